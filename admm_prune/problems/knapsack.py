"""Allocation as a multiple-choice knapsack, solved to a proven gap by a mixed-integer program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from admm_prune.problems.allocation import Allocation, Curve, allocation, check_budget


@dataclass(frozen=True)
class Knapsack:
    """min sum_l E_l(k_l), sum_l saving_l(k_l) >= budget, one k_l of each branch: binary variables, by HiGHS.

    Needs neither convex curves nor linear savings, so that measured times may be the budget.

    Args:
        most: the largest fraction that a branch may lose.
        choices: levels of a branch that are tried, spread evenly where it has more; the bound is for these.
        gap: relative, at which the search may stop.
        time_limit: seconds; then the best allocation so far, with its bound.

    Source: Frantar and Alistarh, SPDY, 2022, solve the same problem by dynamic programming.
    """

    most: float = 1.0
    choices: int = 64
    gap: float = 1e-6
    time_limit: float = 30.0

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        from scipy.optimize import Bounds, LinearConstraint, milp

        check_budget(curves, budget, self.most)
        levels = [_thinned(curve.levels(self.most), self.choices) for curve in curves]
        owner = np.repeat(np.arange(len(curves)), [len(own) for own in levels])
        flat = np.concatenate([np.array(own) for own in levels])
        losses = np.concatenate([c.losses.numpy()[own] for c, own in zip(curves, levels, strict=True)])
        savings = np.concatenate([c.savings.numpy()[own] for c, own in zip(curves, levels, strict=True)])
        scale, unit = losses.max() or 1.0, savings.max() or 1.0
        one_each = (owner == np.arange(len(curves))[:, None]).astype(float)
        found = milp(
            losses / scale,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(savings[None] / unit, budget * (1 - 1e-9) / unit, np.inf),
            ],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": self.gap, "time_limit": self.time_limit},
        )
        if found.x is None:
            raise ValueError(f"no allocation that saves {budget:g} was found: {found.message}")
        chosen = found.x.reshape(-1) > 0.5
        bound = None if found.mip_dual_bound is None else float(found.mip_dual_bound) * scale
        notes = () if found.status == 0 else (f"the knapsack was not closed: {found.message}",)
        return allocation(curves, [int(k) for k in flat[chosen]], bound=bound, notes=notes)


def _thinned(levels: list[int], choices: int) -> list[int]:
    """At most so many levels, the first and the last among them."""
    if len(levels) <= choices:
        return levels
    return [levels[round(i)] for i in np.linspace(0, len(levels) - 1, choices)]
