"""Refit: the least-squares weights on a support that is already chosen."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import check_at_least
from admm_prune.ops import precision, quadratic
from admm_prune.ops.exact_refit import exact_refit, kkt_residual
from admm_prune.ops.group_compensation import minimize_on_columns
from admm_prune.point import Point
from admm_prune.problem import Problem, Quadratic, Refittable, SupportConstraint, checked_constraint, fits
from admm_prune.result import Result
from admm_prune.solvers.base import Solver, checked_start, closed_form, inner_notes


@dataclass(frozen=True)
class Refit:
    """Solves with another solver, then refits on the support that it chose: min f(x), supp(x) in supp(solution).

    A Quadratic problem is refitted by conjugate gradients, one product with A an iteration: some 8 of them after ADMM,
    some 45 from a support that is independent of A; one whose support is whole columns by one factorization. Any other
    problem must be Refittable and refits itself.

    Args:
        inner: chooses the support; None to refit that of `start`, or of its projection where it is not in the set.
        tolerance: relative residual at which conjugate gradients stop.
        exact: solve a Quadratic problem by factorizations in place of conjugate gradients, every row to a residual of
            1e-6 in float64 (`ops.exact_refit`), and note the largest residual, before and after V is rounded to its
            dtype, and the rows where A is singular on the support, whose solution is the one of least norm.

    Raises:
        UserError: a setting out of range.
        TypeError: the problem is neither Quadratic nor Refittable, or its constraint no SupportConstraint.
        ValueError: neither an inner solver nor a start.
    """

    inner: Solver | None = None
    tolerance: float = 1e-5
    max_iterations: int = 100
    exact: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, tolerance=0, max_iterations=0)

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        if not (fits(problem, Quadratic) or fits(problem, Refittable)):
            raise TypeError(
                f"Refit needs a Quadratic or a Refittable problem; {type(problem).__name__} has neither a "
                "hessian nor a refit"
            )
        constraint = checked_constraint(self, problem, SupportConstraint, "the refitted weights cannot leave it")
        began = time.perf_counter()
        start = checked_start(problem, start)
        notes: tuple[str, ...] = ()
        if self.inner is not None:
            result = self.inner.solve(problem, start=start)
            start, notes = result.solution, inner_notes(result)
        if start is None:
            raise ValueError("Refit needs an inner solver or a start whose support it refits")
        if not constraint.contains(start):
            start = constraint.project(start)
        if not fits(problem, Quadratic):
            return closed_form(problem, problem.refit(start.map(lambda x: x != 0)), began, start, notes)
        if self.exact:
            weight, exactness = refit_exactly(problem, start["weight"])
            return closed_form(problem, Point(weight=weight), began, start, (*notes, exactness))
        weight = start["weight"].clone()
        note = refit_(problem, weight, self.tolerance, self.max_iterations)
        return closed_form(problem, Point(weight=weight), began, start, (*notes, *note))


def refit_exactly(problem: Quadratic, weight: Tensor) -> tuple[Tensor, str]:
    """(V refitted on its support (out, in), in its dtype, a note of the residuals)."""
    mask = weight != 0
    solved = exact_refit(problem.hessian, problem.minimizer, mask)
    rounded = solved.weight.to(weight.dtype)
    stored = kkt_residual(problem.hessian, problem.minimizer, rounded, mask)
    note = f"exact refit: relative residual at most {float(solved.residual.max()):.1e}"
    if rounded.dtype is not torch.float64:
        note += f", {float(stored.max()):.1e} rounded to {str(rounded.dtype).removeprefix('torch.')}"
    if solved.minimum_norm:
        note += f"; {solved.minimum_norm} of {len(mask)} rows are singular: solution of least norm"
    return rounded, note


def refit_(problem: Quadratic, weight: Tensor, tolerance: float, max_iterations: int) -> tuple[str, ...]:
    """Refits V (out, in) on its support, in place: by conjugate gradients, or exactly where it is whole columns.

    Returns:
        A note where the tolerance was not reached.
    """
    mask = weight != 0
    if bool((mask == mask[0]).all()) and not bool(mask[0].all()):
        with suppress(LinAlgError):  # not positive definite in its own precision: use conjugate gradients
            weight.copy_(minimize_on_columns(problem.hessian, problem.minimizer, mask[0]))
            return ()
    reachable = max(tolerance, 50 * torch.finfo(weight.dtype).eps)
    _, residual = quadratic.conjugate_gradient_on_support_(
        weight, problem.hessian, problem.minimizer, mask, tolerance=reachable, max_iterations=max_iterations
    )
    return (f"refit stopped at a relative residual of {residual:.1e}",) if residual > 10 * reachable else ()
