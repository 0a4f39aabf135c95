"""The largest of scores in several pieces, in one process or in many: only counts are exchanged.

Non-negative float32 numbers order as their bits do. Four passes over the keys, eight bits each from the top, find the
keep-th largest exactly: a pass counts the keys that agree with the bits found so far by their next eight, the counts
are added up over all processes, and the bin where they reach `keep` determines those bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_INFINITY = 0x7F800000  # the bits of the largest number that is not NaN
_SHIFTS = (23, 15, 7, -1)  # of 31 bits, the sign left out: 8 + 8 + 8 + 7
_BINS = 256


class Exchange(Protocol):
    """Collective communication. All processes call with tensors of one shape, in the same order."""

    def all_reduce(self, counts: Tensor) -> Tensor:
        """The sum of `counts` over the processes."""
        ...

    def before(self, counts: Tensor) -> Tensor:
        """The sum of `counts` over the processes of lower rank."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    def all_reduce(self, counts: Tensor) -> Tensor:
        return counts

    def before(self, counts: Tensor) -> Tensor:
        return torch.zeros_like(counts)


@dataclass(frozen=True)
class Budget:
    """`keep` of all the entries of `pieces` in this and the other processes; each piece of any shape, in float32."""

    pieces: Sequence[Tensor]
    keep: int


def largest(budgets: Sequence[Budget], exchange: Exchange) -> list[list[Tensor]]:
    """Marks the largest entries of every budget: boolean masks of the pieces' shapes, exactly `keep` of them in all.

    Equal scores: those of the lower rank, then of the earlier piece, then of the lower index are kept. The passes of
    all budgets are communicated together: 1 KiB per budget and pass (2 KiB from 2^31 entries), and one count at the
    end.

    Raises:
        ValueError: a score is negative or NaN; in every process alike.
    """
    keys = [[piece.reshape(-1).view(torch.int32) for piece in budget.pieces] for budget in budgets]
    device = keys[0][0].device
    sizes = torch.tensor([sum(map(torch.numel, pieces)) for pieces in keys], dtype=torch.int64, device=device)
    wrong = sum(int(((key < 0) | (key > _INFINITY)).any()) for pieces in keys for key in pieces)
    totals = exchange.all_reduce(torch.cat([sizes, sizes.new_tensor([wrong])])).tolist()
    if totals.pop():
        raise ValueError("scores contain NaN or negative numbers: there is no largest")
    counted = torch.int64 if max(totals) >= 1 << 31 else torch.int32
    needs = [min(max(budget.keep, 0), total) for budget, total in zip(budgets, totals, strict=True)]
    thresholds = [0] * len(budgets)  # the upper bits of the threshold
    for level, shift in enumerate(_SHIFTS):
        counts = torch.stack([_counts(pieces, thresholds[i], level, shift) for i, pieces in enumerate(keys)])
        above = exchange.all_reduce(counts.to(counted)).to(torch.int64).flip(-1).cumsum(-1).cpu()
        for i, need in enumerate(needs):
            if need == 0:
                continue
            down = int(torch.searchsorted(above[i], need))  # bins from the top
            needs[i] -= int(above[i, down - 1]) if down else 0
            thresholds[i] = (thresholds[i] << (8 if shift >= 0 else 7)) + _BINS - 1 - down
    return _marked(keys, budgets, thresholds, needs, exchange)


def _counts(pieces: Sequence[Tensor], prefix: int, level: int, shift: int) -> Tensor:
    """The number of keys with this prefix for each value of the next bits."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=pieces[0].device)
    for key in pieces:
        candidates = key if level == 0 else key[(key >> _SHIFTS[level - 1]) == prefix]
        bins = (candidates >> shift) & 0xFF if shift >= 0 else candidates & 0x7F
        counts += torch.bincount(bins, minlength=_BINS)
    return counts


def _marked(
    keys: Sequence[Sequence[Tensor]],
    budgets: Sequence[Budget],
    thresholds: Sequence[int],
    needs: Sequence[int],
    exchange: Exchange,
) -> list[list[Tensor]]:
    """Everything above the thresholds, and of what equals them the first `needs`."""
    ties = [[key == threshold for key in pieces] for pieces, threshold in zip(keys, thresholds, strict=True)]
    local_ties = torch.tensor(
        [sum(int(torch.count_nonzero(tie)) for tie in pieces) for pieces in ties], device=keys[0][0].device
    )
    before = exchange.before(local_ties).tolist()
    masks = []
    for i, budget in enumerate(budgets):
        left = max(0, needs[i] - before[i])
        marked = []
        for piece, key, tie in zip(budget.pieces, keys[i], ties[i], strict=True):
            mask = key > thresholds[i] if needs[i] else torch.zeros_like(tie)
            taken = tie.nonzero()[:left, 0]
            mask[taken] = True
            left -= len(taken)
            marked.append(mask.view(piece.shape))
        masks.append(marked)
    return masks
