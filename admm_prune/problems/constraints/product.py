"""Products of constraints: one for each tensor of a point, or one for each group of rows of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from math import lcm
from typing import Self

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import StripConstraint, Strips
from admm_prune.problems.constraints.base import SparseSet, rows_and_width


@dataclass(frozen=True)
class Product(SparseSet):
    """C = C_1 x ... x C_n: each named tensor in its own set.

    Raises:
        ValueError: a point names a tensor that no factor names, or misses one.
    """

    factors: Mapping[str, SparseSet]

    @property
    def group_width(self) -> int:
        return lcm(*(factor.group_width for factor in self.factors.values()))

    def select(self, score: Point) -> Point:
        return Point({name: factor.select(Point({name: s}))[name] for name, factor, s in self._pairs(score)})

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> Product:
        return Product({name: factor.column_slice(start, stop, shape) for name, factor in self.factors.items()})

    def scaled_to(self, fraction: float) -> Self:
        return type(self)({name: factor.scaled_to(fraction) for name, factor in self.factors.items()})

    def contains(self, z: Point) -> bool:
        return all(factor.contains(Point({name: x})) for name, factor, x in self._pairs(z))

    def _pairs(self, x: Point) -> list[tuple[str, SparseSet, Tensor]]:
        if x.keys() != self.factors.keys():
            raise ValueError(f"the product is over {sorted(self.factors)}, the point names {sorted(x)}")
        return [(name, self.factors[name], tensor) for name, tensor in x.items()]


@dataclass(frozen=True)
class StackedRows(SparseSet):
    """Each group of consecutive rows of every matrix in its own set: weights that share their inputs, stacked.

    Args:
        parts: (number of rows, set) from the top; the numbers add up to the rows of the matrix.

    Raises:
        ValueError: there is no part, or one of fewer than 1 row; a tensor is no matrix, or has another number of rows.
    """

    parts: tuple[tuple[int, SparseSet], ...]

    def __post_init__(self) -> None:
        if not self.parts or min(rows for rows, _ in self.parts) < 1:
            raise ValueError(f"stacked sets are at least one, each of at least 1 row, not {self.parts}")

    def select(self, score: Point) -> Point:
        pieces = self._split(score)
        if len(score) == 1:
            return score.map(self._select_matrix)
        masks = [part.select(piece) for part, piece in pieces]
        return Point({name: torch.cat([mask[name] for mask in masks]) for name in score})

    def _select_matrix(self, score: Tensor) -> Tensor:
        """Neighbours of one size and set in one selection."""
        masks: list[Tensor] = []
        start = 0
        for (rows, part), alike in groupby(self.parts):
            count = len(list(alike))
            pieces = score[start : start + count * rows].view(count, rows, score.shape[1])
            if count > 1 and isinstance(part, SparseSet):
                masks.append(part.select_each(pieces).flatten(0, 1))
            else:
                masks += [part.select(Point(weight=piece))["weight"] for piece in pieces]
            start += count * rows
        return torch.cat(masks) if len(masks) > 1 else masks[0]

    def select_each(self, score: Tensor) -> Tensor:
        return type(self)(self.parts * len(score))._select_matrix(score.flatten(0, 1)).view(score.shape)

    def runs(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Those of every part, where they are the same."""
        first, *others = {part.runs((rows, shape[1])) for rows, part in self.parts}
        return None if others else first

    def strips(self, shape: tuple[int, int]) -> tuple[Strips, ...] | None:
        """Those of all parts, where each has some."""
        strips: list[Strips] = []
        for rows, part in self.parts:
            those = part.strips((rows, shape[1])) if isinstance(part, StripConstraint) else None
            if those is None:
                return None
            strips += those
        return tuple(strips)

    @property
    def group_width(self) -> int:
        return lcm(*(part.group_width for _, part in self.parts))

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> StackedRows:
        return StackedRows(tuple((rows, part.column_slice(start, stop, (rows, shape[1]))) for rows, part in self.parts))

    def scaled_to(self, fraction: float) -> Self:
        return type(self)(tuple((rows, part.scaled_to(fraction)) for rows, part in self.parts))

    def contains(self, z: Point) -> bool:
        return all(part.contains(piece) for part, piece in self._split(z))

    def _split(self, x: Point) -> list[tuple[SparseSet, Point]]:
        sizes = [rows for rows, _ in self.parts]
        for name, tensor in x.items():
            rows, _ = rows_and_width(tensor, "StackedRows")
            if rows != sum(sizes):
                raise ValueError(f"stacked sets cover {sum(sizes)} rows, {name} has {rows}")
        pieces = {name: tensor.split(sizes) for name, tensor in x.items()}
        return [(part, Point({name: pieces[name][i] for name in x})) for i, (_, part) in enumerate(self.parts)]
