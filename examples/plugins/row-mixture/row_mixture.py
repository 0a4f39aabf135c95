"""A new sparse set: N:M with an N of its own for every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from admm_prune import NofM, Point, StackedRows, Unstructured
from admm_prune.ops import selection
from admm_prune.problems.constraints import SparseSet


@dataclass(frozen=True)
class RowMixture(SparseSet):
    """{z : row i keeps at most n_i of every M consecutive entries, sum_i n_i <= round((1 - sparsity) rows M)}.

    The n-th largest squared scores of the groups of a row, summed, are what the step n - 1 -> n gains it. They fall
    with n, so that the largest of all steps of all rows make up the best choice of n_i.
    """

    sparsity: float
    m: int = 4

    @property
    def group_width(self) -> int:
        return self.m

    def select(self, score: Point) -> Point:
        return score.map(self._select)

    def contains(self, z: Point) -> bool:
        needed = (x.unflatten(1, (-1, self.m)).count_nonzero(2).amax(1).sum() for x in z.values())
        return all(int(steps) <= self._steps(len(x)) for steps, x in zip(needed, z.values(), strict=True))

    def scaled_to(self, fraction: float) -> Self:
        return type(self)(self.sparsity * fraction, self.m)

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> StackedRows:
        """A row's n_i binds all its columns: who sees some of them only is given the same n_i everywhere."""
        n, more = divmod(self._steps(shape[0]), shape[0])
        parts = ((more, n + 1), (shape[0] - more, n))
        return StackedRows(tuple((r, NofM(k, self.m) if k else Unstructured(1.0)) for r, k in parts if r))

    def _steps(self, rows: int) -> int:
        return round((1 - self.sparsity) * rows * self.m)

    def _select(self, score: Tensor) -> Tensor:
        groups = score.double().unflatten(1, (-1, self.m))
        ranked, order = groups.sort(dim=2, descending=True, stable=True)
        taken = selection.largest(ranked.square().sum(1).sqrt(), self._steps(len(score))).sum(1)
        return (order.argsort(dim=2) < taken[:, None, None]).flatten(1)
