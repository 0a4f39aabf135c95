"""Sparse sets of blocks of consecutive weights, and of whole column groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.ops import selection
from admm_prune.point import Point
from admm_prune.problem import Strips
from admm_prune.problems.constraints.base import FractionalSet, rows_and_width, slice_budget

_NARROW = 1e-140  # relative to the largest score: above it, squares lie in the range of float64


@dataclass(frozen=True)
class Blocks(FractionalSet):
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
        super().__post_init__()
        if self.height < 1 or self.width < 1:
            raise ValueError(f"tiles of {self.height} x {self.width} are empty")

    def select(self, score: Point) -> Point:
        return score.map(self._select_matrix)

    @property
    def group_width(self) -> int:
        return self.width

    def strips(self, shape: tuple[int, int]) -> tuple[Strips]:
        return (Strips(shape[0], self.height, self.width),)

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> Blocks:
        total = self._keep(shape[0] * shape[1])
        return Blocks(self.sparsity, self.height, self.width, slice_budget(total, start, stop, shape[1]))

    def contains(self, z: Point) -> bool:
        return all(int(self._tiles(x != 0).any(-1).count_nonzero()) <= self._keep(x.numel()) for x in z.values())

    def _select_matrix(self, score: Tensor) -> Tensor:
        mask = selection.largest(_totals(self._tiles(score)), self._keep(score.numel()))
        return _spread(mask, self.height, self.width)

    def _tiles(self, x: Tensor) -> Tensor:
        """(out, in) -> (out / height, in / width, height * width)."""
        rows, columns = rows_and_width(x, "Blocks")
        if rows % self.height or columns % self.width:
            raise ValueError(f"tiles of {self.height} x {self.width} do not divide a matrix of {rows} x {columns}")
        grid = x.reshape(rows // self.height, self.height, columns // self.width, self.width)
        return grid.transpose(1, 2).flatten(-2)

    def _keep(self, entries: int) -> int:
        return self._count(entries // (self.height * self.width))


def _totals(tiles: Tensor) -> Tensor:
    """Numbers (...,) that order tiles of scores (..., k) as their sums of squares do, in float64."""
    if tiles.dtype is not torch.float64:
        return tiles.double().square_().sum(-1)  # the squares of float32 numbers are exact in float64
    finite = tiles.masked_fill(tiles.isinf(), 0)
    peaks = finite.amax(-1, keepdim=True)
    largest = peaks.amax()
    if not bool(((peaks > 0) & (peaks < largest * _NARROW)).any()):
        return (tiles / _power_below(largest)).square_().sum(-1)
    # The squares are out of range: norms of the tiles, each divided by its own largest entry, scaled against overflow.
    scale = _power_below(peaks)
    return (tiles / scale).square_().sum(-1).sqrt_() * (scale[..., 0] / tiles.shape[-1])


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two not above x, at most 2^1022 and at least 2^-1022; so that dividing by it is exact."""
    exponent = (torch.frexp(x).exponent - 1).clamp(-1022, 1022).to(x)
    half = (exponent / 2).floor()
    return half.exp2() * (exponent - half).exp2()


def _spread(mask: Tensor, height: int, width: int) -> Tensor:
    """(out / height, in / width) -> (out, in): each entry fills its tile."""
    return mask[:, None, :, None].expand(-1, height, -1, width).reshape(mask.shape[0] * height, mask.shape[1] * width)


@dataclass(frozen=True)
class Groups(FractionalSet):
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
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"groups of {self.width} columns are empty")

    @property
    def group_width(self) -> int:
        return self.width

    def budget(self, columns: int) -> int:
        """The number of groups that a matrix with `columns` columns may keep."""
        return self._count(columns // self.width)

    def select(self, score: Point) -> Point:
        return score.map(lambda s: self._tiles(s).select(Point(x=s))["x"])

    def strips(self, shape: tuple[int, int]) -> tuple[Strips]:
        return (Strips(shape[0], shape[0], self.width),)

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> Groups:
        return Groups(self.sparsity, self.width, slice_budget(self.budget(shape[1]), start, stop, shape[1]))

    def contains(self, z: Point) -> bool:
        return all(self._tiles(x).contains(Point(x=x)) for x in z.values())

    def _tiles(self, x: Tensor) -> Blocks:
        """The same set as tiles of the matrix's height."""
        rows, columns = rows_and_width(x, "Groups")
        if columns % self.width:
            raise ValueError(f"groups of {self.width} columns do not divide a matrix of {columns} columns")
        return Blocks(self.sparsity, max(1, rows), self.width, self.budget(columns))
