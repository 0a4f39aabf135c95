"""What holds of every result, whatever the problem."""

from __future__ import annotations

import math

import torch

from admm_prune.problem import Problem, SupportConstraint
from admm_prune.result import Result, Status
from admm_prune.testing.promise import Case, same_form


def check_result(case: Case, problem: Problem, result: Result, *, fills: bool, watched: bool = False) -> None:
    """Checks that a result is feasible, told truly, and recorded in order.

    Args:
        fills: the solution must keep the full count, where its weights are ordinary.
        watched: a watcher may have stopped it.
    """
    case.promise(isinstance(result, Result), "return a Result", f"it returned a {type(result).__name__}")
    x, constraint = result.solution, problem.constraint
    form = {name: (tuple(t.shape), str(t.dtype)) for name, t in x.items()}
    case.promise(same_form(x, problem.initial()), "return a solution of the form of the dense weights", f"{form}")
    case.promise(x.is_finite(), "return a finite solution")
    if isinstance(constraint, SupportConstraint):
        full = constraint.select(x.map(torch.ones_like)).count_nonzero()
        kept = x.count_nonzero()
        case.promise(kept <= full, "keep no more weights than the constraint admits", f"{kept} of {full}")
        case.promise(
            constraint.contains(x), "return a point of the constraint", f"{kept} of {full} weights, in the wrong places"
        )
        if fills:
            case.promise(kept == full, "keep as many weights as the constraint admits", f"{kept} of {full}")
    else:
        case.promise(constraint.contains(x), "return a point of the constraint")
    value = problem.value(x)
    case.promise(
        result.objective == value,
        "report as objective the value of its solution, to the bit",
        f"it reports {result.objective}, problem.value says {value}",
    )
    if result.bound is not None:
        limit = result.objective + 1e-9 * abs(result.objective) + 1e-13 * abs(problem.value(x.zeros_like()))
        case.promise(
            result.bound <= limit, "give a bound not above its objective", f"{result.bound} > {result.objective}"
        )
    case.promise(isinstance(result.status, Status), "end with a Status", f"{result.status!r}")
    case.promise(watched or result.status is not Status.STOPPED, "say STOPPED only where a watcher asked")
    case.promise(math.isfinite(result.seconds) and result.seconds >= 0, "tell its seconds", f"{result.seconds}")
    _check_history(case, result)


def _check_history(case: Case, result: Result) -> None:
    numbers = [progress.iteration for progress in result.history]
    in_order = all(a < b for a, b in zip([0, *numbers], [*numbers, result.iterations + 1], strict=True))
    case.promise(in_order, "number its history from 1 to `iterations`, upwards", f"{numbers}, {result.iterations}")
    best = result.best_iteration
    case.promise(0 <= best <= result.iterations, "find the best point within its iterations", f"at {best}")
    for progress in result.history:
        case.promise(
            progress.objective is None or progress.objective >= result.objective,
            "return the best point that it measured",
            f"iteration {progress.iteration} had {progress.objective}, it returned {result.objective}",
        )
