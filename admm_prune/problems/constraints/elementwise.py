"""Elementwise sparse sets: a fraction of all weights, of each row, or N of every M consecutive inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from admm_prune.ops import selection
from admm_prune.point import Point
from admm_prune.problem import Strips
from admm_prune.problems.constraints.base import FractionalSet, SparseSet, rows_and_width, slice_budget
from admm_prune.problems.constraints.product import StackedRows
from admm_prune.prunable import kept_count


@dataclass(frozen=True)
class Unstructured(FractionalSet):
    """{z : nnz(z) <= round((1 - sparsity) n)}: one budget over all n entries of the point.

    Equal scores: the lower index, row-major, names in the point's order, is kept. `keep`, where given, is the number
    of entries kept in place of the fraction.

    Raises:
        ValueError: sparsity is not between 0 and 1.
    """

    sparsity: float
    keep: int | None = None

    def select(self, score: Point) -> Point:
        keep = self._count(score.numel())
        if len(score) == 1:
            return score.map(lambda s: selection.largest(s, keep))
        flat = torch.cat([s.reshape(-1) for s in score.values()])
        parts = selection.largest(flat, keep).split([s.numel() for s in score.values()])
        return Point({name: part.view_as(s) for (name, s), part in zip(score.items(), parts, strict=True)})

    def runs(self, shape: tuple[int, int]) -> tuple[int, int]:
        entries = shape[0] * shape[1]
        return self._count(entries), entries

    def strips(self, shape: tuple[int, int]) -> tuple[Strips]:
        return (Strips(shape[0], 1, 1),)

    def select_each(self, score: Tensor) -> Tensor:
        return selection.largest_of_each(score, self._count(score[0].numel()))

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> Unstructured:
        keep = self._count(shape[0] * shape[1])
        return Unstructured(self.sparsity, keep=slice_budget(keep, start, stop, shape[1]))

    def contains(self, z: Point) -> bool:
        return z.count_nonzero() <= self._count(z.numel())


@dataclass(frozen=True)
class RowWise(FractionalSet):
    """{z : nnz(row i of z) <= k_i}, with sum_i k_i = round((1 - sparsity) out in) for every matrix (out, in).

    All k_i are equal; where the total is not a multiple of the rows, the first rows keep one more. Equal scores: the
    lower column is kept. `keep`, where given, is the number kept in every row in place of the fraction.

    Raises:
        ValueError: sparsity is not between 0 and 1; a tensor is not a matrix.
    """

    sparsity: float
    keep: int | None = None

    def select(self, score: Point) -> Point:
        return score.map(self._select_matrix)

    def runs(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        keep, longer = self._budget(*shape)
        return None if longer else (keep, shape[1])

    def strips(self, shape: tuple[int, int]) -> tuple[Strips]:
        return (Strips(shape[0], 1, 1, span=shape[1]),)

    def select_each(self, score: Tensor) -> Tensor:
        keep, longer = self._budget(*score.shape[1:])
        return super().select_each(score) if longer else selection.largest_per_row(score, keep)

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> StackedRows:
        rows, width = shape
        keep, longer = self._budget(rows, width)
        parts = ((longer, keep + 1), (rows - longer, keep))
        return StackedRows(
            tuple((n, RowWise(self.sparsity, slice_budget(k, start, stop, width))) for n, k in parts if n > 0)
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
        if self.keep is not None or rows == 0:
            return self.keep or 0, 0
        return divmod(kept_count(self.sparsity, rows * width), rows)

    def _row_budgets(self, x: Tensor) -> Tensor:
        keep, longer = self._budget(*rows_and_width(x, "RowWise"))
        return keep + (torch.arange(x.shape[0], device=x.device) < longer).long()


@dataclass(frozen=True)
class NofM(SparseSet):
    """{z : of every M consecutive entries of a row at most N are non-zero}. N is what is *kept*: NofM(2, 4) is "2:4".

    Equal scores: the lower column is kept.

    Raises:
        ValueError: not 1 <= n <= m; a tensor is not a matrix, or m does not divide its width.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"pattern {self.n}:{self.m} must keep from 1 to {self.m} of every {self.m}")

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    @property
    def group_width(self) -> int:
        return self.m

    def runs(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        return None if shape[1] % self.m else (self.n, self.m)

    def strips(self, shape: tuple[int, int]) -> tuple[Strips]:
        return (Strips(shape[0], 1, 1, span=self.m),)

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> NofM:
        return self

    def select(self, score: Point) -> Point:
        return score.map(lambda s: selection.largest_per_group(self._checked(s), self.n, self.m))

    def select_each(self, score: Tensor) -> Tensor:
        return selection.largest_per_group(self._checked(score.flatten(0, 1)), self.n, self.m).view(score.shape)

    def scaled_to(self, fraction: float) -> Self:
        return type(self)(self.m - math.ceil((self.m - self.n) * fraction), self.m)

    def contains(self, z: Point) -> bool:
        return all(
            bool((self._checked(x).unflatten(-1, (-1, self.m)).count_nonzero(dim=-1) <= self.n).all())
            for x in z.values()
        )

    def _checked(self, x: Tensor) -> Tensor:
        _, width = rows_and_width(x, "NofM")
        if width % self.m:
            raise ValueError(f"pattern {self.n}:{self.m} needs a width that {self.m} divides, not {width}")
        return x


FREE = Unstructured(0.0)  # holds every point
