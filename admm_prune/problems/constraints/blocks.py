"""Whole rectangular tiles kept or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from admm_prune.kernels import selection
from admm_prune.point import Point
from admm_prune.problems.constraints.base import SparseSet, check_sparsity, kept_count, rows_and_width, share_of


@dataclass(frozen=True)
class Blocks(SparseSet):
    """{z : at most round((1 - sparsity) t) of the t tiles (height, width) of each matrix hold a non-zero}.

    The projection keeps the tiles of the largest sum metric_i v_i^2. Equal scores: the lower tile, row-major, is kept.
    `keep`, where given, is the number of tiles kept in place of the fraction.

    Raises:
        ValueError: sparsity is not between 0 and 1, a tile is empty; a tensor is not a matrix that the tiles divide.
    """

    sparsity: float
    height: int
    width: int
    keep: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.height < 1 or self.width < 1:
            raise ValueError(f"tiles of {self.height} x {self.width} are empty")

    def select(self, score: Point) -> Point:
        return score.map(self._select_matrix)

    def tightened(self, fraction: float) -> Self:
        if self.keep is not None:
            raise ValueError("a set with an explicit count cannot be tightened: its fraction is not known")
        return type(self)(self.sparsity * fraction, self.height, self.width)

    @property
    def group_width(self) -> int:
        return self.width

    def share(self, start: int, stop: int, shape: tuple[int, int]) -> Blocks:
        total = self._keep(shape[0] * shape[1])
        return Blocks(self.sparsity, self.height, self.width, share_of(total, start, stop, shape[1]))

    def contains(self, z: Point) -> bool:
        return all(int(self._tiles(x != 0).any(-1).count_nonzero()) <= self._keep(x.numel()) for x in z.values())

    def _select_matrix(self, score: Tensor) -> Tensor:
        # The score of an entry is |v| sqrt(metric): its square adds up over a tile. Dividing by the largest keeps the
        # square of a tiny score from vanishing.
        largest = score.amax().clamp_min(1e-300 if score.element_size() == 8 else 1e-37)
        tiles = self._tiles((score / largest).double()).square().sum(-1)
        kept = selection.largest(tiles, self._keep(score.numel()))
        return _spread(kept, self.height, self.width)

    def _tiles(self, x: Tensor) -> Tensor:
        """(out, in) -> (out / height, in / width, height * width)."""
        rows, columns = rows_and_width(x, "Blocks")
        if rows % self.height or columns % self.width:
            raise ValueError(f"tiles of {self.height} x {self.width} do not divide a matrix of {rows} x {columns}")
        grid = x.reshape(rows // self.height, self.height, columns // self.width, self.width)
        return grid.transpose(1, 2).flatten(-2)

    def _keep(self, entries: int) -> int:
        return self.keep if self.keep is not None else kept_count(self.sparsity, entries // (self.height * self.width))


def _spread(kept: Tensor, height: int, width: int) -> Tensor:
    """(out / height, in / width) -> (out, in): each entry fills its tile."""
    return kept[:, None, :, None].expand(-1, height, -1, width).reshape(kept.shape[0] * height, kept.shape[1] * width)
