"""The protocol of a solver, and the loop that all iterative solvers share."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from admm_prune.errors import NonFiniteError, UserError, check_at_least
from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem, Quadratic
from admm_prune.result import Progress, Result, Status

Watch = Callable[[Progress], bool | None]
StateT = TypeVar("StateT")


class Solver(Protocol):
    """A frozen dataclass of settings; everything that changes during a solve is in its state."""

    def solve(self, problem: Any, *, start: Point | None = None) -> Result: ...


@dataclass
class Run(Generic[StateT]):
    """The state of a solve. A call of `solve` with it as `state` continues exactly where the solve stopped.

    `start` is where it began, None for the dense weights: its projection is a candidate for the result in every call.
    """

    inner: StateT
    iteration: int = 0
    best: Point | None = None
    best_value: float = math.inf
    best_iteration: int = 0
    history: list[Progress] = field(default_factory=list)
    start: Point | None = None

    def offer(self, point: Point, value: float) -> None:
        """Keeps the point if its value is finite and the lowest so far."""
        if value < self.best_value and math.isfinite(value):
            self.best, self.best_value, self.best_iteration = point, value, self.iteration


@dataclass
class _Solve(Generic[StateT]):
    """One call of `solve`: the problem, the state, and the reason why it stopped."""

    problem: Any
    run: Run[StateT]
    stop: Status | None = None


@dataclass(frozen=True, kw_only=True)
class Iterative(ABC, Generic[StateT]):
    """A solver that repeats a step. Subclasses implement the step, this class implements `solve`.

    Args:
        max_iterations: the maximum number of iterations, including those of earlier calls with the same state.
        time_limit: seconds for one call of `solve`; None for no limit.
        objective_every: the number of iterations between evaluations of the feasible point as a candidate for the best
            one; 0 evaluates it at the end only. An evaluation costs about as much as a step.
    """

    batched: ClassVar[bool] = False  # whether `step_all` is faster for several problems at once

    max_iterations: int = 100
    time_limit: float | None = None
    objective_every: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, max_iterations=0, time_limit=0, objective_every=0)

    @abstractmethod
    def check(self, problem: Problem) -> None:
        """Raises TypeError, naming solver and problem, if the problem lacks a capability that the solver needs."""

    @abstractmethod
    def init(self, problem: Any, start: Point | None) -> StateT:
        """The state before the first iteration; it starts from the dense weights if `start` is None."""

    @abstractmethod
    def step(self, problem: Any, state: StateT, iteration: int) -> None:
        """One iteration, in place."""

    def step_all(self, problems: Sequence[Any], states: Sequence[StateT], iteration: int) -> None:
        """One iteration of several solves, in place. A solver may share work between them."""
        for problem, state in zip(problems, states, strict=True):
            self.step(problem, state, iteration)

    @abstractmethod
    def measure(self, state: StateT, iteration: int) -> Progress:
        """Inexpensive measures of the last iteration."""

    def measures(self, state: StateT, iteration: int) -> Sequence[Progress]:
        """The measures since the last call. On a device a solver may read those of several iterations at once, to wait
        for the device less often; in between it returns none, and the solve cannot stop."""
        return (self.measure(state, iteration),)

    @abstractmethod
    def converged(self, progress: Progress) -> bool:
        """Whether the measures of an iteration meet the stopping test."""

    @abstractmethod
    def solution(self, problem: Any, state: StateT) -> Point:
        """The feasible point of the last iteration, which no later step may change: a copy if steps are in place."""

    def projected_start(self, problem: Any, start: Point | None) -> Point:
        """The projection of the start onto the constraint; the result is never worse than this point."""
        point: Point = problem.constraint.project(problem.initial() if start is None else start)
        return point

    def finish(self, problem: Any, state: StateT, point: Point) -> Point:
        """Improves the feasible point of the last iteration and keeps it feasible; may overwrite it. Does nothing by
        default."""
        return point

    def notes(self, state: StateT) -> tuple[str, ...]:
        """Automatic corrections by the solver, for `Result.notes`."""
        return ()

    @precision.full()
    def solve(
        self, problem: Any, *, start: Point | None = None, state: Run[StateT] | None = None, watch: Watch | None = None
    ) -> Result:
        """Iterates until the solver converges, iterations or time are used up, or `watch` requests a stop.

        Args:
            start: where to start; by default at the dense weights. Its projection is a candidate for the result.
            state: `Result.state` of an earlier call on the same problem, to continue it from the start of that call.
            watch: called with each Progress, also the last; returns True to stop.

        Returns:
            The best feasible point that was evaluated, never worse than the projection of the start.

        Raises:
            TypeError: the problem lacks a capability that the solver needs.
            UserError: both a start and a state; a start of another form than the dense weights.
            NonFiniteError: no feasible point has a finite value, not even the projection of the start.
        """
        self.check(problem)
        if start is not None and state is not None:
            raise UserError("a state continues from its own start: give a start or a state, not both")
        began = time.perf_counter()
        start = checked_start(problem, start)
        solve = _Solve(problem, Run(self.init(problem, start), start=start) if state is None else state)
        self._iterate([solve], watch, began)
        return self._result(solve, began)

    @precision.full()
    def solve_all(self, problems: Sequence[Any]) -> list[Result]:
        """Solves several problems in lockstep, from their dense weights. On the CPU the results are bitwise those of
        `solve`; on a GPU they are equal up to the order of summation in products.

        A solve that has stopped is not changed while others continue. `seconds` is the total time divided by the number
        of problems.

        Raises:
            TypeError: a problem lacks a capability that the solver needs.
        """
        for problem in problems:
            self.check(problem)
        began = time.perf_counter()
        solves = [_Solve(problem, Run(self.init(problem, None))) for problem in problems]
        self._iterate(solves, None, began)
        share = (time.perf_counter() - began) / max(1, len(solves))
        return [self._result(solve, time.perf_counter() - share) for solve in solves]

    def _iterate(self, solves: Sequence[_Solve[StateT]], watch: Watch | None, began: float) -> None:
        """The loop of all solves, which are always at the same iteration."""
        going = [solve for solve in solves if solve.run.iteration < self.max_iterations]
        while going:
            iteration = going[0].run.iteration
            if len(going) == 1:
                self.step(going[0].problem, going[0].run.inner, iteration)
            else:
                self.step_all([solve.problem for solve in going], [solve.run.inner for solve in going], iteration)
            for solve in going:
                solve.run.iteration += 1
                news = self._observe(solve.problem, solve.run, time.perf_counter() - began)
                solve.run.history += news
                for progress in news:
                    # `watch` sees all of several iterations that are read at once, unless it requests a stop.
                    watches = None if solve.stop is Status.STOPPED else watch
                    status = _stopping_status(self, progress, watches, began)
                    solve.stop = solve.stop or status
            going = [solve for solve in going if solve.stop is None and solve.run.iteration < self.max_iterations]

    def _result(self, solve: _Solve[StateT], began: float) -> Result:
        """The result of a solve that has stopped."""
        problem, run = solve.problem, solve.run
        status = solve.stop or Status.MAX_ITERATIONS
        finished = self.solution(problem, run.inner)
        finite = finished.is_finite()
        if finite:
            finished = self.finish(problem, run.inner, finished)
        seconds = time.perf_counter() - began  # the time excludes the evaluation of the objective
        # Later candidates belong to this result, not to the run: continuing the run must not depend on them.
        final = replace(run)
        if not finite:
            status = Status.NONFINITE
        else:
            final.offer(finished, problem.value(finished))
            if final.best is not finished:
                unfinished = self.solution(problem, run.inner)
                final.offer(unfinished, problem.value(unfinished))
        start_objective = offer_start(problem, final, self.projected_start(problem, run.start))
        if final.best is None:
            raise NonFiniteError(
                "no feasible point of finite value was met, not even the projected start: look for damaged weights, or "
                "raise the precision"
            )
        return Result(
            solution=final.best,
            status=status,
            objective=final.best_value,
            iterations=run.iteration,
            best_iteration=final.best_iteration,
            history=tuple(run.history),
            seconds=seconds,
            state=run,
            notes=(*getattr(problem, "notes", ()), *self.notes(run.inner)),
            start_objective=start_objective,
        )

    def _observe(self, problem: Any, run: Run[StateT], seconds: float) -> list[Progress]:
        news = [replace(progress, seconds=seconds) for progress in self.measures(run.inner, run.iteration)]
        if self.objective_every and run.iteration % self.objective_every == 0:
            point = self.solution(problem, run.inner)
            objective = problem.value(point)
            run.offer(point, objective)
            if news:
                news[-1] = replace(news[-1], objective=objective)
        return news


def checked_start(problem: Problem, start: Any) -> Point | None:
    """The start in the dtypes of the dense weights.

    Raises:
        UserError: its tensors have other names or shapes, or hold NaN or Inf.
    """
    if start is None:
        return None
    dense = problem.initial()
    forms = [
        {name: tuple(getattr(x, "shape", ())) for name, x in point.items()} if isinstance(point, Point) else None
        for point in (start, dense)
    ]
    if forms[0] != forms[1]:
        given = f"a {type(start).__name__}" if forms[0] is None else f"one with {forms[0]}"
        raise UserError(f"a start for {type(problem).__name__} is a Point with {forms[1]}, not {given}")
    if not start.is_finite():
        raise UserError("the start contains NaN or Inf")
    return dense.map(lambda x, begin: begin.to(x.dtype), start)


def closed_form(
    problem: Problem, solution: Point, began: float, start: Point | None, notes: tuple[str, ...] = ()
) -> Result:
    """The result of a solver without iterations: its solution, or the projection of the start if that is better.

    Args:
        began: when the solve started, by `time.perf_counter`; the evaluation of the points is not part of its time.
        start: None if the solution is itself a projection of the dense weights.

    Returns:
        The result; its status is NONFINITE if the solution overflowed and the projection of the start replaces it.

    Raises:
        UserError: a start of another form than the dense weights.
        NonFiniteError: neither has a finite value.
    """
    seconds = time.perf_counter() - began
    start = checked_start(problem, start)
    run: Run[None] = Run(None)
    run.offer(solution, problem.value(solution))
    status = Status.NONFINITE if run.best is None else Status.CLOSED_FORM
    start_objective = None if start is None else offer_start(problem, run, problem.constraint.project(start))
    if run.best is None:
        raise NonFiniteError("the solution has no finite value: raise the ridge or the precision")
    return Result(
        solution=run.best,
        status=status,
        objective=run.best_value,
        seconds=seconds,
        notes=tuple(dict.fromkeys((*getattr(problem, "notes", ()), *notes))),  # those of an inner solver begin alike
        start_objective=start_objective,
    )


def inner_notes(result: Result) -> tuple[str, ...]:
    """The notes of a solver inside another one, and its status unless that is a success."""
    if result.status.ok:
        return result.notes
    return (*result.notes, f"the inner solver ended as {result.status.name}: {result.status.value}")


def _stopping_status(solver: Iterative[Any], progress: Progress, watch: Watch | None, began: float) -> Status | None:
    watched = watch is not None and watch(progress)  # first: it sees the iteration that ends the run too
    if progress.primal_residual is not None and not math.isfinite(progress.primal_residual):
        return Status.NONFINITE
    if solver.converged(progress):
        return Status.SOLVED
    if watched:
        return Status.STOPPED
    if solver.time_limit is not None and time.perf_counter() - began > solver.time_limit:
        return Status.TIME_LIMIT
    return None


def projection_in_its_metric(problem: Quadratic, point: Point | None = None) -> Point:
    """The projection of a point, by default of the unconstrained minimizer, in the metric diag(A)."""
    metric = problem.hessian.diagonal().clone().expand_as(problem.minimizer)  # the Hessian itself can be freed
    return problem.constraint.project(Point(weight=problem.minimizer) if point is None else point, Point(weight=metric))


def offer_start(problem: Problem, run: Run[Any], point: Point) -> float:
    """Makes the projection of the start a candidate, so that the result is never worse, and returns its value."""
    value = problem.value(point)
    if value <= run.best_value and math.isfinite(value):
        run.best, run.best_value, run.best_iteration = point, value, 0
    return value


def search_start(problem: Quadratic, inner: Solver | None, start: Point | None) -> tuple[Point, tuple[str, ...]]:
    """The point that a search begins from, and its notes: the solution of an inner solver or, without one, the
    projection of the start in the metric diag(A).

    Raises:
        UserError: a start of another form than the dense weights.
    """
    start = checked_start(problem, start)
    if inner is None:
        return projection_in_its_metric(problem, start), tuple(getattr(problem, "notes", ()))
    initial = inner.solve(problem, start=start)
    return initial.solution, inner_notes(initial)


def search_result(
    problem: Problem, point: Point, improved: Point | None, began: float, *, iterations: int, unfinished: bool
) -> Result:
    """The better one of the point that a search began from and the one that it ended at, if that is finite and in the
    set; without notes.

    Args:
        improved: where the search ended; None if there was nothing to search.
        unfinished: whether it ended before it had converged.

    Returns:
        SOLVED or MAX_ITERATIONS; NONFINITE, with the start, if numbers overflowed.

    Raises:
        NonFiniteError: neither has a finite value.
    """
    run: Run[None] = Run(None)
    overflowed = improved is not None and not improved.is_finite()
    if improved is not None and not overflowed and problem.constraint.contains(improved):
        run.iteration = iterations
        run.offer(improved, problem.value(improved))
    start_objective = offer_start(problem, run, point)
    if run.best is None:
        raise NonFiniteError("the value at the start is not finite: look for damaged weights")
    stopped = Status.MAX_ITERATIONS if unfinished else Status.SOLVED
    return Result(
        solution=run.best,
        status=Status.NONFINITE if overflowed else stopped,
        objective=run.best_value,
        iterations=iterations,
        best_iteration=run.best_iteration,
        seconds=time.perf_counter() - began,
        start_objective=start_objective,
    )
