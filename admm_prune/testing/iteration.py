"""What an Iterative solver promises beyond other solvers: to stop anywhere, and to continue exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from admm_prune.problem import Problem
from admm_prune.result import Progress, Result, Status
from admm_prune.solvers.base import Iterative
from admm_prune.testing.instances import CONSTRAINTS, PROBLEMS, VIEWS, Maker
from admm_prune.testing.results import Case, check_result, same_bits
from admm_prune.testing.trial import Trial

_LENGTH = 20  # iterations, 10 + 10
_MAKERS: dict[str, Maker] = {**PROBLEMS, **VIEWS}


def check_iterative(trial: Trial, solver: Iterative[Any]) -> None:
    """Checks stopping and continuing, on the first problems of the kit that the solver takes."""
    checked = 0
    for kind, make in _MAKERS.items():
        for name in ("half", "2:4"):
            if checked < 4 and f"{kind}, {name}" in trial.solved:
                _check(Case(trial.name, f"{kind}, {name}"), solver, make(CONSTRAINTS[name]))
                checked += 1


def _check(case: Case, solver: Iterative[Any], problem: Problem) -> None:
    solver = replace(solver, max_iterations=_LENGTH, time_limit=None)
    seen: list[int] = []
    whole = _run(case, solver, problem, watch=lambda progress: seen.append(progress.iteration))
    case.promise(seen == list(range(1, whole.iterations + 1)), "show each iteration to its watcher", f"{seen}")
    case.promise(whole.iterations <= _LENGTH, f"stop after max_iterations = {_LENGTH}", f"{whole.iterations}")
    _run(case.but("max_iterations = 1"), replace(solver, max_iterations=1), problem)
    _measures_truly(case, solver, problem)
    _heeds_the_clock(case, solver, problem)
    half = whole.iterations // 2
    if half == 0:
        return
    short = replace(solver, max_iterations=half)
    part = _run(case.but(f"max_iterations = {half}"), short, problem)
    stopped = _run(case, solver, problem, watch=lambda progress: progress.iteration == half)
    here = case.but(f"stopped by its watcher at {half}")
    here.promise(stopped.status is Status.STOPPED, "say STOPPED", f"{stopped.status}")
    for words, result in ((f"max_iterations = {half}", part), (f"stopped by its watcher at {half}", stopped)):
        here = case.but(words)
        here.promise(result.iterations == half, f"stop after {half} iterations", f"{result.iterations}")
        rest = _run(here.but("continued"), solver, problem, state=result.state)
        same = same_bits(rest.solution, whole.solution) and rest.objective == whole.objective
        here.promise(
            same and rest.iterations == whole.iterations,
            "continue from its state to the same bits as without a stop",
            f"objective {rest.objective} after {rest.iterations}, not {whole.objective} after {whole.iterations}",
        )
        here.promise(_timeless(rest) == _timeless(whole), "continue its history as without a stop")


def _run(case: Case, solver: Iterative[Any], problem: Problem, **how: Any) -> Result:
    with case.doing("stop and continue where it is asked to"):
        result = solver.solve(problem, **how)
    check_result(case, problem, result, fills=False, watched="watch" in how)
    _has_a_true_status(case, solver, result)
    return result


def _has_a_true_status(case: Case, solver: Iterative[Any], result: Result) -> None:
    """SOLVED where the stopping test was met, MAX_ITERATIONS after all of them, TIME_LIMIT where there is a limit."""
    status = result.status
    found = f"{status} after {result.iterations} of {solver.max_iterations} iterations"
    converged = any(solver.converged(progress) for progress in result.history)
    case.promise(status is not Status.CLOSED_FORM, "not say CLOSED_FORM of what it iterated", found)
    case.promise(status is not Status.SOLVED or converged, "say SOLVED only where its stopping test was met", found)
    used_up = result.iterations == solver.max_iterations and not converged
    case.promise(
        status is not Status.MAX_ITERATIONS or used_up, "say MAX_ITERATIONS only where all were used up", found
    )
    limited = solver.time_limit is not None
    case.promise(status is not Status.TIME_LIMIT or limited, "say TIME_LIMIT only where there is a limit", found)


def _measures_truly(case: Case, solver: Iterative[Any], problem: Problem) -> None:
    here = case.but("objective_every = 1")
    result = _run(here, replace(solver, objective_every=1), problem)
    here.promise(all(p.objective is not None for p in result.history), "measure its objective at every iteration")
    if result.history:
        last = problem.value(solver.solution(problem, result.state.inner))
        told = result.history[-1].objective
        here.promise(told == last, "record the objective of its feasible point", f"{told}, which is {last}")


def _heeds_the_clock(case: Case, solver: Iterative[Any], problem: Problem) -> None:
    here = case.but("time_limit = 0")
    result = _run(here, replace(solver, time_limit=0.0), problem)
    ended = result.iterations == 1 and result.status in (Status.TIME_LIMIT, Status.SOLVED)
    here.promise(ended, "stop after one iteration, at the time limit", f"{result.status} after {result.iterations}")


def _timeless(result: Result) -> list[Progress]:
    return [replace(progress, seconds=0.0) for progress in result.history]
