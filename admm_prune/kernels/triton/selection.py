"""Selection on the GPU: launches `device_selection`. The twin is `kernels.selection`, whose rules these keep.

Nothing here waits for the device: counts, ranks and whether a guess held stay on it.
"""

from __future__ import annotations

# A launched kernel takes plain numbers for its constants, and options that are none of its parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
import torch
from torch import Tensor

from admm_prune.kernels.triton import device_selection as device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCK, _STEPS = 4096, 16  # entries a program takes at once, and how often
_SMALL_BLOCK, _SMALL = 1024, 1 << 20  # up to here the parts are of this size, or there would be too few of them
_DIRECT = 1 << 25  # up to here histograms of all scores cost less than a bracket
_SAMPLED = 1 << 20  # scores sampled to guess where the threshold lies
_DIGITS = ((21, 11), (10, 11), (0, 10))  # shift and width: 32 bits in three passes
_BINS = 1 << 11


def threshold(flat: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep`-th largest of flat (n,), 0-dimensional float32; and whether there was a NaN, on the device."""
    control = _search(flat.contiguous().view(1, -1), keep, direct=_DIRECT)
    level = torch.empty((), dtype=torch.float32, device=flat.device)
    level_of_kernel[(1,)](control, level)
    return level, control[0, NAN]


def largest(score: Tensor, keep: int, *, direct: int = _DIRECT) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest, 0 < keep < n; and whether there was a NaN, on the device.

    Up to `direct` entries three histogram passes find the threshold, above it one pass that gathers what lies in a
    sampled bracket (Floyd and Rivest, 1975), and histograms of that; one more writes the mask. If the sample misled,
    the histograms are taken of everything.
    """
    flat = score.contiguous().view(1, -1)
    kept, bad = _marked(flat, _search(flat, keep, direct=direct))
    return kept.view(score.shape), bad


def largest_of_each(rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row (n, width) of any width, 0 < keep < width; whether there was a NaN.

    The same launches serve all rows.
    """
    flat = rows.contiguous()
    return _marked(flat, _search(flat, keep, direct=flat.shape[1]))


def _marked(flat: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """The mask, from what was found of every row; whether there was a NaN."""
    matrices, total = flat.shape
    (programs,), part = _parts(total)
    ties = torch.zeros(matrices, programs, dtype=torch.int64, device=flat.device)
    count_ties_kernel[(programs, matrices)](flat, total, control, ties, **part)
    kept = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    before = ties.cumsum(1) - ties
    mark_kernel[(programs, matrices)](flat, total, control, before, kept.view(torch.uint8), **part)
    return kept, control[:, NAN].amax()


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
        candidates = _gathered(flat[0], keep, control)
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


def _gathered(flat: Tensor, keep: int, control: Tensor) -> Tensor:
    """The keys of a bracket that holds the threshold almost surely; `control` knows whether it does."""
    total = flat.numel()
    size = min(total // 16, _SAMPLED)
    sample = flat[:: total // size | 1].float().sort(descending=True).values
    expected = keep / total * len(sample)
    margin = 4.0 * (expected * (1 - keep / total)) ** 0.5 + 4.0
    high_rank, low_rank = int(expected - margin) + 1, int(expected + margin) + 1
    high = sample[high_rank - 1] if high_rank >= 1 else sample.new_full((), torch.inf)
    low = sample[low_rank - 1] if low_rank <= len(sample) else sample.new_full((), -torch.inf)
    share = (min(low_rank, len(sample)) - max(high_rank, 0)) / len(sample)
    capacity = min(total, int(1.5 * share * total) + _BLOCK)
    candidates = torch.empty(capacity, dtype=torch.int32, device=flat.device)
    grid, part = _parts(total)
    gather_kernel[grid](flat, total, torch.stack([low, high]), candidates, capacity, control, **part)
    judge_kernel[(1,)](control, keep, capacity)
    return candidates


def _parts(entries: int) -> tuple[tuple[int], dict[str, int]]:
    """How many programs, and what each takes."""
    block, steps = (_SMALL_BLOCK, 1) if entries <= _SMALL else (_BLOCK, _STEPS)
    part = {"BLOCK": block, "STEPS": steps, "num_warps": min(8, block // 128)}
    return (max(1, -(-entries // (block * steps))),), part


def largest_per_row(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every row of up to 32768 entries, 0 < keep < width; whether there was a NaN."""
    rows = score.contiguous()
    width = rows.shape[-1]
    kept = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    bad = torch.zeros((), dtype=torch.int64, device=rows.device)
    block = _power_of_2(width)
    if rows.numel():
        mark_rows_kernel[(rows.numel() // width,)](
            rows, kept.view(torch.uint8), width, keep, bad, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return kept, bad


def largest_per_group(score: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """Marks the `keep` largest of every `group` <= 32 consecutive entries; whether there was a NaN."""
    flat = score.contiguous()
    kept = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    bad = torch.zeros((), dtype=torch.int64, device=flat.device)
    padded = _power_of_2(group)
    block = max(1, 2048 // padded**2) if padded > 8 else 256
    groups = flat.numel() // group
    if groups:
        mark_groups_kernel[(-(-groups // block),)](
            flat, kept.view(torch.uint8), groups, keep, bad, M=group, PADDED=padded, BLOCK=block, num_warps=4
        )
    return kept, bad


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
