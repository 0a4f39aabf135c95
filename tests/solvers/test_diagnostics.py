"""The doctor: every finding where it belongs, and none on a healthy run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from admm_prune.methods.local import LOCAL_METHODS, Method
from admm_prune.methods.target import Target
from admm_prune.point import Point
from admm_prune.problems.constraints import NofM, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Progress, Result, Status
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.diagnostics import diagnose
from admm_prune.solvers.one_shot import Wanda
from admm_prune.solvers.schedules import Constant, LogSpaced
from tests.catalogue import CONSTRAINTS, layer

SETS: dict[str, SparseSet] = {"half": Unstructured(0.5), "four fifths": Unstructured(0.8), "2:4": NofM(2, 4)}
SHAPES = {"64 x 96": (64, 96, 400), "128 x 256, few tokens": (128, 256, 300)}
PATIENT = ADMM(penalty=LogSpaced(0.1, 1.0, over=30), relaxation=1.0, max_iterations=30)
each_set = pytest.mark.parametrize("constraint", SETS.values(), ids=SETS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def solve(solver: ADMM, constraint: SparseSet, shape: tuple[int, int, int]) -> Result:
    rows, width, tokens = shape
    return solver.solve(layer(constraint, rows=rows, width=width, tokens=tokens))


def codes(result: Result, **facts: float) -> list[str]:
    return [finding.code for finding in diagnose(result, **facts)]


@each_set
@each_shape
@pytest.mark.parametrize("solver", [PATIENT, ADMM.alps(), ADMM.gradual()], ids=["patient", "alps", "gradual"])
def test_a_healthy_run_has_converged_and_nothing_else(
    solver: ADMM, constraint: SparseSet, shape: tuple[int, int, int]
) -> None:
    result = solve(solver, constraint, shape)
    assert codes(result, width=100, tokens=400) == ["converged"]


@each_set
@each_shape
@pytest.mark.parametrize("solver", [ADMM(), ADMM.fast(), ADMM.best()], ids=["default", "fast", "best"])
def test_no_preset_calls_for_a_warning(solver: ADMM, constraint: SparseSet, shape: tuple[int, int, int]) -> None:
    """The shorter ones may end on the way, for the refit to finish."""
    (finding,) = diagnose(solve(solver, constraint, shape))
    assert finding.code in {"converged", "still-moving"}
    assert finding.severity in {"good", "info"}


@pytest.mark.parametrize("constraint", [CONSTRAINTS["nothing"], CONSTRAINTS["everything"]])
def test_nothing_to_choose_is_no_illness(constraint: SparseSet) -> None:
    for penalty in (0.1, 100.0):
        assert codes(ADMM(penalty=Constant(penalty)).solve(layer(constraint))) == ["converged"]


@each_set
@each_shape
@pytest.mark.parametrize("rho", [1e-4, 1e-2])
def test_too_small_a_penalty(rho: float, constraint: SparseSet, shape: tuple[int, int, int]) -> None:
    result = solve(ADMM(penalty=Constant(rho)), constraint, shape)
    # So small a penalty may leave nothing better than the start, and that is then said too.
    assert codes(result) in (["rho-too-small"], ["rho-too-small", "start-was-best"])
    assert f"rho = {rho:g}" in diagnose(result)[0].finding


@each_set
@each_shape
@pytest.mark.parametrize("rho", [10.0, 100.0])
def test_too_large_a_penalty(rho: float, constraint: SparseSet, shape: tuple[int, int, int]) -> None:
    result = solve(ADMM(penalty=Constant(rho)), constraint, shape)
    assert codes(result) == ["rho-too-large"]
    assert solve(PATIENT, constraint, shape).objective < result.objective, "the advice is worth following"


@each_set
@each_shape
def test_a_run_that_is_cut_short_still_moves(constraint: SparseSet, shape: tuple[int, int, int]) -> None:
    assert codes(solve(replace(PATIENT, max_iterations=4), constraint, shape)) == ["still-moving"]


def test_a_start_that_nothing_beats() -> None:
    result = ADMM(penalty=Constant(1e-4)).solve(layer(Unstructured(0.8)))
    assert result.best_iteration == 0
    assert codes(result) == ["rho-too-small", "start-was-best"]


def made(status: Status, changes: int, residual: float) -> Result:
    """A history of 20 equal lines, half of 200 weights kept."""
    history = tuple(Progress(i, primal_residual=residual, rho=0.5, support_changes=changes) for i in range(1, 21))
    weight = torch.cat([torch.zeros(10, 10), torch.ones(10, 10)])
    return Result(Point(weight=weight), status, 1.0, 20, 20, history)


def test_stalled_overflowed_and_unsettled() -> None:
    assert codes(made(Status.STALLED, 0, 0.1)) == ["stalled"]
    assert codes(made(Status.NONFINITE, 0, float("nan"))) == ["non-finite"]
    assert codes(made(Status.MAX_ITERATIONS, 0, 0.1)) == ["not-settled"]
    assert codes(made(Status.SOLVED, 0, 1e-7)) == ["converged"]
    (finding,) = diagnose(made(Status.MAX_ITERATIONS, 5, 0.1))
    assert (finding.code, finding.severity) == ("rho-too-small", "warning")
    assert "5 % of the support changed, |x - z| / |z| = 1.0e-01" in finding.finding


def test_facts_about_the_problem_are_told_of_methods_without_a_history_too() -> None:
    result = Wanda().solve(layer(Unstructured(0.5)))
    assert codes(result) == []
    assert codes(result, width=16, tokens=64) == []
    assert codes(result, width=16, tokens=63) == ["few-tokens"]
    assert codes(result, dead=2) == ["dead-channels"]
    assert codes(result, ridge_asked=0.01, ridge_used=0.01) == []
    assert codes(result, ridge_asked=0.0, ridge_used=1e-6) == ["damping-raised"]
    few, dead, raised = diagnose(result, width=16, tokens=32, dead=2, ridge_asked=0.0, ridge_used=1e-6)
    assert "32 tokens for 16 inputs, 2.0 each" in few.finding
    assert "64 tokens" in few.advice
    assert "2 of 16 inputs" in dead.finding
    assert "raised to 1e-06" in raised.finding


def test_a_status_of_its_own_outranks_what_the_history_looks_like() -> None:
    moving = made(Status.MAX_ITERATIONS, 5, 0.1)
    assert codes(replace(moving, status=Status.STALLED)) == ["stalled"]


@pytest.mark.parametrize("method", LOCAL_METHODS.values(), ids=LOCAL_METHODS)
def test_no_method_is_advised_to_turn_what_it_does_not_have(method: Method) -> None:
    """A larger ridge helps where it changes what is found; a penalty is advised where there is one."""
    problem = layer(Unstructured(0.5), rows=8, width=24, tokens=40)
    constraint = method.constraint(Target(0.5))
    solutions = [
        method.make().solve(LayerReconstruction(problem.weight, problem.gram, constraint, ridge=ridge)).solution
        for ridge in (0.01, 10.0)
    ]
    assert method.damped == (not torch.equal(solutions[0]["weight"], solutions[1]["weight"]))
    result = method.make().solve(LayerReconstruction(problem.weight, problem.gram, constraint, ridge=0.1))
    ill = [
        result,
        replace(result, status=Status.NONFINITE),
        replace(result, status=Status.STALLED),
        replace(result, best_iteration=0, objective=1.0),
    ]
    for one in ill:
        found = diagnose(one, width=24, tokens=40, ridge_asked=0.0, ridge_used=1e-6, ridge_matters=method.damped)
        advice = [finding.advice for finding in found]
        assert any("--ridge" in text for text in advice) == method.damped or not method.damped
        assert method.damped or not any("ridge" in text for text in advice)
        has_penalty = any(p.rho is not None for p in result.history)
        assert has_penalty or not any("penalty" in text for text in advice)
