"""A solver of one's own, in numpy: projected gradient on the whole matrix, or group by group."""

from __future__ import annotations

import numpy as np
from benchopt import BaseSolver


class Solver(BaseSolver):
    """V <- P(V - (V - W) H / L), L the largest eigenvalue of H."""

    name = "Projected gradient"
    sampling_strategy = "iteration"

    def set_objective(self, weight, gram, target):
        self.weight, self.gram, self.target = weight.astype(np.float64), gram.astype(np.float64), target
        self.length = 1 / np.linalg.eigvalsh(self.gram)[-1]

    def run(self, n_iter):
        v = self._project(self.weight)
        for _ in range(n_iter):
            v = self._project(v - (v - self.weight) @ self.gram * self.length)
        self.solution = v

    def get_result(self):
        return {"weight": self.solution}

    def _project(self, v):
        grouped = ":" in self.target
        keep, group = (
            map(int, self.target.split(":")) if grouped else (round((1 - float(self.target)) * v.size), v.size)
        )
        cells = v.reshape(-1, group)
        order = np.argsort(-np.abs(cells), axis=1, kind="stable")
        out = np.zeros_like(cells)
        np.put_along_axis(out, order[:, :keep], np.take_along_axis(cells, order[:, :keep], axis=1), axis=1)
        return out.reshape(v.shape)
