"""No bound lies above the optimum in exact arithmetic, and none is low for no reason: hostile problems, 80 digits."""

from __future__ import annotations

import json
import math

import mpmath
import numpy as np
import pytest
import torch

from admm_prune.point import Point
from admm_prune.problems.constraints import Groups, NofM, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.group_obs import GroupMask, GroupOBS
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.reference import BranchAndBound, BruteForce, BruteForceGroups, GroupExact, lower_bound
from admm_prune.solvers.reference.rigorous import Form, gamma, least_eigenvalue, scaled_form
from admm_prune.solvers.refit import Refit
from benchmarks import exact_bounds
from tests.solvers.reference.instances import Toy, correlated, keeping, normal


def bounds_of(problem: LayerReconstruction) -> dict[str, float | None]:
    grouped = isinstance(problem.constraint, Groups)
    names = ["BruteForceGroups"] if grouped else ["BruteForce", "lower_bound"]
    if not grouped and not isinstance(problem.constraint, NofM):
        names.append("BranchAndBound")
    return {name: exact_bounds.SOURCES[name](problem) for name in names}


@pytest.mark.parametrize("seed", range(4))
def test_no_bound_lies_above_the_optimum(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exact_bounds.main(["--count", "60", "--seed", str(100 + seed), "--perspective-every", "0"]) == 0
    told = {name: found for line in capsys.readouterr().out.splitlines() for name, found in json.loads(line).items()}
    for name in ("BruteForce", "BranchAndBound", "BruteForceGroups"):
        shares = told[name]["share of the optimum"]
        assert told[name]["bounds"] >= 5
        assert told[name]["none"] <= 0.2 * told[name]["bounds"]
        assert shares["least, 1 %, 5 %, 25 %, 50 %"][3] > 0.99999, name  # three of four reach the optimum


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_bound_lies_above_the_optimum_of_20000(seed: int) -> None:
    assert exact_bounds.main(["--count", "1000", "--seed", str(seed)]) == 0


def hostile(seed: int = 3, **options: object) -> LayerReconstruction:
    """Weights from 1e-6 to 1e6, correlated inputs, float32: to round the solution moves its value far."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 6, generator=g) + 0.5 * torch.randn(40, 1, generator=g)
    w = torch.randn(2, 6, generator=g) * 10.0 ** torch.empty(2, 6).uniform_(-6, 6, generator=g)
    return LayerReconstruction(w, x.T @ x, RowWise(0.5), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_of_brute_force_is_none_of_its_rounded_point(seed: int) -> None:
    problem = hostile(seed)
    least = exact_bounds.optimum(problem)
    for bound in bounds_of(problem).values():
        assert bound is not None
        assert mpmath.mpf(bound) <= least
    assert BruteForce().solve(problem).bound == pytest.approx(float(least), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("inputs", "weights"), [(1e-15, 1.0), (1e15, 1.0), (1.0, 1e-15), (1.0, 1e15), (1e7, 1e-15)])
@pytest.mark.parametrize("constraint", [RowWise(0.5), Unstructured(0.4), NofM(1, 2), Groups(0.5, 2)], ids=str)
def test_scaling_neither_overflows_nor_loosens(
    dtype: torch.dtype, inputs: float, weights: float, constraint: SparseSet
) -> None:
    """The Gram by 1e-15 to 1e15, the weights likewise: bounds scale with the problem."""
    gram, w = correlated(4, 0).to(dtype) * inputs, normal(2, 4, 0).to(dtype) * weights
    problem = LayerReconstruction(w, gram, constraint)
    least = exact_bounds.optimum(problem)
    assert least > 0
    for name, bound in bounds_of(problem).items():
        assert bound is not None
        assert bound <= least
        assert name == "lower_bound" or bound >= float(least) * (1 - 1e-8)


@pytest.mark.parametrize(
    ("shape", "sparsity"), [((1, 1), 0.0), ((1, 1), 1.0), ((3, 1), 0.5), ((1, 5), 0.0), ((2, 3), 1.0), ((4, 2), 0.5)]
)
@pytest.mark.parametrize("ridge", [0.0, 0.03, 1e6])
@pytest.mark.parametrize("kind", [RowWise, Unstructured, Groups])
def test_small_and_whole_and_empty(shape: tuple[int, int], sparsity: float, ridge: float, kind: type) -> None:
    rows, width = shape
    problem = LayerReconstruction(normal(rows, width, 0), correlated(width, 0), kind(sparsity), ridge=ridge)
    least = exact_bounds.optimum(problem)
    for name, bound in bounds_of(problem).items():
        assert bound is not None, name
        assert bound <= least
        assert name == "lower_bound" or bound == pytest.approx(float(least), rel=1e-8, abs=0)


def retargeted(dtype: torch.dtype, constraint: SparseSet, shift: float) -> LayerReconstruction:
    """With a dead channel; the target is the output on inputs that differ by `shift`."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((30, 5))
    dense = x + shift * draw.standard_normal(x.shape)
    x[:, 2] = 0
    w = torch.from_numpy(draw.standard_normal((2, 5)))
    energy = float(np.square(dense @ w.to(dtype).double().numpy().T).sum())
    gram, cross = (torch.from_numpy(m).to(dtype) for m in (x.T @ x, dense.T @ x))
    return LayerReconstruction(w.to(dtype), gram, constraint, ridge=0.01, cross_gram=cross, target_energy=energy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [1e-3, 0.3])
@pytest.mark.parametrize("constraint", [RowWise(0.0), RowWise(0.4), Unstructured(0.5), Groups(0.4)], ids=str)
def test_other_targets_are_bounded_as_they_are_defined(dtype: torch.dtype, shift: float, constraint: SparseSet) -> None:
    """Their minimizer comes from a solve and is rounded to the dtype, their value is a difference of energies."""
    problem = retargeted(dtype, constraint, shift)
    least, floor = exact_bounds.optimum(problem), problem.value(Point(weight=problem.minimizer))
    for name, bound in bounds_of(problem).items():
        assert bound is not None, name
        assert bound <= least
        if name != "lower_bound":
            assert bound >= float(least) - 1e-2 * (float(least) - floor) - 1e-6 * problem.value(problem.initial())


def test_a_matrix_that_differs_from_its_transpose_is_bounded_either_way() -> None:
    a = correlated(5, 0)
    a = a + 1e-5 * torch.from_numpy(np.random.default_rng(0).standard_normal((5, 5))) * float(a.diagonal().min())
    problem = Toy(normal(2, 5, 0), a, keeping(3, 5))
    bound = BruteForce().solve(problem).bound
    assert bound is not None
    for other in (a, a.T, a.triu() + a.triu(1).T, a.tril() + a.tril(-1).T, (a + a.T) / 2):
        weighed = LayerReconstruction(problem.weight, (other + other.T) / 2, problem.constraint, ridge=0.0)
        assert bound <= exact_bounds.optimum(weighed)
    assert bound == pytest.approx(float(exact_bounds.optimum(weighed)), rel=1e-2)


def test_the_least_eigenvalue_is_below_the_exact_one_and_close() -> None:
    mpmath.mp.dps = 50
    for seed in range(20):
        draw = np.random.default_rng(seed)
        x = np.logspace(0, -draw.uniform(0, 7), 5)[:, None] * np.linalg.qr(draw.standard_normal((5, 5)))[0]
        form, _ = scaled_form(x.T @ x * 10.0 ** draw.uniform(-9, 9))
        root = np.sqrt(form.diagonal)
        exact = mpmath.eigsy(mpmath.matrix(form.hessian.tolist()), eigvals_only=True)[0]  # D lies in [1/2, 2)
        assert form.least <= exact * 2
        unit = mpmath.matrix((form.hessian).tolist())
        for i in range(5):
            for j in range(5):
                unit[i, j] /= mpmath.sqrt(mpmath.mpf(form.diagonal[i]) * mpmath.mpf(form.diagonal[j]))
        least = mpmath.eigsy(unit, eigvals_only=True)[0]
        assert form.least <= least
        assert form.least >= float(least) * 0.5 - 1e-13
        assert root.max() < 1.5
    assert least_eigenvalue(np.full((3, 3), np.nan), np.ones(3)) == -math.inf
    assert not Form(np.ones((3, 3))).definite
    assert gamma(1) > 2.0**-53


DENSE = [
    (BruteForce(), RowWise(0.0)),
    (BranchAndBound(), RowWise(0.0)),
    (BranchAndBound(), Unstructured(0.0)),
    (GroupExact(), RowWise(0.0)),
    (BruteForceGroups(), Groups(0.0)),
    (BruteForceGroups(), Groups(0.0, 2)),
    (GroupOBS(), Groups(0.0)),
    (GroupMask(), Groups(0.0)),
    (Magnitude(), Unstructured(0.0)),
    (Wanda(), RowWise(0.0)),
    (SparseGPT(), Unstructured(0.0)),
    (ADMM(), RowWise(0.0)),
    (ADMM(), Groups(0.0)),
    (Refit(ADMM()), Unstructured(0.0)),
    (LocalSearch(ADMM()), RowWise(0.0)),
    (ADMM(), StackedRows(((1, RowWise(0.0)), (3, RowWise(0.0))))),
]


@pytest.mark.parametrize(("solver", "constraint"), DENSE, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_goes_nothing_changes_by_a_bit(solver: object, constraint: SparseSet, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=g) + 3 * torch.randn(64, 1, generator=g)
    x[:, 3] *= 100
    w = torch.randn(4, 8, generator=g).to(dtype)
    result = solver.solve(LayerReconstruction(w, (x.T @ x).to(dtype), constraint))  # type: ignore[attr-defined]
    assert torch.equal(result.solution["weight"], w)
    assert result.objective == 0.0
    assert result.bound in (None, 0.0)


def test_groups_with_a_mean_are_bounded() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=g) + 2
    problem = GroupReconstruction(
        torch.randn(3, 6, generator=g), x.T @ x, Groups(0.5, 2), mean=x.double().mean(0), tokens=50
    )
    bound = BruteForceGroups().solve(problem).bound
    assert bound is not None
    least = exact_bounds.optimum(problem)
    assert float(least) * (1 - 1e-6) <= bound <= least


def test_the_cheap_bounds_of_a_wide_layer_are_worth_something() -> None:
    """Allowances grow with the width: at 300 inputs they are still nothing beside the bound."""
    problem = LayerReconstruction(normal(8, 300, 0).float(), correlated(300, 0).float(), RowWise(0.5))
    bound = lower_bound(problem)
    assert bound is not None
    assert bound.value > 0.01 * ADMM(max_iterations=20).solve(problem).objective
