"""The digits of scaled float32 matrices, as 8-bit integers.

The reference implementation is `ops.integer_energy.digits`. A program takes a part of one row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops.triton.places import part_of_row

_BLOCK = 1024  # entries of a row that a program takes


@triton.jit
def digits_kernel(
    x_at,
    origin_at,
    row_scale_at,
    column_scale_at,
    into_at,
    stride,
    origin_stride,
    rows,
    width,
    padded,
    ORIGIN: tl.constexpr,
    REVERSED: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, _, _ = part_of_row(width, BLOCK)
    there = (row < rows) & (column < width)
    x = tl.load(x_at + row * stride + column, mask=there, other=0.0).to(tl.float64)
    if ORIGIN:
        x -= tl.load(origin_at + row * origin_stride + column, mask=there, other=0.0).to(tl.float64)
    x *= tl.load(row_scale_at + row, mask=row < rows, other=0.0)
    x *= 64.0 * tl.load(column_scale_at + column, mask=there, other=0.0)
    into_at += row * (DIGITS * padded)
    for k in tl.static_range(DIGITS):
        digit = tl.floor(x + 0.5)
        place = (DIGITS - 1 - k if REVERSED else k) * padded + column
        tl.store(into_at + place, digit.to(tl.int8), mask=column < padded)
        x = (x - digit) * 128.0


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def digits(
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    origin: Tensor | None,
    into: Tensor,
    *,
    padded: int,
    reverse: bool,
) -> Tensor:
    """As the reference, into (padded rows, s padded) int8."""
    x, origin = _by_rows(x), None if origin is None else _by_rows(origin)
    digits_kernel[(len(into), triton.cdiv(padded, _BLOCK))](
        x,
        x if origin is None else origin,
        rows,
        columns,
        into,
        x.stride(0),
        0 if origin is None else origin.stride(0),
        len(x),
        x.shape[1],
        padded,
        ORIGIN=origin is not None,
        REVERSED=reverse,
        DIGITS=into.shape[1] // padded,
        BLOCK=_BLOCK,
    )
    return into


def _by_rows(x: Tensor) -> Tensor:
    """With consecutive columns, as the kernel reads them: solvers return transposed matrices too."""
    return x if x.stride(1) == 1 else x.contiguous()
