"""The elementwise steps of ADMM between two matrix products, and the split of a factor into two bfloat16 numbers.

The reference implementations are `ops.splitting` and `ops.precision`.
A program takes a part of one row; `rows` share a row of the metric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops.triton.places import part_of_row

_WIDEST = 1024  # entries of a row that a program takes


@triton.jit
def to_target_kernel(z_at, d_at, offset_at, width, tau, relaxation, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    _row, _column, there, place = part_of_row(width, BLOCK)
    z = tl.load(z_at + place, mask=there)
    d = tl.load(d_at + place, mask=there)
    dual = z * tau
    tl.store(z_at + place, dual + d * (1.0 - relaxation - tau), mask=there)
    target = d * (1.0 + tau) - dual
    if OFFSET:
        target -= tl.load(offset_at + place, mask=there)
    tl.store(d_at + place, target, mask=there)


@triton.jit
def relax_kernel(
    z_at,
    x_at,
    offset_at,
    root_at,
    score_at,
    rows,
    width,
    relaxation,
    OFFSET: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, there, place = part_of_row(width, BLOCK)
    x = tl.load(x_at + place, mask=there)
    if OFFSET:
        x += tl.load(offset_at + place, mask=there)
        tl.store(x_at + place, x, mask=there)
    z = tl.load(z_at + place, mask=there) + relaxation * x
    tl.store(z_at + place, z, mask=there)
    score = z
    if ROOT:
        score = z * tl.load(root_at + (row // rows) * width + column, mask=there)
    tl.store(score_at + place, tl.abs(score), mask=there)


@triton.jit
def settle_kernel(
    z_at,
    mask_at,
    before_at,
    d_at,
    x_at,
    root_at,
    parts_at,
    rows,
    width,
    CHANGES: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, there, place = part_of_row(width, BLOCK)
    mask = tl.load(mask_at + place, mask=there, other=0)
    z = tl.load(z_at + place, mask=there, other=0.0)
    d = tl.where(mask != 0, z, z * 0.0)  # propagates NaN and Inf off the support
    tl.store(d_at + place, d, mask=there)
    away = tl.load(x_at + place, mask=there, other=0.0) - d
    if ROOT:
        root = tl.load(root_at + (row // rows) * width + column, mask=there, other=0.0)
        away *= root
        d *= root
    part = parts_at + (row * tl.num_programs(1) + tl.program_id(1)) * 4
    if CHANGES:
        before = tl.load(before_at + place, mask=there, other=0)
        tl.store(part, tl.sum(((mask != 0) & (before == 0)).to(tl.int32)).to(tl.float32))
        tl.store(part + 1, tl.sum((mask != 0).to(tl.int32)).to(tl.float32))
    else:
        tl.store(part, 0.0)
        tl.store(part + 1, 0.0)
    tl.store(part + 2, tl.sum(away * away))
    tl.store(part + 3, tl.sum(d * d))


@triton.jit
def measure_kernel(parts_at, measures_at, parts, BLOCK: tl.constexpr):
    """Adds up the parts of each problem in float64, in one order: counts, and the roots of the sums of squares."""
    problem = tl.program_id(0).to(tl.int64)
    field = tl.arange(0, 4)
    total = tl.zeros((BLOCK, 4), tl.float64)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        place = (problem * parts + part)[:, None] * 4 + field[None, :]
        total += tl.load(parts_at + place, mask=(part < parts)[:, None], other=0.0).to(tl.float64)
    sums = tl.sum(total, axis=0)
    tl.store(measures_at + problem * 4 + field, tl.where(field < 2, sums, tl.sqrt(sums)))


@triton.jit
def _nearest(x):
    """The bits of the nearest bfloat16 number, as a float32; of two equally near ones that with an even last bit."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded, 0x7FC00000)


@triton.jit
def split_kernel(a_at, into_at, width, BLOCK: tl.constexpr):
    row, column, there, place = part_of_row(width, BLOCK)
    a = tl.load(a_at + place, mask=there, other=0.0)
    high = _nearest(a)
    low = _nearest(a - high.to(tl.float32, bitcast=True))
    into_at += row * (3 * width) + column
    tl.store(into_at, (high >> 16).to(tl.int16), mask=there)
    tl.store(into_at + width, (high >> 16).to(tl.int16), mask=there)
    tl.store(into_at + 2 * width, (low >> 16).to(tl.int16), mask=there)


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def to_target_(z: Tensor, d: Tensor, offset: Tensor | None, tau: float, relaxation: float) -> None:
    grid, block = _parts(z)
    to_target_kernel[grid](
        z, d, z if offset is None else offset, z.shape[1], tau, relaxation, OFFSET=offset is not None, BLOCK=block
    )


def relax_(z: Tensor, x: Tensor, offset: Tensor | None, root: Tensor | None, score: Tensor, relaxation: float) -> None:
    grid, block = _parts(z)
    relax_kernel[grid](
        z,
        x,
        z if offset is None else offset,
        z if root is None else root,
        score,
        z.shape[0] // _problems(root),
        z.shape[1],
        relaxation,
        OFFSET=offset is not None,
        ROOT=root is not None,
        BLOCK=block,
    )


def settle(z: Tensor, mask: Tensor, before: Tensor | None, d: Tensor, x: Tensor, root: Tensor | None) -> Tensor:
    """Partial sums of the programs are added up in float64, in one order: no atomics, the same bits every time."""
    grid, block = _parts(z)
    parts = torch.empty((*grid, 4), dtype=torch.float32, device=z.device)
    settle_kernel[grid](
        z,
        mask.view(torch.uint8),
        (mask if before is None else before).view(torch.uint8),
        d,
        x,
        z if root is None else root,
        parts,
        z.shape[0] // _problems(root),
        z.shape[1],
        CHANGES=before is not None,
        ROOT=root is not None,
        BLOCK=block,
    )
    problems = _problems(root)
    measures = torch.empty(problems, 4, dtype=torch.float64, device=z.device)
    count = grid[0] * grid[1] // problems
    block = min(2048, max(32, 1 << (count - 1).bit_length()))
    measure_kernel[(problems,)](parts, measures, count, BLOCK=block, num_warps=max(1, min(8, block // 128)))
    return measures if root is not None and root.ndim == 2 else measures[0]


def _problems(root: Tensor | None) -> int:
    """The number of stacked problems: each has a row of the metric."""
    return len(root) if root is not None and root.ndim == 2 else 1


def _parts(x: Tensor) -> tuple[tuple[int, int], int]:
    rows, width = x.shape
    block = min(_WIDEST, max(16, 1 << (width - 1).bit_length()))
    return (rows, -(-width // block)), block


def split(a: Tensor) -> Tensor:
    """[A1, A1, A2] (..., m, 3 k) in bfloat16, of a contiguous float32 A (..., m, k), in one pass over memory."""
    width = a.shape[-1]
    into = torch.empty((*a.shape[:-1], 3 * width), dtype=torch.bfloat16, device=a.device)
    if a.numel():
        block = min(_WIDEST, max(16, 1 << (width - 1).bit_length()))
        split_kernel[(a.numel() // width, -(-width // block))](a, into.view(torch.int16), width, BLOCK=block)
    return into
