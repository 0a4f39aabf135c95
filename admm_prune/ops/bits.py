"""Boolean masks at one bit per entry."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from admm_prune.ops import backend

_PER_BYTE = 8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def packed_width(width: int) -> int:
    """Bytes for a row of `width` bits."""
    return -(-width // _PER_BYTE)


def pack(mask: Tensor) -> Tensor:
    """(..., n) bool -> (..., ceil(n / 8)) uint8; entry i of a row is bit i mod 8 of byte i div 8.

    Rows are packed one by one, so that a tensor may be cut or sharded between its rows.
    """
    if mask.numel() and backend.uses_triton(mask):
        from admm_prune.ops.triton import supports as fused

        return fused.pack(mask, packed_width(mask.shape[-1]))
    short = -mask.shape[-1] % _PER_BYTE
    whole = torch.nn.functional.pad(mask, (0, short)) if short else mask
    bits = whole.to(torch.uint8).unflatten(-1, (-1, _PER_BYTE))
    packed: Tensor = (bits << _positions(mask.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack(bits: Tensor, width: int) -> Tensor:
    """The inverse of `pack`: (..., ceil(width / 8)) uint8 -> (..., width) bool."""
    if bits.numel() and bits.is_contiguous() and backend.uses_triton(bits):
        from admm_prune.ops.triton import supports as fused

        return fused.unpack(bits, width)
    return _entries(bits, torch.bool)[..., :width]


def restrict_(x: Tensor, bits: Tensor) -> None:
    """x <- M x, in place, for x (..., width) and M packed."""
    if x.numel() and x.is_contiguous() and bits.is_contiguous() and backend.uses_triton(x, *_FLOATS):
        from admm_prune.ops.triton import supports as fused

        fused.restrict_(x, bits)
    else:
        x.masked_fill_(_entries(bits.bitwise_not(), torch.bool)[..., : x.shape[-1]], 0)  # 0 times inf is not 0


def _entries(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., n) uint8 -> (..., 8 n), zeros and ones: a byte's eight entries are a row of a table, which is faster than
    shifting bits."""
    rows = _table(dtype, bits.device).index_select(0, bits.flatten().int())
    return rows.view(*bits.shape[:-1], _PER_BYTE * bits.shape[-1])


@lru_cache(maxsize=64)
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the bits of every byte."""
    return ((torch.arange(256, device=device)[:, None] >> torch.arange(_PER_BYTE, device=device)) & 1).to(dtype)


def _positions(device: torch.device) -> Tensor:
    return torch.arange(_PER_BYTE, dtype=torch.uint8, device=device)
