"""Single swaps, a kept weight for a pruned one of the same budget, and what they would gain: float64, numpy alone.

In coordinates where A has a unit diagonal, with v a row of V, S its support and r = A (w - v) its residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admm_prune.runs.recomputation import Array

Mask = NDArray[np.bool_]

_SINGULAR = 1e-15  # what is left of a unit diagonal where a channel is a combination of others


@dataclass(frozen=True)
class RefittedSwaps:
    """A row refitted on its support, and its swaps with all other weights of the row refitted too.

    Attributes:
        loss: (w - v)^T A (w - v) after the refit.
        gain: what the best swap takes off it; 0 where none does.
        pairs: swaps that were compared.
        cheapest_drop: the least that dropping a kept weight adds to the loss; inf where none is kept.
        best_add: the most that adding a weight takes off it; 0 where none is pruned.
    """

    loss: float
    gain: float = 0.0
    pairs: int = 0
    cheapest_drop: float = np.inf
    best_add: float = 0.0


def refitted_swaps(hessian: Array, target: Array, kept: Mask, group: int) -> RefittedSwaps:
    """All swaps of a row, the others refitted.

    With K = A_SS^-1, v_S the refit, and for j pruned T_j = K A_Sj, s_j = A_jj - A_jS T_j, taking j in and i out changes
    the loss by

        -r_j^2 / s_j + (v_i - T_ij r_j / s_j)^2 / (K_ii + T_ij^2 / s_j).

    The best one's gain is that of the point it leads to, which is made, so that it holds where A is too near to
    singular for the formula.

    Args:
        hessian: A (in, in), positive definite.
        target: w (in,).
        kept: S (in,), boolean.
        group: i and j lie in the same of these consecutive columns.

    Raises:
        numpy.linalg.LinAlgError: A is singular on a support.
    """
    away = _refit(hessian, target, kept)
    pull = hessian @ away
    loss = max(0.0, float(away @ pull))
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    if not len(inside):
        return RefittedSwaps(loss, best_add=float(np.square(pull).max()))
    inverse = np.linalg.inv(hessian[np.ix_(inside, inside)])
    fitted = (target - away)[inside]
    drop = float((fitted**2 / np.diagonal(inverse)).min())
    if not len(outside):
        return RefittedSwaps(loss, cheapest_drop=drop)
    across = inverse @ hessian[np.ix_(inside, outside)]
    room = hessian[outside, outside] - (hessian[np.ix_(outside, inside)] * across.T).sum(1)
    room = np.maximum(room, _SINGULAR)
    entry = pull[outside] / room
    leaving = fitted[:, None] - across * entry
    gain = pull[outside] * entry - leaving**2 / np.maximum(np.diagonal(inverse)[:, None] + across**2 / room, _SINGULAR)
    within = inside[:, None] // group == outside // group
    gain[~within] = -np.inf
    i, j = np.unravel_index(int(gain.argmax()), gain.shape)
    swapped = kept.copy()
    swapped[inside[i]], swapped[outside[j]] = False, True
    away = _refit(hessian, target, swapped) if within[i, j] else away
    gained = max(0.0, loss - max(0.0, float(away @ hessian @ away)))
    return RefittedSwaps(loss, gained, int(within.sum()), drop, float((pull[outside] * entry).max()))


@dataclass(frozen=True)
class Gain:
    """What a swap takes off the loss; negative where it adds to it.

    Attributes:
        absolute: in the units of the loss.
        touched: the loss of the rows that it touches, above 0.
    """

    absolute: float
    touched: float

    @property
    def share(self) -> float:
        """Of the loss of the rows that it touches."""
        return self.absolute / self.touched


@dataclass(frozen=True)
class FixedSwaps:
    """Many swaps with all other weights held fixed.

    Attributes:
        pairs: swaps that were compared.
        gains: of the best swap of each row, or pair of rows, that was looked at.
    """

    pairs: int
    gains: tuple[Gain, ...]


def fixed_swaps_within(hessian: Array, residual: Array, point: Array, loss: Array, group: int) -> FixedSwaps:
    """All swaps within rows, or groups of them: j comes in with the value that is then best, so that

        gain_ij = (r_j + v_i A_ij)^2 - v_i^2 - 2 v_i r_i.

    Args:
        residual: r of some rows (rows, in).
        point: V (rows, in); its zeros are what is pruned.
        loss: of each row (rows,).
        group: i and j lie in the same of these consecutive columns.
    """
    columns = np.arange(len(hessian)).reshape(-1, group)
    couplings = hessian[columns[:, :, None], columns[:, None, :]]
    pairs, gains = 0, []
    for r, v, before in zip(residual.reshape(-1, *columns.shape), point.reshape(-1, *columns.shape), loss, strict=True):
        kept = v != 0
        allowed = kept[:, :, None] & ~kept[:, None, :]
        count = int(np.count_nonzero(allowed))
        if count and before > 0:
            gain = (r[:, None, :] + v[:, :, None] * couplings) ** 2 - (v * v + 2 * v * r)[:, :, None]
            gains.append(Gain(float(gain[allowed].max()), float(before)))
        pairs += count
    return FixedSwaps(pairs, tuple(gains))


def fixed_swaps_across(residual: Array, point: Array, loss: Array) -> FixedSwaps:
    """All swaps of a kept weight of one row for a pruned one of another, where rows share a budget.

    They do not touch each other: gain = max r_j^2 - min (v_i^2 + 2 v_i r_i) over different rows, which needs no table.
    """
    kept = point != 0
    add = np.where(kept, -np.inf, residual**2).max(1)
    drop = np.where(kept, point * point + 2 * point * residual, np.inf).min(1)
    inside = kept.sum(1)
    outside = kept.shape[1] - inside
    pairs = int(inside.sum()) * int(outside.sum()) - int(inside @ outside)
    adds, drops = np.argsort(-add, kind="stable")[:2], np.argsort(drop, kind="stable")[:2]
    gains = [
        Gain(float(add[b] - drop[a]), float(loss[a] + loss[b]))
        for a in drops
        for b in adds
        if a != b and np.isfinite(add[b]) and np.isfinite(drop[a]) and loss[a] + loss[b] > 0
    ]
    return FixedSwaps(pairs, tuple(gains))


def _refit(hessian: Array, target: Array, kept: Mask) -> Array:
    """w - v for the v that minimizes (w - v)^T A (w - v) on a support."""
    away = np.where(kept, 0.0, target)
    if kept.any() and not kept.all():
        away[kept] = -np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ away)
    return away
