"""The keep-th largest score, and masks of the largest; the reference is `ops.selection`.

A large row is searched by its range (`count_range_kernel`): from the bracket of a sample, one read of the scores counts
what lies above it, at its two ends, and in each of 2^16 (of a single row 2^19) equal parts of it. The part with the
answer is the next range; a part of one key is the answer. If the bracket missed, the next range is all that lies on the
side of the answer, and two more reads find it. Nothing is read once the answer is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops.triton.digits import BLOCK, CONTROLS, NAN, SMALL, Search, descend, key_of, search_digits
from admm_prune.ops.triton.marking import WIDEST_ROW, largest_per_row, marked

_PROGRAMS = 1056  # that share a read of all scores: eight for each of 132 multiprocessors
_MOST_STEPS = 1000  # of such a program: its counters have ten bits
_DIRECT = 1 << 21  # up to here three reads of all scores take less time than a sample
_SAMPLED, _SAMPLE_OF = 1 << 20, 64  # scores sampled for the bracket, at most, and one in how many
_RANGE_BITS, _RANGE_BITS_ALONE = 16, 19  # of the parts of a range, for several rows and for a single one
_READS = 3  # of all scores, at most: the bracket; if it missed or has more keys than parts, two for what is left
_CHUNK = 4096  # parts that one program adds up


@triton.jit
def start_kernel(control, sampled, counts, high_rank, low_rank, most, keep, BITS: tl.constexpr):
    """The bracket of a row, from the two searches of its sample; an end that no rank stands for is the last key."""
    row = tl.program_id(0).to(tl.int64)
    control += row * 16
    _, high, _ = descend(sampled + 2 * row * 16, counts + 2 * row * 2048, keep, 2)
    _, low, _ = descend(sampled + (2 * row + 1) * 16, counts + (2 * row + 1) * 2048, keep, 2)
    high = tl.where(high_rank >= 1, high, 0xFFFFFFFF)
    low = tl.where(low_rank <= most, low, 0)
    field = tl.arange(0, 16)
    tl.store(control + field, tl.where(field == 0, keep, tl.where(field == 11, 1, 0)).to(tl.int64))
    tl.debug_barrier()  # another thread writes some of these fields again
    _set_range(control, low, high, BITS)


@triton.jit
def _set_range(control, low, high, BITS: tl.constexpr):
    """The next range; its keys between the two ends fall into at most 2^BITS parts of 2^shift keys."""
    between = high - low - 1
    shift = (high * 0).to(tl.int64)
    for bit in tl.static_range(BITS, 33):
        shift += (between > (1 << bit)).to(tl.int64)
    tl.store(control + 2, low)
    tl.store(control + 3, high)
    tl.store(control + 4, shift)
    for field in tl.static_range(8, 11):
        tl.store(control + field, shift * 0)


@triton.jit
def count_range_kernel(score, total, control, histogram, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the keys above the range, at its ends, and in each part of it. Programs share the entries of a row."""
    row = tl.program_id(1).to(tl.int64)
    score += row * total
    control += row * 16
    histogram += row << BITS
    if tl.load(control + 7) == 0:
        low = tl.load(control + 2).to(tl.uint32)
        high = tl.load(control + 3).to(tl.uint32)
        shift = tl.load(control + 4).to(tl.uint32)
        counts = tl.zeros((BLOCK,), tl.int32)  # above, at the upper end, at the lower end: ten bits each
        bad = tl.zeros((BLOCK,), tl.int32)
        start = tl.program_id(0).to(tl.int64) * BLOCK
        for first in range(start, total, tl.num_programs(0).to(tl.int64) * BLOCK):
            # One entry after the other in neighbouring threads: in runs of four, the atomics would reorder them.
            place = tl.max_contiguous(first + tl.arange(0, BLOCK), 1)
            there = place < total
            x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
            key = key_of(x)
            bad |= (x != x).to(tl.int32)
            class_of = (key > high).to(tl.int32) + ((key == high).to(tl.int32) << 10)
            class_of += ((key == low) & (low != high)).to(tl.int32) << 20
            counts += tl.where(there, class_of, 0)
            part = ((key - low - 1) >> shift).to(tl.int32)
            # Few keys lie between the ends, and no single one of them is frequent: no two wait for each other often.
            tl.atomic_add(histogram + part, 1, mask=there & (key > low) & (key < high), sem="relaxed")
        tl.atomic_add(control + 8, tl.sum((counts & 1023).to(tl.int64)))
        tl.atomic_add(control + 9, tl.sum(((counts >> 10) & 1023).to(tl.int64)))
        tl.atomic_add(control + 10, tl.sum((counts >> 20).to(tl.int64)))
        tl.atomic_max(control + 5, tl.max(bad).to(tl.int64))


@triton.jit
def add_parts_kernel(control, histogram, sums, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """The number of keys in each chunk of the parts of a range."""
    row = tl.program_id(1).to(tl.int64)
    if tl.load(control + row * 16 + 7) == 0:
        place = (row << BITS) + tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        tl.store(sums + row * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.load(histogram + place).to(tl.int64)))


@triton.jit
def narrow_kernel(control, histogram, sums, BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The next range, or the threshold and the number of keys that equal it."""
    row = tl.program_id(0).to(tl.int64)
    control += row * 16
    if tl.load(control + 7) == 0:
        histogram += row << BITS
        need = tl.load(control)
        low = tl.load(control + 2)
        high = tl.load(control + 3)
        shift = tl.load(control + 4)
        above = tl.load(control + 8) * tl.load(control + 11)
        at_high = tl.load(control + 9)
        at_low = tl.load(control + 10)
        chunks = tl.arange(0, CHUNKS)
        many = tl.load(sums + row * CHUNKS + chunks)
        tl.debug_barrier()  # all threads have read the control block that one of them writes
        between = tl.sum(many)
        tl.store(control + 11, 0)
        if need <= above:  # the bracket is too low
            _set_range(control, high + 1, 0xFFFFFFFF + high * 0, BITS)
        elif need <= above + at_high:
            tl.store(control, need - above)
            tl.store(control + 1, high)
            tl.store(control + 6, at_high)
            tl.store(control + 7, 1)
        elif need > above + at_high + between:
            need -= above + at_high + between
            tl.store(control, need)
            tl.store(control + 1, low)
            tl.store(control + 6, at_low)
            if need <= at_low:
                tl.store(control + 7, 1)
            else:  # the bracket is too high
                tl.store(control, need - at_low)
                _set_range(control, low * 0, low - 1, BITS)
        else:
            need -= above + at_high
            from_top = between - tl.cumsum(many) + many
            chunk = tl.max(tl.where(from_top >= need, chunks, 0))
            need -= tl.sum(tl.where(chunks > chunk, many, 0))
            parts = tl.arange(0, CHUNK)
            counts = tl.load(histogram + chunk * CHUNK + parts).to(tl.int64)
            from_top = tl.sum(counts) - tl.cumsum(counts) + counts
            part = tl.max(tl.where(from_top >= need, parts, 0))
            need -= tl.sum(tl.where(parts > part, counts, 0))
            first = low + 1 + ((chunk * CHUNK + part).to(tl.int64) << shift)
            tl.store(control, need)
            tl.store(control + 1, first)
            tl.store(control + 6, tl.sum(tl.where(parts == part, counts, 0)))
            if shift == 0:
                tl.store(control + 7, 1)
            else:
                _set_range(control, first, tl.minimum(high - 1, first + (1 << shift) - 1), BITS)


@triton.jit
def level_of_kernel(control, counts, level, DIGITS: tl.constexpr):
    """The score that has the key."""
    if DIGITS:
        _, level_key, _ = descend(control, counts, 0, 2)
    else:
        level_key = tl.load(control + 1)
    key = level_key.to(tl.uint32).to(tl.int32, bitcast=True)
    bits = tl.where(key < 0, key ^ -2147483648, ~key)
    tl.store(level, bits.to(tl.float32, bitcast=True))


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def threshold(flat: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep`-th largest of flat (n,), 0-dimensional float32; and whether there was a NaN, on the device."""
    search = _search(flat.contiguous().view(1, -1), keep, direct=_DIRECT)
    level = torch.empty((), dtype=torch.float32, device=flat.device)
    level_of_kernel[(1,)](search.control, search.last_counts, level, DIGITS=search.counts is not None)
    return level, search.control[0, NAN]


def largest(score: Tensor, keep: int, *, direct: int = _DIRECT) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest, 0 < keep < n; and whether there was a NaN, on the device.

    Up to 32768 entries one program takes all of them. Up to `direct` three histograms of all find the threshold. Above
    it a sampled bracket does (Floyd and Rivest, 1975): one read where the bracket has at most 2^19 keys, which it
    nearly always has, and else two; three or four where it missed. One more read writes the mask; parts that would keep
    other ties than were expected, mostly a single one, are read again.
    """
    flat = score.contiguous().view(1, -1)
    if flat.numel() <= min(WIDEST_ROW, direct):
        mask, bad = largest_per_row(flat, keep)
    else:
        mask, bad = marked(flat, _search(flat, keep, direct=direct))
    return mask.view(score.shape), bad


def largest_of_each(rows: Tensor, keep: int, *, direct: int = _DIRECT) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row (n, width) of any width, 0 < keep < width; whether there was a NaN.

    The same launches serve all rows.
    """
    flat = rows.contiguous()
    return marked(flat, _search(flat, keep, direct=direct))


def _search(flat: Tensor, keep: int, *, direct: int) -> Search:
    """The threshold of every row of flat (rows, n)."""
    return search_digits(flat, (keep,)) if flat.shape[1] <= direct else Search(_search_range(flat, keep))


def _search_range(flat: Tensor, keep: int) -> Tensor:
    """The control blocks of all rows, from the bracket of a strided sample of each."""
    matrices, total = flat.shape
    bits = _RANGE_BITS_ALONE if matrices == 1 else _RANGE_BITS
    size = min(max(1, total // (_SAMPLE_OF if total > SMALL else 16)), _SAMPLED)
    sample = flat[:, :: total // size | 1].contiguous()  # an odd stride visits every column of most matrices
    most = sample.shape[1]
    expected = keep / total * most
    margin = 4.0 * (expected * (1 - keep / total)) ** 0.5 + 4.0
    high_rank, low_rank = int(expected - margin) + 1, int(expected + margin) + 1
    sampled = search_digits(sample, (max(1, high_rank), min(most, low_rank)))
    control = torch.empty(matrices, CONTROLS, dtype=torch.int64, device=flat.device)
    start_kernel[(matrices,)](control, sampled.control, sampled.last_counts, high_rank, low_rank, most, keep, BITS=bits)
    histograms = torch.zeros(_READS, matrices, 1 << bits, dtype=torch.int32, device=flat.device)
    chunks = (1 << bits) // _CHUNK
    sums = torch.empty(matrices, chunks, dtype=torch.int64, device=flat.device)
    shared = max(1, -(-_PROGRAMS // matrices), -(-total // (BLOCK * _MOST_STEPS)))
    grid = (min(shared, -(-total // BLOCK)), matrices)
    for histogram in histograms:
        count_range_kernel[grid](flat, total, control, histogram, BITS=bits, BLOCK=BLOCK, num_warps=8)
        add_parts_kernel[(chunks, matrices)](control, histogram, sums, BITS=bits, CHUNK=_CHUNK)
        narrow_kernel[(matrices,)](control, histogram, sums, BITS=bits, CHUNK=_CHUNK, CHUNKS=chunks)
    return control
