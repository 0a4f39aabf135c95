"""A quadratic problem seen through one capability at a time: for solvers that ask for no more."""

from __future__ import annotations

from typing import cast

import torch

from admm_prune.point import Point
from admm_prune.problem import Constraint, Problem
from admm_prune.problems.layer import LayerReconstruction


class Bare:
    """The least that a problem may be: a value to lower inside a constraint."""

    def __init__(self, inside: LayerReconstruction) -> None:
        self._inside = inside

    @property
    def constraint(self) -> Constraint:
        return self._inside.constraint

    @property
    def curvature(self) -> float:
        return self._inside.curvature

    def initial(self) -> Point:
        return self._inside.initial()

    def value(self, x: Point) -> float:
        return self._inside.value(x)


class OnlyProximable(Bare):
    def prox(self, v: Point, rho: float) -> Point:
        return self._inside.prox(v, rho)


class OnlyRefittable(Bare):
    def refit(self, mask: Point) -> Point:
        return self._inside.refit(mask)


class OnlyDifferentiable(Bare):
    def value_and_gradient(self, x: Point) -> tuple[float, Point]:
        """f(V) and 2 (V A - G)."""
        gradient = 2 * (x["weight"] @ self._inside.hessian - self._inside.linear)
        return self.value(x), Point(weight=gradient)


class OnlyStochastic(Bare):
    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """f(V + e) and its gradient, e a small random shift of the draw's own."""
        g = torch.Generator().manual_seed(draw)
        shift = x.map(lambda v: 0.01 * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v))
        return OnlyDifferentiable(self._inside).value_and_gradient(x + shift)


class OnlyBlockwise(Bare):
    """One block, which is the layer itself."""

    order = ("weight",)

    def block(self, name: str, x: Point) -> Problem:
        if name not in self.order:
            raise KeyError(f"there is no block {name}")
        return cast(Problem, self._inside)
