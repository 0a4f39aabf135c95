"""Device code: which entries of a matrix a program takes, where the grid is (rows, parts of a row)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_of_row(width, BLOCK: tl.constexpr):
    """BLOCK entries of one row: the row, the columns, which of them there are, and where they lie."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < width, row * width + column


@triton.jit
def runs_of_row(width, STEPS: tl.constexpr):
    """STEPS runs of 256 entries of one row, (STEPS, 256): the row, the runs, and as `part_of_row`."""
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    column = run[:, None] * 256 + tl.arange(0, 256)[None, :]
    return row, run, column, column < width, row * width + column


@triton.jit
def bit_of(bits_at, row, column, packed, there):
    """Whether the entries are in a packed support, whose rows have `packed` bytes."""
    byte = tl.load(bits_at + row * packed + column // 8, mask=there, other=0).to(tl.int32)
    return ((byte >> (column % 8)) & 1) != 0
