"""What a solver returns: Status, Progress, Result; and what a report keeps of it: Convergence, Diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal, Self

from admm_prune.point import Point


class Status(Enum):
    """Why a solver stopped. The value is the advice to the user."""

    SOLVED = "The stopping test was met."
    CLOSED_FORM = "The solution was computed directly; there is nothing to iterate."
    STALLED = "Progress stopped before the stopping test was met: try another rho or another start."
    MAX_ITERATIONS = "The planned iterations were used up: the best feasible point is returned; more may improve it."
    TIME_LIMIT = "The time limit was reached: the best feasible point is returned; allow more time to improve it."
    STOPPED = "A callback requested a stop: pass `state` back to continue."
    NONFINITE = "A number overflowed: the last finite best point is returned; raise the ridge or the precision."

    @property
    def ok(self) -> bool:
        """False if the returned point should not be used without inspecting the history."""
        return self not in (Status.STALLED, Status.NONFINITE)


@dataclass(frozen=True)
class Progress:
    """One line of a solver's history. None where it was not measured, because measuring costs as much as a step."""

    iteration: int
    objective: float | None = None  # of the feasible point of this iteration
    primal_residual: float | None = None  # |x - z| / |z|
    dual_residual: float | None = None  # |z - z_before| / |z|
    rho: float | None = None
    support_changes: int | None = None
    seconds: float = 0.0
    end_to_end: float | None = None  # the validation loss of a Coordinated problem
    end_to_end_gain: float | None = None  # relative to the best iteration before; infinite for the first


@dataclass(frozen=True)
class Result:
    """A feasible point and how it was found.

    `solution` lies in the constraint, is the best such point seen by `problem.value`, and is never worse than the
    start. `objective` is that value, and `start_objective` that of the start's projection, None where a method without
    iterations has no start. `bound`, where known, is a proven lower bound of the optimum. `state` continues
    an iterative solver. `notes` lists automatic corrections of a solver (damping, fallback, precision).
    """

    solution: Point
    status: Status
    objective: float
    iterations: int = 0
    best_iteration: int = 0
    history: tuple[Progress, ...] = ()
    bound: float | None = None
    seconds: float = 0.0
    state: Any = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()
    start_objective: float | None = None

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, the proven relative distance to the optimum; None without a bound."""
        if self.bound is None:
            return None
        return 0.0 if self.objective == 0.0 else (self.objective - self.bound) / abs(self.objective)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """Columns of equal length, a line for each reported iteration; None where a solver does not measure one.

    Attributes:
        iteration: counted from 0, as in `Progress`.
        objective: of the feasible point of the iteration.
        primal_residual: |x - z| / |z|.
        support_changes: entries that entered the support.
        rho: the penalty, in units of the problem's curvature.
    """

    iteration: tuple[int, ...]
    objective: tuple[float | None, ...]
    primal_residual: tuple[float | None, ...]
    support_changes: tuple[int | None, ...]
    rho: tuple[float | None, ...]

    @classmethod
    def of(cls, history: Sequence[Progress], most: int = 64) -> Self | None:
        """The history, at most about `most` lines of it at even distances, the last one always; None without any."""
        if not history:
            return None
        stride = -(-len(history) // most)
        chosen = history[(len(history) - 1) % stride :: stride]
        return cls(**{column.name: tuple(getattr(p, column.name) for p in chosen) for column in fields(cls)})


@dataclass(frozen=True)
class Diagnosis:
    """A finding.

    Args:
        code: short and stable.
        finding: a sentence with the numbers it rests on.
        advice: what to do; empty where nothing needs to be done.
    """

    code: str
    severity: Literal["good", "info", "warning", "error"]
    finding: str
    advice: str = ""
