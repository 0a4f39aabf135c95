"""Certificates that need no lower bound: residual of the refit, stationarity, and gains of single swaps.

In coordinates where A has a unit diagonal, with v a row of V, S its support and r = A (w - v) its residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from admm_prune.verify.recomputation import Array, Budget, Definition

_WORK = 1 << 36  # multiplications spent on swaps with a refit, about
_PAIRS = 1 << 28  # entries of the tables of swaps without one, about
_MOST_ROWS = 64
_EXACT = 1e-6  # relative residual of an exact refit
_OPTIMAL = 1e-6  # a gain below this multiple of the loss of the rows it touches is none
Mask = NDArray[np.bool_]
_SINGULAR = 1e-15  # the Schur complement of a unit diagonal for a channel that depends on others


@dataclass(frozen=True)
class Certificates:
    """How far a point is from a local optimum. Numbers, not verdicts.

    A swap exchanges one kept for one pruned weight of the same budget: of the row, of the group of N:M, or, where one
    budget is shared by the whole matrix, of any two rows. Its gain is the decrease of f. The best swap is the one of
    the largest gain, relative to the loss of the layer and relative to the loss of the rows that it changes:
    the layer has many rows, and one swap moves one or two of them.

    Attributes:
        refit_residual: the largest |gradient| on the support of a row over the largest |linear term| there, in
            coordinates where A has a unit diagonal; 0 for least squares on the support, None for an empty support.
        kkt_residual: the largest |gradient| on the support of a row over |linear term| there, both as Euclidean
            norms in the same coordinates; 0 where all supports are empty.
        kkt_exact: the fraction of the rows where that is at most 1e-6.
        unstable_support: the fraction of the kept weights that a projected gradient step of 1 / L would exchange.
        swap_rows: rows examined for swaps with all other weights refitted, drawn at random.
        swap_pairs: all swaps among them, each compared by its exact gain over the refitted rows.
        swap_optimal: the fraction of these rows where no swap within the row gains.
        swap_gain: the largest gain of these swaps over the loss of the layer; 0 where none gains.
        swap_gain_of_rows: the same gain over the loss of its rows.
        fixed_swap_pairs: swaps compared with all other weights held fixed, the weight that enters at its best value:
            those within as many rows as time allows (all but in wide layers), those between any two rows.
        fixed_swap_gain: their largest gain over the loss of the layer; negative where every one costs; None where there
            is none.
        fixed_swap_gain_of_rows: the same gain over the loss of its rows.
        reachable: f after a refit and the best swap in each of the rows examined: no lower bound can lie above it.
    """

    refit_residual: float | None
    kkt_residual: float
    kkt_exact: float
    unstable_support: float
    swap_rows: int
    swap_pairs: int
    swap_optimal: float
    swap_gain: float
    swap_gain_of_rows: float
    fixed_swap_pairs: int
    fixed_swap_gain: float | None
    fixed_swap_gain_of_rows: float | None
    reachable: float

    def in_words(self) -> list[str]:
        """The meaning of the numbers on swaps."""
        said = []
        if self.fixed_swap_gain is not None and self.fixed_swap_gain_of_rows is not None:
            gains = self.fixed_swap_gain, self.fixed_swap_gain_of_rows
            said.append(_swap_words(*gains, self.fixed_swap_pairs, "all other weights fixed"))
        if self.swap_pairs:
            how = f"in {self.swap_rows} rows, all others refitted"
            said.append(_swap_words(self.swap_gain, self.swap_gain_of_rows, self.swap_pairs, how))
        return said


def certify(problem: Definition, budget: Budget, v: Array, seed: int) -> Certificates:
    """The certificates of V (out, in); the rows examined for swaps are drawn by `seed`."""
    scale = problem.scale
    hessian = problem.hessian / scale / scale[:, None]
    hessian = (hessian + hessian.T) / 2
    target, point, support = problem.minimizer * scale, v * scale, v != 0
    gradient = (point - target) @ hessian  # half of it
    linear = np.abs(target @ hessian) * support
    largest = linear.max(1)
    rows = largest > 0
    residual = (np.abs(gradient) * support).max(1)[rows] / largest[rows]
    kkt = _norm_ratios(gradient * support, linear)
    step = point - gradient / float(np.linalg.eigvalsh(hessian)[-1])
    away = target - point
    loss = np.maximum(0.0, -(gradient * away).sum(1))
    group = budget.target.pattern[1] if budget.target.pattern is not None else len(hessian)
    shared = budget.cell == "matrix" and budget.target.pattern is None
    order = np.random.default_rng(seed).permutation(len(v))
    some = np.sort(order[: max(1, _PAIRS // (len(hessian) * group))])
    fixed = [fixed_swaps_within(hessian, -gradient[some], point[some], loss[some], group)]
    if shared:
        fixed.append(fixed_swaps_across(-gradient, point, loss))
    whole = float(loss.sum())
    held = _best([gain for swaps in fixed for gain in swaps.gains], whole)
    drawn = np.sort(order[: min(_MOST_ROWS, max(1, _WORK // len(hessian) ** 3))])
    refitted = [refitted_swaps(hessian, target[row], support[row], group) for row in drawn]
    within = [row.gain / row.loss if row.loss > 0 else 0.0 for row in refitted]
    pairs, between = _between(refitted, support[drawn]) if shared else (0, [])
    best = _best([*(Gain(row.gain, row.loss) for row in refitted if row.loss > 0), *between], whole)
    if best is None or best[0] <= 0:
        best = 0.0, 0.0
    reached = loss.copy()  # summed again: subtracting gains from a large loss would leave rounding errors
    for row, swaps in zip(drawn, refitted, strict=True):
        reached[row] = min(reached[row], max(swaps.loss - max(swaps.gain, 0.0), 0.0))
    return Certificates(
        refit_residual=float(residual.max()) if len(residual) else None,
        kkt_residual=float(kkt.max()),
        kkt_exact=float((kkt <= _EXACT).mean()),
        unstable_support=_exchanged(np.abs(step), support, budget),
        swap_rows=len(drawn),
        swap_pairs=sum(row.pairs for row in refitted) + pairs,
        swap_optimal=float(np.mean([gain <= _OPTIMAL for gain in within])),
        swap_gain=best[0],
        swap_gain_of_rows=best[1],
        fixed_swap_pairs=sum(swaps.pairs for swaps in fixed),
        fixed_swap_gain=None if held is None else held[0],
        fixed_swap_gain_of_rows=None if held is None else held[1],
        reachable=problem.least + float(reached.sum()),
    )


def _norm_ratios(left: Array, right: Array) -> Array:
    """|left_i| / |right_i| of every row; 0 where left_i vanishes."""
    above, below = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(above > 0, above / below, 0.0)


def _best(gains: list[Gain], whole: float) -> tuple[float, float] | None:
    """The largest gain, over the loss of the layer and over that of its rows; None where there is none."""
    if not gains or whole <= 0:
        return None
    best = max(gains, key=lambda gain: gain.absolute)
    return best.absolute / whole, best.share


def _between(rows: list[RefittedSwaps], supports: Mask) -> tuple[int, list[Gain]]:
    """Swaps between two of the refitted rows: their number, and the best gain of each pair of rows."""
    inside = supports.sum(1)
    outside = supports.shape[1] - inside
    pairs = int(inside.sum()) * int(outside.sum()) - int(inside @ outside)
    gains = [
        Gain(into.best_add - out_of.cheapest_drop, into.loss + out_of.loss)
        for out_of, into in permutations(rows, 2)
        if into.loss + out_of.loss > 0
    ]
    return pairs, gains


def _swap_words(gain: float, of_rows: float, pairs: int, how: str) -> str:
    if of_rows > _OPTIMAL:
        shares = f"by {gain:.2g} of the layer's loss ({of_rows:.2g} of its rows' loss)"
        return f"a single swap lowers the error, {how}: {shares}, the best of {pairs:,} pairs tried"
    largest = f"largest gain found {max(gain, 0.0):.2g} of the layer's loss over {pairs:,} pairs tried"
    return f"no single swap lowers the error, {how}: {largest}"


def _exchanged(size: Array, support: Mask, budget: Budget) -> float:
    """The fraction of the kept weights that are not among the largest sizes that the budget keeps; ties stay."""
    dropped = 0
    pairs = zip(budget.cells(size), budget.cells(support.astype(np.float64)), strict=True)
    for (cells, keep), (inside, _) in pairs:
        if keep == 0:
            continue
        last = np.partition(cells, cells.shape[1] - keep, 1)[:, cells.shape[1] - keep, None]
        room = keep - (cells > last).sum(1)
        at_last = ((cells == last) & (inside > 0)).sum(1)
        dropped += int(((cells < last) & (inside > 0)).sum() + np.maximum(0, at_last - room).sum())
    return dropped / max(1, int(support.sum()))


@dataclass(frozen=True)
class RefittedSwaps:
    """A row refitted on its support, and its swaps with all other weights of the row refitted too.

    Attributes:
        loss: (w - v)^T A (w - v) after the refit.
        gain: the decrease by the best swap; 0 if there is none.
        pairs: swaps that were compared.
        cheapest_drop: the least that dropping a kept weight adds to the loss; inf where none is kept.
        best_add: the largest decrease by adding a weight; 0 if none is pruned.
    """

    loss: float
    gain: float = 0.0
    pairs: int = 0
    cheapest_drop: float = np.inf
    best_add: float = 0.0


def refitted_swaps(hessian: Array, target: Array, support: Mask, group: int) -> RefittedSwaps:
    """All swaps of a row, the others refitted.

    With K = A_SS^-1, v_S the refit, and for j pruned T_j = K A_Sj, s_j = A_jj - A_jS T_j, adding j and removing i
    changes the loss by

        -r_j^2 / s_j + (v_i - T_ij r_j / s_j)^2 / (K_ii + T_ij^2 / s_j).

    The gain of the best one is evaluated at the resulting point, so that it is valid even if A is too close to
    singular for the formula.

    Args:
        hessian: A (in, in), positive definite.
        target: w (in,).
        support: S (in,), boolean.
        group: i and j lie in the same of these consecutive columns.

    Raises:
        numpy.linalg.LinAlgError: A is singular on a support.
    """
    away = _refit(hessian, target, support)
    pull = hessian @ away
    loss = max(float(away @ pull), 0.0)  # in this order NaN stays NaN
    inside, outside = np.flatnonzero(support), np.flatnonzero(~support)
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
    swapped = support.copy()
    swapped[inside[i]], swapped[outside[j]] = False, True
    away = _refit(hessian, target, swapped) if within[i, j] else away
    gained = max(loss - max(float(away @ hessian @ away), 0.0), 0.0)
    return RefittedSwaps(loss, gained, int(within.sum()), drop, float((pull[outside] * entry).max()))


@dataclass(frozen=True)
class Gain:
    """The decrease of the loss by a swap; negative for an increase.

    Attributes:
        absolute: in the units of the loss.
        touched: the loss of the rows that it changes, above 0.
    """

    absolute: float
    touched: float

    @property
    def share(self) -> float:
        """Relative to the loss of the rows that it changes."""
        return self.absolute / self.touched


@dataclass(frozen=True)
class FixedSwaps:
    """Many swaps with all other weights fixed.

    Attributes:
        pairs: swaps that were compared.
        gains: of the best swap of each row, or pair of rows, that was looked at.
    """

    pairs: int
    gains: tuple[Gain, ...]


def fixed_swaps_within(hessian: Array, residual: Array, point: Array, loss: Array, group: int) -> FixedSwaps:
    """All swaps within rows, or groups of them: j is added with its best value, so that

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
        support = v != 0
        allowed = support[:, :, None] & ~support[:, None, :]
        count = int(np.count_nonzero(allowed))
        if count and before > 0:
            gain = (r[:, None, :] + v[:, :, None] * couplings) ** 2 - (v * v + 2 * v * r)[:, :, None]
            gains.append(Gain(float(gain[allowed].max()), float(before)))
        pairs += count
    return FixedSwaps(pairs, tuple(gains))


def fixed_swaps_across(residual: Array, point: Array, loss: Array) -> FixedSwaps:
    """All swaps of a kept weight of one row for a pruned one of another, where rows share a budget.

    They are independent: gain = max r_j^2 - min (v_i^2 + 2 v_i r_i) over different rows, which needs no table.
    """
    support = point != 0
    add = np.where(support, -np.inf, residual**2).max(1)
    drop = np.where(support, point * point + 2 * point * residual, np.inf).min(1)
    inside = support.sum(1)
    outside = support.shape[1] - inside
    pairs = int(inside.sum()) * int(outside.sum()) - int(inside @ outside)
    adds, drops = np.argsort(-add, kind="stable")[:2], np.argsort(drop, kind="stable")[:2]
    gains = [
        Gain(float(add[b] - drop[a]), float(loss[a] + loss[b]))
        for a in drops
        for b in adds
        if a != b and np.isfinite(add[b]) and np.isfinite(drop[a]) and loss[a] + loss[b] > 0
    ]
    return FixedSwaps(pairs, tuple(gains))


def _refit(hessian: Array, target: Array, support: Mask) -> Array:
    """w - v for the v that minimizes (w - v)^T A (w - v) on a support."""
    away = np.where(support, 0.0, target)
    if support.any() and not support.all():
        away[support] = -np.linalg.solve(hessian[np.ix_(support, support)], hessian[support] @ away)
    return away
