"""Weights that were computed elsewhere, as the solution of a problem: measured like any other."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form


@dataclass(frozen=True, eq=False)
class Given:
    """Returns the weights that it is given, if they are in the sparse set.

    Args:
        weight: V (out, in).

    Raises:
        ValueError: a weight of another shape, with entries that are not finite, or outside of the set.
    """

    weight: Tensor

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        dense = problem.initial()["weight"]
        if self.weight.shape != dense.shape:
            shapes = " and ".join(" x ".join(map(str, shape)) for shape in (self.weight.shape, dense.shape))
            raise ValueError(f"solution and layer have the shapes {shapes}")
        if not bool(self.weight.isfinite().all()):
            raise ValueError("the solution has NaN or Inf entries")
        solution = Point(weight=self.weight.to(dense))
        if not problem.constraint.contains(solution):
            raise ValueError(
                f"the solution keeps more weights than the target allows: {int(solution['weight'].count_nonzero())} of "
                f"{dense.numel()} are not zero"
            )
        return closed_form(problem, solution, began, start)
