"""What a dual update was like, for one weight and for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """A dual update of one weight: norms are Euclidean, over all processes; z and u are those after the update.

    Attributes:
        x, z, u, a: |x|, |z|, |u|, |x + u before|.
        primal, dual: |x - z|, |z - z_before|.
        pull: |x - c|, of the anchor c in force before the update.
        quantization: |c - what was stored of it|, and `anchor`, |c|.
        entered: entries that entered the support.
        kept, entries: in the support, in all.
        threshold, threshold_before: the smallest score kept, at this update and at the last one.
        rho, rho_next: in force before the update, and after it.
        tau: what u is multiplied by for rho_next.
    """

    x: float
    z: float
    u: float
    primal: float
    dual: float
    pull: float
    quantization: float
    anchor: float
    entered: int
    kept: int
    entries: int
    threshold: float
    threshold_before: float | None
    rho: float
    rho_next: float
    tau: float

    @property
    def primal_residual(self) -> float:
        """|x - z| / |x|."""
        return _ratio(self.primal, self.x)

    @property
    def dual_residual(self) -> float:
        """|z - z_before| / |u|: rho (z - z_before) relative to the multiplier rho u."""
        return _ratio(self.dual, self.u)


@dataclass(frozen=True, kw_only=True)
class DualUpdate:
    """A dual update of all weights.

    Attributes:
        step: optimizer steps done.
        gradient_norm: of the loss, over all parameters, before clipping, at that step.
        skipped: steps left out so far, because a gradient was not finite.
        weights: by name.
    """

    step: int
    gradient_norm: float
    skipped: int
    weights: Mapping[str, WeightUpdate]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` gave, after it was JSON."""
        values: dict[str, Any] = dict(content)
        values["weights"] = {name: WeightUpdate(**numbers) for name, numbers in content["weights"].items()}
        return cls(**values)

    @property
    def primal_residual(self) -> float:
        """|x - z| / |x|."""
        return _ratio(self._norm("primal"), self._norm("x"))

    @property
    def dual_residual(self) -> float:
        """|z - z_before| / |z|."""
        return _ratio(self._norm("dual"), self._norm("z"))

    @property
    def churn(self) -> float:
        """|M and not M_before| / k: the part of the support that is new."""
        return _ratio(sum(w.entered for w in self.weights.values()), sum(w.kept for w in self.weights.values()))

    @property
    def support_changes(self) -> int:
        """Entries that entered the support."""
        return sum(w.entered for w in self.weights.values())

    @property
    def threshold_drift(self) -> float | None:
        """The median of |theta / theta_before - 1| over the weights; None at the first update."""
        drifts = sorted(
            abs(w.threshold / w.threshold_before - 1.0) for w in self.weights.values() if w.threshold_before
        )
        return drifts[len(drifts) // 2] if drifts else None

    @property
    def rho(self) -> float:
        """The mean over the pruned entries, of the penalty in force before the update."""
        return self._mean("rho")

    @property
    def tau(self) -> float:
        """The mean over the pruned entries."""
        return self._mean("tau")

    @property
    def penalty_norm(self) -> float:
        """The norm of the penalty's gradient, rho |x - c|, before the update."""
        return math.hypot(*(w.rho * w.pull for w in self.weights.values()))

    @property
    def quantization_error(self) -> float:
        """|c - what was stored of it| / |c|."""
        return _ratio(self._norm("quantization"), self._norm("anchor"))

    @property
    def sparsity(self) -> float:
        return 1.0 - _ratio(sum(w.kept for w in self.weights.values()), sum(w.entries for w in self.weights.values()))

    def _norm(self, name: str) -> float:
        return math.hypot(*(getattr(w, name) for w in self.weights.values()))

    def _mean(self, name: str) -> float:
        values = self.weights.values()
        return _ratio(sum(w.entries * getattr(w, name) for w in values), sum(w.entries for w in values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
