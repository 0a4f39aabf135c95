"""Least squares on a support to a proved residual, for every row of any mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.ops.quadratic import unit_diagonal

TOLERANCE = 1e-6
_GATHERED = 1 << 24  # entries of the gathered Hessians that are factored at once
_REFINEMENTS = 12
_PROGRESS = 0.5  # a refinement that leaves more of the residual stalls
_RANK = 1e-12  # relative to the largest eigenvalue: those below are taken as zero


@dataclass(frozen=True, eq=False)
class ExactRefit:
    """V and how exactly every row was solved.

    Attributes:
        weight: V (out, in), float64.
        residual: (out,) of `kkt_residual`, computed from V in float64.
        double: rows whose factorization in float32 did not do, and was repeated in float64.
        minimum_norm: rows where A_SS is singular to working precision: V is the solution of least norm in coordinates
            where A has a unit diagonal.
    """

    weight: Tensor
    residual: Tensor
    double: int
    minimum_norm: int


def kkt_residual(hessian: Tensor, minimizer: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """|(A (v - w))_S| / |(A w)_S| of every row (out,), in coordinates where A has a unit diagonal, in float64.

    0 where S is empty, or both vanish. What is scaled does not change it: the gradient of f on S over the gradient at
    zero. V may be of any dtype; a rounded V has the residual of its rounding.
    """
    unit, scale = unit_diagonal(hessian.double())
    target = minimizer.double() * scale
    gradient = ((weight.double() * scale - target) @ unit).mul_(mask).norm(dim=1)
    linear = (target @ unit).mul_(mask).norm(dim=1)
    return torch.where(gradient == 0, 0.0, gradient / linear)  # NaN stays NaN


def exact_refit(hessian: Tensor, minimizer: Tensor, mask: Tensor, tolerance: float = TOLERANCE) -> ExactRefit:
    """argmin_V tr((V - W) A (V - W)^T) over V that vanish off the mask, every row to a residual of `tolerance`.

    Rows of similar |S| are factored together in float32, in coordinates where A has a unit diagonal, and refined with
    residuals in float64. Where that stalls, the row is factored in float64; where A_SS is singular, it is solved by its
    eigenvalues. Rows that all keep the same columns share one factorization. Operations: sum |S|^3 / 3, and
    2 out in^2 for each refinement, of which most rows need 2.

    Args:
        hessian: A (in, in), positive semidefinite, with a positive diagonal.
        minimizer: W (out, in).
        mask: (out, in), boolean.

    Raises:
        ValueError: NaN or Inf, a diagonal entry that is not positive, or a mask of another shape or dtype.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 12, on iterative refinement.
    """
    if mask.shape != minimizer.shape or mask.dtype is not torch.bool:
        raise ValueError(
            f"the mask must be boolean and of shape {tuple(minimizer.shape)}, not {mask.dtype} {tuple(mask.shape)}"
        )
    if not bool(hessian.isfinite().all() and minimizer.isfinite().all()):
        raise ValueError("the Hessian or the minimizer contains NaN or Inf")
    if bool((hessian.diagonal() <= 0).any()):
        raise ValueError("the Hessian has diagonal entries <= 0: cut these channels out")
    unit, scale = unit_diagonal(hessian.double())
    target = minimizer.double() * scale
    size = target.abs().amax(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    right = (target / size @ unit).mul_(mask)
    v = torch.zeros_like(target)
    double = minimum_norm = 0
    for rows in _alike(mask):
        left = _refined(v, unit, right, mask, rows, tolerance, torch.float32)
        double += len(left)
        if len(left):
            left = _refined(v, unit, right, mask, left, tolerance, torch.float64)
        minimum_norm += len(left)
        for row in left.tolist():
            v[row] = _least_norm(unit, right[row], mask[row])
    v = v.mul_(size).div_(scale)
    return ExactRefit(v, kkt_residual(hessian, minimizer, v, mask), double, minimum_norm)


def _alike(mask: Tensor) -> Iterator[Tensor]:
    """The rows in batches: all where they keep the same columns, else those of similar numbers kept."""
    if bool((mask == mask[:1]).all()):
        yield torch.arange(len(mask), device=mask.device)
        return
    sizes = mask.sum(1)
    order = sizes.argsort(stable=True)
    position = 0
    while position < len(order):
        limit = min(len(order) - position, max(1, _GATHERED // max(1, int(sizes[order[position]])) ** 2))
        widest = int(sizes[order[position + limit - 1]])
        count = max(1, min(limit, _GATHERED // max(1, widest) ** 2))
        yield order[position : position + count]
        position += count


def _refined(
    v: Tensor, unit: Tensor, right: Tensor, mask: Tensor, rows: Tensor, tolerance: float, dtype: torch.dtype
) -> Tensor:
    """Solves some rows in place by a factorization in `dtype`; the rows that it does not bring to the tolerance."""
    masks, b = mask[rows], right[rows]
    width = int(masks.sum(1).max())
    if width == 0:
        return rows[:0]
    same = len(rows) > 1 and bool((masks == masks[:1]).all())
    columns = (masks[:1] if same else masks).int().argsort(dim=1, descending=True, stable=True)[:, :width]
    present = (masks[:1] if same else masks).gather(1, columns)
    blocks = unit.to(dtype)[columns[:, :, None], columns[:, None, :]]
    blocks.masked_fill_(~(present[:, :, None] & present[:, None, :]), 0)
    blocks.diagonal(dim1=1, dim2=2).masked_fill_(~present, 1)
    factor, info = torch.linalg.cholesky_ex(blocks)
    failed = (info != 0).expand(len(rows))
    where = columns.expand(len(rows), -1)
    solution, residual = torch.zeros_like(b), b
    whole = b.norm(dim=1)
    before = torch.full_like(whole, torch.inf)
    for _ in range(_REFINEMENTS):
        short = residual.norm(dim=1)
        if bool(((short <= 0.5 * tolerance * whole) | (short > _PROGRESS * before) | failed).all()):
            break
        before = torch.minimum(before, short)
        largest = residual.abs().amax(1, keepdim=True).clamp_min(1e-300)
        right_sides = (residual / largest).gather(1, where).to(dtype)
        # One factorization of many rows solves them as columns of one right-hand side.
        step = torch.cholesky_solve(right_sides.mT[None] if same else right_sides[:, :, None], factor)
        step = step[0].mT if same else step[:, :, 0]
        step = step.double().mul_(largest).masked_fill_(~present, 0)
        candidate = solution.scatter_add(1, where, step)
        after = (b - candidate @ unit).mul_(masks)
        better = ((after.norm(dim=1) < short) & ~failed)[:, None]
        solution, residual = torch.where(better, candidate, solution), torch.where(better, after, residual)
    done = (residual.norm(dim=1) <= tolerance * whole) & ~failed
    v[rows[done]] = solution[done]
    return rows[~done]


def _least_norm(unit: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """A_SS^+ b_S, with the eigenvalues below 1e-12 of the largest taken as zero (in,)."""
    inside = mask.nonzero()[:, 0]
    values, vectors = torch.linalg.eigh(unit[inside[:, None], inside])
    coefficients = right[inside] @ vectors
    scaled = torch.where(values > _RANK * values[-1], coefficients / values, 0.0)
    solution = torch.zeros_like(right)
    solution[inside] = vectors @ scaled
    return solution
