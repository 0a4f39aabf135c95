"""What every sparse set here has in common: it is a family of supports, and its projection keeps the best one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from admm_prune.point import Point


class SparseSet(ABC):
    """C = {z : supp(z) is admissible}, closed under scaling of entries by positive numbers.

    A subclass says which support of a point has the largest total score; the projection and membership follow.
    """

    @abstractmethod
    def select(self, score: Point) -> Point:
        """The admissible support of the largest total squared score, as booleans; scores are not negative."""

    def select_each(self, score: Tensor) -> Tensor:
        """The supports of several matrices (matrices, out, in), each of which has the whole of this set."""
        return torch.stack([self.select(Point(weight=one))["weight"] for one in score])

    @property
    def group_width(self) -> int:
        """How many consecutive columns are kept or dropped in view of each other; 1 where there is no such."""
        return 1

    @abstractmethod
    def share(self, start: int, stop: int, shape: tuple[int, int]) -> SparseSet:
        """What falls to the columns start..stop of a matrix of this shape; shares of a partition add up to the set."""

    @abstractmethod
    def tightened(self, fraction: float) -> Self:
        """The set of the same kind that prunes only `fraction` of what this one prunes."""

    @abstractmethod
    def contains(self, z: Point) -> bool:
        """True where the non-zero entries of z fit in an admissible support."""

    def project(self, v: Point, metric: Point | None = None) -> Point:
        """argmin_{z in C} sum_i metric_i (z_i - v_i)^2: keeps v_i on the support of the largest sum metric_i v_i^2.

        Args:
            v: the point to project.
            metric: positive weights of the same shapes, 1 by default.

        Returns:
            A new point with v's dtypes and devices.

        Raises:
            ValueError: v holds NaN, or its shapes do not admit this set.
        """
        score = v.map(torch.abs) if metric is None else v.map(_weighted, metric)
        return v.map(lambda x, kept: x.where(kept, 0), self.select(score))


def _weighted(v: Tensor, metric: Tensor) -> Tensor:
    # |v| sqrt(metric) orders entries as metric v^2 does, and does not underflow where the square would.
    return v.abs().mul_(metric.sqrt())


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError unless 0 <= sparsity <= 1."""
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie between 0 and 1, not {sparsity}")


def kept_count(sparsity: float, total: int) -> int:
    """round((1 - sparsity) * total), halves rounded to even."""
    return round((1.0 - sparsity) * total)


def share_of(keep: int, start: int, stop: int, width: int) -> int:
    """The part of `keep` that falls to columns start..stop of `width`: rounded so that parts add up to the whole."""
    return round(keep * stop / width) - round(keep * start / width)


def rows_and_width(x: Tensor, owner: str) -> tuple[int, int]:
    """The shape of a matrix; raises ValueError for anything else."""
    if x.ndim != 2:
        raise ValueError(f"{owner} is defined for matrices (out, in), not for shape {tuple(x.shape)}")
    return x.shape[0], x.shape[1]
