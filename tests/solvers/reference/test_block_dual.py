"""Bounds by blocks on the diagonal lie below the optimum, above those by diagonals, and are proved by their data."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, Groups, NofM, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.reference import BlockCertificate, BruteForce, block_bound, dual_bound
from admm_prune.solvers.reference.block_dual import coupled, partition_of
from admm_prune.solvers.reference.block_relaxation import largest_blocks, most_gained
from admm_prune.solvers.reference.cells import Cells, cells_of
from tests.collection import exact
from tests.solvers.reference.hostile import checked
from tests.solvers.reference.instances import Toy, correlated, normal, spectral

QUICK = {"width": 4, "rounds": 2, "iterations": 5}

SETS = {
    "row": (RowWise(0.5), {"kind": "row", "keep": 2}),
    "unstructured": (Unstructured(0.5), {"kind": "unstructured", "keep": 4}),
    "1of2": (NofM(1, 2), {"kind": "N:M", "keep": 1, "of": 2}),
    "tiles": (Blocks(0.5, 1, 2), {"kind": "block", "height": 1, "width": 2, "keep": 2}),
    "groups": (Groups(0.5, 1), {"kind": "group", "width": 1, "keep": 2}),
}
LAYERS: list[SparseSet] = [RowWise(0.5), Unstructured(0.6), NofM(2, 4), Blocks(0.5, 2, 2), Groups(0.5, 2)]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("width", [2, 4])
def test_the_multipliers_prove_the_bound_in_rational_arithmetic(name: str, width: int) -> None:
    """Over every support of the set; with a price on the budget the bound is at most that."""
    constraint, described = SETS[name]
    problem = Toy(normal(2, 4, 3), correlated(4, 3), constraint)
    certificate = block_bound(problem, width=width)
    assert certificate is not None
    arrays = (problem.minimizer.numpy(), problem.hessian.numpy())
    columns, blocks, shift = certificate.tensors().values()
    proved = exact.block_bound(*arrays, described, columns, blocks, shift)
    assert proved is not None
    assert 0 < Fraction(certificate.bound.value) <= proved <= exact.optimum(*arrays, described)
    if name == "1of2":
        assert certificate.bound.value >= float(proved) * (1 - 1e-9)


@pytest.mark.parametrize("constraint", LAYERS, ids=str)
def test_above_the_bound_of_a_diagonal(constraint: SparseSet) -> None:
    problem = Toy(normal(4, 16, 0), correlated(16, 0), constraint, offset=3.0)
    reached = ADMM().solve(problem).objective
    diagonal, blocks = dual_bound(problem, reached), block_bound(problem, reached, rounds=3)
    assert diagonal is not None
    assert blocks is not None
    assert diagonal.bound.value < blocks.bound.value <= reached
    assert blocks.bound.ratio == pytest.approx((blocks.bound.value - 3) / (reached - 3))


def test_one_block_with_all_columns_is_exact_but_for_the_price() -> None:
    """Of N:M nothing is left out: the relaxation is the problem itself."""
    problem = Toy(normal(3, 8, 1), correlated(8, 1), NofM(2, 4))
    least = BruteForce().solve(problem).objective
    certificate = block_bound(problem, width=8, iterations=60)
    assert certificate is not None
    assert least * 0.99 < certificate.bound.value <= least * (1 + 1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_below_the_optimum_of_hostile_problems(number: int) -> None:
    checked(2, number, block_bound, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_below_the_optimum_of_5000_hostile_problems(seed: int) -> None:
    pairs = [pair for n in range(500) if (pair := checked(300 + seed, n, block_bound, **QUICK)) is not None]
    ratios = [bound / least if least > 0 else 1.0 for bound, least in pairs]
    assert len(ratios) > 300
    assert np.median(ratios) > 0.9


@pytest.mark.parametrize("constraint", [*LAYERS, Blocks(0.25, 4, 4), Groups(0.25, 1)], ids=str)
def test_blocks_are_whole_groups_and_list_what_the_set_admits(constraint: SparseSet) -> None:
    ((_, cells),) = cells_of("test", constraint, (4, 8))
    partition = partition_of(correlated(8, 0), cells, 8)
    assert sorted(partition.columns.flatten().tolist()) == list(range(8))
    unit = cells.group if isinstance(constraint, NofM) else cells.tile[1]
    assert bool((partition.columns.view(-1, unit).diff(dim=1) == 1).all())
    assert bool((partition.columns.view(-1, unit)[:, 0] % unit == 0).all())
    x = normal(4, 8, 1)
    assert torch.equal(partition.matrix(partition.blocks(x)), x)
    kept = partition.supports.view(len(partition.supports), -1, unit).sum(2)
    assert bool((kept == 2).all() if isinstance(constraint, NofM) else ((kept == 0) | (kept == unit)).all())
    assert len(partition.supports.unique(dim=0)) == len(partition.supports)


def test_a_budget_above_the_integers_of_float32_is_not_rounded() -> None:
    keep = 2**24 + 1
    partition = partition_of(correlated(8, 0), Cells.whole((4, 8), keep), 4)
    assert partition.keep.tolist() == [keep]
    lines = torch.ones(1, 1, 2, dtype=torch.float64)
    assert float(most_gained(lines, partition.keep)) == 1.0


def test_groups_of_too_many_supports_are_refused() -> None:
    problem = Toy(normal(2, 32, 0), correlated(32, 0), NofM(8, 16))
    with pytest.raises(ValueError, match="at most 1296 supports of a block; a group of 8:16 has 12870: use dual_bound"):
        block_bound(problem)


def test_a_tile_wider_than_a_block_is_a_block() -> None:
    ((_, cells),) = cells_of("test", Groups(0.5, 8), (4, 16))
    assert partition_of(correlated(16, 0), cells, 4).columns.shape == (2, 8)


def test_coupled_columns_are_put_together() -> None:
    hessian = torch.eye(8, dtype=torch.float64)
    for i, j in ((0, 5), (1, 6), (2, 7), (3, 4)):
        hessian[i, j] = hessian[j, i] = 0.5
    assert sorted(sorted(block) for block in coupled(hessian, 1, 2).tolist()) == [[0, 5], [1, 6], [2, 7], [3, 4]]


def test_largest_blocks_of_one_block_and_of_single_columns() -> None:
    """The barrier problem in closed form, and the semidefinite program of diagonals."""
    cvxpy = pytest.importorskip("cvxpy")
    gram = correlated(6, 0)
    root = gram.diagonal().sqrt()
    unit = gram / root / root[:, None]
    least = float(torch.linalg.eigvalsh(unit)[0])
    draw = np.random.default_rng(0)
    whole, c = torch.arange(6)[None], torch.from_numpy(draw.standard_normal((6, 6)))
    weights = (c @ c.T)[None]
    start = torch.eye(6, dtype=torch.float64)[None] * least / 2
    found = largest_blocks(unit, weights, whole, start, (0.1,))[0]
    mu = 0.1 * float(weights[0].diagonal().mean())
    gradient = weights[0] + mu * (torch.linalg.inv(found) - torch.linalg.inv(unit - found))
    assert float(gradient.abs().max()) < 1e-6 * float(weights.abs().max())
    d = cvxpy.Variable(6)
    program = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(d)), [d >= 0, unit.numpy() - cvxpy.diag(d) >> 0])
    program.solve(solver="CLARABEL")
    barriers = (1.0, 0.2, 0.04, *[0.01] * 5)  # every sweep comes closer
    single = torch.full((6, 1, 1), least / 2, dtype=torch.float64)
    ones = torch.ones(6, 1, 1, dtype=torch.float64)
    diagonal = largest_blocks(unit, ones, torch.arange(6)[:, None], single, barriers).flatten()
    assert bool((diagonal > 0).all())
    assert float(torch.linalg.eigvalsh(unit - diagonal.diag())[0]) > 0
    assert program.value - 2.2 * 6 * 0.01 <= float(diagonal.sum()) <= program.value


@pytest.mark.parametrize("seed", range(5))
def test_the_price_bounds_the_largest_sum(seed: int) -> None:
    """At least the best choice by dynamic programming, and close to it: one line loses at most its largest step."""
    draw = np.random.default_rng(seed)
    lines = torch.from_numpy(np.sort(draw.random((1, 12, 4)), axis=2))
    lines[..., 0] = 0
    best = np.zeros(1)
    for line in lines[0].numpy():
        best = np.array(
            [max(best[k - c] + line[c] for c in range(4) if 0 <= k - c < len(best)) for k in range(len(best) + 3)]
        )
    for keep in (0, 5, 17, 36):
        bound = float(most_gained(lines, torch.tensor([float(keep)]))[0])
        exact_most = best[: keep + 1].max()
        assert exact_most * (1 - 1e-12) <= bound <= exact_most + 1


def test_everything_removed_everything_kept_and_zeros() -> None:
    weight, hessian = normal(3, 8, 0), correlated(8, 0)
    every = block_bound(Toy(weight, hessian, RowWise(0.0)))
    assert every is not None
    assert every.bound.value == 0.0
    for constraint in (RowWise(1.0), Groups(1.0, 2)):
        problem = Toy(weight, hessian, constraint)
        none = block_bound(problem, iterations=60)
        assert none is not None
        assert none.bound.value == pytest.approx(problem.value(Point(weight=0 * weight)), rel=0.01)
    empty = block_bound(Toy(0 * weight, hessian, RowWise(0.5)))
    assert empty is not None
    assert empty.bound.value == 0.0


def test_scales_and_a_hessian_that_is_nearly_singular() -> None:
    plain = block_bound(Toy(normal(2, 12, 0), spectral(12, 0, 1e3), NofM(2, 4)), rounds=2, iterations=5)
    far = block_bound(Toy(normal(2, 12, 0) * 2.0**200, spectral(12, 0, 1e3), NofM(2, 4)), rounds=2, iterations=5)
    assert plain is not None
    assert far is not None
    assert far.bound.value == plain.bound.value * 2.0**400
    nearly = torch.ones(6, 6, dtype=torch.float64) + 3e-15 * torch.eye(6, dtype=torch.float64)
    certificate = block_bound(Toy(normal(1, 6, 0), nearly, RowWise(0.5), offset=2.0))
    assert certificate is not None
    assert certificate.bound.value == 2.0


def test_refuses() -> None:
    weight, singular = normal(4, 8, 0), torch.ones(8, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"block_bound needs a Quadratic.*object"):
        block_bound(object())
    with pytest.raises(ValueError, match=r"positive definite.*raise the ridge"):
        block_bound(Toy(weight, singular, RowWise(0.5)))
    with pytest.raises(ValueError, match="sets of one kind"):
        block_bound(Toy(weight, correlated(8, 0), StackedRows(((2, NofM(1, 4)), (2, RowWise(0.25))))))
    with pytest.raises(ValueError, match="one pattern N:M"):
        block_bound(Toy(weight, correlated(8, 0), StackedRows(((2, NofM(1, 4)), (2, NofM(2, 4))))))
    with pytest.raises(ValueError, match="at least 1, not 0, 5 and 20"):
        block_bound(Toy(weight, correlated(8, 0), RowWise(0.5)), width=0)


@pytest.mark.bitwise
def test_repeats_bitwise() -> None:
    problem = Toy(normal(4, 8, 0), correlated(8, 0), Unstructured(0.5))
    first, second = (block_bound(problem, rounds=2, iterations=5) for _ in range(2))
    assert isinstance(first, BlockCertificate)
    assert isinstance(second, BlockCertificate)
    assert first.bound == second.bound
    for name, tensor in first.tensors().items():
        assert np.array_equal(tensor, second.tensors()[name])
