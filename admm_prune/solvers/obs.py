"""SparseGPT: optimal brain surgeon, one column after the other, on a shared inverse factor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from admm_prune.kernels import quadratic
from admm_prune.point import Point
from admm_prune.problem import Quadratic, SupportConstraint, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form

_PANEL = 16  # columns updated one by one before the rest of the block follows in one product


@dataclass(frozen=True)
class SparseGPT:
    """For column j = 1..in: prune it by the mask, and spread its error over the columns to its right,

        e = (w_j - mask_j w_j) / U_jj,    w_k <- w_k - e U_jk  for k > j,    with A^-1 = U^T U, U upper triangular.

    Each step is the exact least-squares answer of the columns to the right, all columns to the left being settled. The
    mask of a block of columns is chosen when the block is reached, by the scores w_ij^2 / U_jj^2 and the block's share
    of the budget; in N:M patterns, group by group. A is the problem's Hessian: give the problem `ridge=0,
    damping=0.01` for the published damping.

    Args:
        block: columns that share one choice of the mask, 128 as published.
        mask_scope: "block" as published, or "layer": one mask for the whole matrix, before any column is settled, by
            w_ij^2 / (A^-1)_jj.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.

    Source: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot, 2023.
    """

    block: int = 128
    mask_scope: Literal["block", "layer"] = "block"

    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "it works on the inverse of one Hessian shared by all rows")
        constraint = problem.constraint
        if not isinstance(constraint, SupportConstraint):
            raise TypeError(f"SparseGPT needs a SupportConstraint; {type(constraint).__name__} lacks select")
        began = time.perf_counter()
        dense = Point(weight=problem.minimizer)
        if constraint.contains(dense):  # nothing has to go: nothing changes, not by a bit
            return closed_form(problem, dense, began, start)
        scaled, scale = quadratic.unit_diagonal(problem.hessian)
        factor, notes = _inverse_factor(scaled)
        columns = (problem.minimizer * scale).T.contiguous()  # (in, out): a column of W is a row here
        if self.mask_scope == "layer":
            score = columns.abs() / factor.norm(dim=0)[:, None]
            mask = constraint.select(Point(weight=score.T.contiguous()))["weight"].T
            self._sweep(columns, factor, constraint, mask)
        else:
            self._sweep(columns, factor, constraint, None)
        solution = Point(weight=(columns.T / scale).contiguous())
        return closed_form(problem, solution, began, start, notes)

    def _sweep(self, columns: Tensor, factor: Tensor, constraint: SupportConstraint, mask: Tensor | None) -> None:
        """Settles all columns, in place. Without a mask, chooses one as it goes."""
        width = len(columns)
        group = constraint.group_width
        panel = group * max(1, min(_PANEL, self.block) // group)
        block = panel * max(1, self.block // panel)
        for start in range(0, width, block):
            stop = min(start + block, width)
            rows = columns[start:stop]
            errors = torch.empty_like(rows)
            if mask is not None:
                keep = mask[start:stop]
            elif group == 1:
                keep = _choose(rows, factor, constraint, start, stop, width)
            else:
                keep = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)  # chosen group by group
            loss = (~keep).to(rows.dtype).div_(factor.diagonal()[start:stop, None])
            for left in range(start, stop, panel):
                right = min(left + panel, stop)
                for j in range(left, right):
                    i = j - start
                    if mask is None and group > 1 and (j - left) % group == 0:
                        keep[i : i + group] = _choose(columns[j : j + group], factor, constraint, j, j + group, width)
                        torch.div(~keep[i : i + group], factor.diagonal()[j : j + group, None], out=loss[i : i + group])
                    torch.mul(rows[i], loss[i], out=errors[i])
                    columns[j + 1 : right].addr_(factor[j, j + 1 : right], errors[i], alpha=-1)
                columns[right:stop].addmm_(
                    factor[left:right, right:stop].T, errors[left - start : right - start], alpha=-1
                )
            rows.mul_(keep)
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def _choose(
    columns: Tensor, factor: Tensor, constraint: SupportConstraint, start: int, stop: int, width: int
) -> Tensor:
    """The mask (stop - start, out) of some columns, by w^2 / U_jj^2 and their share of the budget."""
    score = columns.abs() / factor.diagonal()[start:stop, None]
    share = constraint.share(start, stop, (columns.shape[1], width))
    return share.select(Point(weight=score.T.contiguous()))["weight"].T.contiguous()


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """The factor in the Hessian's own precision, in float64 where that fails; says so."""
    try:
        return quadratic.inverse_factor(hessian), ()
    except RuntimeError:  # torch's LinAlgError, under a name that its types export
        return quadratic.inverse_factor(hessian.double()).to(hessian.dtype), ("the Hessian was factored in float64",)
