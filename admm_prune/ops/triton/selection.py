"""The keep-th largest score by histograms, and masks of the largest; the reference is `ops.selection`.

Scores become unsigned keys of the same order. A control block of sixteen int64 holds the state of the search of one
row, so that no step waits for the host.

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

# Of the control block: how many of the remaining keys are wanted; the upper bits found, at the end the threshold; the
# range, its ends included; how many low bits the parts of the range leave open; whether the search is done; whether a
# NaN was met; how many keys equal the threshold; keys above the range, at its upper and at its lower end, whether those
# above count, which they do for the bracket only.
NEED, FOUND, LOW, HIGH, SHIFT, NAN, TIES, DONE, ABOVE, AT_HIGH, AT_LOW, FIRST = range(12)
CONTROLS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK, _STEPS = 4096, 16  # entries a program takes at once, and how often
_SMALL_BLOCK, _SMALL = 1024, 1 << 20  # up to here the parts are of this size, or there would be too few of them
_PROGRAMS = 1056  # that share a read of all scores: eight for each of 132 multiprocessors
_MOST_STEPS = 1000  # of such a program: its counters have ten bits
_DIRECT = 1 << 21  # up to here three reads of all scores take less time than a sample
_SAMPLED, _SAMPLE_OF = 1 << 20, 64  # scores sampled for the bracket, at most, and one in how many
_RANGE_BITS, _RANGE_BITS_ALONE = 16, 19  # of the parts of a range, for several rows and for a single one
_READS = 3  # of all scores, at most: the bracket; if it missed or has more keys than parts, two for what is left
_CHUNK = 4096  # parts that one program adds up
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
def start_kernel(control, sampled, high_rank, low_rank, most, keep, BITS: tl.constexpr):
    """The bracket of a row, from the two searches of its sample; an end that no rank stands for is the last key."""
    row = tl.program_id(0).to(tl.int64)
    control += row * 16
    high = tl.load(sampled + 2 * row * 16 + 1)
    low = tl.load(sampled + (2 * row + 1) * 16 + 1)
    high = tl.where(high_rank >= 1, high, 0xFFFFFFFF)
    low = tl.where(low_rank <= most, low, 0)
    field = tl.arange(0, 16)
    tl.store(control + field, tl.where(field == 0, keep, tl.where(field == 11, 1, 0)).to(tl.int64))
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
def ranks_kernel(control, histogram, first, second, SEARCHES: tl.constexpr, BINS: tl.constexpr):
    """Control blocks and cleared bins of searches for one or two ranks of every row."""
    search = tl.program_id(0).to(tl.int64)
    field = tl.arange(0, 16)
    rank = tl.where(search % SEARCHES == 0, first, second)
    tl.store(control + search * 16 + field, tl.where(field == 0, rank, 0).to(tl.int64))
    tl.store(histogram + search * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64))


@triton.jit
def count_kernel(
    score,
    total,
    control,
    histogram,
    SEARCHES: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Counts the keys with the prefix found so far for each value of the next bits; SEARCHES ranks of every row."""
    search = tl.program_id(1).to(tl.int64)
    score += search // SEARCHES * total
    control += search * 16
    histogram += search * BINS
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    prefix = tl.load(control + 1).to(tl.uint32)
    counts = tl.zeros((BINS,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        there = place < total
        x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
        bad |= (x != x).to(tl.int32)
        key = key_of(x)
        if not FIRST:
            there = there & ((key >> (SHIFT + WIDTH)) == prefix)
        digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        counts += tl.histogram(digit, BINS, mask=there)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0)
    if FIRST:
        tl.atomic_max(control + 5, tl.max(bad).to(tl.int64))


@triton.jit
def descend_kernel(control, histogram, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """Determines the next bits: the highest bin at which the counts from the top reach the rank. Clears the bins."""
    control += tl.program_id(0) * 16
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
def mark_kernel(score, total, control, ties, selected, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Keeps the keys above the threshold, and those equal to it if all of them are kept; else counts these by part."""
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    selected += matrix * total
    control += matrix * 16
    ties += matrix * tl.num_programs(0)
    level = tl.load(control + 1).to(tl.uint32)
    all_ties = (tl.load(control + 6) <= tl.load(control)).to(tl.int32)
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    equal = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        there = place < total
        key = key_of(tl.load(score + place, mask=there, other=0.0))
        tie = (key == level).to(tl.int32)
        tl.store(selected + place, ((key > level).to(tl.int32) | (tie & all_ties)).to(tl.uint8), mask=there)
        equal += tl.where(there, tie, 0)
    tl.store(ties + tl.program_id(0), tl.sum(equal).to(tl.int64) * (1 - all_ties))


@triton.jit
def place_ties_kernel(score, total, control, ties, selected, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Keeps the first of the keys that equal the threshold. Only parts that have some are read again.

    `ties` holds the number of them up to the end of each part.
    """
    matrix = tl.program_id(1).to(tl.int64)
    score += matrix * total
    selected += matrix * total
    control += matrix * 16
    ties += matrix * tl.num_programs(0) + tl.program_id(0)
    before = tl.load(ties - 1, mask=tl.program_id(0) > 0, other=0)
    need = tl.load(control)
    if (tl.load(ties) > before) & (before < need):
        level = tl.load(control + 1).to(tl.uint32)
        first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
        for step in range(STEPS):
            place = first + step * BLOCK + tl.arange(0, BLOCK)
            there = place < total
            key = key_of(tl.load(score + place, mask=there, other=0.0))
            tie = (there & (key == level)).to(tl.int32)
            rank = before + tl.cumsum(tie)
            tl.store(selected + place, tie.to(tl.uint8), mask=(tie > 0) & (rank <= need))
            before += tl.sum(tie)


@triton.jit
def level_of_kernel(control, level):
    """The score that has the key found."""
    key = tl.load(control + 1).to(tl.uint32).to(tl.int32, bitcast=True)
    bits = tl.where(key < 0, key ^ -2147483648, ~key)
    tl.store(level, bits.to(tl.float32, bitcast=True))


@triton.jit
def mark_rows_kernel(score, selected, width, keep, bad, BLOCK: tl.constexpr):
    """One row a program: its keep-th largest key by four histograms of eight bits each, then ties by index."""
    columns = tl.arange(0, BLOCK)
    there = columns < width
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(score + place, mask=there, other=0.0).to(tl.float32)
    key = key_of(x)
    level = tl.zeros((1,), tl.uint32)
    need = tl.zeros((1,), tl.int32) + keep
    bins = tl.arange(0, 256)
    for step in tl.static_range(4):
        candidate = there
        if step > 0:
            candidate = there & ((key >> (32 - 8 * step)) == level)
        counts = tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=candidate)
        from_top = tl.sum(counts) - tl.cumsum(counts) + counts
        digit = tl.max(tl.where(from_top >= need, bins, 0))
        need -= tl.sum(tl.where(bins > digit, counts, 0))
        level = (level << 8) + digit.to(tl.uint32)
    tie = (there & (key == level)).to(tl.int32)
    chosen = (there & (key > level)) | ((tie > 0) & (tl.cumsum(tie) <= need))
    tl.store(selected + place, chosen.to(tl.uint8), mask=there)
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
    control = _search(flat.contiguous().view(1, -1), keep)
    level = torch.empty((), dtype=torch.float32, device=flat.device)
    level_of_kernel[(1,)](control, level)
    return level, control[0, NAN]


def largest(score: Tensor, keep: int, *, direct: int = _DIRECT) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest, 0 < keep < n; and whether there was a NaN, on the device.

    Up to `direct` entries three histograms of all of them find the threshold. Above it a sampled bracket does (Floyd
    and Rivest, 1975): one read where the bracket has at most 2^19 keys, which it nearly always has, and else two;
    three or four where it missed. One more read writes the mask, and parts with ties of which some are dropped are read
    again.
    """
    flat = score.contiguous().view(1, -1)
    mask, bad = _marked(flat, _search(flat, keep, direct=direct))
    return mask.view(score.shape), bad


def largest_of_each(rows: Tensor, keep: int, *, direct: int = _DIRECT) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row (n, width) of any width, 0 < keep < width; whether there was a NaN.

    The same launches serve all rows.
    """
    flat = rows.contiguous()
    return _marked(flat, _search(flat, keep, direct=direct))


def _marked(flat: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """The mask, from the control blocks of all rows; whether there was a NaN."""
    matrices, total = flat.shape
    (programs,), part = _parts(total)
    ties = torch.empty(matrices, programs, dtype=torch.int64, device=flat.device)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    mark_kernel[(programs, matrices)](flat, total, control, ties, mask.view(torch.uint8), **part)
    place_ties_kernel[(programs, matrices)](flat, total, control, ties.cumsum(1), mask.view(torch.uint8), **part)
    return mask, control[:, NAN]


def _search(flat: Tensor, keep: int, *, direct: int = _DIRECT) -> Tensor:
    """The control blocks (rows, 16) when the threshold of every row of flat (rows, n) is found."""
    if flat.shape[1] <= direct:
        return _search_digits(flat, (keep,))
    return _search_range(flat, keep)


def _search_digits(flat: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """The thresholds of some ranks of every row, in three reads: control blocks (rows * ranks, 16)."""
    total, searches = flat.shape[1], len(ranks) * len(flat)
    control = torch.empty(searches, CONTROLS, dtype=torch.int64, device=flat.device)
    histogram = torch.empty(searches, _BINS, dtype=torch.int64, device=flat.device)
    ranks_kernel[(searches,)](control, histogram, ranks[0], ranks[-1], SEARCHES=len(ranks), BINS=_BINS)
    (programs,), part = _parts(total)
    for position, (shift, width) in enumerate(_DIGITS):
        count_kernel[(programs, searches)](
            flat,
            total,
            control,
            histogram,
            SEARCHES=len(ranks),
            SHIFT=shift,
            WIDTH=width,
            FIRST=position == 0,
            BINS=1 << width,
            **part,
        )
        descend_kernel[(searches,)](control, histogram, WIDTH=width, BINS=1 << width, num_warps=4)
    return control


def _search_range(flat: Tensor, keep: int) -> Tensor:
    """The control blocks of all rows, from the bracket of a strided sample of each."""
    matrices, total = flat.shape
    bits = _RANGE_BITS_ALONE if matrices == 1 else _RANGE_BITS
    size = min(max(1, total // (_SAMPLE_OF if total > _SMALL else 16)), _SAMPLED)
    sample = flat[:, :: total // size | 1].contiguous()  # an odd stride visits every column of most matrices
    most = sample.shape[1]
    expected = keep / total * most
    margin = 4.0 * (expected * (1 - keep / total)) ** 0.5 + 4.0
    high_rank, low_rank = int(expected - margin) + 1, int(expected + margin) + 1
    sampled = _search_digits(sample, (max(1, high_rank), min(most, low_rank)))
    control = torch.empty(matrices, CONTROLS, dtype=torch.int64, device=flat.device)
    start_kernel[(matrices,)](control, sampled, high_rank, low_rank, most, keep, BITS=bits)
    histograms = torch.zeros(_READS, matrices, 1 << bits, dtype=torch.int32, device=flat.device)
    chunks = (1 << bits) // _CHUNK
    sums = torch.empty(matrices, chunks, dtype=torch.int64, device=flat.device)
    shared = max(1, -(-_PROGRAMS // matrices), -(-total // (_BLOCK * _MOST_STEPS)))
    grid = (min(shared, -(-total // _BLOCK)), matrices)
    for histogram in histograms:
        count_range_kernel[grid](flat, total, control, histogram, BITS=bits, BLOCK=_BLOCK, num_warps=8)
        add_parts_kernel[(chunks, matrices)](control, histogram, sums, BITS=bits, CHUNK=_CHUNK)
        narrow_kernel[(matrices,)](control, histogram, sums, BITS=bits, CHUNK=_CHUNK, CHUNKS=chunks)
    return control


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
