"""Masks of the largest scores: from a threshold, of rows, and of small groups.

The reference is `ops.selection`. Of equal scores the first are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops.triton.digits import NAN, Search, descend, key_of, parts

WIDEST_ROW = 1 << 15  # entries of a row that one program takes
_SUMMED = 1024  # parts whose ties each program adds up by itself


@triton.jit
def mark_kernel(
    score,
    total,
    control,
    counts,
    ties,
    selected,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Keeps the keys above the threshold, and counts those equal to it by part.

    Of `need` of them that are kept, the first, this part is expected to have as many as if they were spread evenly: it
    keeps all of its own, or none.
    """
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    selected += matrix * total
    control += matrix * 16
    ties += matrix * tl.num_programs(0)
    if DIGITS:
        need, level, many = descend(control, counts + matrix * 2048, 0, 2)
        if tl.program_id(0) == 0:
            tl.store(control, need)
            tl.store(control + 1, level)
            tl.store(control + 6, many)
    else:
        need, level, many = tl.load(control), tl.load(control + 1), tl.load(control + 6)
    level = level.to(tl.uint32)
    keeps_ties = keeps_ties_of_part(need, many)
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    equal = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        there = place < total
        key = key_of(tl.load(score + place, mask=there, other=0.0))
        tie = (key == level).to(tl.int32)
        tl.store(selected + place, ((key > level).to(tl.int32) | (tie & keeps_ties)).to(tl.uint8), mask=there)
        equal += tl.where(there, tie, 0)
    tl.store(ties + tl.program_id(0), tl.sum(equal).to(tl.int64))


@triton.jit
def keeps_ties_of_part(need, many):
    """Whether the part ends before the last tie that is kept, if ties are spread evenly: 1 or 0."""
    return ((tl.program_id(0) + 1) * many <= need * tl.num_programs(0)).to(tl.int32)


@triton.jit
def place_ties_kernel(
    score,
    total,
    control,
    ties,
    selected,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Keeps the first of the keys that equal the threshold. Only parts of which that is not so are read again.

    Args:
        ties: the number of them in each part, if PARTS is not 0; else up to the end of each part.
    """
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    selected += matrix * total
    control += matrix * 16
    ties += matrix * tl.num_programs(0)
    if PARTS > 0:
        part = tl.arange(0, PARTS)
        before = tl.sum(tl.load(ties + part, mask=part < tl.program_id(0), other=0))
        count = tl.load(ties + tl.program_id(0))
    else:
        before = tl.load(ties + tl.program_id(0) - 1, mask=tl.program_id(0) > 0, other=0)
        count = tl.load(ties + tl.program_id(0)) - before
    need = tl.load(control)
    target_count = tl.minimum(count, tl.maximum(need - before, 0))
    if target_count != count * keeps_ties_of_part(need, tl.load(control + 6)):
        level = tl.load(control + 1).to(tl.uint32)
        first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
        for step in range(STEPS):
            place = first + step * BLOCK + tl.arange(0, BLOCK)
            there = place < total
            key = key_of(tl.load(score + place, mask=there, other=0.0))
            tie = (there & (key == level)).to(tl.int32)
            rank = before + tl.cumsum(tie)
            tl.store(selected + place, (rank <= need).to(tl.uint8), mask=tie > 0)
            before += tl.sum(tie)


@triton.jit
def largest_of_run(key, there, keep):
    """The `keep` largest of the keys of a program, the first of equal ones.

    The bits of the threshold are set from the top, each where as many keys reach it. A count needs few registers,
    unlike a histogram.
    """
    level = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reaching = tl.sum((there & (key >= (level | bit))).to(tl.int32))
        level = tl.where(reaching >= keep, level | bit, level)
        bit = bit >> 1
    above = there & (key > level)
    tie = (there & (key == level)).to(tl.int32)
    return above | ((tie > 0) & (tl.cumsum(tie) <= keep - tl.sum(above.to(tl.int32))))


@triton.jit
def mark_rows_kernel(score, selected, width, keep, bad, BLOCK: tl.constexpr):
    """One row a program."""
    columns = tl.arange(0, BLOCK)
    there = columns < width
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
    chosen = largest_of_run(key_of(x), there, keep)
    tl.store(selected + place, chosen.to(tl.uint8), mask=there)
    tl.store(bad + tl.program_id(0), tl.max((x != x).to(tl.int32)).to(tl.uint8))


@triton.jit
def mark_groups_kernel(score, selected, groups, keep, bad, M: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Entry i of a group is kept when fewer than `keep` beat it: larger ones, and equal ones before it."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    there = (group[:, None] < groups) & (column[None, :] < M)
    place = group[:, None] * M + column[None, :]
    x = tl.load(score + place, mask=there, other=float("-inf")).to(tl.float32)
    mine, other = x[:, :, None], x[:, None, :]
    earlier = column[None, None, :] < column[None, :, None]
    beats = (other > mine) | ((other == mine) & earlier)
    beaten = tl.sum(beats.to(tl.int32), axis=2)
    tl.store(selected + place, (beaten < keep).to(tl.uint8), mask=there)
    tl.store(bad + tl.program_id(0), tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0).to(tl.uint8))


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def marked(flat: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    """The masks of all rows of flat (rows, n); in which rows there was a NaN."""
    matrices, total = flat.shape
    programs, part = parts(total)
    ties = torch.empty(matrices, programs, dtype=torch.int64, device=flat.device)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    grid, control, selected = (programs, matrices), search.control, mask.view(torch.uint8)
    digits = search.counts is not None
    mark_kernel[grid](flat, total, control, search.last_counts, ties, selected, DIGITS=digits, **part)
    few = programs <= _SUMMED
    before = ties if few else ties.cumsum(1)
    summed = max(16, power_of_2(programs)) if few else 0
    place_ties_kernel[grid](flat, total, control, before, selected, PARTS=summed, **part)
    return mask, control[:, NAN]


def largest_per_row(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row of up to 32768 entries, 0 < keep < width; where there was a NaN."""
    rows = score.contiguous()
    width = rows.shape[-1]
    mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    programs = rows.numel() // width
    bad = torch.empty(programs, dtype=torch.bool, device=rows.device)
    block = power_of_2(width)
    if programs:
        warps = min(32, max(1, block // 512))
        mark_rows_kernel[(programs,)](
            rows, mask.view(torch.uint8), width, keep, bad.view(torch.uint8), BLOCK=block, num_warps=warps
        )
    return mask, bad


def largest_per_group(score: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every `group` <= 32 consecutive entries; where there was a NaN."""
    flat = score.contiguous()
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    padded = power_of_2(group)
    block = max(1, 2048 // padded**2) if padded > 8 else 256
    groups = flat.numel() // group
    programs = -(-groups // block)
    bad = torch.empty(programs, dtype=torch.bool, device=flat.device)
    if programs:
        mark_groups_kernel[(programs,)](
            flat,
            mask.view(torch.uint8),
            groups,
            keep,
            bad.view(torch.uint8),
            M=group,
            PADDED=padded,
            BLOCK=block,
            num_warps=4,
        )
    return mask, bad


def power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
