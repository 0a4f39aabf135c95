"""Certificates of a pruned layer that need no lower bound: residual of the refit, stationarity, 1-swap optimality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admm_prune.runs.recomputation import Array, Budget, Definition

Mask = NDArray[np.bool_]

_WORK = 1 << 36  # multiplications spent on swaps, about
_MOST_ROWS = 64
_SINGULAR = 1e-15  # what is left of a unit diagonal where a channel is a combination of others
_OPTIMAL = 1e-6  # a gain below this multiple of the row's loss is none


@dataclass(frozen=True)
class Certificates:
    """How far a point is from what no local change improves. Numbers, not verdicts.

    Attributes:
        refit_residual: the largest |gradient| on the support of a row over the largest |linear term| there, in
            coordinates where A has a unit diagonal; 0 for least squares on the support, None for an empty support.
        unstable_support: the fraction of the kept weights that a projected gradient step of 1 / L would exchange.
        swap_rows: rows examined for swaps.
        swap_optimal: the fraction of them where no exchange of one kept for one pruned weight (of the row, or of the
            group of N:M), all others refitted, lowers the loss.
        swap_gain: the largest such gain relative to its row's loss after a refit.
        reachable: f after a refit and the best swap in each of those rows: no lower bound can lie above it.
    """

    refit_residual: float | None
    unstable_support: float
    swap_rows: int
    swap_optimal: float | None
    swap_gain: float | None
    reachable: float


def certify(problem: Definition, budget: Budget, v: Array, value: float, seed: int) -> Certificates:
    """Computes the certificates of V (out, in) of value f(V); the rows examined for swaps are drawn by `seed`."""
    scale = problem.scale
    hessian = problem.hessian / scale / scale[:, None]
    hessian = (hessian + hessian.T) / 2
    target, point, kept = problem.minimizer * scale, v * scale, v != 0
    gradient = (point - target) @ hessian  # half of it
    linear = np.abs(target @ hessian) * kept
    largest = linear.max(1)
    rows = largest > 0
    residual = (np.abs(gradient) * kept).max(1)[rows] / largest[rows]
    step = point - gradient / float(np.linalg.eigvalsh(hessian)[-1])
    count = min(len(v), _MOST_ROWS, max(1, _WORK // len(hessian) ** 3))
    drawn = np.sort(np.random.default_rng(seed).choice(len(v), count, replace=False))
    group = budget.target.pattern[1] if budget.target.pattern is not None else len(hessian)
    saved, gains = 0.0, []
    for row in drawn:
        before = float(-gradient[row] @ (target[row] - point[row]))
        refitted, gain = best_swap(hessian, target[row], kept[row], group)
        saved += max(0.0, before - refitted + gain)
        gains.append(gain / refitted if refitted > 0 else 0.0)
    return Certificates(
        refit_residual=float(residual.max()) if len(residual) else None,
        unstable_support=_exchanged(np.abs(step), kept, budget),
        swap_rows=count,
        swap_optimal=float(np.mean([gain <= _OPTIMAL for gain in gains])),
        swap_gain=max(gains),
        reachable=value - saved,
    )


def best_swap(hessian: Array, target: Array, kept: Mask, group: int) -> tuple[float, float]:
    """The loss (w - v)^T A (w - v) of a row refitted on its support, and what the best single swap takes off it.

    With S kept, K = A_SS^-1, v_S the refit, r = A (w - v), and for j pruned T_j = K A_Sj, s_j = A_jj - A_jS T_j,
    taking j in and i out changes the loss by

        -r_j^2 / s_j + (v_i - T_ij r_j / s_j)^2 / (K_ii + T_ij^2 / s_j).

    Both losses are of points that are then made, so that they hold where A is too near to singular for the formula.

    Args:
        hessian: A (in, in), positive definite.
        target: w (in,).
        kept: (in,), boolean.
        group: i and j lie in the same of these consecutive columns.

    Raises:
        numpy.linalg.LinAlgError: A is singular on a support.
    """
    away = _refit(hessian, target, kept)
    pull = hessian @ away
    loss = max(0.0, float(away @ pull))
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    if not len(inside) or not len(outside):
        return loss, 0.0
    inverse = np.linalg.inv(hessian[np.ix_(inside, inside)])
    across = inverse @ hessian[np.ix_(inside, outside)]
    room = hessian[outside, outside] - (hessian[np.ix_(outside, inside)] * across.T).sum(1)
    room = np.maximum(room, _SINGULAR)
    entry = pull[outside] / room
    leaving = (target - away)[inside][:, None] - across * entry
    gain = pull[outside] * entry - leaving**2 / np.maximum(np.diagonal(inverse)[:, None] + across**2 / room, _SINGULAR)
    gain[inside[:, None] // group != outside // group] = -np.inf
    i, j = np.unravel_index(int(gain.argmax()), gain.shape)
    swapped = kept.copy()
    swapped[inside[i]], swapped[outside[j]] = False, True
    away = _refit(hessian, target, swapped)
    return loss, max(0.0, loss - max(0.0, float(away @ hessian @ away)))


def _refit(hessian: Array, target: Array, kept: Mask) -> Array:
    """w - v for the v that minimizes (w - v)^T A (w - v) on a support."""
    away = np.where(kept, 0.0, target)
    if kept.any() and not kept.all():
        away[kept] = -np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ away)
    return away


def _exchanged(size: Array, kept: Mask, budget: Budget) -> float:
    """The fraction of the kept weights that are not among the largest sizes that the budget keeps; ties stay."""
    dropped = 0
    pairs = zip(budget.cells(size), budget.cells(kept.astype(np.float64)), strict=True)
    for (cells, keep), (inside, _) in pairs:
        if keep == 0:
            continue
        last = np.partition(cells, cells.shape[1] - keep, 1)[:, cells.shape[1] - keep, None]
        room = keep - (cells > last).sum(1)
        at_last = ((cells == last) & (inside > 0)).sum(1)
        dropped += int(((cells < last) & (inside > 0)).sum() + np.maximum(0, at_last - room).sum())
    return dropped / max(1, int(kept.sum()))
