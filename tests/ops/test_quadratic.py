"""Quadratic forms against dense products, of matrices that are wider than a tile."""

from __future__ import annotations

import pytest
import torch

from admm_prune.ops import exact_refit, group_compensation, quadratic
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups, RowWise
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers import refit
from admm_prune.solvers.group_obs import GroupMask, GroupOBS
from admm_prune.solvers.obs import SparseGPT

DTYPES = (torch.float32, torch.float64)


def drawn(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, W (rows, width) and a Gram (width, width)."""
    g = torch.Generator().manual_seed(0)
    v, w, x = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (rows, rows, 2 * width))
    gram = (x.T @ x / len(x)).to(dtype)
    return v.to(dtype), w.to(dtype), (gram + gram.T) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 300, 600])
@pytest.mark.parametrize("other", [False, True])
def test_the_energy_is_that_of_the_dense_product_and_leaves_its_inputs_alone(
    dtype: torch.dtype, rows: int, other: bool
) -> None:
    v, w, gram = drawn(rows, 300, dtype)
    before = [x.clone() for x in (v, w, gram)]
    e = v.double() - w.double() if other else v.double()
    expected = float(((e @ gram.double()) * e).sum())
    for _ in range(2):
        assert quadratic.energy(v, gram, w if other else None) == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(x, y) for x, y in zip((v, w, gram), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_function_of_a_hessian_changes_it(dtype: torch.dtype) -> None:
    v, w, gram = drawn(300, 300, dtype)
    mask = v.abs() >= v.abs().median(1, keepdim=True).values
    before = [x.clone() for x in (v, w, gram, mask)]
    quadratic.inner(v, w)
    quadratic.bilinear(v, gram, w)
    quadratic.unit_diagonal(gram)
    quadratic.factor_residual(quadratic.inverse_factor(gram), gram)
    quadratic.minimize_on_support(gram, w, mask)
    exact_refit.exact_refit(gram, w, mask)
    exact_refit.kkt_residual(gram, w, v.where(mask, 0), mask)
    group_compensation.eliminate(gram, w, 2, 10, 5)
    group_compensation.minimize_on_columns(gram, w, mask[0])
    assert all(torch.equal(x, y) for x, y in zip((v, w, gram, mask), before, strict=True))


def test_the_relative_error_of_a_wide_layer_in_float64_is_that_of_the_dense_product() -> None:
    v, w, gram = drawn(300, 300, torch.float64)
    problem = LayerReconstruction(w, gram, RowWise(0.5), ridge=0.01)
    before, e = gram.clone(), v - w
    expected = float(((e @ before) * e).sum()) / float(((w @ before) * w).sum())
    point = Point(weight=v)
    assert problem.relative_error(point) == pytest.approx(expected, rel=1e-12)
    assert problem.relative_error(point, before) == pytest.approx(expected, rel=1e-12)
    assert problem.value(point) == problem.value(point)
    assert torch.equal(problem.gram, before)


@pytest.mark.parametrize("retried", [quadratic, group_compensation])
def test_memory_that_runs_out_is_not_taken_for_a_matrix_that_is_not_definite(
    monkeypatch: pytest.MonkeyPatch, retried: object
) -> None:
    """A second try in float64 would take twice the memory, and its note would blame the precision."""
    _, w, gram = drawn(8, 16, torch.float32)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    problem = LayerReconstruction(w, gram, Groups(0.5) if retried is group_compensation else RowWise(0.5))
    solver = GroupOBS() if retried is group_compensation else SparseGPT()
    name = "_eliminate" if retried is group_compensation else "inverse_factor"
    monkeypatch.setattr(retried, name, fail)
    with pytest.raises(torch.OutOfMemoryError):
        solver.solve(problem)


def test_memory_that_runs_out_in_a_refit_of_columns_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    _, w, gram = drawn(8, 16, torch.float32)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(refit, "minimize_on_columns", fail)
    with pytest.raises(torch.OutOfMemoryError):
        refit.Refit(GroupMask()).solve(LayerReconstruction(w, gram, Groups(0.5)))
