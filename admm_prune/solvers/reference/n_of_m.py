"""N:M patterns: the exact choice in one group at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import comb

import numpy as np
import scipy.linalg

from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.result import Result, Status
from admm_prune.solvers.reference.brute_force import all_supports
from admm_prune.solvers.reference.rows import Array, Mask, Row, search, separate

_LEAST_GAIN = 1e-12  # of a change, relative to the loss of the row: smaller ones may be rounding


@dataclass(frozen=True)
class GroupExact:
    """Sweeps over the groups of every row, S_g <- argmin over the C(M, N) supports of group g, until none changes.

    The supports of the other groups are held, all weights are refitted. With U = what the other groups keep and all of
    group g, v the refit on U and B = (Ã_UU^-1)_gg, removing Q from g costs v_Q^T (B_QQ)^-1 v_Q more. The result is
    optimal in each group given the others, and never worse than the start; it is the optimum where there is one group.

    Args:
        max_sweeps: over all groups of a row.
        max_width: the widest row taken on: a sweep costs width / M factorizations.
        max_choices: the most supports of one group, 924 for 6:12.

    Returns (solve):
        Status SOLVED, or MAX_ITERATIONS where some row still changed in its last sweep. No bound.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: no groups of this size, one budget over a matrix, rows too wide, or a Hessian that is not positive
            definite.
    """

    max_sweeps: int = 50
    max_width: int = 512
    max_choices: int = 1000

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        separated = separate(type(self).__name__, problem)
        self._check(separated.rows, problem)
        starts = separated.supports(start)
        kept, sweeps = [], 0
        for i, row in enumerate(separated.rows):
            support, used = self._solve_row(row, search(row)[0] if starts is None else row.completed(starts[i]))
            kept.append(support)
            sweeps = max(sweeps, used)
        status = Status.SOLVED if sweeps <= self.max_sweeps else Status.MAX_ITERATIONS
        seconds = time.perf_counter() - began
        iterations = min(sweeps, self.max_sweeps)
        return separated.result(kept, None, start=start, status=status, iterations=iterations, seconds=seconds)

    def _check(self, rows: tuple[Row, ...], problem: Problem) -> None:
        kind = f"{type(problem.constraint).__name__} on {type(problem).__name__}"
        widest = max(row.width for row in rows)
        most = max(comb(row.group, row.keep) for row in rows)
        if widest > self.max_width:
            raise ValueError(
                f"GroupExact takes rows of at most {self.max_width} entries; {kind} makes rows of {widest}"
            )
        if most > self.max_choices:
            raise ValueError(
                f"GroupExact tries at most {self.max_choices} supports in a group; {kind} has {most:.3g} in each"
            )

    def _solve_row(self, row: Row, kept: Mask) -> tuple[Mask, int]:
        """(support, sweeps used); one more than allowed where the last sweep still changed something."""
        if row.removals in (0, row.width):
            return kept, 0
        choices = all_supports(row.group, row.group, row.keep)
        removals = [np.flatnonzero(~choice) for choice in choices]
        floor = _LEAST_GAIN * row.loss(kept)
        for sweep in range(1, self.max_sweeps + 1):
            changed = False
            for begin in range(0, row.width, row.group):
                group = slice(begin, begin + row.group)
                block, fitted = _released(row, kept, group)
                costs = [float(fitted[q] @ np.linalg.solve(block[np.ix_(q, q)], fitted[q])) for q in removals]
                now = int(np.flatnonzero((choices == kept[group]).all(1))[0])
                best = int(np.argmin(costs))
                if costs[best] < costs[now] - floor:
                    kept[group] = choices[best]
                    changed = True
            if not changed:
                return kept, sweep
        return kept, self.max_sweeps + 1


def _released(row: Row, kept: Mask, group: slice) -> tuple[Array, Array]:
    """((Ã_UU^-1)_gg, v_g): U holds what the other groups keep and all of the group g, v is the refit on U."""
    wide = kept.copy()
    wide[group] = True
    inside = np.flatnonzero(wide)
    own = np.flatnonzero((inside >= group.start) & (inside < group.stop))
    factor = scipy.linalg.cho_factor(row.hessian[np.ix_(inside, inside)])
    units = np.zeros((len(inside), len(own)))
    units[own, np.arange(len(own))] = 1
    pull = row.hessian[np.ix_(inside, ~wide)] @ row.target[~wide]
    solved = scipy.linalg.cho_solve(factor, np.column_stack([units, pull]))
    return solved[own, :-1], row.target[inside[own]] + solved[own, -1]
