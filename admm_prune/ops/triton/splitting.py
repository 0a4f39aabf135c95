"""The elementwise steps of ADMM between two matrix products, and the split of a factor into two bfloat16 numbers.

The reference implementations are `ops.splitting` and `ops.precision`.
A program takes a part of one row; `rows` share a row of the metric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops.precision import Precision
from admm_prune.ops.triton.digits import key_of
from admm_prune.ops.triton.marking import largest_of_run, power_of_2
from admm_prune.ops.triton.places import part_of_row

_WIDEST = 1024  # entries of a row that a program takes
_LONGEST, _LONGEST_GROUP = 1 << 14, 32  # runs from which one program chooses, and of which it takes many
_FORMS = {"exact": 0, "bfloat16": 1, "bfloat16x3": 3}


@triton.jit
def to_target_kernel(
    z_at,
    d_at,
    offset_at,
    into_at,
    width,
    tau,
    relaxation,
    OFFSET: tl.constexpr,
    FORM: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, there, place = part_of_row(width, BLOCK)
    if STORED:
        tau = tl.load(tau)
    z = tl.load(z_at + place, mask=there)
    d = tl.load(d_at + place, mask=there)
    dual = z * tau
    tl.store(z_at + place, dual + d * (1.0 - relaxation - tau), mask=there)
    target = d * (1.0 + tau) - dual
    if OFFSET:
        target -= tl.load(offset_at + place, mask=there)
    if FORM == 0:
        tl.store(into_at + place, target, mask=there)
    elif FORM == 1:
        tl.store(into_at + place, (_nearest(target) >> 16).to(tl.int16), mask=there)
    else:
        _store_split(target, into_at + row * (3 * width) + column, width, there, False)


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
def _store_split(a, into_at, apart, there, SECOND: tl.constexpr):
    """A1, A1, A2 of the first factor of a product, or A1, A2, A1 of its second one."""
    high = _nearest(a)
    low = (_nearest(a - high.to(tl.float32, bitcast=True)) >> 16).to(tl.int16)
    high = (high >> 16).to(tl.int16)
    tl.store(into_at, high, mask=there)
    tl.store(into_at + apart, low if SECOND else high, mask=there)
    tl.store(into_at + apart + apart, high if SECOND else low, mask=there)  # 2 * apart may exceed 32 bits


@triton.jit
def split_kernel(a_at, into_at, rows, width, step, apart, SECOND: tl.constexpr, BLOCK: tl.constexpr):
    row, column, there, place = part_of_row(width, BLOCK)
    a = tl.load(a_at + place, mask=there, other=0.0)
    into_at += row // rows * 3 * rows * width + row % rows * step + column  # in 64 bits, as the row is
    _store_split(a, into_at, apart, there, SECOND)


@triton.jit
def _scored(z_at, x_at, offset_at, root_at, place, column, there, relaxation, OFFSET: tl.constexpr, ROOT: tl.constexpr):
    """x + offset, z + a x, which is stored, and the root of the metric."""
    x = tl.load(x_at + place, mask=there, other=0.0)
    if OFFSET:
        x += tl.load(offset_at + place, mask=there, other=0.0)
    z = tl.load(z_at + place, mask=there, other=0.0) + relaxation * x
    tl.store(z_at + place, z, mask=there)
    root = tl.load(root_at + column, mask=there, other=0.0) if ROOT else x * 0.0 + 1.0
    return x, z, root


@triton.jit
def _settled(z, x, root, mask, mask_at, d_at, part_at, place, there):
    """Stores d = M z and M, and the partial sums of the measures."""
    before = tl.load(mask_at + place, mask=there, other=0)
    tl.store(mask_at + place, mask.to(tl.uint8), mask=there)
    d = tl.where(mask != 0, z, z * 0.0)  # propagates NaN and Inf off the support
    tl.store(d_at + place, d, mask=there)
    away = (x - d) * root
    d *= root
    tl.store(part_at, tl.sum(((mask != 0) & (before == 0)).to(tl.int32)).to(tl.float32))
    tl.store(part_at + 1, tl.sum((mask != 0).to(tl.int32)).to(tl.float32))
    tl.store(part_at + 2, tl.sum(away * away))
    tl.store(part_at + 3, tl.sum(d * d))


@triton.jit
def choose_groups_kernel(
    z_at,
    x_at,
    offset_at,
    root_at,
    mask_at,
    d_at,
    parts_at,
    rows,
    groups,
    keep,
    relaxation,
    OFFSET: tl.constexpr,
    ROOT: tl.constexpr,
    M: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entry i of a group is kept when fewer than `keep` beat it: larger scores, and equal ones before it."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, PADDED)
    there = (group[:, None] < groups) & (member[None, :] < M)
    column = group[:, None] * M + member[None, :]
    place = row * (groups * M) + column
    root_at += row // rows * (groups * M)
    x, z, root = _scored(z_at, x_at, offset_at, root_at, place, column, there, relaxation, OFFSET, ROOT)
    score = tl.where(there, tl.abs(z * root), float("-inf"))
    mine, other = score[:, :, None], score[:, None, :]
    earlier = member[None, None, :] < member[None, :, None]
    beaten = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), axis=2)
    mask = ((beaten < keep) & there).to(tl.int32)
    part_at = parts_at + (row * tl.num_programs(1) + tl.program_id(1)) * 4
    _settled(z, x, root, mask, mask_at, d_at, part_at, place, there)


@triton.jit
def choose_runs_kernel(
    z_at,
    x_at,
    offset_at,
    root_at,
    mask_at,
    d_at,
    parts_at,
    rows,
    width,
    run,
    keep,
    relaxation,
    OFFSET: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The `keep` largest of a run of consecutive entries: of a part of a row, a row, several rows or all."""
    entry = tl.arange(0, BLOCK)
    there = entry < run
    first = tl.program_id(0).to(tl.int64) * run
    place = first + entry
    column = ((first % width).to(tl.int32) + entry) % width
    root_at += first // width // rows * width
    x, z, root = _scored(z_at, x_at, offset_at, root_at, place, column, there, relaxation, OFFSET, ROOT)
    mask = largest_of_run(key_of(tl.abs(z * root)), there, keep).to(tl.int32)
    _settled(z, x, root, mask, mask_at, d_at, parts_at + tl.program_id(0) * 4, place, there)


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def to_target_(
    z: Tensor, d: Tensor, offset: Tensor | None, tau: float | Tensor, relaxation: float, form: Precision
) -> Tensor:
    grid, block = _parts(z)
    rows, width = z.shape
    copies = _FORMS[form]
    into = torch.empty(rows, width * copies, dtype=torch.bfloat16, device=z.device) if copies else d
    to_target_kernel[grid](
        z,
        d,
        z if offset is None else offset,
        into.view(torch.int16) if copies else d,
        width,
        tau,
        relaxation,
        OFFSET=offset is not None,
        FORM=copies,
        STORED=isinstance(tau, Tensor),
        BLOCK=block,
    )
    return into


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
    return _measured(parts, root)


def choose_(
    z: Tensor,
    x: Tensor,
    offset: Tensor | None,
    root: Tensor | None,
    mask: Tensor,
    d: Tensor,
    runs: tuple[int, int],
    relaxation: float,
) -> Tensor:
    """As `settle`, after the choice of the support."""
    keep, run = runs
    rows, width = z.shape[0] // _problems(root), z.shape[1]
    metric = z if root is None else root
    given = z, x, z if offset is None else offset, metric, mask.view(torch.uint8), d
    known = {"OFFSET": offset is not None, "ROOT": root is not None}
    if run <= _LONGEST_GROUP and width % run == 0:
        padded = power_of_2(run)
        block = max(1, 2048 // padded**2) if padded > 8 else 256
        groups = width // run
        grid = (z.shape[0], -(-groups // block))
        parts = torch.empty((*grid, 4), dtype=torch.float32, device=z.device)
        choose_groups_kernel[grid](
            *given, parts, rows, groups, keep, relaxation, **known, M=run, PADDED=padded, BLOCK=block, num_warps=4
        )
    else:
        block = power_of_2(run)
        parts = torch.empty(z.numel() // run, 4, dtype=torch.float32, device=z.device)
        warps = min(32, max(1, block // 512))
        choose_runs_kernel[(len(parts),)](
            *given, parts, rows, width, run, keep, relaxation, **known, BLOCK=block, num_warps=warps
        )
    return _measured(parts, root)


def chooses(runs: tuple[int, int], entries: int) -> bool:
    """Whether `choose_` takes the k largest of every r entries of a problem's."""
    keep, run = runs
    return 0 < keep < run <= min(entries, _LONGEST) and entries % run == 0


def _measured(parts: Tensor, root: Tensor | None) -> Tensor:
    problems = _problems(root)
    measures = torch.empty(problems, 4, dtype=torch.float64, device=parts.device)
    count = parts.numel() // (4 * problems)
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


def split(a: Tensor, *, second: bool = False, stacked: bool = False) -> Tensor:
    """[A1, A1, A2] (..., m, 3 k) in bfloat16, of a contiguous float32 A (..., m, k), in one pass over memory.

    Args:
        second: [A1, A2, A1], as the second factor of a product meets the first.
        stacked: one above the other (..., 3 m, k).
    """
    rows, width = a.shape[-2:]
    shape = (3 * rows, width) if stacked else (rows, 3 * width)
    into = torch.empty((*a.shape[:-2], *shape), dtype=torch.bfloat16, device=a.device)
    if a.numel():
        block = min(_WIDEST, max(16, 1 << (width - 1).bit_length()))
        step, apart = (width, rows * width) if stacked else (3 * width, width)
        split_kernel[(a.numel() // width, -(-width // block))](
            a, into.view(torch.int16), rows, width, step, apart, SECOND=second, BLOCK=block
        )
    return into
