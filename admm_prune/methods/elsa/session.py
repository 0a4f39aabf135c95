"""The state of one run of a method that trains, and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.methods.base import Runtime, Task
from admm_prune.methods.elsa.checkpoints import Checkpoints
from admm_prune.methods.elsa.trainer import MeasuredRate, Trainer
from admm_prune.models.streaming import Offloading
from admm_prune.models.structure import WeightView
from admm_prune.ops.sharding import local
from admm_prune.solvers.elsa.duals import DualUpdate


@dataclass
class Session:
    """The model, the data and the state of a run.

    Attributes:
        model: the model for everything but training; its weights are loaded within the contexts of `offloading`.
        trained: the model that is trained: `model` itself, or the same weights sharded over the processes.
        offloading: where the weights of `model` are; changes to them also change `trained`.
        views: the weights of `model` that are pruned.
        training, held_out: the sequences to train on, and those on which the best model is selected.
        dtypes: the dtypes in which the parameters are saved, by name; they are trained in float32.
        measured: the result of the learning rate range test.
        rates: the learning rates so far.
        stages: a record of each projection, as JSON values.
        prepared: the step whose projection and learning rate are already done.
        best: the best parameters of `trained` so far, in the dtypes of `dtypes`.
        best_loss: their loss on the held-out sequences.
    """

    model: nn.Module
    trained: nn.Module
    offloading: Offloading
    views: list[WeightView]
    task: Task
    runtime: Runtime
    training: Sequences
    held_out: Sequences
    trainer: Trainer
    dtypes: Mapping[str, torch.dtype]
    measured: MeasuredRate | None = None
    rates: list[float] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prepared: int = -1
    best: dict[str, Tensor] | None = None
    best_loss: float = math.inf

    def offer(self) -> float:
        """Computes the loss on the held-out sequences, with weights rounded to the dtypes in which they are saved, and
        keeps a copy of the weights if it is the lowest so far. Only for models that have their final sparsity.

        Returns:
            The loss.
        """
        with self._rounded():
            loss = self.trainer.held_out_loss(self.held_out)
        if self.best is None or loss < self.best_loss:
            self.best_loss, self.best = loss, self.best or self._empty()
            for name, x in self.trained.named_parameters():
                local(self.best[name]).copy_(local(x.detach()))
        return loss

    def _empty(self) -> dict[str, Tensor]:
        """Uninitialized tensors with the shapes of the parameters, in the dtypes in which they are saved."""
        return {
            name: torch.empty_like(x.detach(), dtype=self.dtypes[name]) for name, x in self.trained.named_parameters()
        }

    @contextmanager
    def _rounded(self) -> Generator[None]:
        """Context in which the parameters are rounded to the dtypes in which they are saved."""
        shards = [(local(x.detach()), self.dtypes[name]) for name, x in self.trained.named_parameters()]
        before = [(x, x.clone()) for x, dtype in shards if dtype != x.dtype]
        for x, dtype in shards:
            if dtype != x.dtype:
                x.copy_(x.to(dtype))
        try:
            yield
        finally:
            for x, exact in before:
                x.copy_(exact)

    def finish(self) -> None:
        """Copies the best weights, which may be the current ones, to the trained model."""
        if self.offer() > self.best_loss:
            self.restore_best()
            last = "the last model was worse on held-out sequences than an earlier one, which is returned"
            self.notes.append(last)
        if not math.isfinite(self.best_loss):
            self.notes.append("the loss of the model on held-out sequences is not finite")

    @torch.no_grad()
    def restore_best(self) -> None:
        assert self.best is not None
        for name, parameter in self.trained.named_parameters():
            local(parameter).copy_(local(self.best[name]))

    def save(self, checkpoints: Checkpoints) -> None:
        """Saves a checkpoint of the complete state."""
        if checkpoints.enabled:
            checkpoints.save(self._tensors(), self._values())

    def resume(self, checkpoints: Checkpoints) -> None:
        """Restores the state of the latest checkpoint, if there is one."""
        values = checkpoints.latest()
        if values is None:
            return
        optimizer = self.trainer.optimizer
        for group, settings in zip(optimizer.param_groups, values["groups"], strict=True):
            group.update({key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()})
        optimizer.masks()  # creates the optimizer's state, without anchors where the support is fixed
        if values["best_loss"] is not None:
            self.best = self._empty()
            self.best_loss = values["best_loss"]
        tensors = self._tensors()
        checkpoints.load(tensors)
        torch.set_rng_state(tensors["random"])
        for name, parameter in self.trained.named_parameters():
            state = optimizer.state[parameter]
            for key, number in values["states"][name].items():
                state[key] = torch.full_like(state[key], number) if isinstance(state.get(key), Tensor) else number
        optimizer.history = [DualUpdate.from_json(update) for update in values["history"]]
        self.trainer.move_to(values["trainer"])
        self.measured = None if values["measured"] is None else MeasuredRate(**values["measured"])
        self.rates, self.stages, self.prepared = values["rates"], values["stages"], values["prepared"]
        self.notes = values["notes"]

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, under names that do not depend on the number of processes."""
        tensors = {"random": torch.get_rng_state()}
        for name, parameter in self.trained.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            for key, value in self.trainer.optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.ndim:
                    tensors[f"{key}/{name}"] = value
        return tensors | {f"best/{name}": x for name, x in (self.best or {}).items()}

    def _values(self) -> dict[str, Any]:
        """The rest of the state, as JSON values."""
        optimizer = self.trainer.optimizer
        states = {
            name: {
                key: float(value) if isinstance(value, Tensor) else value
                for key, value in optimizer.state[parameter].items()
                if not (isinstance(value, Tensor) and value.ndim)
            }
            for name, parameter in self.trained.named_parameters()
        }
        kept_apart = ("params", "param_names")
        return {
            "trainer": self.trainer.position(),
            "states": states,
            "groups": [{k: v for k, v in g.items() if k not in kept_apart} for g in optimizer.param_groups],
            "measured": None if self.measured is None else asdict(self.measured),
            "rates": self.rates,
            "stages": self.stages,
            "notes": self.notes,
            "prepared": self.prepared,
            "history": [update.to_json() for update in optimizer.history],
            "best_loss": None if self.best is None else self.best_loss,
        }
