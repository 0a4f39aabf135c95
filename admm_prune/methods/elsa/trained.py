"""The base of the methods that train the model while they prune it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from admm_prune.errors import UserError, check_at_least, check_fractions
from admm_prune.methods.base import (
    IN_PROCESS,
    Budget,
    Capabilities,
    Outcome,
    Recipe,
    Runtime,
    Stages,
    Task,
    TextUse,
    report_of,
    untouched,
)
from admm_prune.methods.elsa.checkpoints import Checkpoints
from admm_prune.methods.elsa.engine import Engine, float32_weights, teacher_of
from admm_prune.methods.elsa.session import Session
from admm_prune.methods.elsa.trainer import DEFAULT_RATE, GRADIENTS, Trainer, measured_rate, passes, trainable
from admm_prune.methods.target import Target
from admm_prune.models.losses import Distillation, next_token_loss
from admm_prune.models.sharded import ShardedModel
from admm_prune.models.streaming import ModelOnDisk
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.ops import backend
from admm_prune.solvers.elsa.moments import MomentFormat
from admm_prune.solvers.sparse_adam import SparseAdam

_HELD_OUT = 16  # sequences that are not trained on, and select the best model of a run
_RATE_TEST = 8  # of the held-out sequences, for the learning rate range test
_LEAST = 2  # smallest number of sequences to train on
_UPDATE = ("step", "primal_residual", "dual_residual", "churn", "rho", "sparsity")  # reported for each dual update
_STEPS, _PART = 32, 8  # checkpoints are written every 32 steps, or every eighth of a shorter run

Projection = Callable[[Session, Target], None]


@dataclass(frozen=True, kw_only=True)
class Trained(Capabilities, ABC):
    """A method that trains all parameters of the model on the calibration text, and ends with sparse weights.

    The learning rate increases linearly, then decreases linearly to zero. Its peak is measured on the model before the
    first step (`trainer.measured_rate`), and increased whenever a projection leaves fewer weights; if it cannot be
    measured it is `trainer.DEFAULT_RATE`, with a note. Weights are trained in float32 and saved in the dtype of the
    model. A copy of the best sparse weights, in this dtype, is kept in addition to the state of the optimizer. The
    complete state is written to the journal every few steps and after each projection, so that an interrupted run
    continues from there, with the same result.

    Several processes shard the trained parameters, their gradients, Adam's moments and the teacher (FSDP2), and share
    every batch. No process ever holds the whole of a model that is on disk: each reads its shards, projections and the
    result gather one block at a time, and the result is written to files. If the model is in memory, each process holds
    its own copy in addition to the shards.

    Attributes:
        steps: the number of forward and backward passes over a batch, including those of the learning rate range test.
        batch_size: the number of sequences per step, drawn in epochs without replacement.
        warm_up: the fraction of the run in which the learning rate increases.
        lr: the peak learning rate; None to measure it.
        lr_multiplier: multiplies the measured learning rate.
        distillation: the weight of the distillation loss, 0 to 1; if it is not 0, a copy of the dense model stays in
            memory.
        moments: the format of Adam's moments, see `SparseAdam`.
        engine: how passes are computed; it changes the result by rounding only.
    """

    options: ClassVar[tuple[str, ...]] = ("steps", "distillation", *(one.name for one in fields(Engine)))
    stages: ClassVar[Stages | None] = "training"

    name: str
    summary: str
    steps: int = 512
    batch_size: int = 8
    warm_up: float = 0.05
    lr: float | None = None
    lr_multiplier: float = 1.0
    distillation: float = 0.0
    moments: MomentFormat = "full"
    engine: Engine = Engine()

    def __post_init__(self) -> None:
        check_at_least(self, steps=1, batch_size=1, lr=0, lr_multiplier=0)
        check_fractions(self, "distillation", "warm_up")

    @property
    def text_use(self) -> TextUse:
        return "training"

    @property
    def budget(self) -> Budget:
        return "matrix"

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size

    @abstractmethod
    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        """The optimizer of a run.

        Args:
            how: arguments of `SparseAdam`: the dense and trainable model as `params`, the pruning target, the initial
                learning rate, and so on.
        """

    def projections(self, target: Target) -> list[tuple[float, Target]]:
        """The projections of a run: (fraction of the run after which it is due, its target). None by default."""
        return []

    def project(self, session: Session, target: Target) -> None:
        """Projects the model onto a target, and restricts the optimizer to the resulting support."""
        raise NotImplementedError(f"{type(self).__name__} plans projections that it cannot do")

    def remarks(self, trainer: Trainer) -> list[str]:
        """Notes on a run that was too short for the method."""
        if self.steps > self._passes:
            return []
        return [
            f"measuring the learning rate takes {self._passes} steps, and {self.steps} were given: one step trained"
        ]

    def projecting(self, task: Task) -> tuple[Recipe, Task] | None:
        """The method for projections, and its task except for the target; None if the model is never projected."""
        return None

    def streaming_obstacle(self) -> str | None:
        return f"{self.name} trains all weights at once: choose a method that goes block by block"

    def check(self, model: nn.Module, target: Target) -> None:
        if target.varied:
            raise UserError(f"{self.name} trains all weights to one target: overrides are for layer-wise methods")
        for view in chosen_views(model, target):
            if target.pattern is not None and view.shape[1] % target.pattern[1]:
                raise UserError(
                    f"{view.name}: {target.pattern[1]} does not divide its {view.shape[1]} inputs: give a sparsity"
                )

    def check_task(self, task: Task) -> None:
        super().check_task(task)
        if task.bounds:
            raise UserError(f"{self.name} trains all weights, and has no layer problems to bound: leave --bounds out")

    def ridge_obstacle(self, task: Task) -> str | None:
        if task.ridge is None:
            return None
        return f"{self.name} takes no ridge, because its layer problems keep their own: leave --ridge out"

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        """Trains and prunes the model. The result has the least held-out loss of the last model and of those that were
        just projected to the final sparsity."""
        self.check(model, task.target)
        if runtime.world.size > 1 and task.target.pattern is None:
            for view in chosen_views(model, task.target):
                if view.parameter.ndim > 2:
                    raise UserError(
                        f"{view.parameter_name} holds the matrices of experts, which several processes cannot prune to "
                        "a sparsity: give a pattern, or run it without torchrun"
                    )
        self.check_task(task)
        if not (runtime.offloading.keeps_changes or runtime.journal.keeps):
            raise ValueError("a model that is not in memory needs a journal, or its pruned weights are lost")
        session = self.run(model, task, runtime)
        trainer = session.trainer
        precision = {torch.bfloat16: "bf16", torch.float32: "float32"}[self.engine.dtype(trainer.device)]
        details = {
            **trainer.as_json(),
            "precision": precision,
            "lr": session.rates or trainer.lr,
            "batch_size": self.batch_size,
            "distillation": self.distillation,
            "moments": trainer.optimizer.moments,
            "held_out_loss": session.best_loss,
            "held_out_sequences": len(session.held_out.rows),
            "dual_updates": [{name: getattr(u, name) for name in _UPDATE} for u in trainer.optimizer.history],
        }
        pruned = {view.name for view in session.views}
        trained_reports, other_reports = [], []
        for index, block in enumerate(decoder_blocks(session.model)):
            with session.offloading.block(index):
                chosen = [view for view in block.weights if view.name in pruned]
                trained_reports += [replace(report_of(view, view.shape), tokens=trainer.tokens) for view in chosen]
                other_reports += untouched(block, pruned)
        _gather_result(model, session)
        return Outcome(
            layers=trained_reports + other_reports,
            notes=(*trainer.optimizer.notes, *trainer.notes, *session.notes, *self.remarks(trainer)),
            details={"training": details, "stages": session.stages},
        )

    def run(
        self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS, project: Projection | None = None
    ) -> Session:
        """Trains and prunes in place, and leaves the best weights of the final sparsity in the model.

        Args:
            project: replaces `project` of the method.
        """
        with float32_weights(model) as dtypes, trainable(model):
            session = self._session(model, task, runtime, dtypes)
            self._train(session, project or self.project)
            session.trainer.optimizer.finalize()
            session.finish()
        return session

    def _session(self, model: nn.Module, task: Task, runtime: Runtime, dtypes: Mapping[str, torch.dtype]) -> Session:
        sequences = task.calibration
        if len(sequences.rows) < _LEAST:
            raise UserError(f"{self.name} trains: it needs at least {_LEAST} sequences of text")
        training, held_out = sequences.split(min(_HELD_OUT / len(sequences.rows), 0.1))
        if not held_out.scored_tokens:
            raise UserError(f"{self.name} chooses by held-out text, which has no token to score here: give more text")
        target, world = task.target, runtime.world
        sharded = ShardedModel(model, runtime.offloading, world) if world.size > 1 else None
        trained = model if sharded is None else sharded.sharded
        plain = model if sharded is None else sharded.model
        views = chosen_views(plain, target)
        how: dict[str, Any] = {"params": trained, "lr": self.lr or 0.0, "moments": self.moments}
        how |= {"targets": list(dict.fromkeys(view.parameter_name for view in views)), "ignore": ()}
        how["fused"] = not backend.uses_triton(next(trained.parameters()))  # torch's kernel, where it is not ours
        how |= {"pattern": target.pattern} if target.pattern else {"sparsity": target.sparsity}
        trainer = Trainer(
            trained,
            self.optimizer(how),
            Distillation(self._teacher(model, sharded), self.distillation) if self.distillation else next_token_loss,
            training,
            steps=self.training_steps,
            batch_size=self.batch_size,
            seed=task.seed,
            warm_up=self.warm_up,
            world=world,
            engine=self.engine,
        )
        offloading = sharded or runtime.offloading
        return Session(plain, trained, offloading, views, task, runtime, training, held_out, trainer, dtypes)

    def _teacher(self, model: nn.Module, sharded: ShardedModel | None) -> nn.Module:
        """A copy of the dense model, in the dtype of its matrix products."""
        if sharded is not None:
            return sharded.copy(self.engine.dtype(sharded.device(model)))
        return teacher_of(model, self.engine.dtype(next(model.parameters()).device))

    @property
    def training_steps(self) -> int:
        """Optimizer steps that remain after the learning rate range test."""
        return max(1, self.steps - self._passes)

    @property
    def _passes(self) -> int:
        """Steps of the learning rate range test."""
        return 0 if self.lr is not None else passes(_RATE_TEST / self.batch_size)

    def _train(self, session: Session, project: Projection) -> None:
        trainer, task, runtime = session.trainer, session.task, session.runtime
        last = trainer.steps - 1
        plan = {min(round(at * trainer.steps), last): target for at, target in self.projections(task.target)}
        every = max(1, trainer.steps // 50)  # the interval of progress lines without a progress bar
        checkpoint_interval = max(1, min(_STEPS, trainer.steps // _PART))
        checkpoints = Checkpoints(runtime.journal.checkpoints("training"), runtime.world)
        session.resume(checkpoints)
        while trainer.done < trainer.steps:
            if trainer.done % every == 0:
                runtime.report_progress(trainer.done, trainer.steps, self.name)
            if session.prepared != trainer.done:
                self._prepare(session, plan, project)
                session.prepared = trainer.done
                if trainer.done in plan:
                    session.save(checkpoints)
            reported = len(trainer.curve)
            trainer.step()
            if len(trainer.curve) > reported:
                step, loss = trainer.curve[-1]
                runtime.record({"train/loss": loss, "train/lr": trainer.last_lr, "train/tokens": trainer.tokens}, step)
            if trainer.done % checkpoint_interval == 0 or trainer.done == trainer.steps:
                session.save(checkpoints)
        runtime.report_progress(trainer.steps, trainer.steps)

    def _prepare(self, session: Session, plan: dict[int, Target], project: Projection) -> None:
        """Projects the model and sets the learning rate, if this is due before the next step."""
        done = session.trainer.done
        if done in plan:
            project(session, plan[done])
        if self.lr is None and (done in plan or done == 0):
            self._set_rate(session, plan.get(done, session.task.target))

    def _set_rate(self, session: Session, target: Target) -> None:
        model, trainer = session.trained, session.trainer
        if session.measured is None:
            validation = replace(session.held_out, rows=session.held_out.rows[-_RATE_TEST:])
            session.measured = measured_rate(
                model, trainer.backward, trainer.take(GRADIENTS), lambda: trainer.held_out_loss(validation)
            )
            if not session.measured.usable:
                finite = math.isfinite(session.measured.decrease)
                why = (
                    "no step along the gradient lowers the loss" if finite else "the loss or its gradient is not finite"
                )
                rate = self.lr_multiplier * DEFAULT_RATE
                session.notes.append(f"the learning rate could not be measured, because {why}: {rate:g} is used")
        trainer.lr = self.lr_multiplier * session.measured.rate(1.0 - target.fraction)
        session.rates.append(trainer.lr)


def chosen_views(model: nn.Module, target: Target) -> list[WeightView]:
    """The weights that are pruned.

    Raises:
        UserError: only some of the matrices in one parameter are selected.
    """
    views = [view for block in decoder_blocks(model) for view in block.weights]
    chosen = [view for view in views if target.at(view.name) is not None]
    left = {view.parameter_name for view in views} - {view.parameter_name for view in chosen}
    torn = {view.parameter_name for view in views if target.at(view.name) is None} - left
    if torn:
        raise UserError(f"{min(torn)} is one parameter for all experts: a method that trains prunes all of it or none")
    return chosen


def _gather_result(model: nn.Module, session: Session) -> None:
    """Copies the trained weights of a sharded model to the given one, in memory or in files."""
    sharded, runtime = session.offloading, session.runtime
    if not isinstance(sharded, ShardedModel):
        return
    if isinstance(runtime.offloading, ModelOnDisk):
        folder = runtime.journal.scratch()
        assert folder is not None, "checked before"
        sharded.write_to(runtime.offloading, folder, session.dtypes)
    else:
        sharded.copy_to(model)
