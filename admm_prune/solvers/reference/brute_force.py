"""Brute force: every support, for tests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np

from admm_prune.kernels import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.result import Result
from admm_prune.solvers.reference.rigorous import least_losses, refit_steps
from admm_prune.solvers.reference.rows import Mask, Row, separate


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
