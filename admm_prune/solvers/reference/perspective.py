"""The perspective relaxation: the strongest lower bound here that needs no search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from admm_prune.solvers.reference.bounds import Bound
from admm_prune.solvers.reference.cvxpy_models import load_cvxpy, try_solve
from admm_prune.solvers.reference.row_search import search
from admm_prune.solvers.reference.rows import Array, Row, separate

_EPSILON = float(np.finfo(np.float64).eps)


def perspective_bound(problem: object, objective: float | None = None, *, max_width: int = 64) -> Bound:
    """The sum over rows of the least value of

        (v-w)^T N (v-w) + sum_j delta_j (t_j - 2 w_j v_j + w_j^2)
        over v_j^2 <= t_j z_j,  0 <= z_j <= 1,  sum_{j in group} z_j <= keep,

    with Ã = N + diag(delta), N positive semidefinite and sum delta as large as can be, by CLARABEL. From the solver
    only p = v - w is taken: `dual_value` at any p is a lower bound, and is evaluated in float64, so that no tolerance
    of the solver touches its validity.

    Args:
        problem: Quadratic.
        objective: the value of a feasible point, to compare with.
        max_width: the widest row taken on.

    Raises:
        ImportError: CVXPY or CLARABEL is not installed.
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: rows too wide, supports of an unknown kind, or a Hessian that is not positive definite.

    Source: Frangioni and Gentile, SDP diagonalizations and perspective cuts for a class of nonseparable MIQP, 2007.
    """
    cvxpy = load_cvxpy("perspective_bound", "CLARABEL")
    separated = separate("perspective_bound", problem)
    widest = max(row.width for row in separated.rows)
    if widest > max_width:
        raise ValueError(f"perspective_bound takes rows of at most {max_width} entries, not {widest}")
    diagonals: dict[int, Array] = {}  # of each Hessian: most often all rows share one
    loss = 0.0
    for row in separated.rows:
        if row.removals == 0:
            continue
        if id(row.hessian) not in diagonals:
            diagonals[id(row.hessian)] = _largest_diagonal(cvxpy, row.hessian)
        diagonal = diagonals[id(row.hessian)]
        if (diagonal > 0).all():
            loss += max(0.0, dual_value(row, diagonal, _relaxed(cvxpy, row, diagonal)))
    return Bound.above(separated.floor, loss, "perspective", objective)


def dual_value(row: Row, diagonal: Array, shift: Array) -> float:
    """-p^T N p - sum_j q_j^2 / delta_j + min_R sum_{j in R} (sqrt(delta_j) w_j - q_j / sqrt(delta_j))^2,  q = N p.

    At most loss(R) for every support and every p: replace (v-w)^T N (v-w) by its tangent at p, then minimize over v
    entry by entry, free where kept and zero where removed.

    Args:
        diagonal: delta > 0 (n,), with N = Ã - diag(delta) positive semidefinite.
        shift: p (n,).
    """
    pull = row.hessian @ shift - diagonal * shift
    terms = (np.sqrt(diagonal) * row.target - pull / np.sqrt(diagonal)) ** 2
    cheapest = np.sort(terms.reshape(-1, row.group), axis=1)[:, : row.group - row.keep].sum()
    curvature, kept = float(shift @ pull), float((pull**2 / diagonal).sum())
    rounding = 8 * row.width * _EPSILON * (float(cheapest) + abs(curvature) + kept)
    return float(cheapest) - curvature - kept - rounding


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


def _largest_diagonal(cvxpy: Any, hessian: Array) -> Array:
    """delta of the largest sum with Ã - diag(delta) positive semidefinite, made safe against rounding.

    Not positive where Ã is singular to working precision.
    """
    width = len(hessian)
    spectrum = np.linalg.eigvalsh(hessian)
    margin = 4 * width * _EPSILON * float(spectrum[-1])
    plain = np.full(width, float(spectrum[0]) - margin)
    delta = cvxpy.Variable(width)
    program = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(delta)), [delta >= plain[0], hessian - cvxpy.diag(delta) >> 0])
    if not try_solve(cvxpy, program, "CLARABEL") or delta.value is None:
        return plain
    found = np.asarray(delta.value, dtype=np.float64)
    # The solver may overshoot by its tolerance: step back by as much as the remainder fails to be semidefinite.
    found = found + min(0.0, float(np.linalg.eigvalsh(hessian - np.diag(found))[0])) - margin
    return found if (found > 0).all() else plain
