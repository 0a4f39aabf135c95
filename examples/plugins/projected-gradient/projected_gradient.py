"""A new solver: projected gradient, V <- P_C(V - (V A - G) D^-1 / L) in the metric D = diag(A)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune import Point, Progress
from admm_prune.problem import Problem, Quadratic, require
from admm_prune.solvers.base import Iterative


@dataclass
class State:
    """The point, D with a row for every row of it, and L, the largest eigenvalue of D^-1/2 A D^-1/2."""

    point: Point
    metric: Tensor
    largest: float
    moved: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ProjectedGradient(Iterative[State]):
    """Projected gradient in the metric of the inputs: no step raises f, since L D is not below A."""

    max_iterations: int = 50

    def check(self, problem: Problem) -> None:
        require(self, problem, Quadratic, "its step length is that of one Hessian")

    def init(self, problem: Quadratic, start: Point | None) -> State:
        diagonal = problem.hessian.diagonal()
        scaled = problem.hessian / diagonal.sqrt() / diagonal.sqrt()[:, None]
        point = self.projected_start(problem, start)
        return State(point, diagonal.expand_as(point["weight"]), float(torch.linalg.eigvalsh(scaled)[-1]))

    def step(self, problem: Quadratic, state: State, iteration: int) -> None:
        v = state.point["weight"]
        gradient = v @ problem.hessian - problem.linear
        moved = Point(weight=v - gradient / (state.largest * state.metric))
        before, state.point = state.point, problem.constraint.project(moved, Point(weight=state.metric))
        state.moved = (state.point - before).norm() / max(before.norm(), 1e-300)

    def measure(self, state: State, iteration: int) -> Progress:
        return Progress(iteration=iteration, dual_residual=state.moved)

    def converged(self, progress: Progress) -> bool:
        return progress.dual_residual is not None and progress.dual_residual < 1e-5

    def solution(self, problem: Quadratic, state: State) -> Point:
        return state.point
