"""Brute force over groups of columns, for tests."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from admm_prune.kernels import precision
from admm_prune.point import Point
from admm_prune.problem import Quadratic, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form
from admm_prune.solvers.group_obs import checked_groups
from admm_prune.solvers.reference.rigorous import Array, Form, Mask, least_losses, rounded_down_sum, total_bound
from admm_prune.solvers.reference.rows import floor_of, scaled_hessian, to_array


@dataclass(frozen=True)
class BruteForceGroups:
    """min over all sets R of groups of f at the least squares on the other columns: a dense solve for each.

    In float64, in coordinates where A has a diagonal next to 1. Where no group has to go, nothing changes, to the bit.

    Args:
        max_supports: the most sets that are tried.

    Returns (solve):
        Status CLOSED_FORM. The bound is the least of the proved bounds of all sets (`rigorous.least_losses`); None
        where float64 does not prove that the Hessian is positive definite.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.
        ValueError: too many sets, or a Hessian that is not positive definite.
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
        sets = math.comb(count, min(keep, count))
        if sets > self.max_supports:
            raise ValueError(
                f"BruteForceGroups tries at most {self.max_supports} sets; {type(constraint).__name__} has {sets:.3g}"
            )
        form, scale = scaled_hessian(type(self).__name__, problem)
        target = to_array(minimizer) * scale
        best, least, bound = Point(weight=minimizer), math.inf, 0.0
        if not constraint.contains(best):
            bound = math.inf
            for groups in combinations(range(count), keep):
                kept = np.isin(np.arange(count), groups).repeat(width)
                steps = _refit_steps(form, target, kept)
                losses, bounds = least_losses(form, target, np.broadcast_to(kept, target.shape), steps)
                bound = min(bound, rounded_down_sum(bounds.tolist()))
                if losses.sum() < least:
                    fitted = np.where(kept, target + steps, 0.0) / scale
                    best, least = Point(weight=torch.from_numpy(fitted).to(minimizer)), float(losses.sum())
        result = closed_form(problem, best, began, start)
        proved = total_bound(form, floor_of(problem, scale), bound)
        return replace(result, bound=None if proved is None else min(proved, result.objective), iterations=sets)


def _refit_steps(form: Form, target: Array, kept: Mask) -> Array:
    """v - w (out, in) for the least squares v on some columns, the same in every row."""
    steps = np.where(kept, 0.0, -target)
    if kept.any():
        block, pull = form.hessian[np.ix_(kept, kept)], (steps @ form.hessian)[:, kept]
        try:
            steps[:, kept] = -np.linalg.solve(block, pull.T).T
        except np.linalg.LinAlgError:
            steps[:, kept] = -(np.linalg.pinv(block, hermitian=True) @ pull.T).T
    return steps
