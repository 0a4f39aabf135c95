"""Masks at one bit per entry on the GPU: launches `device_adam`. The twins are those of `kernels.bits`."""

from __future__ import annotations

# A launched kernel takes plain numbers for its constants, and options that are none of its parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
import torch
from torch import Tensor

from admm_prune.kernels.triton import device_adam as device

_BYTES, _BLOCK = 128, 1024


def pack(mask: Tensor, packed: int) -> Tensor:
    width = mask.shape[-1]
    rows = mask.numel() // max(1, width)
    flat = mask.contiguous()
    bits = torch.empty((*mask.shape[:-1], packed), dtype=torch.uint8, device=mask.device)
    pack_kernel[(rows, -(-packed // _BYTES))](flat.view(torch.uint8), bits, rows, width, packed, BYTES=_BYTES)
    return bits


def unpack(bits: Tensor, width: int) -> Tensor:
    mask = torch.empty((*bits.shape[:-1], width), dtype=torch.bool, device=bits.device)
    unpack_kernel[_grid(mask)](bits, mask.view(torch.uint8), width, bits.shape[-1], BLOCK=_BLOCK)
    return mask


def restrict_(x: Tensor, bits: Tensor) -> None:
    restrict_kernel[_grid(x)](x, bits, x.shape[-1], bits.shape[-1], BLOCK=_BLOCK)


def _grid(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // max(1, width), -(-width // _BLOCK)
