"""The protocol of a pruning method: `Recipe.prune` takes a model, a Task and a Runtime, and returns an Outcome."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.target import Target
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import IN_MEMORY, Offloading
from admm_prune.models.structure import Block, WeightView
from admm_prune.result import Convergence, Diagnosis

if TYPE_CHECKING:
    from admm_prune.methods.joint import Joint
    from admm_prune.methods.local import Method
    from admm_prune.methods.parts import ProblemLike, SetLike

_LOG = logging.getLogger(__name__)
Ridge = float | Literal["auto"] | None  # None: the default of the method
Stages = Literal["layers", "networks", "groups", "training"]
Budget = Literal["matrix", "model", "kv-cache", "flops", "latency"]
# "measurement": the text is used to measure errors only; the pruned weights do not depend on it.
TextUse = Literal["calibration", "training", "measurement"]
# (steps done, all steps, name of the part being processed; "" at the end and during an evaluation)
OnProgress = Callable[[int, int, str], None]
OnRecord = Callable[[dict[str, float], int], None]  # (figures by name, index of their block or training step)


class Journal:
    """Records of finished work, identified by the part of the run and a number. This base class stores nothing;
    `runs.journal.journal` stores the records in files.

    A record is complete or absent. Its content is restored exactly: JSON values including their floats, tensors, and
    the state of the random number generators. A resumed run takes the same steps in the same order as an uninterrupted
    one; a step that has a record is replaced by the record.
    """

    keeps = False  # whether committed records can be read back

    def finished(self, part: str) -> list[Any]:
        """The contents of the records 0, 1, ... of a part, as JSON values."""
        return []

    def tensor_file(self, part: str, index: int) -> Path:
        """The safetensors file with the tensors of a record."""
        raise LookupError(f"there is no record {index} of {part}")

    def resume_point(self, part: str) -> dict[str, Tensor] | None:
        """The activations of the last record of a part, or None if it was committed without activations. Also restores
        the random number generators to their state at that record.

        Only the latest activations of a run are kept: read those of a part before another part begins.
        """
        raise LookupError(f"there is no record of {part}")

    def commit(
        self,
        part: str,
        index: int,
        content: Any,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        activations: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the next record of a part atomically.

        Args:
            content: JSON values; floats may be inf or nan.
            tensors: by name, for `tensor_file`.
            activations: for `resume_point`; they replace those of all earlier records.

        Raises:
            UserError: the record cannot be written. Earlier records are unaffected.
        """

    def once(self, part: str, compute: Callable[[], Any]) -> Any:
        """The recorded result of a part. If there is none, commits and returns that of `compute`, as JSON values."""
        records = self.finished(part)
        if records:
            return records[0]
        content = compute()
        self.commit(part, 0, content)
        return content

    def checkpoints(self, name: str) -> Path | None:
        """A folder for files that a method writes itself, such as training checkpoints; None if nothing is stored.

        The folder survives an interruption and is deleted when the run is finished. The method writes its files
        atomically (under another name, then renamed), and stores its position and the state of the random number
        generators in them.
        """
        return None

    def scratch(self) -> Path | None:
        """A folder for temporary files next to the output, emptied when the run is resumed; None if they may be
        anywhere."""
        return None


NOTHING = Journal()


@dataclass(frozen=True)
class RidgeTrial:
    """A ridge and a damping, as in `LayerReconstruction`, and the relative error on validation tokens with them."""

    ridge: float
    damping: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method is to do with a model: everything that the result depends on.

    Args:
        target: the sparsity to reach.
        calibration: the text to calibrate or train on.
        seed: the seed of all random choices.
        ridge: replaces the default of the method; "auto" selects a ridge for every input on validation tokens.
        bounds: also prove a lower bound for every layer problem, at the cost of two eigendecompositions, which take
            seconds per matrix.
    """

    target: Target
    calibration: Sequences
    seed: int = 0
    ridge: Ridge = None
    bounds: bool = False


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a task is carried out: by default in this process, in memory and without a journal.

    Args:
        offloading: where the weights of the model are.
        world: the processes of the run; all of them have the same task.
        journal: stores finished work, and has that of an interrupted run.
        on_progress: called at every step.
        on_record: called with the figures of every finished block, and with those of training.
        activation_bytes: the bytes of activations between blocks that are held in memory; the rest is on disk. None
            holds all of them in memory.
    """

    offloading: Offloading = IN_MEMORY
    world: World = ALONE
    journal: Journal = NOTHING
    on_progress: OnProgress | None = None
    on_record: OnRecord | None = None
    activation_bytes: int | None = None

    def report_progress(self, done: int, total: int, at_work: str = "") -> None:
        """Calls `on_progress`, if there is one."""
        if self.on_progress is not None:
            self.on_progress(done, total, at_work)

    def record(self, figures: dict[str, float], step: int) -> None:
        """Calls `on_record`, if there is one, and logs the figures."""
        if _LOG.isEnabledFor(logging.INFO):
            kind = next(iter(figures), "").partition("/")[0]
            texts = [f"{name.removeprefix(f'{kind}/')} {value:.6g}" for name, value in figures.items()]
            _LOG.info("%s %d: %s", kind, step, ", ".join(texts))
        if self.on_record is not None:
            self.on_record(figures, step)


IN_PROCESS = Runtime()


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """The result for one weight W, pruned to V.

    Errors are |X (V - W)^T|^2 / |X W^T|^2 of the weights as stored, in float64 and without ridge or damping.

    Attributes:
        shape: (out, in) of the dense weight.
        sparsity: the fraction of the dense weight's entries that are zero, or were removed with their row or column.
        relative_error: on all calibration tokens; None if no layer problem was solved. If a joint step on several
            matrices changed the weight again, X are the inputs after that step.
        relative_error_validation: the same on the calibration tokens that V was not fitted to; None if it was fitted to
            all of them, as by every method that reads the inputs of one layer at a time.
        objective, bound: the objective of V, including ridge and damping, and a lower bound of it over the same sparse
            set, both relative to |X W^T|^2; None unless `Task.bounds` is set.
        tokens: the number of tokens in X.
        ridge, damping: the values used in the layer problem; None if there was none.
        ridge_trials: the trials of the ridge "auto", best first.
        diagnosis: the findings of `solvers.diagnostics`.
        convergence: of the solve; if several weights were solved together, only the first one has it.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    relative_error: float | None = None
    relative_error_validation: float | None = None
    objective: float | None = None
    bound: float | None = None
    status: str | None = None
    iterations: int = 0
    seconds: float = 0.0
    tokens: int = 0
    ridge: float | None = None
    damping: float | None = None
    ridge_trials: tuple[RidgeTrial, ...] = ()
    notes: tuple[str, ...] = ()
    diagnosis: tuple[Diagnosis, ...] = ()
    convergence: Convergence | None = None

    @property
    def nonzeros(self) -> int:
        """The number of entries of V that are not zero."""
        return round((1.0 - self.sparsity) * self.shape[0] * self.shape[1])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The report that `as_json` described, after a round trip through JSON."""
        columns = content["convergence"]
        parts: dict[str, Any] = {name: tuple(content[name]) for name in ("shape", "notes")}
        parts["ridge_trials"] = tuple(RidgeTrial(**trial) for trial in content["ridge_trials"])
        parts["diagnosis"] = tuple(Diagnosis(**finding) for finding in content["diagnosis"])
        parts["convergence"] = columns and Convergence(**{name: tuple(column) for name, column in columns.items()})
        return cls(**{**content, **parts})


def report_of(view: WeightView, dense_shape: tuple[int, int]) -> LayerReport:
    """The report of a matrix for which no problem was solved, such as one that lost rows or is unchanged."""
    left = int(view.read().count_nonzero())
    return LayerReport(name=view.name, shape=dense_shape, sparsity=1 - left / (dense_shape[0] * dense_shape[1]))


def untouched(block: Block, pruned: Collection[str]) -> list[LayerReport]:
    """Reports for the weights of a block that are not selected for pruning."""
    left = [view for view in block.weights if view.name not in pruned]
    return [replace(report_of(view, view.shape), notes=("not selected: left unchanged",)) for view in left]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a method.

    Attributes:
        layers: a report for every weight.
        notes: deviations from the task.
        details: further results (a training curve, an allocation), as JSON values.
        model: the pruned model, if the given one was not pruned in place.
    """

    layers: list[LayerReport]
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None


class Capabilities(Protocol):
    """Properties of a method that the rest of the package asks for instead of testing its class, with their defaults.

    Attributes:
        options: the method-specific settings that it accepts, such as "steps" or "unit".
        stages: the unit of its work, from which `plan` estimates the cost: layers, feed-forward networks, structured
            groups, or training of the whole model; None if the cost cannot be estimated.
        prunes: False for a baseline that leaves the model dense.
        shrinks: whether removed weights are left out of the saved files, rather than stored as zeros.
        text_use: what the calibration text is used for.
    """

    options: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[Stages | None] = None
    prunes: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False

    @property
    def text_use(self) -> TextUse:
        return "calibration"

    def check_task(self, task: Task) -> None:
        """Rejects settings of a task that the method does not support, before any work is done.

        Raises:
            UserError: the method does not support the ridge or the bounds.
        """
        obstacle = self.ridge_obstacle(task)
        if obstacle is not None:
            raise UserError(obstacle)

    def ridge_obstacle(self, task: Task) -> str | None:
        """Why the method does not support the ridge of the task, and what to do; None if it does or none is given."""
        return None

    def streaming_obstacle(self) -> str | None:
        """Why the method cannot prune a model one block at a time from disk; None if it can."""
        return None

    def with_joint(self, joint: Joint) -> Self | None:
        """The method with joint steps on several matrices of a block; None if it does not support them."""
        return None

    def with_parts(self, solver: Method | None, problem: ProblemLike, constraint: SetLike) -> Self | None:
        """The method with other parts in place of its own, where they are not None; None if it has no such parts.

        Raises:
            UserError: a part cannot be used.
        """
        return None


class Recipe(Capabilities, Protocol):
    """A method for whole models, available by name: a frozen dataclass of settings."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str:
        """One line for `admm-prune list`."""
        ...

    @property
    def samples(self) -> int:
        """The default number of calibration sequences."""
        ...

    @property
    def budget(self) -> Budget:
        """The scope of the target: every matrix of the blocks by itself, all of them together, or another quantity of
        the model, such as its FLOPs."""
        ...

    def check(self, model: nn.Module, target: Target) -> None:
        """Rejects a model or target that the method cannot prune, before any weight is changed.

        Raises:
            UserError: the model has no decoder blocks that can be read, or a weight does not admit the target; the
                message names the weight.
        """
        ...

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        """Prunes the model in place if possible. The model is in evaluation mode, and without gradients.

        Raises:
            UserError: as `check`; the text or the ridge cannot be used.
        """
        ...
