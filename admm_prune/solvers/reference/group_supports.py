"""Brute force over groups of columns, for tests."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from admm_prune.kernels import precision
from admm_prune.point import Point
from admm_prune.problem import Quadratic, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form
from admm_prune.solvers.group_obs import checked_groups


@dataclass(frozen=True)
class BruteForceGroups:
    """min over all sets R of groups of f at the least squares on the other columns: a dense solve for each.

    Args:
        max_supports: the most sets that are tried.

    Returns (solve):
        Status CLOSED_FORM; the bound is the objective.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.
        ValueError: too many sets.
    """

    max_supports: int = 5_000

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "it solves the least squares of every set of columns")
        constraint = checked_groups(self, problem)
        began = time.perf_counter()
        minimizer, width = problem.minimizer, constraint.width
        columns = minimizer.shape[1]
        count, keep = columns // width, constraint.budget(columns)
        if math.comb(count, keep) > self.max_supports:
            raise ValueError(
                f"BruteForceGroups tries at most {self.max_supports} sets; "
                f"{type(constraint).__name__} has {math.comb(count, keep):.3g}"
            )
        hessian, linear = problem.hessian.double(), problem.linear.double()
        best, least = minimizer, math.inf
        for groups in combinations(range(count), keep):
            stay = [g * width + i for g in groups for i in range(width)]
            weight = torch.zeros_like(linear)
            if stay:
                weight[:, stay] = torch.linalg.solve(hessian[stay][:, stay], linear[:, stay].T).T
            value = float(((weight @ hessian) * weight).sum() - 2 * (weight * linear).sum())
            if value < least:
                best, least = weight, value
        result = closed_form(problem, Point(weight=best.to(minimizer.dtype)), began, start)
        return replace(result, bound=result.objective, iterations=math.comb(count, keep))
