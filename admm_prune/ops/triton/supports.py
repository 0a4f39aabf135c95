"""Scores of weights and bit masks of their supports, in one pass each.

The reference implementations are in `solvers.elsa` and `ops.bits`. A program takes STEPS runs of 256 entries of one
row; a run shares a scale in 8 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops import quantization
from admm_prune.ops.quantization import Stored
from admm_prune.ops.triton.adam import SECOND_STEP, root_of
from admm_prune.ops.triton.places import bit_of, part_of_row, runs_of_row

_RUNS = 4  # of 256 entries, for each program
_BYTES, _BLOCK = 128, 1024


@triton.jit
def score_kernel(
    x_at,
    anchor_at,
    anchor_scale_at,
    bits_at,
    second_at,
    second_scale_at,
    score_at,
    width,
    packed,
    scales,
    lag,
    bonus,
    least,
    ANCHOR: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    FISHER: tl.constexpr,
    SECOND_CODES: tl.constexpr,
    SECOND_STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    """|x + u| sqrt(F), times `bonus` in the support; u is -lag c off it."""
    row, run, column, there, place = runs_of_row(width, STEPS)
    a = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    inside = bit_of(bits_at, row, column, packed, there)
    if ANCHOR:
        c = tl.load(anchor_at + place, mask=there, other=0.0).to(tl.float32)
        if ANCHOR_CODES:
            c *= (tl.load(anchor_scale_at + row * scales + run, mask=run < scales, other=0.0) / 127.0)[:, None]
        a -= tl.where(inside, 0.0, c) * lag
    a = tl.abs(a)
    a = tl.where(inside, a * bonus, a)
    if FISHER:
        if SECOND_CODES:
            scale = tl.load(second_scale_at + row * scales + run, mask=run < scales, other=0.0)
            root = root_of(tl.load(second_at + place, mask=there, other=0), scale[:, None], SECOND_STEP)
        else:
            # `tl.sqrt` of a denormal number is 0 on a GPU.
            root = tl.sqrt_rn(tl.load(second_at + place, mask=there, other=0.0))
        a = a * tl.maximum(root, least)
    tl.store(score_at + place, a, mask=there)


@triton.jit
def pack_kernel(mask_at, bits_at, rows, width, packed, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    position = tl.arange(0, 8)
    column = byte[:, None] * 8 + position[None, :]
    entry = tl.load(mask_at + row * width + column, mask=column < width, other=0).to(tl.int32)
    whole = tl.sum((entry != 0).to(tl.int32) << position[None, :], axis=1)
    tl.store(bits_at + row * packed + byte, whole.to(tl.uint8), mask=byte < packed)


@triton.jit
def unpack_kernel(bits_at, mask_at, width, packed, BLOCK: tl.constexpr):
    row, column, there, place = part_of_row(width, BLOCK)
    tl.store(mask_at + place, bit_of(bits_at, row, column, packed, there).to(tl.uint8), mask=there)


@triton.jit
def restrict_kernel(x_at, bits_at, width, packed, BLOCK: tl.constexpr):
    """x <- M x."""
    row, column, there, place = part_of_row(width, BLOCK)
    x = tl.load(x_at + place, mask=there, other=0.0)
    inside = bit_of(bits_at, row, column, packed, there)
    tl.store(x_at + place, tl.where(inside != 0, x, 0.0), mask=there)  # 0 times inf is not 0


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def scores(
    x: Tensor,
    anchor: Stored | None,
    bits: Tensor,
    second: Stored | None,
    *,
    lag: float,
    bonus: float,
    least: float,
) -> Tensor:
    """|x + u| max(sqrt(F), least), float32, times `bonus` in the support; u = -lag c off it.

    Args:
        bits: the support, packed.
        second: F, or in 8 bits its root; None for F = 1.
    """
    grid, runs, width, scales = _parts(x)
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    score_kernel[grid](
        x,
        x if anchor is None else anchor.values,
        x if anchor is None else _or(anchor.scales, x),
        bits,
        x if second is None else second.values,
        x if second is None else _or(second.scales, x),
        result,
        width,
        bits.shape[-1],
        scales,
        lag,
        bonus,
        least,
        ANCHOR=anchor is not None,
        ANCHOR_CODES=anchor is not None and anchor.scales is not None,
        FISHER=second is not None,
        SECOND_CODES=second is not None and second.scales is not None,
        SECOND_STEP=SECOND_STEP,
        STEPS=runs,
    )
    return result


def _parts(x: Tensor) -> tuple[tuple[int, int], int, int, int]:
    """The grid, runs for each program, the width of a row, and its number of runs."""
    width = x.shape[-1] if x.ndim else 1
    scales = -(-width // quantization.BLOCK)
    runs = min(_RUNS, 1 << (scales - 1).bit_length())
    return (x.numel() // max(1, width), -(-scales // runs)), runs, width, scales


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


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
