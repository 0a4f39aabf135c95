"""The dense algebra: factorizations, a refit, an ADMM step, a SparseGPT sweep, a Gram."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problems.constraints import NofM, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.schedules import Constant
from admm_prune.solvers.x_updates import QuadraticUpdate
from admm_prune.statistics import GramAccumulator
from benchmarks.micro.rates import Layer, Measure

ITERATIONS = 10
TOKENS = 2048

patterns = pytest.mark.parametrize("constraint", [Unstructured(0.7), NofM(2, 4)], ids=["70%", "2:4"])


class Unvalued(LayerReconstruction):
    """Without the cost of its objective, which belongs to no part."""

    def value(self, x: Point) -> float:
        return 0.0


def problem(layer: Layer, constraint: SparseSet) -> LayerReconstruction:
    return Unvalued(layer.weight, layer.hessian, constraint, ridge=0.0, damping=0.01)


def test_product(measure: Measure, layer: Layer) -> None:
    """H W^T, the unit of the leaderboard. Lower bound: 2 out in^2 operations."""
    out = torch.empty(layer.width, layer.rows)
    measure(
        lambda: torch.matmul(layer.hessian, layer.weight.T, out=out),
        operations=2 * layer.rows * layer.width**2,
        moved=4 * (layer.width**2 + 2 * layer.weight.numel()),
    )


def test_inverse_factor(measure: Measure, layer: Layer) -> None:
    """U with A^-1 = U^T U. Lower bound: 2/3 in^3, a Cholesky factorization and a triangular inverse."""
    factor: Tensor = measure(
        lambda: quadratic.inverse_factor(layer.hessian), operations=2 / 3 * layer.width**3, moved=8 * layer.width**2
    )
    assert bool(torch.isfinite(factor).all())


def test_cholesky_inverse(measure: Measure, layer: Layer) -> None:
    """ADMM's (A + rho I)^-1. Lower bound: in^3 operations, all of them counted once for a symmetric result."""
    update = QuadraticUpdate(problem(layer, Unstructured(0.7)))
    measure(lambda: update.prepare(0.3), operations=layer.width**3, moved=8 * layer.width**2)


@patterns
def test_admm_step(measure: Measure, layer: Layer, constraint: SparseSet) -> None:
    """One iteration at a settled penalty. Lower bound: a product; V, Z and W read, Z and right-hand side written."""
    solver, task = ADMM(penalty=Constant(0.3)), problem(layer, constraint)
    state = solver.init(task, None)
    solver.step(task, state, 0)
    measure(
        lambda: solver.step(task, state, 1),
        operations=2 * layer.rows * layer.width**2,
        moved=5 * 4 * layer.weight.numel() + 4 * layer.width**2,
    )


@patterns
def test_sparsegpt_sweep(measure: Measure, layer: Layer, constraint: SparseSet) -> None:
    """The whole solve, but for its objective. Lower bound: out in^2 operations of the sweep, 2/3 in^3 of the factor."""
    task = problem(layer, constraint)
    result = measure(
        lambda: SparseGPT().solve(task),
        operations=layer.rows * layer.width**2 + 2 / 3 * layer.width**3,
        moved=8 * layer.weight.numel(),
    )
    assert constraint.contains(result.solution)


@patterns
def test_refit(measure: Measure, layer: Layer, constraint: SparseSet) -> None:
    """Ten conjugate-gradient iterations. Lower bound: one product each and one for the first residual."""
    mask = constraint.select(problem(layer, constraint).initial())["weight"]
    start = layer.weight * mask
    measure(
        lambda: quadratic.conjugate_gradient_on_support_(
            start.clone(), layer.hessian, layer.weight, mask, tolerance=0.0, max_iterations=ITERATIONS
        ),
        operations=(ITERATIONS + 1) * 2 * layer.rows * layer.width**2,
        moved=(ITERATIONS + 1) * 4 * layer.width**2,
    )


def test_gram(measure: Measure, layer: Layer) -> None:
    """2048 tokens added to a Gram. Lower bound: n in^2 operations in float64, half a product by symmetry."""
    inputs = torch.randn(TOKENS, layer.width, generator=torch.Generator().manual_seed(0))
    gram = GramAccumulator(layer.width)
    measure(
        lambda: gram.add(inputs),
        operations=TOKENS * layer.width**2,
        moved=4 * inputs.numel() + 16 * layer.width**2,
        dtype=torch.float64,
    )
