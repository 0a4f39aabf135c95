"""Checks of a solver's iterations, and one problem solved and timed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Problem, Quadratic, fits
from admm_prune.result import Progress, Result, Status
from admm_prune.solvers.base import Iterative, Solver
from admm_prune.testing.instances import CONSTRAINTS, PROBLEMS, VIEWS, Maker
from admm_prune.testing.results import Case, check_result, equal, named, same_bits, shares_memory

_LENGTH = 20  # iterations, 10 + 10
_MAKERS: dict[str, Maker] = {**PROBLEMS, **VIEWS}


@dataclass
class Trial:
    """Solves with one solver, and records what it solved and what it refused.

    Args:
        fills: the solver keeps the full count.
        refusals: what it may raise to refuse a problem.
    """

    solver: Solver
    fills: bool
    refusals: tuple[type[Exception], ...]
    solved: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return named(self.solver)

    def solve(self, case: Case, problem: Problem, start: Point | None = None) -> Result | None:
        """The result; None where the solver refuses as it should.

        Raises:
            AssertionError: it refuses without naming both sides, raises anything else, or changes the problem.
        """
        before = _contents(problem)
        try:
            result = self.solver.solve(problem, start=start)
        except self.refusals as refusal:
            message = str(refusal)
            its = {type(problem).__name__, type(problem.constraint).__name__}
            named = any(name in message for name in _names(self.solver)) and any(name in message for name in its)
            case.require(
                named,
                "solve the problem, or refuse it in words that name the solver and the problem or its constraint",
                f"it raised {type(refusal).__name__}: {message}",
            )
            self.refused[case.input] = message
            return None
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(
                f"{case.owner} on {case.input} must solve, or refuse with a TypeError; it raised {kind}: {error}"
            ) from error
        after = _contents(problem)
        changed = [name for name, x in before.items() if not equal(x, after.get(name))]
        case.require(not changed, "not modify the problem", f"it changed {', '.join(changed)}")
        tensors = Point({name: x for name, x in _tensors(problem).items() if x.is_floating_point()})
        returned: object = result  # a third-party solver may return anything
        aliased = isinstance(returned, Result) and (
            shares_memory(returned.solution, tensors) or (start is not None and shares_memory(returned.solution, start))
        )
        case.require(not aliased, "return memory of its own, not a tensor of the problem or of the start")
        if start is None and case.input not in self.solved:
            self.solved.append(case.input)
        return result


def _names(solver: object) -> set[str]:
    """The names of a solver's class and of the solvers that it is made of."""
    names = {type(solver).__name__}
    if is_dataclass(solver):
        inner = (getattr(solver, part.name) for part in fields(solver))
        names.update(name for part in inner if hasattr(part, "solve") for name in _names(part))
    return names


def _tensors(problem: Problem) -> dict[str, Tensor]:
    """All public and private tensors of a problem."""
    contents: dict[str, Any] = {f"initial {name}": x for name, x in problem.initial().items()}
    if fits(problem, Quadratic):
        contents |= {name: getattr(problem, name) for name in ("hessian", "linear", "minimizer")}
    return contents | {name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}


def _contents(problem: Problem) -> dict[str, Tensor | float]:
    """Copies of the tensors of a problem, its curvature and its value at one point."""
    copies = {name: x.clone() for name, x in _tensors(problem).items()}
    return {**copies, "curvature": problem.curvature, "value": problem.value(problem.initial().map(lambda x: 0.5 * x))}


def check_iterative(trial: Trial, solver: Iterative[Any]) -> None:
    """Checks stopping and continuing, on the first problems of the kit that the solver takes."""
    checked = 0
    for kind, make in _MAKERS.items():
        for name in ("half", "2:4"):
            if checked < 4 and f"{kind}, {name}" in trial.solved:
                _check_continuation(Case(trial.name, f"{kind}, {name}"), solver, make(CONSTRAINTS[name]))
                checked += 1


def _check_continuation(case: Case, solver: Iterative[Any], problem: Problem) -> None:
    solver = replace(solver, max_iterations=_LENGTH, time_limit=None)
    seen: list[int] = []
    whole = _run(case, solver, problem, watch=lambda progress: seen.append(progress.iteration))
    case.require(seen == list(range(1, whole.iterations + 1)), "show each iteration to its watcher", f"{seen}")
    case.require(whole.iterations <= _LENGTH, f"stop after max_iterations = {_LENGTH}", f"{whole.iterations}")
    _run(case.narrow("max_iterations = 1"), replace(solver, max_iterations=1), problem)
    _check_objectives(case, solver, problem)
    _check_time_limit(case, solver, problem)
    half = whole.iterations // 2
    if half == 0:
        return
    short = replace(solver, max_iterations=half)
    part = _run(case.narrow(f"max_iterations = {half}"), short, problem)
    stopped = _run(case, solver, problem, watch=lambda progress: progress.iteration == half)
    subcase = case.narrow(f"stopped by its watcher at {half}")
    subcase.require(stopped.status is Status.STOPPED, "say STOPPED", f"{stopped.status}")
    for words, result in ((f"max_iterations = {half}", part), (f"stopped by its watcher at {half}", stopped)):
        subcase = case.narrow(words)
        subcase.require(result.iterations == half, f"stop after {half} iterations", f"{result.iterations}")
        rest = _run(subcase.narrow("continued"), solver, problem, state=result.state)
        same = same_bits(rest.solution, whole.solution) and rest.objective == whole.objective
        subcase.require(
            same and rest.iterations == whole.iterations,
            "continue from its state to the same bits as without a stop",
            f"objective {rest.objective} after {rest.iterations}, not {whole.objective} after {whole.iterations}",
        )
        subcase.require(_without_seconds(rest) == _without_seconds(whole), "continue its history as without a stop")
    _check_start_is_kept(case.narrow("from a good start"), solver, short, problem, whole.solution)


def _check_start_is_kept(
    case: Case, solver: Iterative[Any], short: Iterative[Any], problem: Problem, start: Point
) -> None:
    part = _run(case, short, problem, start=start)
    rest = _run(case.narrow("continued"), solver, problem, state=part.state)
    limit = problem.value(problem.constraint.project(start))
    case.require(
        rest.objective <= limit, "return nothing worse than it when continued", f"{rest.objective} after {limit}"
    )


def _run(case: Case, solver: Iterative[Any], problem: Problem, **how: Any) -> Result:
    with case.guard("stop and continue where it is asked to"):
        result = solver.solve(problem, **how)
    check_result(case, problem, result, fills=False, watched="watch" in how)
    _check_status(case, solver, result)
    return result


def _check_status(case: Case, solver: Iterative[Any], result: Result) -> None:
    """SOLVED where the stopping test was met, MAX_ITERATIONS after all of them, TIME_LIMIT where there is a limit."""
    status = result.status
    outcome = f"{status} after {result.iterations} of {solver.max_iterations} iterations"
    converged = any(solver.converged(progress) for progress in result.history)
    case.require(status is not Status.CLOSED_FORM, "not say CLOSED_FORM of what it iterated", outcome)
    case.require(status is not Status.SOLVED or converged, "say SOLVED only where its stopping test was met", outcome)
    used_up = result.iterations == solver.max_iterations and not converged
    case.require(
        status is not Status.MAX_ITERATIONS or used_up, "say MAX_ITERATIONS only where all were used up", outcome
    )
    limited = solver.time_limit is not None
    case.require(status is not Status.TIME_LIMIT or limited, "say TIME_LIMIT only where there is a limit", outcome)


def _check_objectives(case: Case, solver: Iterative[Any], problem: Problem) -> None:
    subcase = case.narrow("objective_every = 1")
    result = _run(subcase, replace(solver, objective_every=1), problem)
    subcase.require(all(p.objective is not None for p in result.history), "measure its objective at every iteration")
    if result.history:
        last = problem.value(solver.solution(problem, result.state.inner))
        recorded = result.history[-1].objective
        subcase.require(recorded == last, "record the objective of its feasible point", f"{recorded}, which is {last}")


def _check_time_limit(case: Case, solver: Iterative[Any], problem: Problem) -> None:
    subcase = case.narrow("time_limit = 0")
    result = _run(subcase, replace(solver, time_limit=0.0), problem)
    ended = result.iterations == 1 and result.status in (Status.TIME_LIMIT, Status.SOLVED)
    subcase.require(ended, "stop after one iteration, at the time limit", f"{result.status} after {result.iterations}")


def _without_seconds(result: Result) -> list[Progress]:
    return [replace(progress, seconds=0.0) for progress in result.history]
