"""The exact references agree with each other, with least squares, and refuse what they cannot do."""

from __future__ import annotations

import math
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.errors import NonFiniteError
from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, Groups, NofM, RowWise, StackedRows, Unstructured
from admm_prune.result import Status
from admm_prune.solvers.reference import (
    BranchAndBound,
    BruteForce,
    BruteForceGroups,
    GroupExact,
    MixedIntegerReference,
    branch_and_bound,
    cvxpy_models,
    rows,
)
from admm_prune.solvers.reference.brute_force import all_supports
from admm_prune.solvers.reference.rigorous import Form
from admm_prune.solvers.reference.rows import search, separate, swap_gains
from tests.solvers.reference.instances import Toy, correlated, keeping, normal, spectral, toys

TIGHT = 1e-8


def same(a: float, b: float, scale: float, tolerance: float = TIGHT) -> bool:
    """Equal to the tolerance; `scale` is the value at zero, whose rounding no method can resolve."""
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-14 * scale)


def at_zero(problem: Toy) -> float:
    return problem.value(problem.initial().zeros_like())


def agree(problem: Toy) -> None:
    exact, searched = BruteForce().solve(problem), BranchAndBound().solve(problem)
    assert same(exact.objective, searched.objective, at_zero(problem))
    assert searched.status is Status.SOLVED
    for result in (exact, searched):
        assert problem.constraint.contains(result.solution)
        assert result.objective == problem.value(result.solution)
        assert result.bound is not None
        assert result.bound <= exact.objective * (1 + TIGHT)


@settings(max_examples=150, deadline=None)
@given(toys(max_width=13))
def test_branch_and_bound_equals_brute_force(problem: Toy) -> None:
    agree(problem)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(toys(max_width=16, min_width=10))
def test_branch_and_bound_equals_brute_force_wide(problem: Toy) -> None:
    agree(problem)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(toys(max_width=12, min_width=2))
def test_scip_agrees(problem: Toy) -> None:
    assert agrees_with_scip(problem) is Status.SOLVED


@pytest.mark.slow
def test_scip_agrees_wide() -> None:
    """500 cases; SCIP may run out of time or give up on an ill-conditioned few, which then prove nothing."""
    statuses: list[Status] = []

    @settings(max_examples=500, deadline=None)
    @given(toys(max_width=20, min_width=13))
    def compare(problem: Toy) -> None:
        statuses.append(agrees_with_scip(problem))

    compare()
    assert statuses.count(Status.SOLVED) >= 0.95 * len(statuses)


def agrees_with_scip(problem: Toy) -> Status:
    pytest.importorskip("pyscipopt")
    pytest.importorskip("cvxpy")
    searched, mixed = BranchAndBound().solve(problem), MixedIntegerReference(time_limit=20.0).solve(problem)
    assert problem.constraint.contains(mixed.solution)
    if mixed.status is Status.SOLVED:
        assert same(searched.objective, mixed.objective, at_zero(problem))
    else:
        assert searched.objective <= mixed.objective * (1 + TIGHT)
    return mixed.status


@pytest.mark.parametrize("hessian", [spectral(14, 1), correlated(14, 1)])
@pytest.mark.parametrize("keep", range(15))
def test_every_budget(hessian: torch.Tensor, keep: int) -> None:
    agree(Toy(normal(3, 14, keep), hessian, keeping(keep, 14), offset=2.5))


def test_rows_with_an_uneven_budget() -> None:
    agree(Toy(normal(4, 9, 0), correlated(9, 0), RowWise(0.47)))


def test_stacked_rows_keep_their_own_budgets() -> None:
    stacked = StackedRows(((2, RowWise(0.5)), (1, RowWise(0.25))))
    problem = Toy(normal(3, 8, 0), correlated(8, 0), stacked)
    agree(problem)
    assert BranchAndBound().solve(problem).solution["weight"].count_nonzero(1).tolist() == [4, 4, 6]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_one_budget_over_a_matrix(sparsity: float) -> None:
    agree(Toy(normal(3, 5, 1), correlated(5, 1), Unstructured(sparsity)))


@pytest.mark.parametrize("power", [-400, 400])
@pytest.mark.parametrize("constraint", [RowWise(0.5), Unstructured(0.5)], ids=str)
def test_branch_and_bound_scales_with_the_hessian(constraint: RowWise | Unstructured, power: int) -> None:
    """By powers of four, which round nothing: entries of the targets beyond 1e100 reach no padding of the tree."""
    plain = BranchAndBound().solve(Toy(normal(2, 8, 0), correlated(8, 0), constraint))
    scaled = Toy(normal(2, 8, 0), torch.ldexp(correlated(8, 0), torch.tensor(2 * power)), constraint)
    result = BranchAndBound().solve(scaled)
    assert constraint.contains(result.solution)
    assert torch.equal(result.solution["weight"], plain.solution["weight"])
    assert result.objective == math.ldexp(plain.objective, 2 * power)
    assert plain.bound is not None
    assert result.bound == math.ldexp(plain.bound, 2 * power)


@pytest.mark.parametrize(
    ("solver", "constraint", "number"),
    [
        (BruteForce(), Unstructured(0.5), "e479"),
        (BruteForce(), RowWise(0.5), "e479"),
        (BruteForce(), NofM(2, 4), "e311"),
        (BruteForceGroups(), Groups(0.5), "e479"),
        (GroupExact(max_width=10_000), RowWise(0.5), "e479"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_numbers_of_supports_beyond_a_float_are_refused_in_a_line(solver, constraint, number) -> None:
    problem = Toy(normal(1, 1600, 0), torch.eye(1600, dtype=torch.float64), constraint)
    with pytest.raises(ValueError, match=rf"tries at most .* has \d\.\d\d{number}.*: raise max_"):
        solver.solve(problem)


def test_brute_force_refuses_a_layer_before_it_builds_its_hessian() -> None:
    problem = Toy(normal(900, 300, 0), torch.eye(300, dtype=torch.float64), Unstructured(0.5))
    with pytest.raises(ValueError, match="raise max_supports, or use branch-and-bound"):
        BruteForce().solve(problem)


def test_losses_of_groups_that_overflow_are_refused_where_the_dense_weights_are_infeasible() -> None:
    problem = Toy(1e160 * normal(2, 6, 0), correlated(6, 0), Groups(0.5))
    with pytest.raises(NonFiniteError, match="no set has a finite loss"):
        BruteForceGroups().solve(problem)


def test_group_sweeps_solve_a_small_matrix_with_one_budget() -> None:
    problem = Toy(normal(2, 4, 0), correlated(4, 0), Unstructured(0.5))
    result = GroupExact().solve(problem)
    assert problem.constraint.contains(result.solution)
    assert math.isclose(result.objective, BruteForce().solve(problem).objective, rel_tol=TIGHT)


def test_a_start_that_is_better_is_returned_and_its_value_is_told() -> None:
    problem = Toy(normal(2, 8, 0), correlated(8, 0), RowWise(0.5))
    result = BruteForce().solve(problem, start=problem.initial())
    assert result.start_objective == problem.value(problem.constraint.project(problem.initial()))


def test_brute_force_is_the_least_over_least_squares() -> None:
    problem = Toy(normal(1, 8, 3), correlated(8, 3), NofM(2, 4))
    best = math.inf
    for kept in torch.from_numpy(all_supports(8, 4, 2)):
        a, g = problem.hessian[kept][:, kept], problem.linear[0, kept]
        v = torch.zeros(1, 8, dtype=torch.float64)
        v[0, kept] = torch.linalg.solve(a, g)
        best = min(best, problem.value(Point(weight=v)))
    assert math.isclose(BruteForce().solve(problem).objective, best, rel_tol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mixed_integer_program_takes_groups(n: int) -> None:
    pytest.importorskip("pyscipopt")
    problem = Toy(normal(2, 8, n), correlated(8, n), NofM(n, 4))
    exact, mixed = BruteForce().solve(problem), MixedIntegerReference().solve(problem)
    assert math.isclose(exact.objective, mixed.objective, rel_tol=TIGHT)


class TestEdges:
    def test_nothing_removed_returns_the_weights(self) -> None:
        weight = normal(2, 6, 0)
        for solver in (BruteForce(), BranchAndBound(), GroupExact()):
            result = solver.solve(Toy(weight, correlated(6, 0), RowWise(0.0), offset=1.0))
            assert torch.equal(result.solution["weight"], weight)
            assert result.objective == 1.0

    def test_everything_removed_returns_zeros(self) -> None:
        for solver in (BruteForce(), BranchAndBound(), GroupExact()):
            result = solver.solve(Toy(normal(2, 6, 0), correlated(6, 0), RowWise(1.0)))
            assert result.solution.count_nonzero() == 0

    def test_zero_weights(self) -> None:
        problem = Toy(torch.zeros(2, 6, dtype=torch.float64), correlated(6, 0), RowWise(0.5))
        for solver in (BruteForce(), BranchAndBound(), GroupExact()):
            result = solver.solve(problem)
            assert result.objective == 0.0
            assert result.solution.is_finite()

    def test_equal_weights_all_tie(self) -> None:
        problem = Toy(torch.ones(1, 32, dtype=torch.float64), torch.eye(32, dtype=torch.float64), RowWise(0.5))
        result = BranchAndBound().solve(problem)
        assert math.isclose(result.objective, 16.0)
        assert result.iterations < 10

    def test_float32_problem(self) -> None:
        problem = Toy(normal(2, 10, 0).float(), correlated(10, 0).float(), RowWise(0.5))
        exact, searched = BruteForce().solve(problem), BranchAndBound().solve(problem)
        assert searched.solution["weight"].dtype == torch.float32
        assert math.isclose(exact.objective, searched.objective, rel_tol=1e-5)

    def test_input_is_left_alone(self) -> None:
        problem = Toy(normal(2, 8, 0), correlated(8, 0), NofM(2, 4))
        before, start = problem.weight.clone(), problem.constraint.project(problem.initial())
        copy = start.clone()
        for solver in (BruteForce(), GroupExact()):
            solver.solve(problem, start=start)
        assert torch.equal(problem.weight, before)
        assert torch.equal(start["weight"], copy["weight"])


def test_a_bound_that_rounding_keeps_from_the_gap_is_noted() -> None:
    well, ill = (Toy(normal(2, 12, 0), spectral(12, 0, condition), RowWise(0.5)) for condition in (10.0, 1e12))
    assert BranchAndBound().solve(well).notes == ()
    result = BranchAndBound().solve(ill)
    assert result.status is Status.SOLVED
    assert result.bound is not None
    assert result.bound < result.objective * (1 - 1e-6)
    assert "of 2 rows are up to" in result.notes[0]
    assert "below their losses because of rounding: raise the ridge" in result.notes[0]


def test_swaps_stop_where_none_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the first kept and the first removed entry are swapped."""
    row = rows.Row(Form(np.eye(4)), np.array([0.0, 1.0, 1.0, 2.0]), 2, 1)
    support = np.array([True, False, True, False])
    monkeypatch.setattr(rows, "swap_gains", lambda *_: np.full((2, 2), -np.inf))
    assert rows._swap_descent(row, support)[0].tolist() == support.tolist()


class TestTimeLimit:
    def test_open_bound_is_valid(self) -> None:
        problem = Toy(normal(2, 32, 5), spectral(32, 5), keeping(8, 32))
        optimum = BranchAndBound().solve(problem)
        for limit in (0.0, 0.02, 0.1):
            began = time.perf_counter()
            result = BranchAndBound(time_limit=limit).solve(problem)
            assert time.perf_counter() - began < limit + 1.0
            assert result.bound is not None
            if result.status is Status.SOLVED:  # on a machine faster than this test expects
                continue
            assert result.status is Status.TIME_LIMIT
            assert 0.0 <= result.bound <= optimum.objective <= result.objective * (1 + TIGHT)
            assert problem.constraint.contains(result.solution)
            assert "rows are not proved optimal" in result.notes[0]

    def test_little_memory_only_changes_the_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = Toy(normal(1, 24, 5), spectral(24, 5), keeping(8, 24))
        plenty = BranchAndBound().solve(problem)
        monkeypatch.setattr(branch_and_bound, "_MEMORY", 0)
        assert math.isclose(BranchAndBound().solve(problem).objective, plenty.objective, rel_tol=TIGHT)

    def test_never_worse_than_the_start(self) -> None:
        problem = Toy(normal(1, 32, 5), spectral(32, 5), keeping(8, 32))
        best = BranchAndBound().solve(problem)
        result = BranchAndBound(time_limit=0.0).solve(problem, start=best.solution)
        assert result.objective <= best.objective


class TestGroupExact:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 3), st.booleans())
    def test_no_group_can_be_improved(self, seed: int, n: int, from_magnitude: bool) -> None:
        problem = Toy(normal(2, 12, seed), correlated(12, seed), NofM(n, 4))
        start = problem.constraint.project(problem.initial()) if from_magnitude else None
        result = GroupExact().solve(problem, start=start)
        assert result.status is Status.SOLVED
        assert problem.constraint.contains(result.solution)
        exact = BruteForce().solve(problem).objective
        assert exact <= result.objective * (1 + TIGHT)
        if start is not None:
            assert result.objective <= problem.value(start)
        for row, kept in zip(separate("test", problem).rows, (result.solution["weight"] != 0).numpy(), strict=True):
            for begin in range(0, 12, 4):
                for choice in all_supports(4, 4, n):
                    changed = kept.copy()
                    changed[begin : begin + 4] = choice
                    assert row.loss(kept) <= row.loss(changed) * (1 + TIGHT)

    def test_one_group_is_the_optimum(self) -> None:
        problem = Toy(normal(5, 8, 0), correlated(8, 0), NofM(3, 8))
        assert math.isclose(GroupExact().solve(problem).objective, BruteForce().solve(problem).objective, rel_tol=TIGHT)

    def test_sweeps_run_out(self) -> None:
        problem = Toy(normal(8, 32, 0), spectral(32, 0), NofM(2, 4))
        start = problem.constraint.project(problem.initial())
        result = GroupExact(max_sweeps=1).solve(problem, start=start)
        assert result.status is Status.MAX_ITERATIONS
        assert result.iterations == 1


class TestRefusals:
    @pytest.mark.parametrize("solver", [BruteForce(), BranchAndBound(), GroupExact(), MixedIntegerReference()])
    def test_tiles(self, solver: BruteForce) -> None:
        problem = Toy(normal(4, 8, 0), correlated(8, 0), Blocks(0.5, 2, 2))
        with pytest.raises(ValueError, match=f"{type(solver).__name__}.*Blocks"):
            solver.solve(problem)

    def test_too_many_supports(self) -> None:
        with pytest.raises(ValueError, match=r"BruteForce.*20000.*RowWise"):
            BruteForce().solve(Toy(normal(1, 20, 0), correlated(20, 0), RowWise(0.5)))
        with pytest.raises(ValueError, match=r"GroupExact.*1000.*RowWise"):
            GroupExact().solve(Toy(normal(1, 20, 0), correlated(20, 0), RowWise(0.5)))

    def test_too_wide(self) -> None:
        with pytest.raises(ValueError, match=r"BranchAndBound.*64.*Unstructured.*80"):
            BranchAndBound().solve(Toy(normal(8, 10, 0), correlated(10, 0), Unstructured(0.5)))
        with pytest.raises(ValueError, match=r"MixedIntegerReference.*32.*RowWise.*40"):
            MixedIntegerReference().solve(Toy(normal(1, 40, 0), correlated(40, 0), RowWise(0.5)))
        with pytest.raises(ValueError, match=r"GroupExact.*8 entries.*NofM.*12"):
            GroupExact(max_width=8).solve(Toy(normal(1, 12, 0), correlated(12, 0), NofM(2, 4)))

    def test_groups_in_branch_and_bound(self) -> None:
        with pytest.raises(ValueError, match=r"BranchAndBound.*NofM.*BruteForce"):
            BranchAndBound().solve(Toy(normal(1, 8, 0), correlated(8, 0), NofM(2, 4)))

    @pytest.mark.parametrize("solver", [BruteForce(), BranchAndBound()])
    def test_not_quadratic(self, solver: BruteForce) -> None:
        class Flat:
            constraint, curvature = RowWise(0.5), 1.0

        with pytest.raises(TypeError, match=r"Quadratic.*Flat lacks hessian, linear, minimizer"):
            solver.solve(Flat())  # type: ignore[arg-type]

    def test_not_a_support_constraint(self) -> None:
        class Ball:
            def project(self, v: Point, metric: Point | None = None) -> Point:
                return v

            def contains(self, z: Point) -> bool:
                return True

        with pytest.raises(TypeError, match=r"BruteForce needs a SupportConstraint.*Ball"):
            BruteForce().solve(Toy(normal(1, 4, 0), correlated(4, 0), Ball()))

    @pytest.mark.parametrize(
        ("hessian", "message"),
        [(torch.ones(4, 4), "raise the ridge"), (torch.zeros(4, 4), "cut"), (torch.full((4, 4), math.nan), "NaN")],
    )
    def test_hessian(self, hessian: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=f"BranchAndBound.*Toy.*{message}"):
            BranchAndBound().solve(Toy(normal(1, 4, 0), hessian.double(), RowWise(0.5)))

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cvxpy", None)
        with pytest.raises(ImportError, match=r"MixedIntegerReference.*admm-prune\[reference\]"):
            MixedIntegerReference().solve(Toy(normal(1, 4, 0), correlated(4, 0), RowWise(0.5)))

    def test_a_solver_that_gives_up_is_not_trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pyscipopt")
        monkeypatch.setattr(cvxpy_models, "try_solve", lambda *_, **__: False)
        problem = Toy(normal(1, 8, 0), correlated(8, 0), RowWise(0.5))
        result = MixedIntegerReference().solve(problem)
        assert result.status is Status.STALLED
        assert problem.constraint.contains(result.solution)

    @pytest.mark.parametrize(
        ("status", "limit", "expected"),
        [
            ("optimal", math.inf, Status.SOLVED),
            ("optimal_inaccurate", math.inf, Status.STALLED),
            ("infeasible", math.inf, Status.STALLED),
            ("optimal_inaccurate", 1e4, Status.STALLED),
            ("optimal_inaccurate", 0.0, Status.TIME_LIMIT),
            (None, 0.0, Status.TIME_LIMIT),
        ],
    )
    def test_time_has_run_out_only_where_a_limit_was_reached(
        self, monkeypatch: pytest.MonkeyPatch, status: str | None, limit: float, expected: Status
    ) -> None:
        pytest.importorskip("pyscipopt")

        def stopped(_: object, program: object, *__: object, **___: object) -> bool:
            program._status = status  # type: ignore[attr-defined]
            return status is not None

        monkeypatch.setattr(cvxpy_models, "try_solve", stopped)
        problem = Toy(normal(1, 8, 0), correlated(8, 0), RowWise(0.5))
        result = MixedIntegerReference(time_limit=limit).solve(problem)
        assert result.status is expected
        assert problem.constraint.contains(result.solution)

    def test_missing_solver_names_the_extra(self) -> None:
        pytest.importorskip("cvxpy")
        with pytest.raises(ImportError, match=r"NO_SUCH.*admm-prune\[reference\]"):
            MixedIntegerReference(solver="NO_SUCH").solve(Toy(normal(1, 4, 0), correlated(4, 0), RowWise(0.5)))


@settings(max_examples=40, deadline=None)
@given(toys(max_width=12, min_width=2), st.integers(0, 10**6))
def test_loss_is_monotone(problem: Toy, seed: int) -> None:
    (row,) = separate("test", problem).rows
    order = np.random.default_rng(seed).permutation(row.width)
    losses = [row.loss(~np.isin(np.arange(row.width), order[:removed])) for removed in range(row.width + 1)]
    assert all(small <= large * (1 + TIGHT) + 1e-14 * losses[-1] for small, large in pairwise(losses))


def test_swap_gains_are_exact() -> None:
    (row,) = separate("test", Toy(normal(1, 12, 4), correlated(12, 4), RowWise(0.5))).rows
    kept = np.arange(12) % 2 == 0
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    gains = swap_gains(row.hessian, row.target, inside, outside)
    for a, i in enumerate(inside):
        for b, j in enumerate(outside):
            swapped = kept.copy()
            swapped[i], swapped[j] = False, True
            assert math.isclose(row.loss(kept) - row.loss(swapped), gains[a, b], rel_tol=1e-8, abs_tol=1e-10)


def test_a_dependent_column_does_not_stop_the_search() -> None:
    """Column 1 is column 0 once more: to add it takes nothing off the loss, and the other swaps are still ranked."""
    hessian = correlated(6, 4).double().numpy()
    hessian[1], hessian[:, 1] = hessian[0], hessian[:, 0]
    gains = swap_gains(hessian, np.ones(6), np.array([0, 2, 3]), np.array([1, 4, 5]))
    assert not np.isnan(gains).any()
    assert np.isfinite(gains[:, 1:]).all()


def test_search_ends_where_no_swap_helps() -> None:
    (row,) = separate("test", Toy(normal(1, 24, 4), spectral(24, 4), RowWise(0.5))).rows
    kept, loss = search(row)
    gains = swap_gains(row.hessian, row.target, np.flatnonzero(kept), np.flatnonzero(~kept))
    assert gains.max() <= 1e-6 * loss
    assert search(row, kicks=5)[1] <= loss


@pytest.mark.slow
def test_rows_of_32_in_time() -> None:
    """200 rows of n = 32, k = 16, cond 1e6: proved in under 1 s median."""
    seconds = []
    for seed in range(200):
        problem = Toy(normal(1, 32, seed), spectral(32, seed), keeping(16, 32))
        result = BranchAndBound(time_limit=30.0).solve(problem)
        assert result.status is Status.SOLVED
        seconds.append(result.seconds)
    assert float(np.median(seconds)) < 1.0


@pytest.mark.parametrize("offset", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_no_solution_and_has_no_bound(offset) -> None:
    result = BruteForce().solve(Toy(normal(2, 6, 0), correlated(6, 0), RowWise(0.5), offset=offset))
    assert result.status is Status.NONFINITE
    assert result.bound is None
