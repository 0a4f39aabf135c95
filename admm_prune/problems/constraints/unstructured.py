"""At most a given fraction of all weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from admm_prune.kernels import selection
from admm_prune.point import Point
from admm_prune.problems.constraints.base import SparseSet, check_sparsity, kept_count, share_of


@dataclass(frozen=True)
class Unstructured(SparseSet):
    """{z : nnz(z) <= round((1 - sparsity) n)}: one budget over all n entries of the point.

    Equal scores: the lower index, row-major, names in the point's order, is kept. `keep`, where given, is the number
    of entries kept in place of the fraction.

    Raises:
        ValueError: sparsity is not between 0 and 1.
    """

    sparsity: float
    keep: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def select(self, score: Point) -> Point:
        keep = self._count(score)
        if len(score) == 1:
            return score.map(lambda s: selection.largest(s, keep))
        flat = torch.cat([s.reshape(-1) for s in score.values()])
        parts = selection.largest(flat, keep).split([s.numel() for s in score.values()])
        return Point({name: part.view_as(s) for (name, s), part in zip(score.items(), parts, strict=True)})

    def select_each(self, score: Tensor) -> Tensor:
        return selection.largest_of_each(score, self._count(Point(weight=score[0])))

    def tightened(self, fraction: float) -> Self:
        if self.keep is not None:
            raise ValueError("a set with an explicit count cannot be tightened: its fraction is not known")
        return type(self)(self.sparsity * fraction)

    def share(self, start: int, stop: int, shape: tuple[int, int]) -> Unstructured:
        total = self.keep if self.keep is not None else kept_count(self.sparsity, shape[0] * shape[1])
        return Unstructured(self.sparsity, keep=share_of(total, start, stop, shape[1]))

    def contains(self, z: Point) -> bool:
        return z.count_nonzero() <= self._count(z)

    def _count(self, x: Point) -> int:
        return self.keep if self.keep is not None else kept_count(self.sparsity, x.numel())
