"""`Point`: named tensors with the arithmetic of one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


class Point(dict[str, Tensor]):
    """x = (x_1, ..., x_n): tensors by name, with the arithmetic of one vector.

    Operations preserve names, shapes, dtypes and devices; the operands of an operation must have the same names. Sums
    over entries (`dot`, `norm`) are computed in float64, whatever the dtype of the tensors.
    """

    def map(self, function: Callable[..., Tensor], *others: Point) -> Point:
        """(function(x_i, y_i, ...)) for every name i.

        Raises:
            KeyError: the points do not have the same names.
        """
        for other in others:
            if other.keys() != self.keys():
                raise KeyError(f"points name different tensors: {sorted(self)} and {sorted(other)}")
        return Point({name: function(x, *(other[name] for other in others)) for name, x in self.items()})

    def __add__(self, other: Point) -> Point:
        return self.map(torch.add, other)

    def __sub__(self, other: Point) -> Point:
        return self.map(torch.sub, other)

    def __mul__(self, other: Point | float) -> Point:
        """x * y, entry by entry for a point y; y may also be a number."""
        if isinstance(other, Point):
            return self.map(torch.mul, other)
        return self.map(lambda x: x * other)

    __rmul__ = __mul__

    def __neg__(self) -> Point:
        return self.map(torch.neg)

    def add_(self, other: Point, scale: float = 1.0) -> Self:
        """x <- x + scale * y, in place."""
        self.map(lambda x, y: x.add_(y, alpha=scale), other)
        return self

    def mul_(self, other: Point | float) -> Self:
        """x <- x * y, in place; y is a point or a number."""
        if isinstance(other, Point):
            self.map(lambda x, y: x.mul_(y), other)
        else:
            self.map(lambda x: x.mul_(other))
        return self

    def copy_(self, other: Point) -> Self:
        """x <- y, in place."""
        self.map(lambda x, y: x.copy_(y), other)
        return self

    def clone(self) -> Point:
        return self.map(torch.clone)

    def zeros_like(self) -> Point:
        return self.map(torch.zeros_like)

    def dot(self, other: Point) -> float:
        """sum_i <x_i, y_i>, in float64."""
        products = self.map(lambda x, y: (x.double() * y.double()).sum(), other)
        return float(sum(product.item() for product in products.values()))

    def norm(self) -> float:
        """sqrt(<x, x>), in float64."""
        return float(self.dot(self) ** 0.5)

    def numel(self) -> int:
        return sum(x.numel() for x in self.values())

    def count_nonzero(self) -> int:
        return sum(int(torch.count_nonzero(x)) for x in self.values())

    def sparsity(self) -> float:
        """The fraction of entries that are exactly zero."""
        return 1.0 - self.count_nonzero() / self.numel()

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(x).all()) for x in self.values())
