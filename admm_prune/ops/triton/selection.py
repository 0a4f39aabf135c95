"""The keep-th largest score by radix histograms, and masks of the largest; the reference is `ops.selection`.

Scores become unsigned keys of the same order. A control block of eight int64 holds the state of the search, so that no
step waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of the control block: how many of the remaining keys are wanted; the upper bits found; candidates gathered; keys above
# the bracket; whether the candidates failed; whether a NaN was met; how many keys equal the threshold.
NEED, FOUND, GATHERED, ABOVE, FAILED, NAN, TIES = 0, 1, 2, 3, 4, 5, 6
CONTROLS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK, _STEPS = 4096, 16  # entries a program takes at once, and how often
_SMALL_BLOCK, _SMALL = 1024, 1 << 20  # up to here the parts are of this size, or there would be too few of them
_DIRECT = 1 << 25  # up to here histograms of all scores cost less than a bracket
_SAMPLED = 1 << 20  # scores sampled to guess where the threshold lies
_DIGITS = ((21, 11), (10, 11), (0, 10))  # shift and width: 32 bits in three passes
_BINS = 1 << 11


@triton.jit
def key_of(x):
    """uint32 keys of float scores, in their order; -0 and +0 are one."""
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def gather_kernel(score, total, bracket, candidates, capacity, control, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Counts what lies above the bracket, and gathers the keys inside it, in any order."""
    low = key_of(tl.load(bracket))
    high = key_of(tl.load(bracket + 1))
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    above = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        there = place < total
        x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
        key = key_of(x)
        over = there & (key > high)
        inside = (there & (key >= low) & (key <= high)).to(tl.int32)
        above += over.to(tl.int32)
        bad += (x != x).to(tl.int32)
        start = tl.atomic_add(control + 2, tl.sum(inside).to(tl.int64))
        slot = start + tl.cumsum(inside) - 1
        tl.store(candidates + slot, key.to(tl.int32, bitcast=True), mask=(inside > 0) & (slot < capacity))
    tl.atomic_add(control + 3, tl.sum(above).to(tl.int64))
    tl.atomic_max(control + 5, tl.max(bad).to(tl.int64))


@triton.jit
def check_bracket_kernel(control, keep, capacity):
    """Whether the answer is among the candidates; if not, all keys are searched."""
    count = tl.load(control + 2)
    need = keep - tl.load(control + 3)
    good = (need >= 1) & (need <= count) & (count <= capacity)
    tl.store(control, tl.where(good, need, keep))
    tl.store(control + 4, tl.where(good, 0, 1).to(tl.int64))


@triton.jit
def count_kernel(
    score,
    total,
    candidates,
    control,
    histogram,
    ALL: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Counts the keys with the prefix found so far for each value of the next bits."""
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    control += matrix * 8
    histogram += matrix * BINS
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    limit = total
    if not ALL:
        limit = tl.load(control + 2)
    searched = (tl.load(control + 4) != 0) == ALL
    if searched & (first < limit):
        prefix = tl.load(control + 1).to(tl.uint32)
        counts = tl.zeros((BINS,), tl.int32)
        bad = tl.zeros((BLOCK,), tl.int32)
        for step in range(STEPS):
            place = first + step * BLOCK + tl.arange(0, BLOCK)
            there = place < limit
            if ALL:
                x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
                bad += (x != x).to(tl.int32)
                key = key_of(x)
            else:
                key = tl.load(candidates + place, mask=there, other=0).to(tl.uint32, bitcast=True)
            if not FIRST:
                there = there & ((key >> (SHIFT + WIDTH)) == prefix)
            digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
            counts += tl.histogram(digit, BINS, mask=there)
        bins = tl.arange(0, BINS)
        tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0)
        if ALL:
            tl.atomic_max(control + 5, tl.max(bad).to(tl.int64))


@triton.jit
def descend_kernel(control, histogram, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """Determines the next bits: the highest bin at which the counts from the top reach the rank. Clears the bins."""
    control += tl.program_id(0) * 8
    histogram += tl.program_id(0) * BINS
    need = tl.load(control)
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    from_top = tl.sum(counts) - tl.cumsum(counts) + counts
    digit = tl.max(tl.where(from_top >= need, bins, 0))
    above = tl.sum(tl.where(bins > digit, counts, 0))
    tl.store(control, need - above)
    tl.store(control + 6, tl.sum(tl.where(bins == digit, counts, 0)))
    tl.store(control + 1, (tl.load(control + 1) << WIDTH) + digit)
    tl.store(histogram + bins, tl.zeros((BINS,), tl.int64))


@triton.jit
def count_ties_kernel(score, total, control, ties, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Keys equal to the threshold in each program's part; nothing where all of them are kept."""
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    control += matrix * 8
    ties += matrix * tl.num_programs(0)
    if tl.load(control + 6) > tl.load(control):
        level = tl.load(control + 1).to(tl.uint32)
        first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
        equal = tl.zeros((BLOCK,), tl.int32)
        for step in range(STEPS):
            place = first + step * BLOCK + tl.arange(0, BLOCK)
            there = place < total
            key = key_of(tl.load(score + place, mask=there, other=0.0))
            equal += (there & (key == level)).to(tl.int32)
        tl.store(ties + tl.program_id(0), tl.sum(equal).to(tl.int64))


@triton.jit
def mark_kernel(score, total, control, ties_before, selected, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Keeps the keys above the threshold, and of those equal to it the first ones."""
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    selected += matrix * total
    control += matrix * 8
    ties_before += matrix * tl.num_programs(0)
    need = tl.load(control)
    level = tl.load(control + 1).to(tl.uint32)
    all_ties = tl.load(control + 6) <= need
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    before = tl.load(ties_before + tl.program_id(0))
    for step in range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        there = place < total
        key = key_of(tl.load(score + place, mask=there, other=0.0))
        if all_ties:
            tl.store(selected + place, (key >= level).to(tl.uint8), mask=there)
        else:
            tie = (there & (key == level)).to(tl.int32)
            rank = before + tl.cumsum(tie)
            tl.store(selected + place, ((key > level) | ((tie > 0) & (rank <= need))).to(tl.uint8), mask=there)
            before += tl.sum(tie)


@triton.jit
def level_of_kernel(control, level):
    """The score that has the key found."""
    key = tl.load(control + 1).to(tl.uint32).to(tl.int32, bitcast=True)
    bits = tl.where(key < 0, key ^ -2147483648, ~key)
    tl.store(level, bits.to(tl.float32, bitcast=True))


@triton.jit
def mark_rows_kernel(score, selected, width, keep, bad, BLOCK: tl.constexpr):
    """One row a program: its keep-th largest key bit by bit, then ties by index."""
    columns = tl.arange(0, BLOCK)
    there = columns < width
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
    key = key_of(x)
    level = tl.zeros((1,), tl.uint32)
    one = tl.full((1,), 1, tl.uint32)
    for step in range(32):
        trial = level | (one << (31 - step))
        reaching = tl.sum((there & (key >= trial)).to(tl.int32))
        level = tl.where(reaching >= keep, trial, level)
    greater = there & (key > level)
    tie = (there & (key == level)).to(tl.int32)
    missing = keep - tl.sum(greater.to(tl.int32))
    tl.store(selected + place, (greater | ((tie > 0) & (tl.cumsum(tie) <= missing))).to(tl.uint8), mask=there)
    wrong = tl.max((x != x).to(tl.int32))
    if wrong > 0:
        tl.atomic_max(bad, wrong.to(tl.int64))


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
    wrong = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    if wrong > 0:
        tl.atomic_max(bad, wrong.to(tl.int64))


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def threshold(flat: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep`-th largest of flat (n,), 0-dimensional float32; and whether there was a NaN, on the device."""
    control = _search(flat.contiguous().view(1, -1), keep, direct=_DIRECT)
    level = torch.empty((), dtype=torch.float32, device=flat.device)
    level_of_kernel[(1,)](control, level)
    return level, control[0, NAN]


def largest(score: Tensor, keep: int, *, direct: int = _DIRECT) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest, 0 < keep < n; and whether there was a NaN, on the device.

    Up to `direct` entries three histogram passes find the threshold, above it one pass that gathers what lies in a
    sampled bracket (Floyd and Rivest, 1975), and histograms of that; one more writes the mask. If the bracket misses,
    the histograms cover everything.
    """
    flat = score.contiguous().view(1, -1)
    mask, bad = _marked(flat, _search(flat, keep, direct=direct))
    return mask.view(score.shape), bad


def largest_of_each(rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row (n, width) of any width, 0 < keep < width; whether there was a NaN.

    The same launches serve all rows.
    """
    flat = rows.contiguous()
    return _marked(flat, _search(flat, keep, direct=flat.shape[1]))


def _marked(flat: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """The mask, from the control blocks of all rows; whether there was a NaN."""
    matrices, total = flat.shape
    (programs,), part = _parts(total)
    ties = torch.zeros(matrices, programs, dtype=torch.int64, device=flat.device)
    count_ties_kernel[(programs, matrices)](flat, total, control, ties, **part)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    before = ties.cumsum(1) - ties
    mark_kernel[(programs, matrices)](flat, total, control, before, mask.view(torch.uint8), **part)
    return mask, control[:, NAN].amax()


def _search(flat: Tensor, keep: int, *, direct: int) -> Tensor:
    """The control blocks (rows, 8) when all bits of the threshold of every row of flat (rows, n) are found.

    A bracket is sampled for a single row alone.
    """
    matrices, total = flat.shape
    control = torch.zeros(matrices, CONTROLS, dtype=torch.int64, device=flat.device)
    histogram = torch.zeros(matrices, _BINS, dtype=torch.int64, device=flat.device)
    if total <= direct:
        control[:, NEED].fill_(keep)
        control[:, FAILED].fill_(1)
        candidates = histogram  # not read
        sources: tuple[tuple[bool, int], ...] = ((True, total),)
    else:
        candidates = _bracket_candidates(flat[0], keep, control)
        sources = ((False, len(candidates)), (True, total))
    for position, (shift, width) in enumerate(_DIGITS):
        for everything, entries in sources:
            (programs,), part = _parts(entries)
            count_kernel[(programs, matrices)](
                flat,
                total,
                candidates,
                control,
                histogram,
                ALL=everything,
                SHIFT=shift,
                WIDTH=width,
                FIRST=position == 0,
                BINS=1 << width,
                **part,
            )
        descend_kernel[(matrices,)](control, histogram, WIDTH=width, BINS=1 << width, num_warps=4)
    return control


def _bracket_candidates(flat: Tensor, keep: int, control: Tensor) -> Tensor:
    """The keys of a bracket that almost surely contains the threshold; `control` records whether it does."""
    total = flat.numel()
    size = min(total // 16, _SAMPLED)
    sample = flat[:: total // size | 1].float().sort(descending=True).values
    expected = keep / total * len(sample)
    margin = 4.0 * (expected * (1 - keep / total)) ** 0.5 + 4.0
    high_rank, low_rank = int(expected - margin) + 1, int(expected + margin) + 1
    high = sample[high_rank - 1] if high_rank >= 1 else sample.new_full((), torch.inf)
    low = sample[low_rank - 1] if low_rank <= len(sample) else sample.new_full((), -torch.inf)
    fraction = (min(low_rank, len(sample)) - max(high_rank, 0)) / len(sample)
    capacity = min(total, int(1.5 * fraction * total) + _BLOCK)
    candidates = torch.empty(capacity, dtype=torch.int32, device=flat.device)
    grid, part = _parts(total)
    gather_kernel[grid](flat, total, torch.stack([low, high]), candidates, capacity, control, **part)
    check_bracket_kernel[(1,)](control, keep, capacity)
    return candidates


def _parts(entries: int) -> tuple[tuple[int], dict[str, int]]:
    """The number of programs, and the part of each."""
    block, steps = (_SMALL_BLOCK, 1) if entries <= _SMALL else (_BLOCK, _STEPS)
    part = {"BLOCK": block, "STEPS": steps, "num_warps": min(8, block // 128)}
    return (max(1, -(-entries // (block * steps))),), part


def largest_per_row(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row of up to 32768 entries, 0 < keep < width; whether there was a NaN."""
    rows = score.contiguous()
    width = rows.shape[-1]
    mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    bad = torch.zeros((), dtype=torch.int64, device=rows.device)
    block = _power_of_2(width)
    if rows.numel():
        mark_rows_kernel[(rows.numel() // width,)](
            rows, mask.view(torch.uint8), width, keep, bad, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return mask, bad


def largest_per_group(score: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every `group` <= 32 consecutive entries; whether there was a NaN."""
    flat = score.contiguous()
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    bad = torch.zeros((), dtype=torch.int64, device=flat.device)
    padded = _power_of_2(group)
    block = max(1, 2048 // padded**2) if padded > 8 else 256
    groups = flat.numel() // group
    if groups:
        mark_groups_kernel[(-(-groups // block),)](
            flat, mask.view(torch.uint8), groups, keep, bad, M=group, PADDED=padded, BLOCK=block, num_warps=4
        )
    return mask, bad


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
