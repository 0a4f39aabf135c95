"""The result of a solver: Status, Progress, Result; and what a report records of it: Convergence, Diagnosis."""

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
        """Whether the returned point can be used without inspecting the history."""
        return self not in (Status.STALLED, Status.NONFINITE)


@dataclass(frozen=True)
class Progress:
    """The measures of one iteration in the history of a solver; None if a measure was not computed."""

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
    """A feasible point, and how a solver found it.

    Attributes:
        solution: the best feasible point that the solver evaluated; never worse than the start.
        status: why the solver stopped.
        objective: `problem.value` of the solution.
        iterations: the number of iterations, including those of earlier calls with the same `state`.
        best_iteration: the iteration of the solution; 0 for the projection of the start.
        history: the measures of the iterations.
        bound: a proved lower bound of the optimum; None if there is none.
        seconds: the duration of the solve, without evaluations of the objective.
        state: continues an iterative solver.
        notes: automatic corrections by the solver (damping, fallback, precision).
        start_objective: `problem.value` of the projection of the start; None for a method without iterations or start.
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
        """(objective - bound) / |objective|, a proved bound of the relative distance to the optimum; None without a
        bound."""
        if self.bound is None:
            return None
        return 0.0 if self.objective == 0.0 else (self.objective - self.bound) / abs(self.objective)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """The history of a solver in columns of equal length, one entry for each reported iteration; None if a measure was
    not computed.

    Attributes:
        iteration: as in `Progress`.
        objective: of the feasible point of the iteration.
        primal_residual: |x - z| / |z|.
        support_changes: the number of entries that entered the support.
        rho: the penalty, in units of the problem's curvature.
    """

    iteration: tuple[int, ...]
    objective: tuple[float | None, ...]
    primal_residual: tuple[float | None, ...]
    support_changes: tuple[int | None, ...]
    rho: tuple[float | None, ...]

    @classmethod
    def of(cls, history: Sequence[Progress], most: int = 64) -> Self | None:
        """About `most` iterations at even distances, including the last one; None if the history is empty."""
        if not history:
            return None
        stride = -(-len(history) // most)
        chosen = history[(len(history) - 1) % stride :: stride]
        return cls(**{column.name: tuple(getattr(p, column.name) for p in chosen) for column in fields(cls)})


@dataclass(frozen=True)
class Diagnosis:
    """A finding about a solve, for the user.

    Args:
        code: a short identifier that does not change between releases.
        finding: one sentence, with the numbers that it is based on.
        advice: what to do; empty if nothing needs to be done.
    """

    code: str
    severity: Literal["good", "info", "warning", "error"]
    finding: str
    advice: str = ""
