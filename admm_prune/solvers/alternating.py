"""Alternating minimization over blocks of variables; returns the round with the least validation loss."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

from admm_prune.errors import check_at_least
from admm_prune.point import Point
from admm_prune.problem import Coordinated, Minimizable, Problem, Safeguarded, fits, require
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative, Solver, inner_notes
from admm_prune.solvers.refit import Refit


@dataclass
class AlternatingState:
    """The point of this round, and the best one by the validation loss."""

    x: Point
    best: Point
    best_validation_loss: float = math.inf
    validation_loss: float = math.inf
    rounds: int = 0
    best_round: int = 0
    gain: float = math.inf  # of this round over the best one before, relative
    changed: int = 0  # entries that entered a support in this round
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, kw_only=True)
class Alternating(Iterative[AlternatingState]):
    """Round after round, for every block b in the problem's order: x_b <- argmin over x_b, all other blocks fixed.

    A block that is `Minimizable` gives its minimum itself, any other is solved by `inner`. The blocks minimize a
    surrogate: after every round the problem computes the validation loss, the best round is returned, and a round
    without improvement ends the run. A `Safeguarded` problem corrects or rejects the solution of a block.

    Args:
        inner: solves blocks with a sparse set.
        freeze_after: rounds after which supports are fixed and `refit` replaces `inner`; None never.
        refit: fits a block anew on the support of its start.
        together: if given, ends every round: improves all blocks jointly on their supports, is kept if the validation
            loss decreases, and is the start of the next round. The last block of the best round is then refitted.
        tolerance: stop after a round that lowers the validation loss by less, relative to the best round before. With a
            negative one a round may raise the loss; -inf never stops.

    Raises:
        UserError: a setting out of range.
        TypeError: the problem is not Coordinated.

    Reference implementation: `textbook.sparsellm`.

    Source: Bai et al., SparseLLM, 2024, algorithm 1; the validation, the freezing and the joint step are ours.
    """

    inner: Solver
    max_iterations: int = 4
    freeze_after: int | None = None
    refit: Solver = Refit(max_iterations=20)
    together: Solver | None = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, freeze_after=0, tolerance=-math.inf)

    def check(self, problem: Problem) -> None:
        require(self, problem, Coordinated, "it solves block after block and validates the whole")

    def init(self, problem: Coordinated, start: Point | None) -> AlternatingState:
        x = problem.initial() if start is None else start
        return AlternatingState(x, x)

    def step(self, problem: Coordinated, state: AlternatingState, iteration: int) -> None:
        frozen = self.freeze_after is not None and iteration >= self.freeze_after
        state.rounds, state.changed = iteration + 1, 0
        for name in problem.order:
            state.x = self._solved(problem, state, state.x, name, frozen)
        state.validation_loss = problem.validation_loss(state.x)
        if self.together is not None:
            self._improve(self.together, problem, state)
        best = state.best_validation_loss
        state.gain = (best - state.validation_loss) / best if 0 < best < math.inf else best
        if state.validation_loss < state.best_validation_loss:
            state.best, state.best_validation_loss, state.best_round = state.x, state.validation_loss, state.rounds

    def measure(self, state: AlternatingState, iteration: int) -> Progress:
        return Progress(
            iteration=iteration,
            end_to_end=state.validation_loss,
            end_to_end_gain=state.gain,
            support_changes=state.changed,
        )

    def converged(self, progress: Progress) -> bool:
        return progress.end_to_end_gain is not None and progress.end_to_end_gain < self.tolerance

    def solution(self, problem: Coordinated, state: AlternatingState) -> Point:
        # Before a round with a validation loss that is a number, `best` is the start, which may be dense.
        return state.best if state.best_round else problem.constraint.project(state.best)

    def notes(self, state: AlternatingState) -> tuple[str, ...]:
        if state.rounds and not state.best_round:
            return (f"no validation loss of {state.rounds} rounds is a number", *dict.fromkeys(state.notes))
        stalled = state.rounds - state.best_round
        note = (f"stalled: round {state.best_round} of {state.rounds} was the best",) if stalled else ()
        return (*note, *dict.fromkeys(state.notes))

    def finish(self, problem: Coordinated, state: AlternatingState, point: Point) -> Point:
        if self.together is None:
            return point
        refitted = self._solved(problem, state, point, problem.order[-1], frozen=True)
        return refitted if problem.validation_loss(refitted) < state.best_validation_loss else point

    def _improve(self, together: Solver, problem: Coordinated, state: AlternatingState) -> None:
        improved = together.solve(_with_validation_as_value(problem), start=state.x).solution
        validation_loss = problem.validation_loss(improved)
        if validation_loss < state.validation_loss:
            state.x, state.validation_loss = improved, validation_loss
        else:
            state.notes.append(
                f"round {state.rounds}: the joint step was no better, validation loss {validation_loss:.4g}"
            )

    def _solved(self, problem: Coordinated, state: AlternatingState, x: Point, name: str, frozen: bool) -> Point:
        """x with one block solved."""
        block = problem.block(name, x)
        if fits(block, Minimizable):
            return problem.joined(x, name, block, block.minimize())
        solver, before = self.refit if frozen else self.inner, problem.part(x, name)
        result = solver.solve(block, start=before if frozen else None)
        entered = result.solution.map(lambda new, old: (new != 0) & (old == 0), before)
        state.changed += entered.count_nonzero()
        state.notes += [f"{name}: {note}" for note in inner_notes(result)]
        joined = problem.joined(x, name, block, result.solution)
        return problem.safeguarded(x, joined, name) if fits(problem, Safeguarded) else joined


def _with_validation_as_value(problem: Coordinated) -> Coordinated:
    """The problem with the validation loss as its value."""
    view = copy.copy(problem)
    vars(view)["value"] = problem.validation_loss
    return view
