"""Brute force over every support, and over every set of column groups, for tests."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import torch

from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem, Quadratic, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form
from admm_prune.solvers.group_obs import checked_groups
from admm_prune.solvers.reference.rigorous import (
    Array,
    Form,
    Mask,
    least_losses,
    refit_steps,
    rounded_down_sum,
    total_bound,
)
from admm_prune.solvers.reference.rows import Row, floor_of, scaled_hessian, separate, to_array


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


@dataclass(frozen=True)
class BruteForce:
    """min over all supports of w_R^T (K_RR)^-1 w_R, row by row; over the whole matrix where it shares one budget.

    Args:
        max_supports: the most supports that one row, or the matrix, may have: 20 000 admits one budget on 16 entries
            (12 870) and four groups of 2:4 (1296).

    Returns (solve):
        Status CLOSED_FORM. The bound is the least of the proved bounds of all supports (`rigorous.least_losses`); None
        where float64 does not prove that the Hessian is positive definite.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: too many supports, supports of an unknown kind, or a Hessian that is not positive definite.
    """

    max_supports: int = 20_000

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        separated = separate(type(self).__name__, problem)
        most = max(row.supports for row in separated.rows)
        if most > self.max_supports:
            raise ValueError(
                f"BruteForce tries at most {self.max_supports} supports; {type(problem.constraint).__name__} on "
                f"{type(problem).__name__} has {most:.3g} for one budget"
            )
        best = [_best(row) for row in separated.rows]
        return separated.result(
            [kept for kept, _ in best],
            [bound for _, bound in best],
            start=start,
            iterations=sum(row.supports for row in separated.rows),
            seconds=time.perf_counter() - began,
        )


def _best(row: Row) -> tuple[Mask, float]:
    """The support of the least loss, and a proved lower bound of the losses of all supports."""
    kept = all_supports(row.width, row.group, row.keep)
    losses, bounds = least_losses(row.form, row.target, kept, refit_steps(row.form, row.target, kept))
    return np.asarray(kept[int(np.argmin(losses))]), float(bounds.min())


@lru_cache(maxsize=8)
def all_supports(width: int, group: int, keep: int) -> Mask:
    """Every support that keeps `keep` of each `group` consecutive entries of `width`: (count, width)."""
    cells = np.stack([np.isin(np.arange(group), list(kept)) for kept in combinations(range(group), keep)])
    picks = np.array(list(product(range(len(cells)), repeat=width // group)))
    return np.asarray(cells[picks].reshape(len(picks), width))
