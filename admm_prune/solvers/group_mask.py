"""Column groups zeroed, and nothing else changed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.kernels import groups, precision, selection
from admm_prune.point import Point
from admm_prune.problem import Quadratic, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form
from admm_prune.solvers.group_obs import checked_groups


@dataclass(frozen=True)
class GroupMask:
    """min over masks m of (1 - m)^T Q (1 - m), Q = (V^T V) * A summed over groups; what is kept stays as it is.

    The closed form keeps the groups of the largest Q_gg, and is exact where groups do not interact: with one price t
    over all modules it keeps g iff Q_gg > t c_g. With `interactions` groups go one by one, each time the one that
    raises the loss least, argmin_j Q_jj + 2 sum_{k gone} Q_jk. Q_gg is Wanda's score,
    squared and summed over a column.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.
    """

    interactions: bool = False

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "its scores are entries of one Hessian")
        constraint = checked_groups(self, problem)
        began = time.perf_counter()
        dense = problem.minimizer
        if constraint.contains(Point(weight=dense)):
            return closed_form(problem, Point(weight=dense), began, start)
        width, columns = constraint.width, dense.shape[1]
        q = groups.interactions(problem.hessian, dense, width)
        keep = constraint.budget(columns)
        kept = _greedy(q, keep) if self.interactions else selection.largest(q.diagonal(), keep)
        weight = dense.where(kept.repeat_interleave(width), 0)
        return closed_form(problem, Point(weight=weight), began, start)


def _greedy(q: Tensor, keep: int) -> Tensor:
    """The groups that stay when they go one by one, the least rise first; ties: the higher index goes first."""
    rise = q.diagonal().clone()
    kept = torch.ones(len(q), dtype=torch.bool, device=q.device)
    for _ in range(len(q) - keep):
        least = int(len(q) - 1 - rise.where(kept, torch.inf).flip(0).argmin())
        kept[least] = False
        rise += 2 * q[least]
    return kept
