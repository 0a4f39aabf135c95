"""Whole groups of columns kept or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from admm_prune.point import Point
from admm_prune.problems.constraints.base import SparseSet, check_sparsity, kept_count, rows_and_width, share_of
from admm_prune.problems.constraints.blocks import Blocks


@dataclass(frozen=True)
class Groups(SparseSet):
    """{V : at most round((1 - sparsity) g) of the g groups of `width` consecutive columns hold a non-zero}.

    The projection keeps the groups of the largest sum metric_i v_i^2. Equal scores: the lower group is kept. A column
    of an output matrix that is zero in every row is an input that can be removed from the model.

    Args:
        width: columns of a group: 1 for a neuron, (query heads of a group) x (head size) for attention.
        keep: where given, the number of groups kept in place of the fraction.

    Raises:
        ValueError: sparsity is not between 0 and 1, a group is empty; a tensor is not a matrix that the groups divide.
    """

    sparsity: float
    width: int = 1
    keep: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.width < 1:
            raise ValueError(f"groups of {self.width} columns are empty")

    @property
    def group_width(self) -> int:
        return self.width

    def budget(self, columns: int) -> int:
        """How many groups a matrix of so many columns may keep."""
        return self.keep if self.keep is not None else kept_count(self.sparsity, columns // self.width)

    def select(self, score: Point) -> Point:
        return score.map(lambda s: self._tiles(s).select(Point(x=s))["x"])

    def tightened(self, fraction: float) -> Self:
        if self.keep is not None:
            raise ValueError("a set with an explicit count cannot be tightened: its fraction is not known")
        return type(self)(self.sparsity * fraction, self.width)

    def share(self, start: int, stop: int, shape: tuple[int, int]) -> Groups:
        return Groups(self.sparsity, self.width, share_of(self.budget(shape[1]), start, stop, shape[1]))

    def contains(self, z: Point) -> bool:
        return all(self._tiles(x).contains(Point(x=x)) for x in z.values())

    def _tiles(self, x: Tensor) -> Blocks:
        """The same set as tiles of the matrix's height."""
        rows, columns = rows_and_width(x, "Groups")
        if columns % self.width:
            raise ValueError(f"groups of {self.width} columns do not divide a matrix of {columns} columns")
        return Blocks(self.sparsity, rows, self.width, self.budget(columns))
