"""The requirements on every solver."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.problems.constraints import Blocks, Groups, NofM, RowWise, SparseSet, Unstructured
from admm_prune.result import Result
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Iterative, Solver
from admm_prune.testing.drawing import for_all, st
from admm_prune.testing.instances import CONSTRAINTS, PROBLEMS, TROUBLES, VIEWS, Maker, ill_posed, layer, optimum
from admm_prune.testing.iteration import Trial, check_iterative
from admm_prune.testing.results import Case, check_result, named, same_bits

_TINY: tuple[tuple[SparseSet, int, int], ...] = (
    (RowWise(0.5), 1, 12),
    (RowWise(0.6), 2, 6),
    (Unstructured(0.5), 3, 4),
    (Unstructured(0.75), 2, 6),
    (NofM(2, 4), 1, 12),
    (NofM(1, 3), 2, 6),
    (Blocks(0.5, 1, 2), 2, 6),
    (Groups(0.5), 3, 4),
    (Groups(0.5, 2), 2, 6),
)
_LARGE = (300, 600)  # in float64, of which a conversion to float64 is no copy


@dataclass(frozen=True)
class Conformance:
    """The trials of a solver: the pairs of problem and constraint that it solved, and the reasons for refusals."""

    solved: tuple[str, ...]
    refused: Mapping[str, str]


def assert_solver_conforms(
    solver: Solver,
    *,
    problems: Mapping[str, Maker] | None = None,
    constraints: Mapping[str, SparseSet] | None = None,
    examples: int = 15,
    fills: bool = True,
    refusals: tuple[type[Exception], ...] = (TypeError,),
) -> Conformance:
    """Tries a solver on every problem under every constraint, on ill-posed layers, on small ones with known optimum,
    and on one of 300 x 600, which is larger than the tiles that operations on matrices are split into.

    A pair may be refused, with a TypeError whose message names the solver and the problem or its constraint; at least
    one must be solved. For every solve:

    - the solution lies in the constraint, has the form of the dense weights, is finite, and keeps the full count;
    - `objective` is exactly `problem.value(solution)`, and not below the optimum of a small problem;
    - `bound`, if given, is above neither the objective nor the optimum of a tiny problem, nor the value of the feasible
      point that `ADMM.best` finds for a larger one;
    - the solution shares no memory with the problem or the start;
    - it is never worse than the projection of a given start: even if the start is the optimum;
    - the same problem made again gives the same bits; problem, start and the solver's settings are not modified;
    - a target of zero returns lossless dense weights bitwise, a target of one returns zeros;
    - the status is `ok` if the problem is well posed, and STOPPED only where a watcher asked;
    - no iteration in the history is better than the objective, none is out of order;
    - an `Iterative` continues from its state as if it had never stopped, and never worse than from the start that it
      had; stops when its watcher says so, and returns a feasible point wherever it stops; its status is SOLVED only
      where its stopping test was met, MAX_ITERATIONS only where all iterations were used up, TIME_LIMIT only where
      there is a limit, and never CLOSED_FORM.

    Args:
        problems: builders of problems for a constraint, by name, in place of `testing.instances.PROBLEMS`: for solvers
            of problems that the kit does not know.
        constraints: by name, in place of `testing.instances.CONSTRAINTS`; sets of 6 x 16 matrices.
        examples: drawn tiny problems.
        fills: the solver keeps as many weights as the constraint admits; False for one that may prune more than asked.
        refusals: what may be raised to refuse; a reference that takes small sizes only may add ValueError.

    Returns:
        The pairs solved and the pairs refused.

    Raises:
        AssertionError: a requirement is violated.
    """
    trial = Trial(solver, fills, refusals)
    settings = repr(solver)
    sets = CONSTRAINTS if constraints is None else constraints
    makers = PROBLEMS if problems is None else problems
    kinds = list(makers)
    for kind, make in makers.items():
        for name, constraint in sets.items():
            _check_solve(trial, f"{kind}, {name}", make, constraint, dense_start=kind == kinds[0])
    for kind, view in VIEWS.items():
        for name in ("half", "2:4"):
            _check_solve(trial, f"{kind}, {name}", view, CONSTRAINTS[name], dense_start=True)
    for trouble in TROUBLES:
        for name in ("half", "2:4"):
            case = Case(trial.name, f"a layer with {trouble}, {name}")
            problem: Any = ill_posed(
                CONSTRAINTS[name], trouble
            )  # some type checkers take a cached_property for no member
            result = trial.solve(case, problem)
            if result is not None:
                check_result(case, problem, result, fills=False)
    _check_large(trial)
    drawn = st.tuples(st.sampled_from(_TINY), st.sampled_from((2, 12, 64)), st.integers(0, 9999))
    for_all(drawn, lambda drawn: _check_against_optimum(trial, *drawn), examples)
    whole = Case(trial.name, "all problems of the kit")
    refused = "; ".join(sorted(set(trial.refused.values()))[:3])
    whole.require(bool(trial.solved), "solve something", f"it refused everything: {refused}")
    if isinstance(solver, Iterative):
        check_iterative(trial, solver)
    whole.require(repr(solver) == settings, "not modify its own settings", f"{settings} became {solver!r}")
    return Conformance(tuple(trial.solved), dict(trial.refused))


def _check_solve(trial: Trial, name: str, make: Maker, constraint: SparseSet, *, dense_start: bool) -> None:
    case = Case(trial.name, name)
    problem = make(constraint)
    result = trial.solve(case, problem)
    if result is None:
        return
    check_result(case, problem, result, fills=trial.fills)
    case.require(result.status.ok, "end with an ok status on a well-posed problem", f"{result.status}")
    _check_bound(case, problem, result)
    _check_extremes(case, problem, result)
    again = trial.solve(case, make(constraint))
    case.require(
        again is not None and same_bits(again.solution, result.solution) and again.objective == result.objective,
        "give the same bits for the same problem made again",
    )
    dense = problem.initial().clone()
    feasible = problem.constraint.project(0.9 * dense)
    _check_start(trial, case.narrow("from a feasible start"), problem, feasible)
    if dense_start:
        _check_start(trial, case.narrow("from the dense weights"), problem, dense)


def _check_large(trial: Trial) -> None:
    """One solve, under the first constraint that the solver takes."""
    for name in ("half", "2:4", "heads"):
        case = Case(trial.name, f"a layer of {_LARGE[0]} x {_LARGE[1]}, {name}")
        problem: Any = layer(CONSTRAINTS[name], rows=_LARGE[0], width=_LARGE[1], tokens=2 * _LARGE[1])
        result = trial.solve(case, problem)
        if result is not None:
            check_result(case, problem, result, fills=trial.fills)
            return


def _check_bound(case: Case, problem: Problem, result: Result) -> None:
    if result.bound is None:
        return
    rivals = [problem.constraint.project(problem.initial())]
    with suppress(TypeError):  # the problem may lack a capability that ADMM needs
        rivals.append(ADMM.best().solve(problem).solution)
    least = min(problem.value(x) for x in rivals if problem.constraint.contains(x))
    slack = 1e-9 * abs(least) + 1e-13 * abs(problem.value(problem.initial().zeros_like()))
    case.require(
        result.bound <= least + slack, "give a bound that no feasible point is below", f"{result.bound}, {least}"
    )


def _check_extremes(case: Case, problem: Problem, result: Result) -> None:
    dense = problem.initial()
    if problem.constraint.contains(dense) and problem.value(dense) == 0.0:  # no loss of the kit is below zero
        case.require(same_bits(result.solution, dense), "return the dense weights, bitwise, if nothing is to be pruned")
    ones = dense.map(torch.ones_like)
    if problem.constraint.project(ones).count_nonzero() == 0:
        case.require(result.solution.count_nonzero() == 0, "return zeros if everything is to be pruned")


def _check_start(trial: Trial, case: Case, problem: Problem, start: Point) -> None:
    before = start.clone()
    result = trial.solve(case, problem, start=start)
    case.require(result is not None, "take a start wherever it takes the problem")
    if result is not None:
        check_result(case, problem, result, fills=False)
        limit = problem.value(problem.constraint.project(before))
        case.require(
            result.objective <= limit,
            "be never worse than the projection of the start",
            f"it returned {result.objective}, the start's projection has {limit}",
        )
    case.require(same_bits(start, before), "not modify the start")


def _check_against_optimum(trial: Trial, instance: tuple[SparseSet, int, int], tokens: int, seed: int) -> None:
    constraint, rows, width = instance
    case = Case(trial.name, f"a layer of {rows} x {width}, {tokens} tokens, seed {seed}, {named(constraint)}")
    problem: Any = layer(constraint, rows=rows, width=width, tokens=tokens, seed=seed)
    result = trial.solve(case, problem)
    if result is None:
        return
    check_result(case, problem, result, fills=False)
    best = optimum(problem)
    least = problem.value(best)
    slack = 1e-9 * least + 1e-13 * problem.value(best.zeros_like())
    case.require(
        result.objective >= least - slack,
        "not claim less than the optimum over every support",
        f"it claims {result.objective}, the optimum is {least}",
    )
    if result.bound is not None:
        case.require(
            result.bound <= least + slack,
            "give a lower bound that is not above the optimum",
            f"bound {result.bound}, optimum {least}",
        )
    _check_start(trial, case.narrow("from the optimum"), problem, best)
