"""The protocol of a pruning method: it is given a Task and a Runtime, and returns an Outcome with layer reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.methods.target import Target
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import IN_MEMORY, Offloading
from admm_prune.result import Convergence, Diagnosis

if TYPE_CHECKING:
    from admm_prune.methods.joint import Joint
    from admm_prune.methods.local import Method
    from admm_prune.methods.parts import ProblemLike, SetLike

_LOG = logging.getLogger(__name__)
Ridge = float | Literal["auto"] | None  # None: the method's own
Stages = Literal["layers", "networks", "groups", "training"]
Budget = Literal["matrix", "model", "kv-cache", "flops", "latency"]
TextUse = Literal["calibration", "training", "measurement"]  # of errors alone: the weights do not depend on the text
OnProgress = Callable[[int, int, str], None]  # (steps done, steps, what is at work; "" at the end and in an evaluation)
OnRecord = Callable[[dict[str, float], int], None]  # (figures by name, the block or the step that they are of)


class Journal:
    """Records of finished work, by part of the run and number; this one keeps nothing.

    `runs.journal.journal` keeps files.

    A record is complete or absent. Its content is restored exactly: JSON values with their floats, tensors, and the
    state of the random generators. A run that is resumed does the same steps in the same order as one that was never
    interrupted; where a step has a record it takes the record instead.
    """

    keeps = False  # whether what is committed can be had again

    def finished(self, part: str) -> list[Any]:
        """The contents of the records 0, 1, ... of a part, as JSON gives them back."""
        return []

    def tensor_file(self, part: str, index: int) -> Path:
        """The safetensors file with the tensors of a record."""
        raise LookupError(f"there is no record {index} of {part}")

    def resume_point(self, part: str) -> dict[str, Tensor] | None:
        """The activations of the last record of a part, None if it went without; puts the random generators into the
        state that they had then.

        Only the latest activations of a run are kept: ask for those of a part before another part begins.
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
        """Writes the next record of a part, whole or not at all.

        Args:
            content: JSON values; floats may be inf or nan.
            activations: with them the activations of all records before are dropped.

        Raises:
            UserError: it cannot be written. What was committed before is safe.
        """

    def once(self, part: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which is called on the first request of the part: JSON values."""
        records = self.finished(part)
        if records:
            return records[0]
        content = compute()
        self.commit(part, 0, content)
        return content

    def checkpoints(self, name: str) -> Path | None:
        """A folder for what a recipe keeps in files of its own, whole or not at all; None where nothing is kept.

        It is there, with all that is in it, when the run is resumed, and goes when the run is finished. The recipe
        makes its files atomic (write under another name, then rename), says in them how far it was, and keeps the
        state of the random generators in them.
        """
        return None

    def scratch(self) -> Path | None:
        """A folder for temporary files beside the output, emptied when the run is resumed; None for anywhere."""
        return None


NOTHING = Journal()


@dataclass(frozen=True)
class RidgeTrial:
    """A ridge and a damping (both of `LayerReconstruction`), and the error on validation tokens that they led to."""

    ridge: float
    damping: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method is to do to a model: all that its result depends on.

    Args:
        target: the sparsity to reach.
        calibration: text to calibrate or train on.
        seed: of every random choice.
        ridge: in place of the method's own; "auto" chooses one for every shared input on a part of the tokens.
        bounds: prove a lower bound for every layer problem too: two eigendecompositions, seconds per matrix.
    """

    target: Target
    calibration: Sequences
    seed: int = 0
    ridge: Ridge = None
    bounds: bool = False


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a task is carried out. By default in this process and in memory, without a record.

    Args:
        offloading: where the model's weights are.
        world: the processes of the run; all of them have the same task.
        journal: keeps what is finished, and what an earlier run finished.
        on_progress: called at every step.
        on_record: called with the figures of every block that is finished, and of training.
        activation_bytes: of activations between blocks that are held in memory, the others on disk; None for all.
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
    """What became of one weight. Errors are relative, undamped, in float64, of the weights as written back.

    Attributes:
        shape: (out, in) of the dense weight.
        sparsity: the fraction of the dense weight's entries that are zero, or gone with their row or column.
        relative_error: on all calibration tokens; None where no layer problem was solved. Of a matrix that a step on
            several matrices fitted again, on the inputs that it has after that step.
        relative_error_validation: likewise on those of the calibration tokens that the weight was not fitted to; None
            where it was fitted to all, as by every method that reads the inputs of one layer at a time.
        objective, bound: of the weights and of all others in the same sparse set, with ridge and damping, relative as
            the errors are; None unless `bounds` is set.
        tokens: that the layer's inputs were taken from.
        ridge, damping: of the layer problem, as used in the end; None where there was none.
        ridge_trials: what "auto" tried, the best one first.
        diagnosis: what `solvers.diagnostics` finds.
        convergence: of the solve; of several weights that were solved as one, with the first.
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
        """Entries that are left, and not zero."""
        return round((1.0 - self.sparsity) * self.shape[0] * self.shape[1])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """What `as_json` gave, after it was JSON."""
        columns = content["convergence"]
        parts: dict[str, Any] = {name: tuple(content[name]) for name in ("shape", "notes")}
        parts["ridge_trials"] = tuple(RidgeTrial(**trial) for trial in content["ridge_trials"])
        parts["diagnosis"] = tuple(Diagnosis(**finding) for finding in content["diagnosis"])
        parts["convergence"] = columns and Convergence(**{name: tuple(column) for name, column in columns.items()})
        return cls(**{**content, **parts})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a method.

    Attributes:
        layers: a report of every pruned weight.
        notes: deviations from the task.
        details: further results (a training curve, an allocation), as JSON values.
        model: the new model, where the old one was not pruned in place.
    """

    layers: list[LayerReport]
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None


class Capabilities(Protocol):
    """What the rest of the package asks about a method, in place of its class; a method overrides what differs.

    Attributes:
        options: settings of a run that only some methods have, and that this one takes, such as "steps" or "unit".
        stages: what its work is made of, by which `plan` counts it: layers, feed-forward networks, structured groups,
            or training of the whole model; None where it cannot be counted beforehand.
        prunes: False for a baseline that leaves the model dense.
        shrinks: whether what it removes is left out of the saved files, rather than stored as zeros.
        text_use: what the calibration text is for.
    """

    options: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[Stages | None] = None
    prunes: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False

    @property
    def text_use(self) -> TextUse:
        return "calibration"

    def check_task(self, task: Task) -> None:
        """Refuses settings of a task that the method has no use for, before any work is done.

        Raises:
            UserError: the ridge or the bounds.
        """
        return

    def streaming_obstacle(self) -> str | None:
        """Why a model cannot be pruned one block at a time, from disk; None where it can."""
        return None

    def with_joint(self, joint: Joint) -> Self | None:
        """The method with steps on several matrices of a block together; None where it takes none."""
        return None

    def with_parts(self, solver: Method | None, problem: ProblemLike, constraint: SetLike) -> Self | None:
        """The method with other parts inside, None leaves its own; None where it has no such parts.

        Raises:
            UserError: a part cannot be used.
        """
        return None


class Recipe(Capabilities, Protocol):
    """A way to prune a whole model, ready to use by name. A frozen configuration."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str:
        """A line for `admm-prune list`."""
        ...

    @property
    def samples(self) -> int:
        """Calibration sequences, where the user names no number."""
        ...

    @property
    def budget(self) -> Budget:
        """What meets the target: every matrix of the blocks, all of them together, or something else of the model."""
        ...

    def check(self, model: nn.Module, target: Target) -> None:
        """Refuses what cannot be done, before anything is touched.

        Raises:
            UserError: the model has no decoder blocks that can be read, or a weight, named, does not admit the target.
        """
        ...

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        """Prunes the model, which is in evaluation mode and without gradients, in place where it can.

        Raises:
            UserError: as `check`; the text or the ridge cannot be used.
        """
        ...
