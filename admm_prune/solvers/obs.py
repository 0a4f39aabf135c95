"""SparseGPT: optimal brain surgeon, one column after the other, on a shared inverse factor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import check_at_least, unknown
from admm_prune.ops import backend, precision, quadratic, selection
from admm_prune.point import Point
from admm_prune.problem import Quadratic, RunConstraint, SupportConstraint, checked_constraint, require
from admm_prune.result import Result
from admm_prune.solvers.base import closed_form

_PANEL = 16  # columns updated one by one before the rest of the block follows in one product
_WIDEST_GROUP = 32  # of the kernel
_ACCURATE = 1e-3  # residual of a factor, above which it is computed in float64


@dataclass(frozen=True)
class SparseGPT:
    """For column j = 1..in: prune it by the mask, and spread its error over the columns to its right,

        e = (w_j - mask_j w_j) / U_jj,    w_k <- w_k - e U_jk  for k > j,    with A^-1 = U^T U, U upper triangular.

    Each step is the exact least-squares update of the columns to the right, with all columns to the left fixed. The
    mask of a block of columns is chosen when the block is reached, by the scores w_ij^2 / U_jj^2 and the block's part
    of the budget; in N:M patterns, group by group. A is the problem's Hessian: give the problem `ridge=0,
    damping=0.01` for the published damping.

    Args:
        block: columns that share one choice of the mask, 128 as published.
        mask_scope: "block" as published, or "layer": one mask for the whole matrix, before any column is pruned, by
            w_ij^2 / (A^-1)_jj.

    Raises:
        UserError: a block of no column, or an unknown scope.
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.

    Reference implementation: `textbook.sparsegpt`.

    Source: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot, 2023.
    """

    block: int = 128
    mask_scope: Literal["block", "layer"] = "block"

    def __post_init__(self) -> None:
        check_at_least(self, block=1)
        if self.mask_scope not in ("block", "layer"):
            raise unknown("mask_scope", self.mask_scope, ("block", "layer"))

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "it works on the inverse of one Hessian shared by all rows")
        constraint = checked_constraint(self, problem, SupportConstraint, "it selects a support block by block")
        began = time.perf_counter()
        dense = Point(weight=problem.minimizer)
        if constraint.contains(dense):  # nothing to prune: the weights are returned bitwise unchanged
            return closed_form(problem, dense.clone(), began, start)
        scaled, scale = quadratic.unit_diagonal(problem.hessian)
        factor, notes = _inverse_factor(scaled)
        columns = (problem.minimizer * scale).T.contiguous()  # (in, out): a column of W is a row here
        if self.mask_scope == "layer":
            score = columns.abs() / factor.norm(dim=0)[:, None]
            mask = constraint.select(Point(weight=score.T.contiguous()))["weight"].T
            self._sweep(columns, factor, constraint, mask)
        else:
            with selection.skip_nan_check():  # non-finite values are detected at the end
                self._sweep(columns, factor, constraint, None)
        solution = Point(weight=(columns.T / scale).contiguous())
        return closed_form(problem, solution, began, start, (*notes, *backend.note(columns.device)))

    def _sweep(self, columns: Tensor, factor: Tensor, constraint: SupportConstraint, mask: Tensor | None) -> None:
        """Prunes all columns, in place. Without a mask, selects one block by block."""
        width = len(columns)
        group = constraint.group_width
        panel = group * max(1, min(_PANEL, self.block) // group)
        block = panel * max(1, self.block // panel)
        pattern = _pattern(constraint, (columns.shape[1], width)) if group > 1 else None
        known = mask is not None or group == 1 or pattern is not None  # when the block is reached
        fused = known and backend.uses_triton(columns, torch.float32)
        if fused:
            factor = factor.contiguous()
        for start in range(0, width, block):
            stop = min(start + block, width)
            keep = None if mask is None else mask[start:stop]
            if keep is None and group == 1:
                keep = _choose(columns, factor, constraint, start, stop)
            if fused:
                from admm_prune.ops.triton.sweep import eliminate_

                errors = eliminate_(columns, factor, start, stop, keep, pattern or (1, 1))
            else:
                errors = _eliminate_(columns, factor, constraint, start, stop, keep, panel)
            if stop < width:
                columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def _eliminate_(
    columns: Tensor,
    factor: Tensor,
    constraint: SupportConstraint,
    start: int,
    stop: int,
    keep: Tensor | None,
    panel: int,
) -> Tensor:
    """As `ops.triton.sweep.eliminate_`: without a mask, selects one group by group."""
    rows, group = columns[start:stop], constraint.group_width
    errors = torch.empty_like(rows)
    chooses = keep is None
    keep = torch.empty_like(rows, dtype=torch.bool) if keep is None else keep.contiguous()
    loss = (~keep).to(rows.dtype).div_(factor.diagonal()[start:stop, None])
    for left in range(start, stop, panel):
        right = min(left + panel, stop)
        for j in range(left, right):
            i = j - start
            if chooses and (j - left) % group == 0:
                keep[i : i + group] = _choose(columns, factor, constraint, j, j + group)
                torch.div(~keep[i : i + group], factor.diagonal()[j : j + group, None], out=loss[i : i + group])
            torch.mul(rows[i], loss[i], out=errors[i])
            columns[j + 1 : right].addr_(factor[j, j + 1 : right], errors[i], alpha=-1)
        columns[right:stop].addmm_(factor[left:right, right:stop].T, errors[left - start : right - start], alpha=-1)
    rows.mul_(keep)
    return errors


def _choose(columns: Tensor, factor: Tensor, constraint: SupportConstraint, start: int, stop: int) -> Tensor:
    """The mask (stop - start, out) of some columns, by w^2 / U_jj^2 and their part of the budget."""
    if factor.is_contiguous() and backend.uses_triton(columns, torch.float32):
        from admm_prune.ops.triton.sweep import scores

        score = scores(columns, factor, start, stop)
    else:
        score = (columns[start:stop].abs() / factor.diagonal()[start:stop, None]).T.contiguous()
    part = constraint.column_slice(start, stop, (columns.shape[1], len(columns)))
    return part.select(Point(weight=score))["weight"].T


def _pattern(constraint: SupportConstraint, shape: tuple[int, int]) -> tuple[int, int] | None:
    """(n, m) where every row keeps n of every m consecutive columns; None if that is not known."""
    runs = constraint.runs(shape) if isinstance(constraint, RunConstraint) else None
    return runs if runs is not None and runs[1] == constraint.group_width <= _WIDEST_GROUP else None


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """The factor in the Hessian's own precision, or in float64, with a note, where that fails or is not accurate."""
    note = "the Hessian was factored in float64"
    try:
        factor = quadratic.inverse_factor(hessian)
        residual = 0.0 if hessian.dtype is torch.float64 else quadratic.factor_residual(factor, hessian)
        if residual <= _ACCURATE:
            return factor, ()
        note += f": in {str(hessian.dtype).removeprefix('torch.')} its residual was {residual:.1e}"
    except LinAlgError:
        pass
    return quadratic.inverse_factor(hessian.double()).to(hessian.dtype), (note,)
