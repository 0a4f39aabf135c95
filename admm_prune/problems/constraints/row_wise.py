"""The same number of weights in every output row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from admm_prune.kernels import selection
from admm_prune.point import Point
from admm_prune.problems.constraints.base import SparseSet, check_sparsity, kept_count, rows_and_width, share_of
from admm_prune.problems.constraints.product import StackedRows


@dataclass(frozen=True)
class RowWise(SparseSet):
    """{z : nnz(row i of z) <= k_i}, with sum_i k_i = round((1 - sparsity) out in) for every matrix (out, in).

    All k_i are equal; where the total is not a multiple of the rows, the first rows keep one more. Equal scores: the
    lower column is kept. `keep`, where given, is the number kept in every row in place of the fraction.

    Raises:
        ValueError: sparsity is not between 0 and 1; a tensor is not a matrix.
    """

    sparsity: float
    keep: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def select(self, score: Point) -> Point:
        return score.map(self._select_matrix)

    def select_each(self, score: Tensor) -> Tensor:
        keep, longer = self._budget(*score.shape[1:])
        return super().select_each(score) if longer else selection.largest_per_row(score, keep)

    def tightened(self, fraction: float) -> Self:
        if self.keep is not None:
            raise ValueError("a set with an explicit count cannot be tightened: its fraction is not known")
        return type(self)(self.sparsity * fraction)

    def share(self, start: int, stop: int, shape: tuple[int, int]) -> StackedRows:
        rows, width = shape
        keep, longer = self._budget(rows, width)
        parts = ((longer, keep + 1), (rows - longer, keep))
        return StackedRows(
            tuple((n, RowWise(self.sparsity, share_of(k, start, stop, width))) for n, k in parts if n > 0)
        )

    def contains(self, z: Point) -> bool:
        return all(bool((x.count_nonzero(dim=1) <= self._row_budgets(x)).all()) for x in z.values())

    def _select_matrix(self, score: Tensor) -> Tensor:
        keep, longer = self._budget(*rows_and_width(score, "RowWise"))
        if longer == 0:
            return selection.largest_per_row(score, keep)
        head, tail = score[:longer], score[longer:]
        return torch.cat([selection.largest_per_row(head, keep + 1), selection.largest_per_row(tail, keep)])

    def _budget(self, rows: int, width: int) -> tuple[int, int]:
        """(k, r): every row keeps k, the first r rows k + 1."""
        if self.keep is not None:
            return self.keep, 0
        return divmod(kept_count(self.sparsity, rows * width), rows)

    def _row_budgets(self, x: Tensor) -> Tensor:
        keep, longer = self._budget(*rows_and_width(x, "RowWise"))
        return keep + (torch.arange(x.shape[0], device=x.device) < longer).long()
