"""Structured optimal brain surgeon: whole groups of columns go, and the columns that stay answer exactly."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from admm_prune.kernels import groups, precision
from admm_prune.point import Point
from admm_prune.problem import GroupConstraint, Quadratic, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form

_LOOKS = 128  # at the scores of all groups, where the batch is not given
_LARGEST_BATCH = 32


@dataclass(frozen=True)
class GroupOBS:
    """Removes the groups R of columns of the least loss tr(V_R (K_RR)^-1 V_R^T), K = A^-1, then solves least squares.

    The loss is exact for the groups removed so far: all other columns answer. The last step solves the least squares on
    the columns that stay afresh, so that no error of the downdates is left.

    Args:
        batch: groups removed between two looks at the scores: 1 for the greedy choice, 0 for one look (one-shot). None
            for about 128 looks, at most 32 groups at a time.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no GroupConstraint.

    Sources: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; for groups,
    Kurtic et al., ZipLM, 2023.
    """

    batch: int | None = 1

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "it works on the inverse of one Hessian shared by all rows")
        constraint = checked_groups(self, problem)
        began = time.perf_counter()
        dense = Point(weight=problem.minimizer)
        if constraint.contains(dense):  # nothing has to go: nothing changes, not by a bit
            return closed_form(problem, dense, began, start)
        width, columns = constraint.width, problem.minimizer.shape[1]
        count = columns // width
        found = groups.eliminate(
            problem.hessian, problem.minimizer, width, count - constraint.budget(columns), self.size(count)
        )
        kept = torch.ones(columns, dtype=torch.bool, device=found.order.device)
        kept[groups.columns_of(found.order, width)] = False
        weight = groups.minimize_on_columns(problem.hessian, problem.minimizer, kept)
        notes = ("groups were eliminated in float64",) if found.escalated else ()
        return closed_form(problem, Point(weight=weight), began, start, notes)

    def size(self, count: int) -> int:
        """Of a batch, where there are so many groups."""
        if self.batch is None:
            return min(_LARGEST_BATCH, max(1, count // _LOOKS))
        return self.batch or count


def checked_groups(solver: object, problem: Quadratic) -> GroupConstraint:
    """The constraint of the problem, as column groups.

    Raises:
        TypeError: it is of another kind; the message names both sides.
    """
    constraint = problem.constraint
    if not isinstance(constraint, GroupConstraint):
        raise TypeError(
            f"{type(solver).__name__} needs a GroupConstraint (it removes whole columns); "
            f"{type(constraint).__name__} of {type(problem).__name__} lacks budget or width"
        )
    return constraint
