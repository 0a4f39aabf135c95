"""The exact refit reaches its residual in every row, whatever the mask, and says where it is not unique."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.ops.exact_refit import exact_refit, kkt_residual
from admm_prune.ops.quadratic import energy
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups, RowWise
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.refit import Refit
from tests.solvers.reference.instances import correlated, normal, spectral


def random_mask(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Rows from empty to full."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, shape[0])[:, None]
    return torch.rand(shape, generator=generator) < share


def by_numpy(hessian: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    solution = np.zeros(target.shape)
    a, w = hessian.double().numpy(), target.double().numpy()
    for i, row in enumerate(mask.numpy()):
        if row.any():
            solution[i, row] = np.linalg.solve(a[np.ix_(row, row)], (a @ w[i])[row])
    return solution


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.sampled_from([1e2, 1e6, 1e10]))
def test_every_row_of_any_mask(seed: int, width: int, rows: int, condition: float) -> None:
    scale = 10.0 ** torch.from_numpy(np.random.default_rng(seed).uniform(-4, 4, width))
    hessian = spectral(width, seed, condition) * scale * scale[:, None]
    target, mask = normal(rows, width, seed) / scale, random_mask((rows, width), seed)
    solved = exact_refit(hessian, target, mask)
    assert not bool(solved.weight[~mask].any())
    assert float(solved.residual.max()) <= 1e-6
    # The gradient on the support, by numpy from the definition.
    root = np.sqrt(np.diag(hessian.numpy()))
    gradient = (solved.weight.numpy() - target.numpy()) @ hessian.numpy() / root * mask.numpy()
    linear = target.numpy() @ hessian.numpy() / root * mask.numpy()
    assert (np.linalg.norm(gradient, axis=1) <= 1.01e-6 * np.linalg.norm(linear, axis=1)).all()
    assert solved.minimum_norm == 0 or condition == 1e10


def test_the_solution_is_that_of_a_dense_solver() -> None:
    hessian, target = correlated(24, 0), normal(9, 24, 0)
    mask = random_mask((9, 24), 1)
    solved = exact_refit(hessian, target, mask, tolerance=1e-13)
    assert solved.weight.numpy() == pytest.approx(by_numpy(hessian, target, mask), abs=1e-10)


def test_one_mask_for_all_rows_is_the_same_as_many() -> None:
    hessian, target = correlated(16, 0), normal(5, 16, 0)
    columns = torch.arange(16) % 3 != 0
    together = exact_refit(hessian, target, columns.expand(5, -1), tolerance=1e-12)
    assert together.weight.numpy() == pytest.approx(by_numpy(hessian, target, columns.expand(5, -1)), abs=1e-9)


def test_a_singular_row_has_the_solution_of_least_norm_and_is_counted() -> None:
    half = normal(6, 4, 0)
    x = torch.cat([half, half], 1)  # every column twice
    hessian, target = x.T @ x, normal(3, 8, 1)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 4:] = False
    solved = exact_refit(hessian, target, mask)
    assert solved.minimum_norm == 2
    assert float(solved.residual.max()) <= 1e-6
    assert solved.weight[1, :4].numpy() == pytest.approx(solved.weight[1, 4:].numpy(), abs=1e-6)
    assert energy(solved.weight, hessian, target) <= energy(torch.where(mask, target, 0.0), hessian, target)


def test_an_ill_conditioned_row_is_factored_in_float64() -> None:
    hessian = spectral(30, 0, 1e9)
    solved = exact_refit(hessian, normal(4, 30, 0), random_mask((4, 30), 2))
    assert solved.double > 0
    assert solved.minimum_norm == 0
    assert float(solved.residual.max()) <= 1e-6


def test_nothing_kept_and_zero_targets() -> None:
    hessian, target = correlated(8, 0), normal(3, 8, 0)
    empty = exact_refit(hessian, target, torch.zeros(3, 8, dtype=torch.bool))
    assert not bool(empty.weight.any())
    assert not bool(empty.residual.any())
    zero = exact_refit(hessian, 0 * target, torch.ones(3, 8, dtype=torch.bool))
    assert not bool(zero.weight.any())
    assert not bool(zero.residual.any())


def test_refuses() -> None:
    hessian, target = correlated(8, 0), normal(3, 8, 0)
    with pytest.raises(ValueError, match=r"mask must be boolean and of shape \(3, 8\)"):
        exact_refit(hessian, target, torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN or Inf"):
        exact_refit(hessian, target * torch.nan, target > 0)
    with pytest.raises(ValueError, match="diagonal entries <= 0"):
        exact_refit(hessian - torch.diag(hessian.diagonal()), target, target > 0)


@pytest.mark.parametrize("constraint", [RowWise(0.5), Groups(0.5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_solver_refits_exactly_and_notes_the_residual(constraint: RowWise | Groups, dtype: torch.dtype) -> None:
    problem = LayerReconstruction(normal(6, 16, 0).to(dtype), correlated(16, 0).to(dtype), constraint)
    start = constraint.project(Point(weight=problem.weight))
    result = Refit(exact=True).solve(problem, start=start)
    weight = result.solution["weight"]
    assert weight.dtype == dtype
    assert float(kkt_residual(problem.hessian, problem.minimizer, weight, weight != 0).max()) <= 1e-5
    assert result.notes[-1].startswith("exact refit: relative residual at most")
    assert ("rounded to float32" in result.notes[-1]) == (dtype is torch.float32)
    plain = Refit(tolerance=1e-7).solve(problem, start=start)
    assert result.objective <= plain.objective * (1 + 1e-6)
    if isinstance(constraint, RowWise):
        inner = Refit(SparseGPT(), exact=True).solve(problem)
        assert inner.objective <= SparseGPT().solve(problem).objective


def test_the_residual_of_weights_with_nan_is_nan() -> None:
    hessian, weight = correlated(8, 0), normal(3, 8, 0)
    weight[0, 0] = torch.nan
    residual = kkt_residual(hessian, normal(3, 8, 0), weight, weight != 0)
    assert residual.isnan().tolist() == [True] + [False] * (len(weight) - 1)
