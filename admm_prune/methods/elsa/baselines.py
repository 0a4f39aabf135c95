"""Methods that train without a dual variable: in stages, gradually, or without pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from admm_prune.errors import UserError, check_at_least, check_fractions, check_positive
from admm_prune.methods.base import Outcome, Recipe, Runtime, Task
from admm_prune.methods.elsa.session import Session
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.elsa.trainer import Trainer
from admm_prune.methods.layerwise import Layerwise, check_target
from admm_prune.methods.local import LOCAL_METHODS, Method, with_parts
from admm_prune.methods.parts import ProblemLike, SetLike
from admm_prune.methods.target import Target
from admm_prune.models.structure import decoder_blocks
from admm_prune.solvers.elsa.settings import Score
from admm_prune.solvers.sparse_adam import SparseAdam

_CALIBRATION = 128  # sequences for the layer problems


@dataclass(frozen=True)
class DensitySchedule:
    """The densities on the way to a sparse target: first `first`, then decreasing by equal ratios.

    A target of density `first` or more is reached by one projection. A layer-wise projection of the dense model to a
    lower density loses more than training recovers; that of a model trained at slightly less than twice the density
    does not.

    Args:
        first: the density of the first projection.
        ratio: the smallest ratio of a density to the one before.
        until: the fraction of the run after which the target is reached; the stages before are of equal length.
    """

    first: float = 0.25
    ratio: float = 0.58
    until: float = 0.4

    def __post_init__(self) -> None:
        check_positive(self, "first", "ratio")
        check_fractions(self, "first", "ratio", "until")
        if self.ratio == 1 or self.until == 1:
            raise UserError(f"ratio and until of a schedule must be less than 1, not {self.ratio} and {self.until}")

    def densities(self, target: float) -> list[float]:
        """The densities of all projections, the last of which is the target."""
        if not 0.0 < target < self.first:
            return [target]
        stages = math.ceil(math.log(self.first / target) / -math.log(self.ratio))
        return [self.first * (target / self.first) ** (i / stages) for i in range(stages)] + [target]


@dataclass(frozen=True, kw_only=True)
class Staged(Trained):
    """min f(x), x in C, f the model's own loss: projections onto sets approaching C, and Adam on the support.

        at the stages:   x <- argmin_{z in C_t} |z - x|_H^2,   H the layers' Gram on the model as it is now;
        in between:      x <- Adam's step with the gradient of f, restricted to the support.

    x = z between the projections: there is no dual variable, and the only state in addition to Adam's is one bit per
    weight. The support changes only at the stages. With a single stage this is one-shot pruning followed by training on
    a fixed mask.

    Attributes:
        schedule: the densities of the projections; None projects to the target at once.
        projection: the solver of the layer problems.
    """

    name: str = "staged"
    summary: str = "layer-wise projections in stages, the true loss trained on the support in between"
    distillation: float = 0.5
    schedule: DensitySchedule | None = DensitySchedule()
    projection: Method = LOCAL_METHODS["admm"]

    def check(self, model: Any, target: Target) -> None:
        super().check(model, target)
        check_target(decoder_blocks(model), self.projection, target)

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam(**how, freeze=1.0)

    def projections(self, target: Target) -> list[tuple[float, Target]]:
        return stages_of(target, self.schedule)

    def projecting(self, task: Task) -> tuple[Recipe, Task]:
        rows = task.calibration.rows[:_CALIBRATION]
        return Layerwise(self.projection), replace(task, calibration=replace(task.calibration, rows=rows))

    def with_parts(self, solver: Method | None, problem: ProblemLike, constraint: SetLike) -> Self | None:
        if constraint is not None:
            return None
        return replace(self, projection=with_parts(solver or self.projection, problem))

    def project(self, session: Session, target: Target) -> None:
        stage = self.solve_layers(session, target)
        names = dict.fromkeys(view.parameter_name for view in session.views)
        masks = {name: session.trained.get_parameter(name).detach() != 0 for name in names}
        session.trainer.optimizer.change_support(masks)
        if str(target) == str(session.task.target):
            stage["held_out_loss"] = session.offer()

    def solve_layers(self, session: Session, target: Target) -> dict[str, Any]:
        """Replaces the model by its layer-wise projection, and adds the record of the stage and the notes of the layer
        problems to the session.

        Returns:
            The record of the stage, as JSON values.
        """
        rows = len(session.training.rows)
        calibration = session.training.split(_CALIBRATION / rows)[1] if rows > _CALIBRATION else session.training
        task = Task(target=target, calibration=calibration, seed=session.task.seed)
        given = session.runtime
        runtime = Runtime(world=given.world, offloading=session.offloading, activation_bytes=given.activation_bytes)
        session.model.requires_grad_(False)
        outcome = Layerwise(self.projection).prune(session.model, task, runtime)
        session.model.requires_grad_(True)
        notes = _notes(outcome)
        if notes:
            name, first = next(iter(notes.items()))
            session.notes.append(
                f"projection at step {session.trainer.done}: {len(notes)} layer problems have notes, which are in the "
                f"details of the stage, such as {name}: {first[0]}"
            )
        stage = {
            "step": session.trainer.done,
            "target": str(target),
            "relative_error": _mean_error(outcome),
            "notes": notes,
        }
        session.stages.append(stage)
        return stage


@dataclass(frozen=True, kw_only=True)
class Gradual(Trained):
    """Gradual pruning: every `interval` steps, the remaining weights with the smallest |w| F^power are removed.

    After a fraction s of the first part of the run, the sparsity is 1 - (1 - s)^3 of that of the target.

    Attributes:
        interval: the number of steps between two removals.
        ramp: the length of the first part, as a fraction of the run.
        power: of F, Adam's second moment; 0 removes the smallest weights.

    Source: Zhu and Gupta, To prune, or not to prune, 2017.
    """

    name: str = "gradual"
    summary: str = "gradual pruning during training: the smallest weights are removed every few steps"
    interval: int = 16
    ramp: float = 0.75
    power: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, interval=1, power=0)
        check_fractions(self, "ramp")

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        score = Score(fisher="adam" if self.power else "none", power=self.power)
        settings: dict[str, Any] = {**how, "penalty": math.inf, "score": score, "freeze": 1.0 - self.ramp, "ramp": 1.0}
        return SparseAdam(**settings, interval=self.interval, total_steps=self.training_steps)

    def remarks(self, trainer: Trainer) -> list[str]:
        notes = super().remarks(trainer)
        if self.ramp * trainer.steps < 2 * self.interval:
            notes.append(f"all weights were removed at once, in {trainer.steps} steps of training: give more steps")
        return notes


@dataclass(frozen=True, kw_only=True)
class TunedDense(Trained):
    """The dense model, trained on the same text for as long: separates the effect of training from that of pruning."""

    prunes: ClassVar[bool] = False

    name: str = "tuned-dense"
    summary: str = "no pruning: the dense model trained for as long, as a baseline for methods that train"

    def check(self, model: nn.Module, target: Target) -> None:
        if target.fraction or target.layers:
            raise UserError("tuned-dense prunes nothing: give --sparsity 0, and no targets or overrides")

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam(**how, freeze=1.0)

    def projections(self, target: Target) -> list[tuple[float, Target]]:
        return [(0.0, target)]

    def project(self, session: Session, target: Target) -> None:
        """Makes the untrained dense model a candidate for the result."""
        session.trainer.optimizer.masks()  # creates the optimizer's state, which a checkpoint holds
        session.offer()


def stages_of(target: Target, schedule: DensitySchedule | None) -> list[tuple[float, Target]]:
    """The projections of a run: (fraction of the run after which it is due, its target). For a pattern N:M, the earlier
    ones keep a whole number of every M weights, rounded up."""
    densities = [] if schedule is None else schedule.densities(1.0 - target.fraction)[:-1]
    before = [_of_density(target, density) for density in densities]
    stages = list(dict.fromkeys([*before, target]))
    until = 0.0 if schedule is None or len(stages) == 1 else schedule.until
    return [(until * i / max(1, len(stages) - 1), stage) for i, stage in enumerate(stages)]


def _of_density(target: Target, density: float) -> Target:
    if target.pattern is None:
        return replace(target, sparsity=1.0 - density)
    return replace(target, pattern=(math.ceil(density * target.pattern[1]), target.pattern[1]))


def _mean_error(outcome: Outcome) -> float:
    errors = [layer.relative_error for layer in outcome.layers if layer.relative_error is not None]
    return float(torch.tensor(errors, dtype=torch.float64).mean()) if errors else math.nan


def _notes(outcome: Outcome) -> dict[str, list[str]]:
    """The notes and the errors of the layer problems that have any, by the name of the weight."""
    solved = [layer for layer in outcome.layers if layer.status is not None]
    notes = {
        layer.name: [*layer.notes, *(one.finding for one in layer.diagnosis if one.severity == "error")]
        for layer in solved
    }
    return {name: lines for name, lines in notes.items() if lines}
