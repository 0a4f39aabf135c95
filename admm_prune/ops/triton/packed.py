"""y = x W^T for up to 16 tokens and a packed W, whose mask and values are streamed once; the reference is `ops.packed`.

A program multiplies 16 rows. For every block of columns it loads the bytes of the mask; prefix sums of their numbers of
set bits give the place of every value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops.packed import Packed

MOST_TOKENS = 16
_ROWS, _OCTETS = 16, 16  # rows of a program, bytes of the mask of a row at once


@triton.jit
def ones_of(x):
    """The number of set bits of integers below 256."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


@triton.jit
def linear_kernel(
    x,
    packed_bits,
    values,
    offsets,
    scales,
    out,
    tokens,
    rows,
    width,
    octets,
    groups,
    group,
    per_byte,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ROWS i to ROWS (i + 1) - 1 of y for all tokens, in float32 sums."""
    BLOCK: tl.constexpr = OCTETS * 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    place = row.to(tl.int64)
    if EVEN:  # noqa: SIM108  # Triton evaluates both arms of an expression
        start = place * octets * per_byte
    else:
        start = tl.load(offsets + row, mask=there, other=0).to(tl.int64)
    token = tl.arange(0, TOKENS)
    single = tl.zeros((ROWS, BLOCK), tl.float32)
    several = tl.zeros((ROWS, TOKENS), tl.float32)
    bit = tl.arange(0, 8)[None, None, :]
    for first in range(0, octets, OCTETS):
        octet = first + tl.arange(0, OCTETS)
        inside = there[:, None] & (octet < octets)[None, :]
        byte = tl.load(packed_bits + place[:, None] * octets + octet[None, :], mask=inside, other=0).to(tl.int32)
        count = ones_of(byte)
        before = start[:, None] + (tl.cumsum(count, axis=1) - count)
        start += tl.sum(count, axis=1)
        below = ones_of(byte[:, :, None] & ((1 << bit) - 1))
        marked = ((byte[:, :, None] >> bit) & 1) != 0
        index = tl.reshape(before[:, :, None] + below, (ROWS, BLOCK))
        w = tl.load(values + index, mask=tl.reshape(marked, (ROWS, BLOCK)), other=0)
        column = first * 8 + tl.arange(0, BLOCK)
        if SCALED:
            there_too = there[:, None] & (column < width)[None, :]
            factor = scales + place[:, None] * groups + (column // group)[None, :]
            w = w.to(tl.float32) * tl.load(factor, mask=there_too, other=0.0)
        if ONE:
            inputs = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
            single += w.to(tl.float32) * inputs[None, :]
        else:
            present = (token < tokens)[None, :] & (column < width)[:, None]
            inputs = tl.load(x + token[None, :] * width + column[:, None], mask=present, other=0.0)
            several += tl.dot(w.to(tl.float32), inputs.to(tl.float32), input_precision=PRECISION)
    if ONE:
        y = tl.sum(single, axis=1)
        tl.store(out + row, y.to(out.dtype.element_ty), mask=there)
    else:
        y_place = out + token[None, :] * rows + row[:, None]
        mask = there[:, None] & (token < tokens)[None, :]
        tl.store(y_place, several.to(out.dtype.element_ty), mask=mask)


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def linear(x: Tensor, matrix: Packed) -> Tensor:
    """y (tokens, rows) of x (tokens, width), contiguous, 1 <= tokens <= 16, in the dtype of x."""
    tokens, octets = x.shape[0], matrix.bits.shape[1]
    out = torch.empty(tokens, matrix.rows, dtype=x.dtype, device=x.device)
    offsets, scales = matrix.offsets, matrix.scales
    # TF32 holds every number of 16 bits, so that the products are exact.
    precision = "ieee" if torch.float32 in (x.dtype, matrix.values.dtype) or scales is not None else "tf32"
    linear_kernel[(triton.cdiv(matrix.rows, _ROWS),)](
        x,
        matrix.bits,
        matrix.values,
        matrix.bits if offsets is None else offsets,
        matrix.bits if scales is None else scales,
        out,
        tokens,
        matrix.rows,
        matrix.width,
        octets,
        1 if scales is None else scales.shape[1],
        matrix.group,
        0 if offsets is not None else matrix.values.numel() // matrix.bits.numel(),
        EVEN=offsets is None,
        SCALED=scales is not None,
        ONE=tokens == 1,
        ROWS=_ROWS,
        OCTETS=_OCTETS,
        TOKENS=16,
        PRECISION=precision,
    )
    return out
