"""A quadratic problem that shows one capability at a time, and a problem with other held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from admm_prune.point import Point
from admm_prune.problem import (
    Blockwise,
    Constraint,
    Coordinated,
    Differentiable,
    Minimizable,
    Problem,
    Proximable,
    Quadratic,
    Refittable,
    Stochastic,
)
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.testing.results import Case, equal, random_like, rms


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


def check_held_out(case: Case, problem: Problem, other: Problem, points: list[Point], seed: int) -> None:
    """Checks that two problems that differ in their held-out data alone differ in `judge` alone.

    Initial point, curvature, values, gradients, sampled gradients, prox, refit, minimize, the tensors of a Quadratic
    problem and all of these of each block must be equal to the bit.
    """
    twins = zip(_answers(problem, points, seed), _answers(other, points, seed), strict=True)
    for (name, ours), (_, theirs) in twins:
        case.promise(equal(ours, theirs), f"have a {name} that does not depend on held-out data")
    if isinstance(problem, Coordinated) and isinstance(other, Coordinated):
        judged = [(problem.judge(x), other.judge(x)) for x in points]
        case.promise(
            any(ours != theirs for ours, theirs in judged), "judge by its held-out data", f"both give {judged[0][0]}"
        )


def _answers(problem: Problem, points: list[Point], seed: int) -> Iterator[tuple[str, Any]]:
    """All that a problem computes but `judge`, by name."""
    yield "initial point", problem.initial()
    yield "curvature", problem.curvature
    last = points[-1]
    for x in points:
        yield "value", problem.value(x)
        if isinstance(problem, Differentiable):
            yield "gradient", problem.value_and_gradient(x)
    if isinstance(problem, Stochastic):
        for draw in (0, 1, 7):
            yield "sampled gradient", problem.sample_gradient(last, draw)
    if isinstance(problem, Quadratic):
        for name in ("hessian", "linear", "minimizer"):
            yield name, Point({name: getattr(problem, name)})
    if isinstance(problem, Proximable):
        for rho in (1e-2, 1.0, 30.0):
            yield "prox", problem.prox(last, rho)
    if isinstance(problem, Refittable):
        mask = random_like(last, seed).map(lambda score: score > 0)
        yield "refit", problem.refit(mask)
        yield "refit", problem.refit(mask.map(torch.ones_like))
    if isinstance(problem, Minimizable):
        yield "minimum", problem.minimize()
    if isinstance(problem, Blockwise):
        for x in points:
            for block in problem.order:
                inner = problem.block(block, x)
                start = inner.initial()
                near = start + random_like(start, seed, 0.1 * rms(start))
                for name, answer in _answers(inner, [start, near], seed):
                    yield f"{name} of block {block}", answer
