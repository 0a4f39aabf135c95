"""The base of all constraint sets: a family of supports, whose projection keeps the best one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.prunable import kept_count


class SparseSet(ABC):
    """C = {z : supp(z) is admissible}, closed under scaling of entries by positive numbers.

    A subclass selects the support with the largest total score; projection and membership follow.
    """

    @abstractmethod
    def select(self, score: Point) -> Point:
        """The admissible support of the largest total squared score, as booleans.

        Scores are not negative; an infinite one is larger than every sum of finite ones.

        Raises:
            ValueError: a score is NaN; the shapes do not admit this set.
        """

    def select_each(self, score: Tensor) -> Tensor:
        """The supports of several matrices (matrices, out, in), each under the whole constraint."""
        return torch.stack([self.select(Point(weight=one))["weight"] for one in score])

    @property
    def group_width(self) -> int:
        """The number of consecutive columns whose selection depends on each other; 1 if they are independent."""
        return 1

    def runs(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """(k, r) where `select` keeps the k largest of every r consecutive entries of a matrix, row-major, and of equal
        ones the first; None where it does something else for this shape."""
        return None

    @abstractmethod
    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> SparseSet:
        """The constraint on the columns start..stop of a matrix of this shape; the budgets of a partition add up."""

    @abstractmethod
    def scaled_to(self, fraction: float) -> Self:
        """The set of the same kind that prunes only `fraction` of what this one prunes."""

    @abstractmethod
    def contains(self, z: Point) -> bool:
        """True where the non-zero entries of z fit in an admissible support."""

    def project(self, v: Point, metric: Point | None = None) -> Point:
        """argmin_{z in C} sum_i metric_i (z_i - v_i)^2: keeps v_i on the support of the largest sum metric_i v_i^2.

        Products metric_i v_i^2 are compared without overflow or underflow, whatever the dtypes: as |v_i| sqrt(metric_i)
        in float32 or, where an input is float64 or float32 has not the range, in float64. In float64, scores smaller
        than 2^-2000 times the largest count as zero.

        Args:
            v: the point to project. An infinite entry has an infinite score, whatever the metric.
            metric: positive weights of the same shapes, 1 by default; an entry of weight 0 is the first to be dropped.

        Returns:
            A new point with v's dtypes and devices.

        Raises:
            ValueError: v contains NaN, the metric NaN or a negative number, or the shapes do not admit this set.
        """
        if any(x.numel() and bool(torch.isnan(x.amax())) for x in v.values()):
            raise ValueError("the point contains NaN: there is no closest point")
        if metric is not None and not all(bool(m.amin() >= 0) for m in metric.values() if m.numel()):  # NaN is not
            raise ValueError("the metric contains NaN or negative numbers: there is no closest point")
        score = v.map(torch.abs) if metric is None else _weighted(v, metric)
        return v.map(lambda x, mask: x.where(mask, 0), self.select(score))


def _weighted(v: Point, metric: Point) -> Point:
    """|v| sqrt(metric), up to a common factor: it orders entries as metric v^2 does, and has half the range."""
    score = v.map(_product, metric)
    return score if all(v.map(_in_range, score).values()) else _scaled_product(v, metric)


def _product(v: Tensor, metric: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(v.dtype, metric.dtype), torch.float32)
    return v.abs().to(dtype).mul_(metric.to(dtype).sqrt())


def _in_range(v: Tensor, score: Tensor) -> Tensor:
    """Whether no score under- or overflows: each is normal, or zero or infinite like its entry."""
    tiny = torch.finfo(score.dtype).tiny
    as_the_entry = ((v == 0) & (score == 0)) | (v.isinf() & score.isinf())
    return (((score >= tiny) & score.isfinite()) | as_the_entry).all()


def _scaled_product(v: Point, metric: Point) -> Point:
    """|v| sqrt(metric) 2^k in float64, with k such that the largest finite one is about 2^1000."""
    left, right = v.map(lambda x: x.abs().double()), metric.map(lambda m: m.double().sqrt())
    exponent = left.map(lambda x, r: (torch.frexp(x).exponent + torch.frexp(r).exponent).double(), right)
    counted = left.map(lambda x, r, e: e[(x > 0) & (r > 0) & x.isfinite()], right, exponent)
    top = max((float(e.amax()) for e in counted.values() if e.numel()), default=0.0)

    def shifted(x: Tensor, r: Tensor, e: Tensor) -> Tensor:
        mantissa = torch.frexp(x).mantissa * torch.frexp(r).mantissa
        power = (e + (1000 - top)).clamp_(-2000, 1000)
        lower = (power / 2).floor()  # 2^power alone may lie outside the range
        product = mantissa * lower.exp2() * (power - lower).exp2()
        return product.masked_fill(x == 0, 0).masked_fill(x.isinf(), torch.inf)

    return left.map(shifted, right, exponent)


class FractionalSet(SparseSet):
    """A set that keeps a fraction of the entries, tiles or groups: 1 - sparsity, or the number `keep` where given."""

    sparsity: float
    keep: int | None

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"sparsity must lie between 0 and 1, not {self.sparsity}")
        if self.keep is not None and not (hasattr(self.keep, "__index__") and self.keep >= 0):
            raise ValueError(f"keep is a whole number of at least 0, not {self.keep}")

    def scaled_to(self, fraction: float) -> Self:
        if self.keep is not None:
            raise ValueError("a set with an explicit count has no fraction to scale: give a sparsity in place of keep")
        return replace(self, sparsity=self.sparsity * fraction)  # type: ignore[type-var]  # a dataclass

    def _count(self, total: int) -> int:
        """The number kept of `total`."""
        return self.keep if self.keep is not None else kept_count(self.sparsity, total)


def slice_budget(keep: int, start: int, stop: int, width: int) -> int:
    """The part of `keep` for the columns start..stop of `width`, rounded so that the parts add up to the whole."""
    return round(keep * stop / width) - round(keep * start / width)


def rows_and_width(x: Tensor, owner: str) -> tuple[int, int]:
    """The shape of a matrix; raises ValueError for anything else."""
    if x.ndim != 2:
        raise ValueError(f"{owner} is defined for matrices (out, in), not for shape {tuple(x.shape)}")
    return x.shape[0], x.shape[1]
