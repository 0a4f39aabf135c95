"""The one-shot projections: magnitude and Wanda."""

from __future__ import annotations

import time
from dataclasses import dataclass

from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem, Quadratic, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form, projection_in_its_metric


@dataclass(frozen=True)
class Magnitude:
    """Projects the dense weights: keeps the largest |w|. Accepts every problem."""

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        return closed_form(problem, problem.constraint.project(problem.initial()), began, start)


@dataclass(frozen=True)
class Wanda:
    """Projects the unconstrained minimum in the metric diag(A): keeps the largest |w_ij| ||x_j||.

    As published the budget is per row (`RowWise`); any constraint is accepted.

    Raises:
        TypeError: the problem is not Quadratic.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023.
    """

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "the norms of its inputs are its metric")
        began = time.perf_counter()
        return closed_form(problem, projection_in_its_metric(problem), began, start)
