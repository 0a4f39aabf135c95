"""Lower bounds that need no search: valid for every support, at the cost of one factorization.

The perspective relaxation: the strongest lower bound here that needs no search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admm_prune.solvers.reference.cvxpy_models import load_cvxpy, try_solve
from admm_prune.solvers.reference.rigorous import UNIT, Array, Form, gamma, least_eigenvalue, total_bound
from admm_prune.solvers.reference.rows import (
    Row,
    Supports,
    floor_of,
    quadratic,
    recognise,
    scaled_hessian,
    search,
    separate,
    to_array,
)

VACUOUS = 0.1  # a smaller ratio certifies nothing useful
_STEPS_BACK = 4  # each twice as far as the remainder fails to be semidefinite


@dataclass(frozen=True)
class Bound:
    """problem.value(V) >= value for every V in the constraint.

    Args:
        value: the bound.
        kind: which argument gave it.
        ratio: (value - f(minimizer)) / (objective - f(minimizer)) for a given objective, None without one: 1 is
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
        return cls(value, kind, 1.0 if lost <= 0 else min(max(0.0, value - floor) / lost, 1.0))  # NaN stays NaN


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

    Sources: the loss of one removal is that of Hassibi and Stork, Optimal Brain Surgeon, 1993; the others are Rayleigh
    quotients. Their use as bounds over budgets is ours.
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
    unit = _power_of_two_scale(target)
    squares = target.mul(unit).square()
    cell = rounding / unit / unit
    diagonal = _least(squares * torch.from_numpy(form.diagonal), supports, torch.sum) * form.least
    bounds = {"Hessian diagonal": diagonal * cell}
    if form.inverse_error < 1:
        removal = squares / torch.from_numpy(form.inverse.diagonal().copy())
        factor = (1 - form.inverse_error) * (1 - 2 * UNIT) * cell
        bounds["removal"] = _least(removal, supports, torch.amax) * factor
        bounds["inverse diagonal"] = _least(removal, supports, torch.sum) / form.inverse_spread * factor
    return {name: loss if math.isfinite(loss) else 0.0 for name, loss in bounds.items()}


def _power_of_two_scale(target: Tensor) -> float:
    """A power of two that brings the largest entry next to 1; 1 where all are zero."""
    largest = float(target.abs().max())
    return 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _least(terms: Tensor, supports: Supports, reduce: Callable[[Tensor, tuple[int, int]], Tensor]) -> float:
    """min_R sum_i reduce_{j in R, row i} terms_ij over the entries R that a support removes, for a sum or a maximum.

    One sum or maximum over all rows where they share a budget. Terms (out, in) are not negative.
    """
    if supports.rows is None:
        removed = terms.numel() - supports.total
        return float(reduce(terms.reshape(1, 1, -1).sort(-1).values[..., :removed], (-1, -2))) if removed else 0.0
    total = 0.0
    for group, keep in set(supports.rows):
        if keep == group:
            continue
        rows = torch.tensor([row == (group, keep) for row in supports.rows])
        cells = terms[rows].unflatten(1, (-1, group)).sort(-1).values
        total += float(reduce(cells[..., : group - keep], (-1, -2)).sum())
    return total


def perspective_bound(problem: object, objective: float | None = None, *, max_width: int = 64) -> Bound | None:
    """The sum over rows of the least value of

        (v-w)^T N (v-w) + sum_j delta_j (t_j - 2 w_j v_j + w_j^2)
        over v_j^2 <= t_j z_j,  0 <= z_j <= 1,  sum_{j in group} z_j <= keep,

    with Ã = N + diag(delta), N positive semidefinite and sum delta as large as can be, by CLARABEL. From the solver
    only p = v - w is taken: `dual_value` at any p is a lower bound, and is evaluated in float64, so that no tolerance
    of the solver touches its validity.

    Args:
        problem: Quadratic.
        objective: the value of a feasible point, to compare with.
        max_width: the widest row accepted.

    Raises:
        ImportError: CVXPY or CLARABEL is not installed.
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: rows too wide, supports of an unknown kind, or a Hessian that is not positive definite.

    Source: Frangioni and Gentile, SDP diagonalizations and perspective cuts for a class of nonseparable MIQP, 2007.
    """
    cvxpy = load_cvxpy("perspective_bound", "CLARABEL")
    separated = separate("perspective_bound", problem, max_width)
    diagonals: dict[int, Array] = {}  # of each Hessian: most often all rows share one
    losses = []
    for row in separated.rows:
        if row.removals == 0:
            continue
        if id(row.form) not in diagonals:
            diagonals[id(row.form)] = _largest_diagonal(cvxpy, row.form)
        diagonal = diagonals[id(row.form)]
        if (diagonal > 0).all():
            losses.append(max(0.0, dual_value(row, diagonal, _relaxed(cvxpy, row, diagonal))))
    value = separated.bound(losses)
    return None if value is None else Bound.above(separated.floor, value, "perspective", objective)


def dual_value(row: Row, diagonal: Array, shift: Array) -> float:
    """-p^T N p - sum_j q_j^2 / delta_j + min_R sum_{j in R} (sqrt(delta_j) w_j - q_j / sqrt(delta_j))^2,  q = N p.

    At most loss(R) for every support and every p: replace (v-w)^T N (v-w) by its tangent at p, then minimize over v
    entry by entry, free where kept and zero where removed. q is known within d = gamma_(n+4) (|Ã| + diag(delta)) |p|:
    what is kept counts (|q_j| + d_j)^2 / delta_j, what is removed 2 d_j |w_j| less, and gamma_(2n+16) of all
    magnitudes is taken off for the sums.

    Args:
        diagonal: delta > 0 (n,), with N = Ã - diag(delta) positive semidefinite.
        shift: p (n,).
    """
    if row.form.doubt:
        return 0.0
    n = row.width
    unit = _power_of_two_scale(torch.from_numpy(np.maximum(np.abs(row.target), np.abs(shift))))
    w, p = row.target * unit, shift * unit
    pull = row.hessian @ p - diagonal * p
    doubt = gamma(n + 4) * (np.abs(row.hessian) @ np.abs(p) + diagonal * np.abs(p))
    kept_terms = (np.abs(pull) + doubt) ** 2 / diagonal
    removed_terms = diagonal * w * w - 2 * pull * w - 2 * doubt * np.abs(w)
    cheapest = np.sort((removed_terms + kept_terms).reshape(-1, row.group), axis=1)[:, : row.group - row.keep].sum()
    curvature = float(np.abs(p) @ doubt + p @ pull)
    sizes = (
        diagonal * w * w + 2 * np.abs(w) * (np.abs(pull) + doubt) + 2 * kept_terms + np.abs(p) * (np.abs(pull) + doubt)
    )
    value = float(cheapest) - curvature - float(kept_terms.sum()) - gamma(2 * n + 16) * float(sizes.sum())
    return value / unit / unit if math.isfinite(value) else 0.0


def _relaxed(cvxpy: Any, row: Row, diagonal: Array) -> Array:
    """p = v - w at the solver's solution, zeros where it found none."""
    upper = search(row)[1]
    if upper == 0.0:
        return np.zeros(row.width)
    target = row.target / math.sqrt(upper)
    values, vectors = np.linalg.eigh(row.hessian - np.diag(diagonal))
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    v, z, t = (cvxpy.Variable(row.width) for _ in range(3))
    groups = range(0, row.width, row.group)
    constraints = [
        z >= 0,
        z <= 1,
        *(cvxpy.sum(z[begin : begin + row.group]) <= row.keep for begin in groups),
        cvxpy.SOC(t + z, cvxpy.vstack([2 * v, t - z])),
    ]
    loss = cvxpy.sum_squares(root @ (v - target)) + diagonal @ t - 2 * (diagonal * target) @ v
    program = cvxpy.Problem(cvxpy.Minimize(loss), constraints)
    if not try_solve(cvxpy, program, "CLARABEL") or v.value is None:
        return np.zeros(row.width)
    return np.asarray((v.value - target) * math.sqrt(upper), dtype=np.float64)


def _largest_diagonal(cvxpy: Any, form: Form) -> Array:
    """delta with Ã - diag(delta) proved positive semidefinite, of the largest sum of delta_j / Ã_jj.

    Not positive where Ã is not proved definite.
    """
    diagonal = form.diagonal
    plain = form.least * diagonal * (1 - 8 * UNIT)
    root = np.sqrt(diagonal)
    correlation = form.hessian / root / root[:, None]
    delta = cvxpy.Variable(form.width)
    program = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(delta)), [delta >= 0, correlation - cvxpy.diag(delta) >> 0])
    if form.least == 0 or not try_solve(cvxpy, program, "CLARABEL") or delta.value is None:
        return plain
    proposed = np.asarray(delta.value, dtype=np.float64) * diagonal
    # The solver may overshoot by its tolerance: step back by as much as the remainder fails to be semidefinite.
    for _ in range(_STEPS_BACK):
        rest = form.hessian - np.diag(proposed)
        short = least_eigenvalue(rest, diagonal) - 4 * UNIT * float((1 + np.abs(proposed / diagonal)).max())
        if short >= 0:
            return proposed if (proposed > 0).all() else plain
        if not math.isfinite(short):
            return plain
        proposed = proposed + 2 * short * diagonal
    return plain
