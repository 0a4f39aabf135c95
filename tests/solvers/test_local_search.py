"""Local search: its gains against least squares, its bookkeeping, and how often it finds the optimum."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problems.constraints import NofM, RowWise, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Status
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.local_search import Gains, LocalSearch, Rows, _Count, resolvent
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.reference.brute_force import BruteForce
from admm_prune.solvers.refit import Refit
from tests.catalogue import CONSTRAINTS, PROBLEMS, ROWS, WIDTH, layer
from tests.third_party import Bare

seeds = st.integers(0, 10_000)
SETS = {
    "half": Unstructured(0.5),
    "rows": RowWise(0.6),
    "2:4": NofM(2, 4),
    "3:8": NofM(3, 8),
    "stacked": StackedRows(((2, NofM(1, 4)), (4, Unstructured(0.7)))),
    "stacked rows": StackedRows(((2, RowWise(0.5)), (4, Unstructured(0.7)))),
}


def scaled(problem: LayerReconstruction) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A with a unit diagonal, W, and the projected W's support."""
    scale = problem.hessian.diagonal().sqrt()
    w = problem.minimizer * scale
    return problem.hessian / scale / scale[:, None], w, problem.constraint.select(Point(weight=w.abs()))["weight"]


@given(seed=seeds, kept=st.floats(0.5, 15.5))
def test_the_resolvent_has_the_degrees_of_freedom_asked(seed, kept) -> None:
    a, _, _ = scaled(layer(RowWise(0.5), seed=seed))
    inverse, shift = resolvent(a, kept)
    assert torch.allclose(inverse, torch.linalg.inv(a + shift * torch.eye(WIDTH, dtype=a.dtype)), rtol=1e-8)
    assert float((a @ inverse).trace()) == pytest.approx(kept, rel=0.011)


@pytest.mark.parametrize("constraint", [RowWise(0.5), NofM(2, 4)], ids=str)
def test_gains_are_close_to_those_of_least_squares_and_name_the_best_swaps(constraint) -> None:
    problem = layer(constraint, rows=24, width=128, tokens=1024, ridge=0.03)
    a, w, support = scaled(problem)
    v = quadratic.minimize_on_support(a, w, support)
    rows = Rows.at(v, w, support, a)
    drop, add, _, use = Gains(a, float(support.sum(1).double().mean()), constraint.group_width, 8).propose(
        rows, torch.zeros_like(support), torch.full((24,), 8)
    )
    fell = 0
    for r in use.any(1).nonzero()[:, 0].tolist():
        kept = support[r].clone()
        assert bool(kept[drop[r, 0]])
        assert not bool(kept[add[r, 0]])
        if constraint.group_width > 1:
            assert int(drop[r, 0]) // 4 == int(add[r, 0]) // 4
        kept[drop[r, 0]], kept[add[r, 0]] = False, True
        moved = quadratic.minimize_on_support(a, w[r : r + 1], kept[None])
        fell += quadratic.energy(moved - w[r : r + 1], a) < float(rows.value[r])
    assert fell >= 0.85 * int(use.any(1).sum()) > 0


@given(seed=seeds)
def test_where_inputs_are_unrelated_gains_are_exact(seed) -> None:
    g = torch.Generator().manual_seed(seed)
    a, w = torch.eye(WIDTH, dtype=torch.float64), torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    support = torch.rand(w.shape, generator=g).argsort(1) < WIDTH // 2
    gains = Gains(a, WIDTH / 2, 1, 4)
    assert torch.allclose(gains.schur, torch.ones(WIDTH, dtype=torch.float64), rtol=1e-8)
    rows = Rows.at(w * support, w, support, a)
    drop, add, entry, use = gains.propose(rows, torch.zeros_like(support), torch.ones(ROWS, dtype=torch.long))
    best = (w * ~support).abs().amax(1)
    hopeful = use[:, 0]
    assert torch.equal(hopeful, best > w.abs().masked_fill(~support, torch.inf).amin(1))
    assert torch.allclose(entry[hopeful, 0].abs(), best[hopeful], rtol=1e-8)
    moved = rows.swapped(a, drop, add, entry, use)
    assert torch.allclose(moved.residual, (w - moved.v) @ a, atol=1e-12)
    assert torch.equal(moved.v != 0, moved.support)


@given(seed=seeds)
def test_a_refit_keeps_the_residual_and_converges_to_least_squares(seed) -> None:
    a, w, support = scaled(layer(RowWise(0.5), seed=seed))
    rows = Rows.at(w * support, w, support, a).refitted(a, 40, _Count())
    assert torch.allclose(rows.residual, (w - rows.v) @ a, atol=1e-9)
    assert torch.allclose(rows.v, quadratic.minimize_on_support(a, w, support), rtol=1e-6, atol=1e-8)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["layer", "layer, float32", "layer, other target", "layer, few tokens"])
@pytest.mark.parametrize("name", SETS)
@given(seed=seeds)
def test_feasible_and_never_worse_than_the_inner_solver_or_the_start(name, kind, seed) -> None:
    problem = PROBLEMS[kind](SETS[name]) if kind != "layer" else layer(SETS[name], seed=seed)
    before = Wanda().solve(problem)
    after = LocalSearch(Wanda()).solve(problem)
    assert problem.constraint.contains(after.solution)
    assert after.objective == problem.value(after.solution) <= before.objective
    counts = [x["weight"].count_nonzero(dim=1) for x in (before.solution, after.solution)]
    assert bool((counts[1] <= counts[0]).all())
    again = LocalSearch().solve(problem, start=before.solution)
    assert again.solution["weight"].equal(after.solution["weight"])
    assert again.solution["weight"].dtype == problem.minimizer.dtype


@pytest.mark.slow
@given(seed=seeds)
def test_more_rounds_are_never_worse(seed) -> None:
    problem = layer(RowWise(0.6), seed=seed, width=32)
    errors = [LocalSearch(Wanda(), rounds=n, refits=30).solve(problem).objective for n in (0, 1, 4, 24)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))


@pytest.mark.slow
def test_on_small_rows_the_optimum_is_found_more_often() -> None:
    before = after = 0
    for seed in range(200):
        problem = layer(RowWise(0.5), rows=1, width=12, seed=seed)
        optimum = BruteForce().solve(problem).objective * (1 + 1e-6)
        start = Refit(Wanda()).solve(problem)
        found = LocalSearch(refits=12, patience=12).solve(problem, start=start.solution)
        assert found.objective >= optimum * (1 - 2e-6)
        before += start.objective <= optimum
        after += found.objective <= optimum
    assert after >= before + 60


def test_a_row_that_keeps_fewer_than_the_candidates_still_swaps() -> None:
    """The places left in its list of candidates must not outrank a swap."""
    improved = 0
    for seed in range(40):
        problem = layer(RowWise(0.75), rows=1, width=12, seed=seed)
        start = Refit(Magnitude()).solve(problem)
        found = LocalSearch(refits=12, swaps=1).solve(problem, start=start.solution)
        improved += found.objective < start.objective * (1 - 1e-6)
    assert improved >= 20


def test_swaps_improve_what_admm_found() -> None:
    for constraint in (Unstructured(0.7), NofM(2, 4)):
        problem = layer(constraint, rows=64, width=128, tokens=1024, dtype=torch.float32, ridge=0.03)
        found = LocalSearch(ADMM.fast()).solve(problem)
        assert found.objective < 0.997 * ADMM.fast().solve(problem).objective
        assert "swaps" in found.notes[-1]
        assert "products" in found.notes[-1]
        assert found.iterations > 0


def test_with_unrelated_inputs_the_best_of_every_row_is_found() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    problem = LayerReconstruction(w, torch.eye(WIDTH, dtype=torch.float64), RowWise(0.5), ridge=0.0)
    start = Point(weight=w * (torch.arange(WIDTH) < WIDTH // 2))
    found = LocalSearch().solve(problem, start=start)
    assert found.status is Status.SOLVED
    assert torch.allclose(found.solution["weight"], problem.constraint.project(Point(weight=w))["weight"])


@pytest.mark.parametrize("name", ["nothing", "everything"])
def test_without_a_choice_the_start_returns(name) -> None:
    problem = layer(CONSTRAINTS[name])
    result = LocalSearch(Wanda()).solve(problem)
    assert result.status is Status.SOLVED
    assert problem.constraint.contains(result.solution)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 8), (8, 1), (3, 5)])
def test_odd_shapes(rows, width) -> None:
    problem = layer(RowWise(0.5), rows=rows, width=width)
    assert problem.constraint.contains(LocalSearch(Magnitude()).solve(problem).solution)


def test_refusals_name_both_sides() -> None:
    mixed = StackedRows(((3, NofM(2, 4)), (3, NofM(3, 8))))
    with pytest.raises(TypeError, match=r"LocalSearch needs a set.*StackedRows of LayerRecon"):
        LocalSearch(Wanda()).solve(layer(mixed))

    with pytest.raises(TypeError, match=r"LocalSearch needs a Quadratic problem.*Bare"):
        LocalSearch().solve(Bare())


def test_a_search_that_overflows_gives_its_start_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(LocalSearch, "_search", lambda _, __, target, *rest, **how: torch.full_like(target, torch.inf))
    problem = layer(Unstructured(0.5))
    result = LocalSearch(ADMM()).solve(problem)
    assert result.status is Status.NONFINITE
    assert result.objective == ADMM().solve(problem).objective
