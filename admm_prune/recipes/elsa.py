"""ELSA, surrogate-free pruning of a whole model, and what it has to be compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from admm_prune.errors import UserError
from admm_prune.recipes.layerwise import Layerwise, check_target
from admm_prune.recipes.local_methods import LOCAL_METHODS, Method
from admm_prune.recipes.recipe import Outcome
from admm_prune.recipes.targets import Target
from admm_prune.recipes.trained import Session, Trained
from admm_prune.solvers.elsa.settings import Score
from admm_prune.solvers.sparse_adam import SparseAdam

_CALIBRATION = 128  # sequences that layer problems are made of


@dataclass(frozen=True)
class Stage:
    """The model is projected to density d^share, d that of the target, when `at` of the run is done."""

    at: float
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Elsa(Trained):
    """min f(x), x in C, f the model's own loss: projections that come closer to C, and Adam on the support in between.

        at the stages:   x <- argmin_{z in C_t} |z - x|_H^2,   H the layers' Gram on the model as it is now;
        in between:      x <- Adam's step with the gradient of f, restricted to the support.

    This is ELSA's splitting with three of its parts exchanged, each by measurement (`benchmarks/results/elsa-*`). The
    projection is taken in the metric of the layers' second moments, as far as `projection` solves it, and compensates
    what it removes, in place of the diagonal of the Fisher information. x = z is held between the projections: the
    penalty is infinite, so that no dual variable and no anchor is kept, and the state beyond Adam's is a bit a weight.
    And C is approached through a few larger sets. `published` is the iteration of the paper.

    Attributes:
        stages: the last one has share 1.
        projection: a solver of layer problems.
    """

    name: str = "elsa"
    summary: str = "surrogate-free: layer-wise projections in stages, the true loss trained on the support in between"
    stages: tuple[Stage, ...] = (Stage(0.0, 0.6), Stage(0.2, 0.8), Stage(0.4))
    projection: Method = LOCAL_METHODS["admm"]

    def check(self, model: Any, target: Target) -> None:
        from admm_prune.models.structure import decoder_blocks

        check_target(decoder_blocks(model), self.projection, target)

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam(**how, freeze=1.0)

    def projections(self, target: Target) -> list[tuple[float, Target]]:
        return staged(target, self.stages)

    def project(self, session: Session, target: Target) -> None:
        rows = len(session.training.rows)
        calibration = session.training.split(_CALIBRATION / rows)[1] if rows > _CALIBRATION else session.training
        request = replace(session.request, target=target, calibration=calibration, on_progress=None)
        session.model.requires_grad_(False)
        outcome = Layerwise(self.projection).prune(session.model, request)
        session.model.requires_grad_(True)
        masks = {view.name: view.parameter.detach() != 0 for view in session.views}
        session.trainer.optimizer.change_support(masks)
        stage = {"step": session.trainer.done, "target": str(target), "relative_error": _mean_error(outcome)}
        if str(target) == str(session.request.target):
            stage["held_out_loss"] = session.offer()
        session.stages.append(stage)


@dataclass(frozen=True, kw_only=True)
class Gradual(Trained):
    """Gradual pruning: every `interval` steps the smallest |w| F^power of the weights that are left go for good.

    The sparsity rises by 1 - (1 - s)^3 of the target over the first `ramp` of the run.

    Sources: Zhu and Gupta, To prune, or not to prune, 2017; the score with the Fisher information: issue of
    Kurtic et al., The optimal BERT surgeon, 2022, in its diagonal form.
    """

    name: str = "gradual"
    summary: str = "gradual pruning while training: the smallest weights go every few steps, and stay away"
    interval: int = 16
    ramp: float = 0.75
    power: float = 0.0

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        score = Score(fisher="adam" if self.power else "none", power=self.power)
        timeline = {"interval": self.interval, "total_steps": self.steps, "freeze": 1.0 - self.ramp, "ramp": 1.0}
        return SparseAdam(**how, **timeline, penalty=math.inf, score=score)


@dataclass(frozen=True, kw_only=True)
class Published(Trained):
    """ELSA as published: see `SparseAdam.faithful`. Its rate and penalty are absolute."""

    name: str = "elsa-published"
    summary: str = "ELSA as published: penalty from 0 by a cosine, Fisher-weighted projections, no frozen end"
    lr: float | None = 2e-4
    penalty: float = 1e-3

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam.faithful(**how, total_steps=self.steps, penalty=self.penalty)


@dataclass(frozen=True, kw_only=True)
class TunedDense(Trained):
    """The dense model trained on the same text for as long: what of a gain is mere tuning."""

    name: str = "tuned-dense"
    summary: str = "prunes nothing: the dense model trained as long as the others, to compare them with"

    def check(self, model: Any, target: Target) -> None:
        if target.fraction:
            raise UserError("tuned-dense prunes nothing: give --sparsity 0")

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam(**how, freeze=1.0)


def staged(target: Target, stages: tuple[Stage, ...]) -> list[tuple[float, Target]]:
    """When the model is projected to what; stages that ask for what one before them asked are left out."""
    plan: dict[Target, float] = {}
    for stage in stages:
        plan.setdefault(_between(target, stage.share), stage.at)
    return [(at, between) for between, at in plan.items()]


def _between(target: Target, share: float) -> Target:
    """The target of density d^share; of a pattern, whole numbers kept of every M, rounded up."""
    density = (1.0 - target.fraction) ** share if target.fraction < 1.0 else float(share < 1.0)
    if share == 1.0:
        return target
    if target.pattern is not None:
        return Target(pattern=(math.ceil(density * target.pattern[1] - 1e-9), target.pattern[1]))
    return Target(sparsity=1.0 - density)


def _mean_error(outcome: Outcome) -> float:
    errors = [layer.relative_error for layer in outcome.layers if layer.relative_error is not None]
    return float(torch.tensor(errors, dtype=torch.float64).mean()) if errors else math.nan


TRAINED: tuple[Trained, ...] = (
    Elsa(),
    Elsa(
        name="elsa-l",
        summary="elsa with Adam's moments in 8 bits",
        moments="int8",
    ),
    Published(),
    Elsa(
        name="admm-finetuned",
        summary="admm at once, then trained on its support: the baseline that counts",
        stages=(Stage(0.0),),
    ),
    Gradual(),
    TunedDense(),
)
