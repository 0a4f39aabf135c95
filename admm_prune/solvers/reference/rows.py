"""The normal form of every reference: independent rows, Jacobi-scaled, in float64, each with its own supports.

With A = S Ã S, S the powers of two next to sqrt(diag A), and W' = minimizer S, which rounds nothing, a problem with the
Hessian A on every row splits as

    f(V) = f(minimizer) + sum_i loss_i(R_i),    loss(R) = w_R^T (K_RR)^-1 w_R,    K = Ã^-1,

where R_i are the entries removed from row i. loss is monotone: R in R' implies loss(R) <= loss(R').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import comb, prod

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Fitted, Quadratic, fits
from admm_prune.result import Result, Status
from admm_prune.solvers.reference.rigorous import (
    Array,
    Floor,
    Form,
    Mask,
    gamma,
    rounded_down_sum,
    scaled_form,
    total_bound,
)
from admm_prune.solvers.reference.supports import recognise

__all__ = ["Array", "Mask", "Row", "Separated", "floor_of", "quadratic", "scaled_hessian", "separate", "to_array"]


@dataclass(frozen=True, eq=False)
class Row:
    """One independent row: loss(R) = w_R^T (K_RR)^-1 w_R over the supports that keep `keep` of every `group` entries.

    Args:
        form: of Ã (n, n), diagonal in [1/2, 2), positive definite.
        target: w (n,), the unconstrained minimum.
        group: divides n; n for one budget over the whole row.
        keep: entries kept in every group of consecutive entries.
    """

    form: Form
    target: Array
    group: int
    keep: int

    @property
    def hessian(self) -> Array:
        """Ã (n, n)."""
        return self.form.hessian

    @property
    def inverse(self) -> Array:
        """K = Ã^-1 (n, n)."""
        return self.form.inverse

    @property
    def width(self) -> int:
        return len(self.target)

    @property
    def removals(self) -> int:
        """How many entries every support of full size removes."""
        return self.width // self.group * (self.group - self.keep)

    @property
    def supports(self) -> int:
        """The number of supports of full size."""
        return int(prod([comb(self.group, self.keep)] * (self.width // self.group)))

    def completed(self, kept: Mask) -> Mask:
        """The support of full size nearest to `kept`: its entries first, larger |w| first."""
        size = np.abs(self.target)
        score = (size / (1 + size.max()) + kept).reshape(-1, self.group)
        full = np.zeros_like(score, dtype=np.bool_)
        np.put_along_axis(full, np.argsort(-score, axis=1, kind="stable")[:, : self.keep], True, axis=1)
        return full.reshape(-1)

    def loss(self, kept: Mask) -> float:
        """loss(R) for R = the entries not kept."""
        removed = ~kept
        target = self.target[removed]
        return float(target @ np.linalg.solve(self.inverse[np.ix_(removed, removed)], target))

    def refit(self, kept: Mask) -> Array:
        """argmin_v (v - w)^T Ã (v - w) over the v that vanish where `kept` is False: v_S = w_S + Ã_SS^-1 Ã_SR w_R."""
        fitted = np.zeros_like(self.target)
        if kept.any():
            pull = self.hessian[np.ix_(kept, ~kept)] @ self.target[~kept]
            factor = scipy.linalg.cho_factor(self.hessian[np.ix_(kept, kept)])
            fitted[kept] = self.target[kept] + scipy.linalg.cho_solve(factor, pull)
        return fitted


@dataclass(frozen=True, eq=False)
class Separated:
    """A Quadratic problem in normal form.

    Args:
        problem: the problem itself.
        form: of the Hessian that the rows of the matrix share.
        target: the scaled minimizer (out, in).
        rows: its independent rows. One budget over a whole matrix makes it a single row of out * in entries, with the
            Hessian I kron Ã.
        scale: S (in,), powers of two.
    """

    problem: Quadratic
    form: Form
    target: Array
    rows: tuple[Row, ...]
    scale: Array

    @cached_property
    def floor(self) -> float:
        """f at the unconstrained minimum: what no support can beat."""
        return self.problem.value(Point(weight=self.problem.minimizer))

    def point(self, supports: Sequence[Mask]) -> Point:
        """The least-squares weights on the supports of all rows, unscaled, in the problem's dtype."""
        minimizer = self.problem.minimizer
        fitted = np.stack([row.refit(kept) for row, kept in zip(self.rows, supports, strict=True)])
        weight = torch.from_numpy(fitted.reshape(minimizer.shape) / self.scale).to(minimizer)
        # A matrix row that loses nothing keeps its own bits.
        untouched = torch.from_numpy(np.stack(supports).reshape(minimizer.shape).all(1)).to(minimizer.device)
        return Point(weight=torch.where(untouched[:, None], minimizer, weight))

    def supports(self, start: Point | None) -> list[Mask] | None:
        """The supports of a start, row by row; None where there is no start or where it is not feasible."""
        if start is None or not self.problem.constraint.contains(start):
            return None
        mask = to_array(start["weight"]) != 0
        return list(mask.reshape(len(self.rows), -1))

    def result(
        self,
        supports: Sequence[Mask],
        row_bounds: Sequence[float] | None,
        *,
        start: Point | None = None,
        status: Status = Status.CLOSED_FORM,
        iterations: int = 0,
        seconds: float = 0.0,
        notes: tuple[str, ...] = (),
    ) -> Result:
        """The refitted point with its value, or the start's projection where that is better.

        Args:
            row_bounds: proved lower bounds of the losses of the rows.
        """
        solution = self.point(supports)
        objective = self.problem.value(solution)
        if start is not None:
            projected = self.problem.constraint.project(start)
            value = self.problem.value(projected)
            if value < objective or not math.isfinite(objective):
                solution, objective = projected, value
        notes = (*getattr(self.problem, "notes", ()), *notes)
        result = Result(solution, status, objective, iterations=iterations, seconds=seconds, notes=notes)
        bound = None if row_bounds is None else self.bound(row_bounds)
        return replace(result, bound=None if bound is None else min(objective, bound))

    def bound(self, row_bounds: Sequence[float]) -> float | None:
        """A lower bound of f from proved ones of the rows' losses; None where nothing is proved."""
        return total_bound(self.form, floor_of(self.problem, self.scale), rounded_down_sum(list(row_bounds)))


def separate(owner: str, candidate: object) -> Separated:
    """The normal form of a problem.

    Args:
        owner: who asks, for the messages.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: its supports are of an unknown kind, or its Hessian is not positive definite.
    """
    problem = quadratic(owner, candidate)
    form, scale = scaled_hessian(owner, problem)
    target = to_array(problem.minimizer) * scale
    count, width = target.shape
    supports = recognise(owner, problem.constraint, (count, width))
    if supports.rows is None:
        stacked = np.asarray(np.kron(np.eye(count), form.hessian), dtype=np.float64)
        whole = Row(Form(stacked, form.doubt), target.reshape(-1), count * width, supports.total)
        return Separated(problem, form, target, (whole,), scale)
    rows = tuple(Row(form, w, group, keep) for w, (group, keep) in zip(target, supports.rows, strict=True))
    return Separated(problem, form, target, rows, scale)


def floor_of(problem: Quadratic, scale: Array) -> Floor:
    """f at the minimizer of a problem, with the rounding of both."""
    value = problem.value(Point(weight=problem.minimizer))
    found = problem.minimizer_residual() if fits(problem, Fitted) else None
    if found is None:
        return Floor(value)
    residual, sizes = (np.abs(to_array(x)) / scale for x in found[:2])
    return Floor(value, residual + gamma(len(scale) + 4) * sizes, found[2])


def quadratic(owner: str, problem: object) -> Quadratic:
    """The problem itself; raises TypeError, naming both sides and what is missing, where it is not Quadratic."""
    if fits(problem, Quadratic):
        return problem
    missing = ", ".join(name for name in ("hessian", "linear", "minimizer", "value") if not hasattr(problem, name))
    raise TypeError(f"{owner} needs a Quadratic problem; {type(problem).__name__} lacks {missing}")


def scaled_hessian(owner: str, problem: Quadratic) -> tuple[Form, Array]:
    """The form of Ã and S (in,), powers of two, A = S Ã S, the diagonal of Ã in [1/2, 2).

    Raises:
        ValueError: A is not finite or not positive definite.
    """
    hessian = to_array(problem.hessian)
    diagonal = hessian.diagonal()
    names = f"{owner} needs a positive definite Hessian; that of {type(problem).__name__}"
    if not np.isfinite(hessian).all():
        raise ValueError(f"{names} holds NaN or Inf")
    if not (diagonal > 0).all():
        raise ValueError(f"{names} has {int((diagonal <= 0).sum())} diagonal entries <= 0: cut these channels out")
    form, exponents = scaled_form(hessian)
    if int(torch.linalg.cholesky_ex(torch.from_numpy(form.hessian)).info):
        raise ValueError(f"{names} is not: raise the ridge")
    return form, np.ldexp(1.0, exponents.astype(np.int32))


def to_array(x: Tensor) -> Array:
    return np.asarray(x.detach().double().cpu().numpy(), dtype=np.float64)
