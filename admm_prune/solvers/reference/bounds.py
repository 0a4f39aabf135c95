"""Lower bounds that need no search: valid for every support, at the price of one factorization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.solvers.reference.rows import quadratic, scaled_hessian, to_array
from admm_prune.solvers.reference.supports import Supports, recognise

VACUOUS = 0.1  # a smaller ratio certifies nothing worth saying
_EPSILON = torch.finfo(torch.float64).eps


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
    def above(cls, floor: float, loss: float, kind: str, objective: float | None) -> Bound:
        """The bound floor + loss, compared with an objective; floor = f(minimizer)."""
        if objective is None:
            return cls(floor + loss, kind)
        lost = objective - floor
        return cls(floor + loss, kind, min(1.0, loss / lost) if lost > 0 else 1.0)


def lower_bound(candidate: object, objective: float | None = None) -> Bound:
    """The best of three bounds, with K = Ã^-1 in Jacobi-scaled coordinates, r removals, and K^ = K with unit diagonal:

        removal            loss(R) >= max_{j in R} w_j^2 / K_jj >= the r-th smallest of w_j^2 / K_jj,
        Hessian diagonal   loss(R) >= lambda_min(Ã) sum_{j in R} w_j^2,
        inverse diagonal   loss(R) >= sum_{j in R} w_j^2 / K_jj / lambda_max(K^),

    the sums over the r smallest terms, each within its own budget: group, row or matrix. Computed in float64 and
    lowered by the rounding that cond(Ã) allows; zero where Ã is singular to working precision.

    Args:
        candidate: a Quadratic problem.
        objective: the value of a feasible point, to compare with.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: supports of an unknown kind, or a Hessian that is not positive definite.

    Source: this project's methods, local.md, section 8.
    """
    problem = quadratic("lower_bound", candidate)
    hessian, scale = (torch.from_numpy(x) for x in scaled_hessian("lower_bound", problem))
    target = torch.from_numpy(to_array(problem.minimizer)) * scale
    supports = recognise("lower_bound", problem.constraint, (target.shape[0], target.shape[1]))
    losses = loss_bounds(hessian, target, supports)
    kind = max(losses, key=lambda name: losses[name])
    floor = problem.value(Point(weight=problem.minimizer))
    return Bound.above(floor, losses[kind], kind, objective)


def loss_bounds(hessian: Tensor, target: Tensor, supports: Supports) -> dict[str, float]:
    """The three bounds of `lower_bound` by name, on the loss above f(minimizer).

    Args:
        hessian: Ã (in, in), float64, unit diagonal, positive definite.
        target: w (out, in), float64, Jacobi-scaled.
    """
    width = len(hessian)
    spectrum = torch.linalg.eigvalsh(hessian)
    largest = float(spectrum[-1])
    least = max(0.0, float(spectrum[0]) - 4 * width * _EPSILON * largest)
    if least == 0.0:
        return {"Hessian diagonal": 0.0}
    rounding = max(0.0, 1 - 8 * width * _EPSILON * largest / least)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    diagonal = inverse.diagonal()
    correlation = inverse / diagonal.sqrt() / diagonal.sqrt()[:, None]
    spread = float(torch.linalg.eigvalsh(correlation)[-1])
    removal = target.square() / diagonal
    cheapest = least_sum(removal, supports)
    return {
        "removal": _least_maximum(removal, supports) * rounding,
        "Hessian diagonal": least_sum(target.square(), supports) * least * (1 - 4 * width * _EPSILON),
        "inverse diagonal": cheapest / spread * rounding,
    }


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
