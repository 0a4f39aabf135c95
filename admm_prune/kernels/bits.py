"""Boolean masks at one bit per entry."""

from __future__ import annotations

import torch
from torch import Tensor

_PER_BYTE = 8


def packed_width(width: int) -> int:
    """Bytes for a row of `width` bits."""
    return -(-width // _PER_BYTE)


def pack(mask: Tensor) -> Tensor:
    """(..., n) bool -> (..., ceil(n / 8)) uint8; entry i of a row is bit i mod 8 of byte i div 8.

    Rows are packed one by one, so that a tensor may be cut or sharded between its rows.
    """
    short = -mask.shape[-1] % _PER_BYTE
    whole = torch.nn.functional.pad(mask, (0, short)) if short else mask
    bits = whole.to(torch.uint8).unflatten(-1, (-1, _PER_BYTE))
    packed: Tensor = (bits << _positions(mask.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack(bits: Tensor, width: int) -> Tensor:
    """The inverse of `pack`: (..., ceil(width / 8)) uint8 -> (..., width) bool."""
    entries = (bits.unsqueeze(-1) >> _positions(bits.device)) & 1
    return entries.flatten(-2)[..., :width].bool()


def _positions(device: torch.device) -> Tensor:
    return torch.arange(_PER_BYTE, dtype=torch.uint8, device=device)
