"""The conformance kit passes every solver, set and problem here, and parts that other packages might write."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from admm_prune.problems.constraints import Groups, NofM, Product, RowWise, StackedRows, Unstructured
from admm_prune.solvers.one_shot import Wanda
from admm_prune.solvers.reference import BranchAndBound, BruteForce, BruteForceGroups, GroupExact
from admm_prune.testing import assert_constraint_conforms, assert_problem_conforms, assert_solver_conforms
from admm_prune.testing.instances import VIEWS
from tests.catalogue import CONSTRAINTS, PROBLEMS, SOLVERS, layer, retargeted
from tests.third_party import Box, HardThresholding, Huber, Logarithmic

NO_GROUPS = [name for name, constraint in CONSTRAINTS.items() if not isinstance(constraint, Groups)]
REFUSES = {
    "exchanges": ["product"],
    **{name: NO_GROUPS for name in SOLVERS if name.startswith("group")},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name) -> None:
    tried = assert_solver_conforms(SOLVERS[name]())
    fitting = [constraint for constraint in CONSTRAINTS if constraint not in REFUSES.get(name, ())]
    assert {f"{problem}, {constraint}" for problem in PROBLEMS for constraint in fitting} <= set(tried.solved)
    for constraint in REFUSES.get(name, ()):
        assert f"layer, {constraint}" in tried.refused


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("solver", "does"),
    [
        (BruteForce(), "layer, rows"),
        (BranchAndBound(), "layer, rows"),
        (BruteForceGroups(), "layer, heads"),
        (GroupExact(), "layer, 2:4"),
    ],
)
def test_references_that_refuse_sizes(solver, does) -> None:
    tried = assert_solver_conforms(solver, refusals=(TypeError, ValueError))
    assert does in tried.solved
    assert any(name.startswith("a layer of") for name in tried.solved)  # tiny, with its optimum known
    assert "layer, tiles" in tried.refused


@pytest.mark.parametrize("name", SOLVERS)
def test_a_good_start_is_never_lost(name) -> None:
    problem = layer(CONSTRAINTS["columns" if "half" in REFUSES.get(name, ()) else "half"])
    best = SOLVERS["admm best"]().solve(problem)
    assert SOLVERS[name]().solve(problem, start=best.solution).objective <= best.objective


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints(name) -> None:
    assert_constraint_conforms(CONSTRAINTS[name], shape=(6, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_on_a_gpu(name) -> None:
    assert_constraint_conforms(CONSTRAINTS[name], shape=(6, 16), device="cuda")


def test_constraints_over_several_tensors() -> None:
    shapes = {"a": (2, 3), "b": (6,)}
    assert_constraint_conforms(Unstructured(0.4), shapes)
    assert_constraint_conforms(Product({"a": RowWise(0.5), "b": Unstructured(0.5)}), shapes)


@pytest.mark.parametrize("name", ["half", "2:4"])
@pytest.mark.parametrize("make", [layer, retargeted])
def test_layer_reconstruction(make, name) -> None:
    assert_problem_conforms(lambda seed: make(CONSTRAINTS[name], seed=seed))


def test_layer_reconstruction_in_float32() -> None:
    assert_problem_conforms(lambda seed: layer(CONSTRAINTS["rows"], seed=seed, dtype=torch.float32))


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_one_capability(name) -> None:
    assert_problem_conforms(lambda seed: VIEWS[name](CONSTRAINTS["half"]), examples=2)


def test_a_set_that_is_no_family_of_supports() -> None:
    assert_constraint_conforms(Box())


def test_a_logarithmic_loss() -> None:
    assert_problem_conforms(Logarithmic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_of_residuals_that_vanish_at_the_dense_weights(dtype: torch.dtype) -> None:
    """Its gradient is exactly zero there, and the rounding of its value is that of the terms that cancel."""
    assert_problem_conforms(lambda seed: Huber(seed, dtype), examples=5)


def test_a_solver_of_fifteen_lines() -> None:
    tried = assert_solver_conforms(HardThresholding())
    assert {"layer, half", "a layer that shows only its gradient, half"} <= set(tried.solved)
    assert "HardThresholding needs a Differentiable problem" in tried.refused["a layer that shows only its prox, half"]


def test_problems_and_constraints_of_ones_own() -> None:
    mine = {"wide": lambda c: layer(c, rows=2, width=24)}
    tried = assert_solver_conforms(Wanda(), problems=mine, constraints={"1:3": NofM(1, 3)})
    assert [name for name in tried.solved if name.startswith("wide")] == ["wide, 1:3"]


def test_stacked_groups_of_unlike_width() -> None:
    assert_constraint_conforms(StackedRows(((1, NofM(1, 3)), (1, NofM(2, 4)))), shape=(2, 12))


def test_without_hypothesis_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['hypothesis'] = None; import admm_prune.testing"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ImportError: admm_prune.testing needs hypothesis: pip install 'admm-prune[testing]'" in run.stderr
