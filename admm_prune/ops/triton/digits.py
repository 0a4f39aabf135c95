"""The order of float scores as integer keys, and thresholds by three histograms of the keys' digits.

Scores become unsigned keys of the same order. A control block of sixteen int64 holds the state of the search of one
row, so that no step waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of the control block: how many of the remaining keys are wanted; the upper bits found, at the end the threshold; the
# range, its ends included; how many low bits the parts of the range leave open; whether a NaN was met; how many keys
# equal the threshold; whether the search is done; keys above the range, at its upper and at its lower end; whether
# those above count, which they do for the bracket only; what is wanted and found after the first and the second digit.
NEED, FOUND, LOW, HIGH, SHIFT, NAN, TIES, DONE, ABOVE, AT_HIGH, AT_LOW, FIRST = range(12)
CONTROLS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, STEPS = 4096, 16  # entries a program takes at once, and how often
_SMALL_BLOCK, SMALL = 1024, 1 << 20  # up to here the parts are smaller, or there would be too few of them
_FEW, _FEW_STEPS = 1 << 14, 4  # from here they are not smaller still: every program reads the counts of all
_LEVELS, _BINS = 3, 1 << 11  # 32 bits in digits of 11, 11 and 10


@triton.jit
def key_of(x):
    """uint32 keys of float scores, in their order; -0 and +0 are one."""
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def descend(control, histogram, rank, LEVEL: tl.constexpr):
    """After digit LEVEL: how many keys are wanted of those with the bits found, these bits, and the number of the keys.

    The digit is the highest bin at which the counts from the top reach what is wanted.
    """
    WIDTH: tl.constexpr = 10 if LEVEL == 2 else 11
    if LEVEL == 0:
        need = rank.to(tl.int64)
        prefix = need * 0
    else:
        need = tl.load(control + 10 + 2 * LEVEL)
        prefix = tl.load(control + 11 + 2 * LEVEL)
    bins = tl.arange(0, 1 << WIDTH)
    counts = tl.load(histogram + bins).to(tl.int64)
    from_top = tl.sum(counts) - tl.cumsum(counts) + counts
    digit = tl.max(tl.where(from_top >= need, bins, 0))
    need -= tl.sum(tl.where(bins > digit, counts, 0))
    return need, (prefix << WIDTH) + digit, tl.sum(tl.where(bins == digit, counts, 0))


@triton.jit
def count_kernel(
    score,
    total,
    control,
    histograms,
    first_rank,
    second_rank,
    SEARCHES: tl.constexpr,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Counts the keys with the bits of the digits before LEVEL for each value of this digit; SEARCHES ranks of every
    row. Every program finds those bits by itself, from the counts of the launch before."""
    WIDTH: tl.constexpr = 10 if LEVEL == 2 else 11
    SHIFT: tl.constexpr = 21 - 11 * LEVEL if LEVEL < 2 else 0
    search = tl.program_id(1).to(tl.int64)
    score += search // SEARCHES * total
    control += search * 16
    if LEVEL > 0:
        rank = tl.where(search % SEARCHES == 0, first_rank, second_rank)
        before = histograms + ((LEVEL - 1) * tl.num_programs(1) + search) * 2048
        need, prefix, _ = descend(control, before, rank, LEVEL - 1)
        if tl.program_id(0) == 0:
            tl.store(control + 10 + 2 * LEVEL, need)
            tl.store(control + 11 + 2 * LEVEL, prefix)
        prefix = prefix.to(tl.uint32)
    histogram = histograms + (LEVEL * tl.num_programs(1) + search) * 2048
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    counts = tl.zeros((1 << WIDTH,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        there = place < total
        x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
        bad |= (x != x).to(tl.int32)
        key = key_of(x)
        if LEVEL > 0:
            there = there & ((key >> (SHIFT + WIDTH)) == prefix)
        digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        counts += tl.histogram(digit, 1 << WIDTH, mask=there)
    bins = tl.arange(0, 1 << WIDTH)
    tl.atomic_add(histogram + bins, counts, mask=counts > 0)
    if LEVEL == 0:
        tl.atomic_max(control + 5, tl.max(bad).to(tl.int64))


@dataclass(frozen=True)
class Search:
    """What a search leaves on the device: control blocks (rows, 16) and, where the last digit is still to be found, the
    counts of the digits (3, rows, 2048)."""

    control: Tensor
    counts: Tensor | None = None

    @property
    def last_counts(self) -> Tensor:
        """Of the last digit, or something in their place."""
        return self.control if self.counts is None else self.counts[-1]


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def search_digits(flat: Tensor, ranks: tuple[int, ...]) -> Search:
    """Thresholds of one or two ranks of every row, in three reads: rows * ranks searches, all but their last digit.

    Rows have fewer than 2^31 entries.
    """
    total, searches = flat.shape[1], len(ranks) * len(flat)
    memory = torch.zeros(searches, CONTROLS + _LEVELS * _BINS // 2, dtype=torch.int64, device=flat.device).view(-1)
    control = memory[: searches * CONTROLS].view(searches, CONTROLS)
    counts = memory[searches * CONTROLS :].view(torch.int32).view(_LEVELS, searches, _BINS)
    programs, part = parts(total)
    for level in range(_LEVELS):
        count_kernel[(programs, searches)](
            flat, total, control, counts, ranks[0], ranks[-1], SEARCHES=len(ranks), LEVEL=level, **part
        )
    return Search(control, counts)


def parts(entries: int) -> tuple[int, dict[str, int]]:
    """The number of programs, and the part of each."""
    block, steps = BLOCK, STEPS
    if entries <= SMALL:
        block, steps = _SMALL_BLOCK, 1 if entries <= _FEW else _FEW_STEPS
    part = {"BLOCK": block, "STEPS": steps, "num_warps": min(8, block // 128)}
    return max(1, -(-entries // (block * steps))), part
