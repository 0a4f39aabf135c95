"""What every way to prune a whole model meets: it is asked by a Request, and answers with an Outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, Self

from torch import nn

from admm_prune.data.sequences import Sequences
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import IN_MEMORY, Residence
from admm_prune.recipes.convergence import Convergence
from admm_prune.recipes.journal import NOTHING, Journal
from admm_prune.recipes.ridge import Ridge, Trial
from admm_prune.recipes.targets import Target
from admm_prune.solvers.doctor import Diagnosis

Budget = Literal["matrix", "model", "kv-cache", "flops", "latency"]
OnProgress = Callable[[int, int, str], None]  # (steps done, steps, what is at work; "" at the end)
OnRecord = Callable[[dict[str, float], int], None]  # (figures by name, the block or the step that they are of)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a recipe is asked for, beside the model.

    Args:
        target: how much is to go.
        calibration: text to calibrate or train on.
        seed: of every random choice.
        ridge: in place of the recipe's own; "auto" chooses one for every shared input on a part of the tokens.
        bounds: prove a lower bound for every layer problem too: seconds a matrix, two eigendecompositions each.
        on_progress: told of every step.
        on_record: told the figures of every block that is finished, and of training.
        residence: where the model's weights are.
        journal: keeps what is finished, and knows what an earlier run finished.
        world: the processes that work on this together; all of them ask for the same.
        activation_bytes: of activations between blocks that are held in memory, the others on disk; None for all.
    """

    target: Target
    calibration: Sequences
    seed: int = 0
    ridge: Ridge = None
    bounds: bool = False
    on_progress: OnProgress | None = None
    on_record: OnRecord | None = None
    residence: Residence = IN_MEMORY
    journal: Journal = NOTHING
    activation_bytes: int | None = None
    world: World = ALONE

    def tell(self, done: int, total: int, at_work: str = "") -> None:
        """Reports progress, where anybody listens."""
        if self.on_progress is not None:
            self.on_progress(done, total, at_work)

    def record(self, figures: dict[str, float], step: int) -> None:
        """Reports figures, where anybody listens."""
        if self.on_record is not None:
            self.on_record(figures, step)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What became of one weight. Errors are relative, undamped, in float64, of the weights as written back.

    Attributes:
        shape: (out, in) of the dense weight.
        sparsity: the fraction of the dense weight's entries that are zero, or gone with their row or column.
        relative_error, relative_error_validation: None where no layer problem was solved.
        objective, bound: of the weights and of all others in the same sparse set, with ridge and damping, relative as
            the errors are; None where they were not asked for.
        tokens: that the layer's inputs were taken from.
        ridge, damping: of the layer problem, as used in the end; None where there was none.
        ridge_trials: what "auto" tried, the best one first.
        diagnosis: what `solvers.doctor` finds.
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
    ridge_trials: tuple[Trial, ...] = ()
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
        parts["ridge_trials"] = tuple(Trial(**trial) for trial in content["ridge_trials"])
        parts["diagnosis"] = tuple(Diagnosis(**finding) for finding in content["diagnosis"])
        parts["convergence"] = columns and Convergence(**{name: tuple(column) for name, column in columns.items()})
        return cls(**{**content, **parts})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a recipe did.

    Attributes:
        layers: a report of every pruned weight.
        notes: what had to be done that was not asked for.
        details: what the recipe has to say beyond that (a training curve, an allocation), as JSON values.
        model: the new model, where the old one was not pruned in place.
    """

    layers: list[LayerReport]
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None


class Recipe(Protocol):
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

    def prune(self, model: nn.Module, request: Request) -> Outcome:
        """Prunes the model, which is in evaluation mode and without gradients, in place where it can.

        Raises:
            UserError: as `check`; the text or the ridge asked for cannot be used.
        """
        ...
