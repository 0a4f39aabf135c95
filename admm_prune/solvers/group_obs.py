"""Column groups removed one by one by structured optimal brain surgeon, or masked without an update of the others."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.errors import check_at_least
from admm_prune.ops import group_compensation, precision
from admm_prune.point import Point
from admm_prune.problem import GroupConstraint, Quadratic, checked_constraint, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form

_UPDATES = 128  # updates of the scores, where the batch is not given
_LARGEST_BATCH = 32


@dataclass(frozen=True)
class GroupMask:
    """min over masks m of (1 - m)^T Q (1 - m), Q = (V^T V) * A summed over groups; kept weights are unchanged.

    The closed form keeps the groups of the largest Q_gg, and is exact where groups do not interact: with one price t
    over all modules it keeps g iff Q_gg > t c_g. With `interactions` groups are removed one by one, each
    time the one that raises the loss least, argmin_j Q_jj + 2 sum_{k gone} Q_jk. Q_gg is Wanda's score,
    squared and summed over a column.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.
    """

    interactions: bool = False

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "its scores are entries of one Hessian")
        constraint = checked_constraint(self, problem, GroupConstraint, "it removes whole columns")
        began = time.perf_counter()
        dense = problem.minimizer
        if constraint.contains(Point(weight=dense)):
            return closed_form(problem, Point(weight=dense.clone()), began, start)
        width, columns = constraint.width, dense.shape[1]
        q = group_compensation.interactions(problem.hessian, dense, width)
        mask = torch.ones(len(q), dtype=torch.bool, device=q.device)
        mask[self.order(q, len(q) - constraint.budget(columns))] = False
        weight = dense.where(mask.repeat_interleave(width), 0)
        return closed_form(problem, Point(weight=weight), began, start)

    def order(self, q: Tensor, count: int) -> Tensor:
        """The first `count` groups in the order of their removal; ties: the higher index first."""
        rise = q.diagonal().clone()
        if not self.interactions:
            return (len(q) - 1 - rise.flip(0).argsort(stable=True))[:count]
        order: list[int] = []
        for _ in range(count):
            least = int(len(q) - 1 - rise.flip(0).argmin())
            order.append(least)
            rise += 2 * q[least]
            rise[least] = torch.inf
        return torch.tensor(order, dtype=torch.long, device=q.device)


@dataclass(frozen=True)
class GroupOBS:
    """Removes the groups R of columns of the least loss tr(V_R (K_RR)^-1 V_R^T), K = A^-1, then solves least squares.

    The loss is exact for the groups removed so far: all other columns are refitted. The last step solves the least
    squares on the remaining columns again, so that no error of the downdates remains.

    Args:
        batch: groups removed between two updates of the scores: 1 for the greedy choice, 0 for a one-shot choice. None
            for about 128 updates, at most 32 groups at a time.

    Raises:
        UserError: a negative batch.
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.

    Sources: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; for groups,
    Kurtic et al., ZipLM, 2023.
    """

    batch: int | None = 1

    def __post_init__(self) -> None:
        check_at_least(self, batch=0)

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "it works on the inverse of one Hessian shared by all rows")
        constraint = checked_constraint(self, problem, GroupConstraint, "it removes whole columns")
        began = time.perf_counter()
        dense = Point(weight=problem.minimizer)
        if constraint.contains(dense):  # nothing to prune: the weights are returned bitwise unchanged
            return closed_form(problem, dense.clone(), began, start)
        width, columns = constraint.width, problem.minimizer.shape[1]
        count = columns // width
        elimination = group_compensation.eliminate(
            problem.hessian, problem.minimizer, width, count - constraint.budget(columns), self.size(count)
        )
        mask = torch.ones(columns, dtype=torch.bool, device=elimination.order.device)
        mask[group_compensation.columns_of(elimination.order, width)] = False
        weight = group_compensation.minimize_on_columns(problem.hessian, problem.minimizer, mask)
        notes = ("groups were eliminated in float64",) if elimination.escalated else ()
        return closed_form(problem, Point(weight=weight), began, start, notes)

    def size(self, count: int) -> int:
        """The size of a batch for this number of groups."""
        if self.batch is None:
            return min(_LARGEST_BATCH, max(1, count // _UPDATES))
        return self.batch or count
