"""Lower bounds that need no search: valid for every support, at the price of one factorization."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.solvers.reference.rigorous import UNIT, Form, gamma, total_bound
from admm_prune.solvers.reference.rows import Supports, floor_of, quadratic, recognise, scaled_hessian, to_array

VACUOUS = 0.1  # a smaller ratio certifies nothing worth saying


@dataclass(frozen=True)
class Bound:
    """problem.value(V) >= value for every V in the constraint.

    Args:
        value: the bound.
        kind: which argument gave it.
        ratio: (value - f(minimizer)) / (objective - f(minimizer)) for the objective asked about, None without one: 1 is
            a proof of optimality, and no V can be better than the objective by more than the factor ratio.
    """

    value: float
    kind: str
    ratio: float | None = None

    @property
    def vacuous(self) -> bool:
        """True where the ratio is below 0.1: a bound to be reported as no certificate."""
        return self.ratio is not None and self.ratio < VACUOUS

    @classmethod
    def above(cls, floor: float, value: float, kind: str, objective: float | None) -> Bound:
        """The bound `value`, compared with an objective; floor = f(minimizer)."""
        if objective is None:
            return cls(value, kind)
        lost = objective - floor
        return cls(value, kind, min(1.0, max(0.0, value - floor) / lost) if lost > 0 else 1.0)


def lower_bound(candidate: object, objective: float | None = None) -> Bound | None:
    """The best of three bounds, with K = Ã^-1 in Jacobi-scaled coordinates, r removals, and K^ = K with unit diagonal:

        removal            loss(R) >= max_{j in R} w_j^2 / K_jj >= the r-th smallest of w_j^2 / K_jj,
        Hessian diagonal   loss(R) >= lambda_min(Ã) sum_{j in R} w_j^2,
        inverse diagonal   loss(R) >= sum_{j in R} w_j^2 / K_jj / lambda_max(K^),

    the sums over the r smallest terms, each within its own budget: group, row or matrix; in the second Ã has a unit
    diagonal. Computed in float64 and lowered by bounds of all rounding (see `rigorous`). Where Ã is definite and no
    more is proved, the bound is f(minimizer).

    Args:
        candidate: a Quadratic problem.
        objective: the value of a feasible point, to compare with.

    Returns:
        None where float64 does not prove that A is positive definite: then f has no bound.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: supports of an unknown kind, or a Hessian that is not positive definite.

    Source: this project's methods, local.md, section 8.
    """
    problem = quadratic("lower_bound", candidate)
    form, scale = scaled_hessian("lower_bound", problem)
    target = to_array(problem.minimizer) * scale
    supports = recognise("lower_bound", problem.constraint, (target.shape[0], target.shape[1]))
    losses = loss_bounds(form, torch.from_numpy(target), supports)
    kind = max(losses, key=lambda name: losses[name])
    floor = floor_of(problem, scale)
    value = total_bound(form, floor, losses[kind])
    return None if value is None else Bound.above(floor.value, value, kind, objective)


def loss_bounds(form: Form, target: Tensor, supports: Supports) -> dict[str, float]:
    """The three bounds of `lower_bound` by name, on the loss above f(minimizer).

    The terms and their sums are of numbers that are not negative, and lose at most gamma_(k+8) of k terms.

    Args:
        form: of Ã (in, in).
        target: w (out, in), float64, scaled as Ã.
    """
    if form.least == 0:
        return {"Hessian diagonal": 0.0}
    rounding = 1 - gamma(target.numel() + 8)
    unit = scaled_exactly(target)
    squares = target.mul(unit).square()
    cell = rounding / unit / unit
    diagonal = least_sum(squares * torch.from_numpy(form.diagonal), supports) * form.least
    found = {"Hessian diagonal": diagonal * cell}
    if form.inverse_error < 1:
        removal = squares / torch.from_numpy(form.inverse.diagonal().copy())
        kept = (1 - form.inverse_error) * (1 - 2 * UNIT) * cell
        found["removal"] = _least_maximum(removal, supports) * kept
        found["inverse diagonal"] = least_sum(removal, supports) / form.inverse_spread * kept
    return {name: loss if math.isfinite(loss) else 0.0 for name, loss in found.items()}


def scaled_exactly(target: Tensor) -> float:
    """A power of two that brings the largest entry next to 1; 1 where all are zero."""
    largest = float(target.abs().max())
    return 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def least_sum(terms: Tensor, supports: Supports) -> float:
    """min_R sum_{j in R} terms_j over the entries R that a support removes; terms (out, in) are not negative."""
    return _over_budgets(terms, supports, lambda smallest: smallest.sum((-1, -2)))


def _least_maximum(terms: Tensor, supports: Supports) -> float:
    """min_R sum_i max_{j in R, row i} terms_ij; one maximum over all rows where they share a budget."""
    return _over_budgets(terms, supports, lambda smallest: smallest.amax((-1, -2)))


def _over_budgets(terms: Tensor, supports: Supports, reduce: Callable[[Tensor], Tensor]) -> float:
    """The sum over rows of reduce(the smallest terms of each group (rows, groups, removed))."""
    if supports.rows is None:
        removed = terms.numel() - supports.total
        return float(reduce(terms.reshape(1, 1, -1).sort(-1).values[..., :removed])) if removed else 0.0
    total = 0.0
    for group, keep in set(supports.rows):
        if keep == group:
            continue
        rows = torch.tensor([row == (group, keep) for row in supports.rows])
        cells = terms[rows].unflatten(1, (-1, group)).sort(-1).values
        total += float(reduce(cells[..., : group - keep]).sum())
    return total
