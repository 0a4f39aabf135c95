"""Baselines of the methods that train: gradual pruning, and training without pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from admm_prune.errors import UserError
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.target import Target
from admm_prune.solvers.elsa.settings import Score
from admm_prune.solvers.sparse_adam import SparseAdam


@dataclass(frozen=True, kw_only=True)
class Gradual(Trained):
    """Gradual pruning: every `interval` steps the smallest |w| F^power of the remaining weights are removed.

    The sparsity rises by 1 - (1 - s)^3 of the target over the first `ramp` of the run.

    Source: Zhu and Gupta, To prune, or not to prune, 2017.
    """

    name: str = "gradual"
    summary: str = "gradual pruning during training: the smallest weights are removed every few steps"
    interval: int = 16
    ramp: float = 0.75
    power: float = 0.0

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        score = Score(fisher="adam" if self.power else "none", power=self.power)
        settings = {**how, "penalty": math.inf, "score": score, "freeze": 1.0 - self.ramp, "ramp": 1.0}
        return SparseAdam(**settings, interval=self.interval, total_steps=self.training_steps)


@dataclass(frozen=True, kw_only=True)
class TunedDense(Trained):
    """The dense model trained on the same text for as long, to separate the gain of training from that of pruning."""

    prunes: ClassVar[bool] = False

    name: str = "tuned-dense"
    summary: str = "no pruning: the dense model trained for as long, as a baseline for methods that train"

    def check(self, model: nn.Module, target: Target) -> None:
        if target.fraction or target.layers:
            raise UserError("tuned-dense prunes nothing: give --sparsity 0, and no targets or overrides")

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam(**how, freeze=1.0)
