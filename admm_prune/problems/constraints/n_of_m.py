"""N kept of every M consecutive inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from admm_prune.kernels import selection
from admm_prune.point import Point
from admm_prune.problems.constraints.base import SparseSet, rows_and_width


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

    def share(self, start: int, stop: int, shape: tuple[int, int]) -> NofM:
        return self

    def select(self, score: Point) -> Point:
        return score.map(lambda s: selection.largest_per_group(self._checked(s), self.n, self.m))

    def select_each(self, score: Tensor) -> Tensor:
        return selection.largest_per_group(self._checked(score.flatten(0, 1)), self.n, self.m).view(score.shape)

    def tightened(self, fraction: float) -> Self:
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
