"""Every solver on every problem under every constraint: feasible, exact in count, honest, never worse than the start."""

from __future__ import annotations

import pytest
import torch
from catalogue import CONSTRAINTS, PROBLEMS, SOLVERS

from admm_prune.point import Point

FULL_SUPPORT = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@FULL_SUPPORT
def test_result_is_feasible_exact_and_honest(problem, constraint, solver) -> None:
    p = problem(constraint)
    result = solver().solve(p)
    w = result.solution["weight"]
    assert w.dtype == p.weight.dtype and w.shape == p.weight.shape
    assert constraint.contains(result.solution)
    kept = constraint.select(Point(weight=torch.rand_like(w)))["weight"].sum()
    assert result.solution.count_nonzero() == kept
    assert result.objective == p.value(result.solution)
    assert result.status.ok
    if p.cross_gram is None and constraint.contains(p.initial()):  # nothing has to go: nothing changes, not by a bit
        assert torch.equal(w, p.weight)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@FULL_SUPPORT
def test_result_is_not_worse_than_the_start(constraint, solver) -> None:
    p = PROBLEMS["layer"](constraint)
    assert solver().solve(p, start=p.initial()).objective <= p.value(constraint.project(p.initial()))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@FULL_SUPPORT
def test_same_input_same_bits(constraint, solver) -> None:
    first, second = (solver().solve(PROBLEMS["layer, float32"](constraint)) for _ in range(2))
    assert torch.equal(first.solution["weight"], second.solution["weight"])
    assert first.objective == second.objective


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_good_start_is_never_lost(solver) -> None:
    p = PROBLEMS["layer"](CONSTRAINTS["half"])
    best = SOLVERS["admm best"]().solve(p)
    assert solver().solve(p, start=best.solution).objective <= best.objective
