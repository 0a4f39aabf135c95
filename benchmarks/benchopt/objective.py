"""Error of a sparse layer on tokens that were not calibrated on; numpy alone, so that no solver judges itself."""

from __future__ import annotations

import numpy as np
from benchopt import BaseObjective


class Objective(BaseObjective):
    """tr((W - V) H (W - V)^T) / tr(W H W^T), V within its budget."""

    name = "Pruned layer"
    parameters = {"target": ["0.5", "0.7", "2:4"]}  # the fraction to go, or N kept of every M inputs
    min_benchopt_version = "1.6"

    def set_data(self, weight, gram, gram_holdout=None):
        self.weight, self.gram, self.gram_holdout = weight, gram, gram_holdout

    def get_objective(self):
        """The held-out Gram stays here."""
        return {"weight": self.weight, "gram": self.gram, "target": self.target}

    def evaluate_result(self, weight):
        """The first value is what curves show; an answer beyond its budget is worth nothing."""
        v = np.asarray(weight, dtype=np.float64)
        excess = self._excess(v)
        value = self._relative_error(v, self.gram) if excess == 0 else np.inf
        holdout = value if self.gram_holdout is None else self._relative_error(v, self.gram_holdout)
        return {"value": value, "holdout": holdout, "sparsity": float((v == 0).mean()), "excess": excess}

    def get_one_result(self):
        return {"weight": np.zeros_like(self.weight)}

    def _relative_error(self, v, gram):
        w, h = self.weight.astype(np.float64), gram.astype(np.float64)
        return float(((w - v) @ h * (w - v)).sum() / (w @ h * w).sum())

    def _excess(self, v):
        """Weights beyond the budget."""
        if ":" in self.target:
            keep, group = map(int, self.target.split(":"))
            counts = (v.reshape(len(v), -1, group) != 0).sum(2)
            return int(np.maximum(counts - keep, 0).sum())
        return max(0, int((v != 0).sum()) - round((1 - float(self.target)) * v.size))
