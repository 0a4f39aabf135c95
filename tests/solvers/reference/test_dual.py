"""Bounds of whole layers lie below the optimum, are close to it, and are proved by their multipliers alone."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import Blocks, Groups, NofM, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.reference import BruteForce, DualCertificate, dual_bound, lower_bound
from admm_prune.solvers.reference.cells import Cells, cells_of
from admm_prune.solvers.reference.dual import semidefinite
from admm_prune.solvers.reference.perspective_dual import largest_diagonal
from tests.solvers.reference.hostile import checked
from tests.solvers.reference.instances import Toy, correlated, normal, spectral

QUICK = {"rounds": 3, "iterations": 20}

SETS: list[SparseSet] = [
    RowWise(0.5),
    Unstructured(0.6),
    NofM(2, 4),
    Blocks(0.5, 2, 2),
    Blocks(0.25, 1, 4),
    Groups(0.5, 2),
    StackedRows(((1, NofM(1, 4)), (1, RowWise(0.25)))),
]


def exact_bound(
    certificate: DualCertificate, hessian: torch.Tensor, target: torch.Tensor, constraint: SparseSet
) -> Fraction:
    """The bound of the multipliers in rational numbers, over every support of the set; fails where D is too large."""
    a = [[Fraction(x) for x in row] for row in hessian.double().tolist()]
    width = len(a)
    kept, removed, constant = [], [], Fraction(0)
    for row, w in enumerate(target.double().tolist()):
        d = [Fraction(x) for x in certificate.diagonal[certificate.diagonal_of_row[row]].tolist()]
        s = [Fraction(x) for x in certificate.shift[row].tolist()]
        rest = [[a[i][j] - (d[i] if i == j else 0) for j in range(width)] for i in range(width)]
        assert is_semidefinite(rest)
        q = [sum((s[i] * rest[i][j] for i in range(width)), Fraction(0)) for j in range(width)]
        constant += sum(x * y for x, y in zip(s, q, strict=True))
        assert all(x > 0 or y == 0 for x, y in zip(d, q, strict=True))
        kept.append([-y * y / x if y else Fraction(0) for x, y in zip(d, q, strict=True)])
        removed.append([x * Fraction(t) ** 2 - 2 * y * Fraction(t) for x, y, t in zip(d, q, w, strict=True)])
    return least_cost(kept, removed, constraint) - constant


def least_cost(kept: list[list[Fraction]], removed: list[list[Fraction]], constraint: SparseSet) -> Fraction:
    """Over all supports of small sets; over rows and groups where these are independent."""
    rows, width = len(kept), len(kept[0])
    if isinstance(constraint, StackedRows):
        total, start = Fraction(0), 0
        for count, inner in constraint.parts:
            total += least_cost(kept[start : start + count], removed[start : start + count], inner)
            start += count
        return total
    score = torch.arange(1.0, rows * width + 1).view(rows, width)
    mask = constraint.select(Point(weight=score))["weight"]
    if isinstance(constraint, Blocks | Groups):
        height, across = (
            (rows, constraint.width) if isinstance(constraint, Groups) else (constraint.height, constraint.width)
        )
        cells = [
            [
                [(i + r, j + c) for r in range(height) for c in range(across)]
                for i in range(0, rows, height)
                for j in range(0, width, across)
            ]
        ]
    elif isinstance(constraint, Unstructured):
        cells = [[[(i, j)] for i in range(rows) for j in range(width)]]
    else:
        group = constraint.m if isinstance(constraint, NofM) else width
        cells = [[[(i, j)] for j in range(g, g + group)] for i in range(rows) for g in range(0, width, group)]
    total = Fraction(0)
    for cell in cells:
        keep = sum(bool(mask[tile[0]]) for tile in cell)
        gains = [sum((removed[i][j] - kept[i][j] for i, j in tile), Fraction(0)) for tile in cell]
        total += sum((removed[i][j] for tile in cell for i, j in tile), Fraction(0))
        total -= max((sum(chosen, Fraction(0)) for chosen in combinations(gains, keep)), default=Fraction(0))
    return total


def is_semidefinite(matrix: list[list[Fraction]]) -> bool:
    rows = [list(row) for row in matrix]
    for k, top in enumerate(rows):
        if top[k] < 0 or (top[k] == 0 and any(top[k + 1 :])):
            return False
        if top[k] == 0:
            continue
        for row in rows[k + 1 :]:
            factor = row[k] / top[k]
            row[k:] = [x - factor * y for x, y in zip(row[k:], top[k:], strict=True)]
    return True


@pytest.mark.parametrize("constraint", SETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_multipliers_prove_the_bound(constraint: SparseSet, dtype: torch.dtype) -> None:
    problem = LayerReconstruction(normal(2, 8, 3).to(dtype), correlated(8, 3).to(dtype), constraint)
    certificate = dual_bound(problem)
    assert certificate is not None
    exact = exact_bound(certificate, problem.hessian, problem.minimizer, constraint)
    assert 0 < certificate.bound.value <= exact
    assert certificate.bound.value >= float(exact) * (1 - 1e-9)


@pytest.mark.parametrize("constraint", SETS[:3], ids=str)
def test_close_to_the_optimum_and_above_the_bounds_without_search(constraint: Constraint) -> None:
    ratios = []
    for seed in range(4):
        problem = Toy(normal(2, 8, seed), correlated(8, seed), constraint, offset=3.0)
        exact = BruteForce().solve(problem).objective
        certificate = dual_bound(problem, exact)
        plain = lower_bound(problem, exact)
        assert certificate is not None
        assert plain is not None
        assert certificate.bound.value <= exact * (1 + 1e-12)
        assert certificate.bound.value >= plain.value
        ratios.append(certificate.bound.ratio or 0.0)
    assert np.median(ratios) > 0.9, ratios


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_below_the_optimum_of_hostile_problems(number: int) -> None:
    checked(1, number, dual_bound, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_below_the_optimum_of_10000_hostile_problems(seed: int) -> None:
    pairs = [pair for number in range(500) if (pair := checked(100 + seed, number, dual_bound, **QUICK)) is not None]
    assert len(pairs) > 400
    ratios = [bound / least for bound, least in pairs if least > 0]
    assert np.median(ratios) > 0.9


@pytest.mark.parametrize("constraint", [RowWise(0.5), Unstructured(0.5), NofM(2, 4)], ids=str)
def test_a_diagonal_for_each_row_is_tighter(constraint: SparseSet) -> None:
    problem = Toy(normal(4, 16, 0), correlated(16, 0), constraint)
    shared, each = dual_bound(problem), dual_bound(problem, diagonals="row")
    assert shared is not None
    assert each is not None
    assert each.bound.value > shared.bound.value
    assert len(each.diagonal) == 4
    assert each.diagonal_of_row.tolist() == list(range(4))
    assert each.bound.value <= ADMM().solve(problem).objective


def test_everything_kept_and_everything_removed() -> None:
    weight, hessian = normal(3, 8, 0), correlated(8, 0)
    every = dual_bound(Toy(weight, hessian, RowWise(0.0)))
    assert every is not None
    assert every.bound.value == 0.0
    for constraint in (RowWise(1.0), Groups(1.0, 2)):
        problem = Toy(weight, hessian, constraint)
        none = dual_bound(problem)
        assert none is not None
        assert none.bound.value == pytest.approx(problem.value(Point(weight=0 * weight)), rel=1e-4)


def test_rows_of_zeros_and_a_matrix_of_zeros() -> None:
    weight = normal(3, 8, 0)
    weight[1] = 0
    certificate = dual_bound(Toy(weight, correlated(8, 0), RowWise(0.5)))
    assert certificate is not None
    assert certificate.row_losses is not None
    assert certificate.row_losses[1] == 0
    assert (certificate.row_losses[[0, 2]] > 0).all()
    for constraint in SETS[:4]:
        empty = dual_bound(Toy(torch.zeros(2, 8, dtype=torch.float64), correlated(8, 0), constraint))
        assert empty is not None
        assert empty.bound.value == 0.0


def test_rows_of_different_scales_are_each_solved() -> None:
    scales = torch.tensor([2.0**-40, 1.0, 2.0**40, 2.0**300], dtype=torch.float64)
    hessian = spectral(12, 0, 1e3)
    certificate = dual_bound(Toy(normal(1, 12, 0) * scales[:, None], hessian, RowWise(0.5)))
    assert certificate is not None
    assert certificate.row_losses is not None
    relative = certificate.row_losses / scales.numpy() ** 2
    assert relative == pytest.approx(relative[0], rel=1e-6)
    assert 0 < relative[0] <= BruteForce().solve(Toy(normal(1, 12, 0), hessian, RowWise(0.5))).objective


def test_a_hessian_that_is_nearly_singular_has_a_bound_that_says_nothing() -> None:
    nearly = torch.ones(6, 6, dtype=torch.float64) + 3e-15 * torch.eye(6, dtype=torch.float64)
    certificate = dual_bound(Toy(normal(1, 6, 0), nearly, RowWise(0.5), offset=2.0))
    assert certificate is not None
    assert certificate.bound.value == 2.0
    assert not certificate.diagonal.any()


def test_refuses() -> None:
    weight, singular = normal(4, 8, 0), torch.ones(8, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"dual_bound needs a Quadratic.*object"):
        dual_bound(object())
    with pytest.raises(ValueError, match=r"positive definite.*raise the ridge"):
        dual_bound(Toy(weight, singular, RowWise(0.5)))
    with pytest.raises(ValueError, match="NaN"):
        dual_bound(Toy(weight, singular * torch.nan, RowWise(0.5)))
    with pytest.raises(ValueError, match="N:M groups, tiles and one budget over a matrix; StackedRows"):
        dual_bound(Toy(weight, correlated(8, 0), StackedRows(((2, Unstructured(0.5)), (2, Unstructured(0.25))))))
    with pytest.raises(ValueError, match="at least one round"):
        dual_bound(Toy(weight, correlated(8, 0), RowWise(0.5)), rounds=0)
    with pytest.raises(ValueError, match="'shared' and 'row', not 'each'"):
        dual_bound(Toy(weight, correlated(8, 0), RowWise(0.5)), diagonals="each")  # type: ignore[arg-type]


@pytest.mark.bitwise
def test_repeats_bitwise() -> None:
    problem = Toy(normal(4, 8, 0), correlated(8, 0), Unstructured(0.5))
    first, second = dual_bound(problem), dual_bound(problem)
    assert first is not None
    assert second is not None
    assert first.bound == second.bound
    for name, tensor in first.tensors().items():
        assert np.array_equal(tensor, second.tensors()[name])


@pytest.mark.parametrize("constraint", [*SETS[:6], Blocks(0.0, 1, 2), Blocks(0.75, 4, 2), Groups(0.25, 1)], ids=str)
def test_cells_are_those_of_the_set(constraint: SparseSet) -> None:
    """The largest sum that the cells admit is that of the selection."""
    score = normal(4, 8, 5).abs()
    ((rows, cells),) = cells_of("test", constraint, (4, 8))
    assert rows.tolist() == list(range(4))
    mask = constraint.select(Point(weight=score))["weight"]
    largest = float(cells.largest(cells.table(score.square()).sum(-1)).sum())
    assert largest == pytest.approx(float((score.square() * mask).sum()))
    assert torch.equal(cells.matrix(cells.table(score)), score)


def test_cells_of_some_rows() -> None:
    cells = Cells.per_row((3, 8), [1, 2, 3], 4).of_rows(torch.tensor([True, False, True]))
    assert cells.shape == (2, 8)
    assert cells.keep.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_diagonal_is_that_of_the_semidefinite_program(seed: int) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    gram = correlated(10, seed).numpy()
    root = np.sqrt(gram.diagonal())
    unit = gram / root / root[:, None]
    weights = np.random.default_rng(seed).uniform(0.2, 2, 10)
    delta = cvxpy.Variable(10)
    program = cvxpy.Problem(cvxpy.Maximize(weights @ delta), [delta >= 0, unit - cvxpy.diag(delta) >> 0])
    program.solve(solver="CLARABEL")
    start = torch.full((10,), 0.5 * float(np.linalg.eigvalsh(unit)[0]), dtype=torch.float64)
    found = largest_diagonal(torch.from_numpy(unit), torch.from_numpy(weights), start)
    assert bool(semidefinite(torch.from_numpy(unit)[None], found[None]))
    reached = float(torch.from_numpy(weights) @ found)
    slack = 2 * 10 * 1e-3 * weights.mean()  # of the barrier
    assert program.value - 1.1 * slack <= reached <= program.value * (1 + 1e-6)
