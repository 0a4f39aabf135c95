"""Parts as another package would write them: a convex set, a problem with a gradient alone, a solver of 15 lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from admm_prune.point import Point
from admm_prune.problem import Differentiable, require
from admm_prune.problems.constraints import Unstructured
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative


@dataclass(frozen=True)
class Box:
    """{z : |z_i| <= 1}, convex, and no family of supports."""

    def project(self, v: Point, metric: Point | None = None) -> Point:
        if not v.is_finite():
            raise ValueError("NaN has no place in a box")
        return v.map(lambda x: x.clamp(-1, 1))

    def contains(self, z: Point) -> bool:
        return all(bool((x.abs() <= 1).all()) for x in z.values())


class Bare:
    """A problem with a value and no capability beside it."""

    constraint, curvature = Unstructured(0.5), 1.0

    def initial(self) -> Point:
        return Point(weight=torch.ones(2, 2))

    def value(self, x: Point) -> float:
        return x.norm()


class Logarithmic:
    """sum_i log(1 + (x_i - w_i)^2) over two tensors: smooth, not convex, with nothing but a gradient to show."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.dense = Point({n: torch.randn(3, 4, generator=g, dtype=torch.float64) for n in "ab"})
        self.constraint, self.curvature = Unstructured(0.5), 1.0

    def initial(self) -> Point:
        return self.dense

    def value(self, x: Point) -> float:
        return self.value_and_gradient(x)[0]

    def value_and_gradient(self, x: Point) -> tuple[float, Point]:
        away = x - self.dense
        value = sum(float(d.square().log1p().sum()) for d in away.values())
        return value, away.map(lambda d: 2 * d / (1 + d.square()))


class Huber:
    """sum_ti h((x_t V^T - y_t)_i), h(e) = e^2 / 2 up to |e| = 1, |e| - 1 / 2 beyond: of residuals, which cancel."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(seed)
        self.inputs, self.weight = (torch.randn(n, 8, generator=g, dtype=torch.float64).to(dtype) for n in (64, 4))
        self.targets = self.inputs @ self.weight.T
        self.constraint = Unstructured(0.5)
        self.curvature = float(self.inputs.double().square().mean()) * len(self.inputs) / 2

    def initial(self) -> Point:
        return Point(weight=self.weight)

    def value(self, x: Point) -> float:
        return self.value_and_gradient(x)[0]

    def value_and_gradient(self, x: Point) -> tuple[float, Point]:
        away = self.inputs @ x["weight"].T - self.targets
        loss = torch.nn.functional.huber_loss(away.double(), torch.zeros_like(away.double()), reduction="sum")
        return float(loss), Point(weight=away.clamp(-1, 1).T @ self.inputs)


@dataclass(frozen=True, kw_only=True)
class HardThresholding(Iterative[list[Point]]):
    """z <- P_C(z - gradient / (2 step)): a third party's solver."""

    step_size: float = 1e-2
    max_iterations: int = 30

    def check(self, problem) -> None:
        require(self, problem, Differentiable, "it descends")

    def init(self, problem, start) -> list[Point]:
        return [self.projected_start(problem, start)]

    def step(self, problem, state, iteration) -> None:
        _, gradient = problem.value_and_gradient(state[0])
        state[0] = problem.constraint.project(state[0] - self.step_size / problem.curvature * gradient)

    def measure(self, state, iteration) -> Progress:
        return Progress(iteration=iteration)

    def converged(self, progress) -> bool:
        return False

    def solution(self, problem, state) -> Point:
        return state[0]
