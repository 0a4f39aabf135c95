"""Branch and bound: the proven optimum of small rows, or an honest gap."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from admm_prune.kernels import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.result import Result, Status
from admm_prune.solvers.reference.bounds import loss_bounds
from admm_prune.solvers.reference.rigorous import least_losses, refit_steps
from admm_prune.solvers.reference.row_search import search
from admm_prune.solvers.reference.rows import Mask, Row, separate
from admm_prune.solvers.reference.supports import Supports
from admm_prune.solvers.reference.tree import Nodes, Pool, expand

_BATCH = 256  # nodes expanded at a time
_MEMORY = 256 * 2**20  # bytes of open nodes beyond which the search dives
_KICKS = 10


@dataclass(frozen=True)
class BranchAndBound:
    """min_R loss_i(R) for every row i, loss(R) = w_R^T (K_RR)^-1 w_R, by best-first branch and bound.

    Each row starts from the best of greedy elimination, 1-swaps and a few kicks; `tree` says how its nodes are expanded
    and bounded. One budget over a whole matrix is one row of out * in entries with the Hessian I kron A. On one core, a
    row of 32 entries with 16 kept takes 0.01 s with the inputs of an ordinary layer and 0.05 s at cond(A) = 1e6; of 48,
    under a second; of 64, many seconds, or no proof at all where few are kept and A is ill-conditioned.

    Args:
        time_limit: seconds for all rows together; an unfinished row leaves its unused share to those after it.
        gap: relative to the loss of a row: what a better support must gain to be worth a proof.
        max_width: the widest row taken on.

    Returns (solve):
        Status SOLVED where every row is proved to `gap`; else TIME_LIMIT, with the best supports found and the least
        bound of the open nodes. `iterations` counts nodes. The bound is what the tree proves less the rounding of its
        eliminations, `Form.elimination_error`, or that of `lower_bound`, which is valid for every support.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: the supports are N:M groups or of an unknown kind, a row is wider than `max_width`, or the Hessian
            is not positive definite.

    Sources: this project's methods, local.md, section 8; Furnival and Wilson, Regressions by leaps and bounds, 1974.
    """

    time_limit: float = math.inf
    gap: float = 1e-9
    max_width: int = 64

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        separated = separate(type(self).__name__, problem)
        self._check(separated.rows, problem)
        starts = separated.supports(start)
        solved: list[Solved] = []
        for i, row in enumerate(separated.rows):
            now = time.perf_counter()
            share = (began + self.time_limit - now) / (len(separated.rows) - i)
            known = () if starts is None else (starts[i],)
            solved.append(solve_row(row, search(row, known, _KICKS), self.gap, now + share))
        open_rows = sum(not row.closed for row in solved)
        return separated.result(
            [row.kept for row in solved],
            [row.bound for row in solved],
            start=start,
            status=Status.TIME_LIMIT if open_rows else Status.SOLVED,
            iterations=sum(row.nodes for row in solved),
            seconds=time.perf_counter() - began,
            notes=(f"{open_rows} of {len(solved)} rows were not closed in {self.time_limit} s",) if open_rows else (),
        )

    def _check(self, rows: tuple[Row, ...], problem: Problem) -> None:
        kind = type(problem.constraint).__name__
        widest = max(row.width for row in rows)
        if widest > self.max_width:
            raise ValueError(
                f"BranchAndBound takes rows of at most {self.max_width} entries that share a budget; {kind} on "
                f"{type(problem).__name__} makes rows of {widest}"
            )
        if any(row.group < row.width and 0 < row.removals < row.width for row in rows):
            raise ValueError(
                f"BranchAndBound takes one budget per row or per matrix; {kind} has a budget for each group of a row: "
                "use BruteForce, MixedIntegerReference or GroupExact"
            )


class Solved(NamedTuple):
    """The best support of a row, its loss, a lower bound of the optimum, nodes expanded, and whether it is proved."""

    kept: Mask
    loss: float
    bound: float
    nodes: int
    closed: bool


def solve_row(row: Row, incumbent: tuple[Mask, float], gap: float, deadline: float) -> Solved:
    """Proves or improves the incumbent (kept, loss) of one row with one budget.

    Args:
        gap: relative to the loss.
        deadline: in the time of `time.perf_counter`.
    """
    kept, loss = incumbent
    if row.removals in (0, row.width):
        return Solved(kept, loss, _least_of(row, kept[None])[1], 0, True)
    if row.removals == 1:
        single = ~np.eye(row.width, dtype=np.bool_)
        best, bound = _least_of(row, single)
        return Solved(single[best], row.loss(single[best]), bound, 1, True)
    plain = Supports(row.keep, ((row.group, row.keep),))
    root = max(loss_bounds(row.form, torch.from_numpy(row.target[None]), plain).values())
    least_leaf = math.inf
    pool, count = Pool(), 0
    pool.push(Nodes.root(row.inverse, row.target, row.removals))
    while pool and time.perf_counter() < deadline:
        nodes = pool.pop(_BATCH, loss * (1 - gap), _MEMORY)
        if nodes is None:
            continue
        count += len(nodes.loss)
        children, leaf = expand(nodes, loss * (1 - gap))
        if leaf is not None:
            least_leaf = min(least_leaf, leaf.loss)
        if leaf is not None and leaf.loss < loss:
            value = row.loss(~leaf.removed)
            if value < loss:
                kept, loss = ~leaf.removed, value
        for child in children:
            pool.push(child)
    # The tree compares what it computes; a leaf may have been computed below the loss that stands for it in the end.
    threshold = min(loss * (1 - gap), least_leaf, pool.least_bound())
    proved = (
        max(0.0, threshold * (1 - row.form.elimination_error)) if math.isfinite(row.form.elimination_error) else 0.0
    )
    return Solved(kept, loss, max(root, proved), count, not pool)


def _least_of(row: Row, kept: Mask) -> tuple[int, float]:
    """(which of some supports has the least loss, a proved bound of all their losses)."""
    losses, bounds = least_losses(row.form, row.target, kept, refit_steps(row.form, row.target, kept))
    return int(np.argmin(losses)), float(bounds.min())
