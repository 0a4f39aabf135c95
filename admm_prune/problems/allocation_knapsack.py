"""Allocation as a multiple-choice knapsack: found by a mixed-integer program, proved by Lagrangian bounds."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admm_prune.errors import check_at_least, check_fractions
from admm_prune.problems.allocation import Allocation, Curve, allocation, check_budget, required_saving

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

_HALVINGS = 48  # of an interval of prices
_ROUNDING = 2.0**-52


@dataclass(frozen=True)
class Knapsack:
    """min sum_l E_l(k_l), sum_l saving_l(k_l) >= budget, one k_l of each sublayer: binary variables, by HiGHS.

    Needs neither convex curves nor linear savings, so that measured times may be the budget. The bound is not that of
    HiGHS, which holds to its tolerances and for the levels that it is given: all levels of all sublayers are searched
    by branch and bound, each node with the Lagrangian bound, for any price t >= 0,

        t budget + sum_l min_k (E_l(k) - t saving_l(k)),

    in float64 less its rounding. Allocations that the search meets are taken where they are better.

    Args:
        most: the largest fraction that a sublayer may lose.
        choices: levels of a sublayer that HiGHS is given, spread evenly where it has more.
        gap: relative, at which the search may stop.
        time_limit: seconds for HiGHS, and as many for the proof; then the best allocation so far, with its bound.
        max_nodes: of the proof.

    Sources: Frantar and Alistarh, SPDY, 2022, solve the same problem by dynamic programming; Sinha and Zoltners, The
    Multiple-Choice Knapsack Problem, 1979, the bound.
    """

    most: float = 1.0
    choices: int = 64
    gap: float = 1e-6
    time_limit: float = 30.0
    max_nodes: int = 2000

    def __post_init__(self) -> None:
        check_fractions(self, "most")
        check_at_least(self, choices=2, gap=0, time_limit=0, max_nodes=0)

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        check_budget(curves, budget, self.most)
        levels = [curve.levels(self.most) for curve in curves]
        table = _Table.of(curves, levels, required_saving(curves, budget))
        start = self._programmed(table)
        best = _search(table, start, self.gap, self.max_nodes, time.perf_counter() + self.time_limit)
        gap = 0.0 if best.closed else (best.loss - best.bound) / best.loss
        notes = () if best.closed else (f"the knapsack is proved to {gap:.2g} only",)
        removed = [column[k] for column, k in zip(levels, best.chosen, strict=True)]
        result = allocation(curves, removed, notes=notes)
        return allocation(curves, removed, bound=min(best.bound, result.loss), notes=notes)

    def _programmed(self, table: _Table) -> Indices | None:
        """What HiGHS chooses among some levels of each sublayer; None where it fails."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        tried = [np.unique(np.linspace(0, n - 1, min(n, self.choices)).round().astype(np.intp)) for n in table.counts]
        owner = np.repeat(np.arange(len(tried)), [len(indices) for indices in tried])
        flat = np.concatenate(tried)
        losses, savings = table.losses[owner, flat], table.savings[owner, flat]
        scale, unit = losses.max(initial=0.0) or 1.0, savings.max(initial=0.0) or 1.0
        solution = milp(
            losses / scale,
            constraints=[
                LinearConstraint((owner == np.arange(len(tried))[:, None]).astype(float), 1, 1),
                LinearConstraint(savings[None] / unit, table.budget / unit, np.inf),
            ],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": self.gap, "time_limit": self.time_limit},
        )
        if solution.x is None:
            return None
        chosen = np.zeros(len(tried), dtype=np.intp)
        picked = solution.x.reshape(-1) > 0.5
        chosen[owner[picked]] = flat[picked]
        return chosen


@dataclass(frozen=True, eq=False)
class _Table:
    """Losses and savings of all levels (sublayers, most levels), infinite and 0 behind the last of a sublayer."""

    losses: Array
    savings: Array
    counts: NDArray[np.intp]
    budget: float

    @classmethod
    def of(cls, curves: Sequence[Curve], levels: Sequence[Sequence[int]], budget: float) -> _Table:
        counts = np.array([len(sublayer_levels) for sublayer_levels in levels])
        losses = np.full((len(levels), counts.max()), np.inf)
        savings = np.zeros_like(losses)
        for l, (curve, sublayer_levels) in enumerate(zip(curves, levels, strict=True)):
            losses[l, : len(sublayer_levels)] = curve.losses.double().numpy()[sublayer_levels]
            savings[l, : len(sublayer_levels)] = curve.savings.double().numpy()[sublayer_levels]
        total = float(savings.max(1).sum())
        if total < 2**53 and not np.any(savings % 1):  # whole numbers, whose sums are multiples of their divisor
            step = int(np.gcd.reduce(savings.astype(np.int64), axis=None)) or 1
            return cls(losses, savings, counts, float(math.ceil(budget / step * (1 - 2 * _ROUNDING)) * step))
        # Sums that others round differently still meet it.
        return cls(losses, savings, counts, budget - _ROUNDING * len(levels) * total)

    def saved(self, chosen: Indices) -> float:
        return math.fsum(self.savings[np.arange(len(chosen)), chosen])

    def loss(self, chosen: Indices) -> float:
        """The loss of an allocation that meets the budget; infinite for others."""
        return math.fsum(self.losses[np.arange(len(chosen)), chosen]) if self.saved(chosen) >= self.budget else math.inf


@dataclass(frozen=True, eq=False)
class _SearchResult:
    chosen: Indices
    loss: float
    bound: float
    closed: bool


def _search(table: _Table, start: Indices | None, gap: float, most: int, deadline: float) -> _SearchResult:
    """Branch and bound over intervals of levels (sublayers, 2), best first."""
    whole = np.stack([np.zeros_like(table.counts), table.counts - 1], axis=1)
    chosen = whole[:, 1] if start is None else start
    loss = table.loss(chosen)
    if loss == math.inf:
        chosen, loss = whole[:, 1], table.loss(whole[:, 1])
    heap: list[tuple[float, int, NDArray[np.intp], Indices, Indices]] = []
    count = 0

    def offer(ranges: NDArray[np.intp], above: float) -> None:
        nonlocal chosen, loss, count
        count += 1
        bound, below, reaching = _lagrangian(table, ranges)
        if reaching is not None and table.loss(reaching) < loss:
            chosen, loss = reaching, table.loss(reaching)
        if below is not None and reaching is not None:
            heapq.heappush(heap, (max(bound, above), count, ranges, below, reaching))

    settled = math.inf  # the least bound of nodes that cannot be split
    offer(whole, 0.0)
    while heap and heap[0][0] < loss * (1 - gap) and count < most and time.perf_counter() < deadline:
        bound, _, ranges, below, reaching = heapq.heappop(heap)
        apart = np.abs(table.losses[np.arange(len(below)), reaching] - table.losses[np.arange(len(below)), below])
        apart[below == reaching] = -1.0
        l = int(apart.argmax())
        if apart[l] < 0:
            settled = min(settled, bound)
            continue
        middle = (int(below[l]) + int(reaching[l])) // 2
        for low, high in ((ranges[l, 0], middle), (middle + 1, ranges[l, 1])):
            part = ranges.copy()
            part[l] = low, high
            offer(part, bound)
    proved = min(settled, heap[0][0] if heap else math.inf)
    # Nodes above the loss are left in the heap or hold no allocation: what was dropped lies at the loss or above it.
    return _SearchResult(chosen, loss, max(0.0, min(proved, loss)), proved >= loss * (1 - 2 * gap))


def _lagrangian(table: _Table, ranges: NDArray[np.intp]) -> tuple[float, Indices | None, Indices | None]:
    """(a lower bound, the choice just below the budget, one that meets it) for levels within ranges (sublayers, 2).

    The choices are the minima at the two ends of the last interval of prices, equal where no price is needed; None
    where the ranges cannot meet the budget, with an infinite bound.

    E - t s is computed with an error of at most 2 u (E + t s), the sum over b sublayers with gamma_b: 2^-52 (b + 4)
    times the largest E + t s of each sublayer and t budget is taken off.
    """
    index = np.arange(table.losses.shape[1])
    inside = (index >= ranges[:, :1]) & (index <= ranges[:, 1:])
    losses, savings = np.where(inside, table.losses, np.inf), np.where(inside, table.savings, -np.inf)
    highest = savings.argmax(1)
    if table.saved(highest) < table.budget:
        return math.inf, None, None
    losses_inside, savings_inside = np.where(inside, losses, 0.0), np.where(inside, savings, 0.0)

    def at(price: float) -> tuple[float, Indices]:
        reduced = np.where(inside, losses_inside - price * savings_inside, np.inf)
        best = reduced.argmin(1)
        sizes = (losses_inside + price * savings_inside).max(1).sum() + price * abs(table.budget)
        value = price * table.budget + reduced[np.arange(len(best)), best].sum()
        return float(value - _ROUNDING * (len(best) + 4) * sizes), best

    bound, below = at(0.0)
    if table.saved(below) >= table.budget:
        return bound, below, below
    reaching, low, high = highest, 0.0, 1.0
    largest = float(losses_inside.max()) or 1.0
    unit = largest / max(float(savings_inside.max()), math.ulp(0.0))
    while math.isfinite(high * unit):  # the least power of four at which the budget is met
        value, choice = at(high * unit)
        bound = max(bound, value)
        if table.saved(choice) >= table.budget:
            reaching = choice
            break
        low, below, high = high, choice, 4 * high
        if high > 1e18:
            return bound, below, reaching
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high) or np.array_equal(below, reaching):
            break
        value, choice = at(middle * unit)
        bound = max(bound, value)
        if table.saved(choice) >= table.budget:
            high, reaching = middle, choice
        else:
            low, below = middle, choice
    return bound, below, reaching
