"""Value of a solution relative to pruning everything, by the checker of the collection."""

from __future__ import annotations

import numpy as np
from benchmark_utils import checker
from benchopt import BaseObjective


class Objective(BaseObjective):
    """tr((V - W) H (V - W)^T) / tr(W H W^T), V in the set of the problem; infinite outside of it."""

    name = "Layer of the collection"
    min_benchopt_version = "1.6"

    def set_data(self, problem, best_known):
        self.problem, self.best_known = problem, best_known
        self.energy = checker.energy(problem)

    def get_objective(self):
        return {"weight": self.problem.weight, "hessian": self.problem.hessian, "given": dict(self.problem.set)}

    def evaluate_result(self, weight):
        """The first value is what curves show; `excess` is relative to the best value known."""
        v = np.asarray(weight, dtype=np.float64)
        valid = v.shape == self.problem.weight.shape and np.isfinite(v).all()
        allowed = valid and checker.is_member(v, self.problem.set)
        value = checker.value(self.problem, v).upper if allowed else np.inf
        excess = value / self.best_known - 1 if self.best_known else np.nan
        return {"value": value / self.energy, "excess": excess}

    def get_one_result(self):
        return {"weight": np.zeros_like(self.problem.weight)}
