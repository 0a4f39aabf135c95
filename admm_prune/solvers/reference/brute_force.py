"""Exact solutions by enumeration: every support, N:M patterns group by group, and sets of column groups."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import scipy.linalg
import torch

from admm_prune.errors import NonFiniteError, check_at_least
from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import GroupConstraint, Problem, Quadratic, checked_constraint, require
from admm_prune.result import Result, Status
from admm_prune.solvers.base import closed_form
from admm_prune.solvers.reference.rigorous import (
    Array,
    Form,
    Mask,
    least_losses,
    rounded_down_sum,
    total_bound,
)
from admm_prune.solvers.reference.rows import (
    Row,
    check_few,
    floor_of,
    log10_supports,
    scaled_hessian,
    search,
    separate,
    to_array,
)

_LEAST_GAIN = 1e-12  # of a change, relative to the loss of the row: smaller ones may be due to rounding


@dataclass(frozen=True)
class GroupExact:
    """Sweeps over the groups of every row, S_g <- argmin over the C(M, N) supports of group g, until none changes.

    The supports of the other groups are fixed, all weights are refitted. With U = what the other groups keep and all of
    group g, v the refit on U and B = (Ã_UU^-1)_gg, removing Q from g costs v_Q^T (B_QQ)^-1 v_Q more. The result is
    optimal in each group given the others, and never worse than the start; it is the optimum where there is one group.

    Args:
        max_sweeps: over all groups of a row.
        max_width: the widest row accepted: a sweep costs width / M factorizations.
        max_choices: the most supports of one group, 924 for 6:12.

    Returns (solve):
        Status SOLVED, or MAX_ITERATIONS where some row still changed in its last sweep. No bound.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: supports of an unknown kind, rows too wide, too many supports of a group, or a Hessian that is not
            positive definite. One budget over a matrix is a single group of all its entries.
    """

    max_sweeps: int = 50
    max_width: int = 512
    max_choices: int = 1000

    def __post_init__(self) -> None:
        check_at_least(self, max_sweeps=0, max_width=1, max_choices=1)

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        separated = separate(type(self).__name__, problem, self.max_width)
        check_few(
            max(log10_supports(group, keep) for group, keep in {(row.group, row.keep) for row in separated.rows}),
            self.max_choices,
            f"GroupExact tries at most {self.max_choices} supports in a group; {type(problem.constraint).__name__} on "
            f"{type(problem).__name__} has {{}} in each: raise max_choices",
        )
        solved = [
            self._solve_row(row, row.completed(*known) if known else search(row)[0])
            for row, known in separated.starts(start)
        ]
        sweeps = max(used for _, used in solved)
        return separated.result(
            [support for support, _ in solved],
            None,
            start=start,
            status=Status.SOLVED if sweeps <= self.max_sweeps else Status.MAX_ITERATIONS,
            iterations=min(sweeps, self.max_sweeps),
            seconds=time.perf_counter() - began,
        )

    def _solve_row(self, row: Row, support: Mask) -> tuple[Mask, int]:
        """(support, sweeps used); one more than allowed if the last sweep still changed the support."""
        if row.removals in (0, row.width):
            return support, 0
        choices = all_supports(row.group, row.group, row.keep)
        removals = [np.flatnonzero(~choice) for choice in choices]
        floor = _LEAST_GAIN * row.loss(support)
        for sweep in range(1, self.max_sweeps + 1):
            changed = False
            for begin in range(0, row.width, row.group):
                group = slice(begin, begin + row.group)
                block, fitted = _released(row, support, group)
                costs = [float(fitted[q] @ np.linalg.solve(block[np.ix_(q, q)], fitted[q])) for q in removals]
                now = int(np.flatnonzero((choices == support[group]).all(1))[0])
                best = int(np.argmin(costs))
                if costs[best] < costs[now] - floor:
                    support[group] = choices[best]
                    changed = True
            if not changed:
                return support, sweep
        return support, self.max_sweeps + 1


def _released(row: Row, support: Mask, group: slice) -> tuple[Array, Array]:
    """((Ã_UU^-1)_gg, v_g): U holds what the other groups keep and all of the group g, v is the refit on U."""
    wide = support.copy()
    wide[group] = True
    inside = np.flatnonzero(wide)
    group_entries = np.flatnonzero((inside >= group.start) & (inside < group.stop))
    factor = scipy.linalg.cho_factor(row.hessian[np.ix_(inside, inside)])
    units = np.zeros((len(inside), len(group_entries)))
    units[group_entries, np.arange(len(group_entries))] = 1
    pull = row.hessian[np.ix_(inside, ~wide)] @ row.target[~wide]
    solved = scipy.linalg.cho_solve(factor, np.column_stack([units, pull]))
    return solved[group_entries, :-1], row.target[inside[group_entries]] + solved[group_entries, -1]


@dataclass(frozen=True)
class BruteForceGroups:
    """min over all sets R of groups of f at the least squares on the other columns: a dense solve for each.

    In float64, in coordinates where A has a diagonal next to 1. If no group has to be removed, the weights are bitwise
    unchanged.

    Args:
        max_supports: the most sets that are tried.

    Returns (solve):
        Status CLOSED_FORM. The bound is the least of the proved bounds of all sets (`rigorous.least_losses`); None
        where float64 does not prove that the Hessian is positive definite.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.
        ValueError: too many sets, or a Hessian that is not positive definite.
        NonFiniteError: no set has a finite loss.
    """

    max_supports: int = 5_000

    def __post_init__(self) -> None:
        check_at_least(self, max_supports=1)

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "it solves the least squares of every set of columns")
        constraint = checked_constraint(self, problem, GroupConstraint, "it removes whole columns")
        began = time.perf_counter()
        minimizer, width = problem.minimizer, constraint.width
        columns = minimizer.shape[1]
        count, keep = columns // width, constraint.budget(columns)
        check_few(
            log10_supports(count, keep),
            self.max_supports,
            f"BruteForceGroups tries at most {self.max_supports} sets; {type(constraint).__name__} has {{}}: raise "
            "max_supports",
        )
        sets = math.comb(count, min(keep, count))
        form, scale = scaled_hessian(type(self).__name__, problem)
        target = to_array(minimizer) * scale
        dense = Point(weight=minimizer.clone())
        best, least, bound = (dense, 0.0, 0.0) if constraint.contains(dense) else (None, math.inf, math.inf)
        if best is None:
            for groups in combinations(range(count), keep):
                mask = np.isin(np.arange(count), groups).repeat(width)
                steps = _refit_steps(form, target, mask)
                losses, bounds = least_losses(form, target, np.broadcast_to(mask, target.shape), steps)
                bound = min(bound, rounded_down_sum(bounds.tolist()))
                if losses.sum() < least:
                    fitted = np.where(mask, target + steps, 0.0) / scale
                    best, least = Point(weight=torch.from_numpy(fitted).to(minimizer)), float(losses.sum())
        if best is None:
            raise NonFiniteError("no set has a finite loss: scale the weights or the Gram down")
        result = closed_form(problem, best, began, start)
        proved = total_bound(form, floor_of(problem, scale), bound)
        return replace(result, bound=None if proved is None else min(proved, result.objective), iterations=sets)


def _refit_steps(form: Form, target: Array, mask: Mask) -> Array:
    """v - w (out, in) for the least squares v on some columns, the same in every row."""
    steps = np.where(mask, 0.0, -target)
    if mask.any():
        block, pull = form.hessian[np.ix_(mask, mask)], (steps @ form.hessian)[:, mask]
        try:
            steps[:, mask] = -np.linalg.solve(block, pull.T).T
        except np.linalg.LinAlgError:
            steps[:, mask] = -(np.linalg.pinv(block, hermitian=True) @ pull.T).T
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

    def __post_init__(self) -> None:
        check_at_least(self, max_supports=1)

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        separated = separate(type(self).__name__, problem, max_supports=self.max_supports)
        best, bounds = [], []
        for row in separated.rows:
            supports = all_supports(row.width, row.group, row.keep)
            index, bound = row.least(supports)
            best.append(supports[index])
            bounds.append(bound)
        return separated.result(
            best,
            bounds,
            start=start,
            iterations=sum(row.supports for row in separated.rows),
            seconds=time.perf_counter() - began,
        )


@lru_cache(maxsize=8)
def all_supports(width: int, group: int, keep: int) -> Mask:
    """Every support that keeps `keep` of each `group` consecutive entries of `width`: (count, width)."""
    cells = np.stack([np.isin(np.arange(group), list(entries)) for entries in combinations(range(group), keep)])
    picks = np.array(list(product(range(len(cells)), repeat=width // group)))
    return np.asarray(cells[picks].reshape(len(picks), width))
