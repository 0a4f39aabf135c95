"""Lower bounds lie below the optimum, and say how much they are worth; supports are recognised for what they are."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.point import Point
from admm_prune.problem import Constraint, SupportConstraint
from admm_prune.problems.constraints import Blocks, NofM, RowWise, StackedRows, Unstructured
from admm_prune.solvers.reference import Bound, BranchAndBound, BruteForce, lower_bound, perspective_bound
from admm_prune.solvers.reference.bounds import dual_value, loss_bounds
from admm_prune.solvers.reference.rows import Supports, recognise, separate
from tests.solvers.reference.instances import Toy, correlated, keeping, normal, spectral, toys

SLACK = 1 + 1e-9

SETS: list[Constraint] = [RowWise(0.5), RowWise(0.4), NofM(2, 4), NofM(1, 4), Unstructured(0.5), Unstructured(0.9)]


def every_bound(problem: Toy) -> dict[str, float]:
    separated = separate("test", problem)
    target = problem.weight * torch.from_numpy(separated.scale)
    supports = recognise("test", problem.constraint, (problem.weight.shape[0], problem.weight.shape[1]))
    return loss_bounds(separated.form, target, supports)


@settings(max_examples=80, deadline=None)
@given(toys(max_width=10, rows=2))
def test_bounds_are_below_the_optimum(problem: Toy) -> None:
    optimum = BruteForce().solve(problem).objective
    assert all(0.0 <= bound <= optimum * SLACK for bound in every_bound(problem).values())


@pytest.mark.parametrize("hessian", [spectral(10, 0), correlated(10, 0)])
@pytest.mark.parametrize("keep", range(11))
def test_bounds_at_every_budget(hessian: torch.Tensor, keep: int) -> None:
    problem = Toy(normal(3, 10, keep), hessian, keeping(keep, 10))
    optimum = BruteForce().solve(problem).objective
    assert all(bound <= optimum * SLACK for bound in every_bound(problem).values())
    assert lower_bound(problem).value <= optimum * SLACK


@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_bounds_for_every_kind_of_budget(constraint: Constraint) -> None:
    problem = Toy(normal(2, 8, 0), correlated(8, 0), constraint, offset=3.0)
    exact = BruteForce().solve(problem)
    bound = lower_bound(problem, exact.objective)
    assert 3.0 < bound.value <= exact.objective
    assert bound.ratio is not None
    assert math.isclose(bound.ratio, (bound.value - 3.0) / (exact.objective - 3.0))


def test_removal_bound_is_tight_for_one_removal() -> None:
    problem = Toy(normal(1, 8, 0), correlated(8, 0), keeping(7, 8))
    bound = lower_bound(problem, BruteForce().solve(problem).objective)
    assert bound.kind == "removal"
    assert bound.ratio == pytest.approx(1.0)


def test_diagonal_bound_is_tight_for_orthogonal_inputs() -> None:
    diagonal = torch.diag(torch.linspace(1.0, 5.0, 8, dtype=torch.float64))
    problem = Toy(normal(2, 8, 0), diagonal, Unstructured(0.5))
    assert lower_bound(problem, BruteForce().solve(problem).objective).ratio == pytest.approx(1.0)


def test_vacuous_is_below_a_tenth() -> None:
    assert Bound.above(1.0, 1.09, "any", 2.0).vacuous
    assert not Bound.above(1.0, 1.11, "any", 2.0).vacuous
    assert not Bound.above(1.0, 1.0, "any", 1.0).vacuous  # the objective is the floor itself: nothing to prove
    assert not Bound.above(1.0, 1.0, "any", None).vacuous
    problem = Toy(normal(1, 32, 0), spectral(32, 0), RowWise(0.5))
    bound = lower_bound(problem, BranchAndBound(time_limit=0.2).solve(problem).objective)
    assert bound is not None
    assert bound.vacuous


def test_an_objective_of_nan_is_not_proved_optimal() -> None:
    ratio = Bound.above(floor=1.0, value=2.0, kind="removal", objective=math.nan).ratio
    assert ratio is not None
    assert math.isnan(ratio)


def test_a_hessian_that_is_definite_by_less_than_rounding_has_the_bound_of_its_floor() -> None:
    """Integers prove what float64 cannot."""
    nearly = torch.ones(6, 6, dtype=torch.float64) + 3e-15 * torch.eye(6, dtype=torch.float64)
    problem = Toy(normal(1, 6, 0), nearly, RowWise(0.5), offset=2.0)
    for solve in (lower_bound, perspective_bound) if importlib.util.find_spec("cvxpy") else (lower_bound,):
        bound = solve(problem)
        assert bound is not None
        assert bound.value == 2.0
    assert BruteForce().solve(problem).bound == 2.0


def test_a_hessian_that_may_be_indefinite_has_no_bound() -> None:
    """A Cholesky factorization that runs to its end proves nothing within its own rounding."""
    a = torch.tensor([[1.0, 1 / 3, 1 / 3], [1 / 3, 1 / 9, 1 / 9], [1 / 3, 1 / 9, 1 / 9]], dtype=torch.float64)
    a.diagonal().mul_(1 + 2**-52)
    for solver in (BruteForce(), BranchAndBound()):
        for problem in (Toy(normal(1, 3, seed), a, RowWise(0.4)) for seed in range(3)):
            try:
                result = solver.solve(problem)
            except ValueError:
                continue
            assert result.bound is None or definite(problem.hessian)


def definite(matrix: torch.Tensor) -> bool:
    """By leading minors, in fractions."""
    rows = [[Fraction(x) for x in row] for row in matrix.tolist()]
    for k in range(len(rows)):
        if rows[k][k] <= 0:
            return False
        for i in range(k + 1, len(rows)):
            rows[i] = [x - rows[i][k] / rows[k][k] * y for x, y in zip(rows[i], rows[k], strict=True)]
    return True


def test_lower_bound_refuses() -> None:
    with pytest.raises(TypeError, match=r"lower_bound needs a Quadratic.*object"):
        lower_bound(object())
    with pytest.raises(ValueError, match=r"lower_bound.*Blocks"):
        lower_bound(Toy(normal(4, 8, 0), correlated(8, 0), Blocks(0.5, 2, 2)))


class TestPerspective:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("cvxpy")

    @pytest.mark.parametrize("constraint", SETS, ids=str)
    def test_valid_and_better_than_the_cheap_bounds(self, constraint: Constraint) -> None:
        problem = Toy(normal(2, 8, 0), correlated(8, 0), constraint, offset=1.0)
        exact = BruteForce().solve(problem).objective
        bound = perspective_bound(problem, exact)
        diagonal = every_bound(problem)["Hessian diagonal"]
        assert 1.0 + diagonal * (1 - 1e-6) <= bound.value <= exact * SLACK

    @pytest.mark.parametrize("seed", range(3))
    def test_valid_where_ill_conditioned(self, seed: int) -> None:
        problem = Toy(normal(1, 12, seed), spectral(12, seed), RowWise(0.5))
        assert perspective_bound(problem).value <= BruteForce().solve(problem).objective * SLACK

    def test_too_wide(self) -> None:
        with pytest.raises(ValueError, match=r"at most 4 entries.*rows of 8"):
            perspective_bound(Toy(normal(1, 8, 0), correlated(8, 0), RowWise(0.5)), max_width=4)


@settings(max_examples=60, deadline=None)
@given(toys(max_width=10, min_width=2), st.integers(0, 10**6), st.floats(0.0, 2.0))
def test_dual_value_is_valid_at_every_point(problem: Toy, seed: int, size: float) -> None:
    (row,) = separate("test", problem).rows
    least = float(np.linalg.eigvalsh(row.hessian)[0]) * 0.99
    shift = size * np.random.default_rng(seed).standard_normal(row.width) * np.abs(row.target).max()
    optimum = BruteForce().solve(problem).objective
    assert dual_value(row, np.full(row.width, least), shift) <= optimum * SLACK


class Counted:
    """A constraint that counts how often it is asked for a support."""

    def __init__(self, inner: SupportConstraint) -> None:
        self.inner, self.count = inner, 0

    def select(self, score: Point) -> Point:
        self.count += 1
        return self.inner.select(score)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class TestRecognition:
    @pytest.mark.parametrize(
        ("constraint", "rows"),
        [
            (RowWise(0.5), ((8, 4), (8, 4), (8, 4))),
            (RowWise(0.3), ((8, 6), (8, 6), (8, 5))),
            (NofM(2, 4), ((4, 2), (4, 2), (4, 2))),
            (NofM(1, 2), ((2, 1), (2, 1), (2, 1))),
            (NofM(3, 8), ((8, 3), (8, 3), (8, 3))),
            (StackedRows(((1, NofM(2, 4)), (2, RowWise(0.25)))), ((4, 2), (8, 6), (8, 6))),
            (RowWise(0.0), ((1, 1), (1, 1), (1, 1))),
            (RowWise(1.0), ((1, 0), (1, 0), (1, 0))),
            (Unstructured(0.4), None),
        ],
        ids=str,
    )
    def test_kinds(self, constraint: Constraint, rows: tuple[tuple[int, int], ...] | None) -> None:
        assert recognise("test", constraint, (3, 8)).rows == rows

    @pytest.mark.parametrize(
        ("constraint", "expected"),
        [
            (RowWise(0.5), (256, 128)),
            (NofM(2, 4), (4, 2)),
            (NofM(5, 8), (8, 5)),
            (StackedRows(((1, NofM(1, 4)), (299, RowWise(0.25)))), (256, 192)),
            (Unstructured(0.3), None),
        ],
        ids=str,
    )
    def test_a_large_matrix_is_recognised_by_three_selections(
        self, constraint: SupportConstraint, expected: tuple[int, int] | None
    ) -> None:
        asked = Counted(constraint)
        rows = recognise("test", asked, (300, 256)).rows
        assert asked.count == 3
        assert (None if rows is None else rows[-1]) == expected
        if isinstance(constraint, StackedRows):
            assert rows is not None
            assert rows[0] == (4, 1)
        for other in (Blocks(0.5, 1, 4), Blocks(0.5, 2, 2), Blocks(0.75, 4, 1)):
            with pytest.raises(ValueError, match="another kind"):
                recognise("test", other, (300, 256))

    def test_total(self) -> None:
        assert recognise("test", Unstructured(0.4), (3, 8)) == Supports(14, None)

    def test_one_row_has_one_budget(self) -> None:
        assert recognise("test", Unstructured(0.5), (1, 8)).rows == ((8, 4),)

    @pytest.mark.parametrize("constraint", [Blocks(0.5, 1, 4), Blocks(0.5, 2, 2), Blocks(0.75, 4, 1)], ids=str)
    def test_tiles_are_another_kind(self, constraint: Constraint) -> None:
        with pytest.raises(ValueError, match=r"test knows budgets.*Blocks selects supports of another kind"):
            recognise("test", constraint, (4, 8))

    def test_stacked_whole_budgets_are_another_kind(self) -> None:
        stacked = StackedRows(((2, Unstructured(0.5)), (2, Unstructured(0.25))))
        with pytest.raises(ValueError, match="StackedRows"):
            recognise("test", stacked, (4, 8))

    def test_a_start_outside_the_constraint_is_ignored(self) -> None:
        problem = Toy(normal(2, 8, 0), correlated(8, 0), RowWise(0.5))
        result = BranchAndBound().solve(problem, start=Point(weight=problem.weight))
        assert problem.constraint.contains(result.solution)
