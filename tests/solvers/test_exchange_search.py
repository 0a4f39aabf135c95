"""Exact exchanges of weights, tiles and column groups: the optimum of small cases, budgets, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problem import Strips
from admm_prune.problems.constraints import Blocks, Groups, NofM, Product, RowWise, StackedRows, Unstructured
from admm_prune.problems.constraints.base import SparseSet
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Status
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.exchange_search import ExchangeSearch
from admm_prune.solvers.group_obs import GroupOBS
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.reference import BruteForceGroups
from admm_prune.testing.instances import TROUBLES, ill_posed
from tests.catalogue import ROWS, WIDTH, layer
from tests.third_party import Bare

seeds = st.integers(0, 10_000)
SETS: dict[str, SparseSet] = {
    "half": Unstructured(0.5),
    "rows": RowWise(0.6),
    "2:4": NofM(2, 4),
    "3:8": NofM(3, 8),
    "columns": Groups(0.6),
    "heads": Groups(0.5, 4),
    "tiles": Blocks(0.5, 2, 4),
    "tall": Blocks(0.7, 3, 1),
    "flat": Blocks(0.4, 1, 2),
    "stacked": StackedRows(((2, Groups(0.5, 2)), (4, Blocks(0.6, 2, 4)))),
    "nothing": Groups(0.0),
    "everything": Blocks(1.0, 2, 4),
}


def tiles(weight: Tensor, strips: Strips) -> Tensor:
    """Whether each tile (strips, groups) has a non-zero."""
    return (weight != 0).unflatten(1, (-1, strips.width)).unflatten(0, (-1, strips.height)).any(3).any(1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SETS)
@given(seed=seeds)
def test_feasible_truthful_and_never_worse_than_the_inner_solver(name, seed) -> None:
    problem = layer(SETS[name], seed=seed)
    before = Wanda().solve(problem)
    after = ExchangeSearch(Wanda()).solve(problem)
    assert problem.constraint.contains(after.solution)
    assert after.objective == problem.value(after.solution) <= before.objective
    assert after.start_objective == before.objective
    weight = after.solution["weight"]
    fitted = quadratic.minimize_on_support(problem.hessian, problem.minimizer, weight != 0)
    torch.testing.assert_close(weight, fitted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["half", "rows", "2:4", "3:8", "columns", "heads", "tiles", "tall", "flat"])
@pytest.mark.parametrize("seed", range(2))
def test_no_exchange_in_a_strip_is_better(name, seed) -> None:
    problem = layer(SETS[name], seed=seed)
    result = ExchangeSearch(Magnitude(), candidates=None, rounds=200).solve(problem)
    weight = result.solution["weight"]
    ((strips),) = SETS[name].strips((ROWS, WIDTH))  # type: ignore[attr-defined]
    kept = tiles(weight, strips)
    for strip in range(len(kept)):
        for drop in kept[strip].nonzero()[:, 0].tolist():
            for add in (~kept[strip]).nonzero()[:, 0].tolist():
                if strips.span is not None and drop * strips.width // strips.span != add * strips.width // strips.span:
                    continue
                other = kept.clone()
                other[strip, drop], other[strip, add] = False, True
                support = other.repeat_interleave(strips.height, 0).repeat_interleave(strips.width, 1)
                v = quadratic.minimize_on_support(problem.hessian, problem.minimizer, support)
                assert problem.value(Point(weight=v)) >= result.objective * (1 - 1e-7)


def test_the_optimum_of_small_cases_is_found_mostly() -> None:
    found = 0
    for seed in range(15):
        problem = layer(Groups(0.75), seed=seed)
        best = BruteForceGroups().solve(problem).objective
        reached = ExchangeSearch(GroupOBS()).solve(problem).objective
        assert best * (1 - 1e-9) <= reached
        found += reached <= best * (1 + 1e-9)
    assert found >= 13


def test_exact_exchanges_go_on_where_estimated_ones_end() -> None:
    lower = []
    for seed in range(4):
        for constraint in (RowWise(0.6), Unstructured(0.6), NofM(2, 4)):
            problem = layer(constraint, rows=24, width=64, tokens=256, seed=seed)
            estimated = LocalSearch(ADMM()).solve(problem)
            exact = ExchangeSearch().solve(problem, start=estimated.solution)
            assert exact.objective <= estimated.objective
            lower.append(exact.objective < estimated.objective * (1 - 1e-6))
    assert sum(lower) >= 9


def test_tiles_move_to_the_strip_that_needs_them() -> None:
    """Between unrelated inputs the optimum keeps the largest tiles; the start keeps as many in each strip."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64) * torch.tensor([3.0, 3, 1, 1, 0.1, 0.1])[:, None]
    problem = LayerReconstruction(w, torch.eye(WIDTH, dtype=torch.float64), Blocks(0.5, 2, 4), ridge=0.0)
    start = Point(weight=w * (torch.arange(WIDTH) < WIDTH // 2))
    found = ExchangeSearch(transfers=8).solve(problem, start=start)
    assert found.status is Status.SOLVED
    assert torch.allclose(found.solution["weight"], problem.constraint.project(Point(weight=w))["weight"])
    assert "transfers between strips" in found.notes[-1]
    kept = ExchangeSearch(transfers=0).solve(problem, start=start)
    assert kept.status is Status.MAX_ITERATIONS
    assert found.objective < kept.objective


def test_more_rounds_are_no_worse_and_the_limit_is_told() -> None:
    problem = layer(Groups(0.5), rows=12, width=64, tokens=256)
    results = [ExchangeSearch(Magnitude(), rounds=n).solve(problem) for n in (0, 1, 3, 64)]
    assert all(more.objective <= fewer.objective for fewer, more in pairwise(results))
    assert results[-1].objective < results[0].objective
    assert [result.status for result in results[:2]] == [Status.MAX_ITERATIONS] * 2
    assert results[-1].status is Status.SOLVED


@given(seed=seeds)
def test_float32_finds_what_float64_finds(seed) -> None:
    problems = [layer(Groups(0.6), seed=seed, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    exact, ours = (ExchangeSearch(Wanda()).solve(problem) for problem in problems)
    assert ours.solution["weight"].dtype is torch.float32
    assert ours.objective <= exact.objective * (1 + 1e-4)


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("name", ["columns", "tiles"])
def test_ill_posed_layers_stay_finite(name, trouble) -> None:
    problem = ill_posed(SETS[name], trouble)
    result = ExchangeSearch(Magnitude()).solve(problem)
    assert result.solution.is_finite()
    assert problem.constraint.contains(result.solution)
    assert result.objective <= Magnitude().solve(problem).objective


def test_a_local_search_exchanges_tiles_where_the_set_is_made_of_them() -> None:
    for name in ("columns", "heads", "tiles", "stacked"):
        problem = layer(SETS[name])
        theirs, ours = LocalSearch(ADMM()).solve(problem), ExchangeSearch(ADMM()).solve(problem)
        assert torch.equal(theirs.solution["weight"], ours.solution["weight"])
        assert theirs.notes == ours.notes
    single = layer(Blocks(0.5, 1, 1))
    assert LocalSearch(Wanda()).solve(single).objective <= Wanda().solve(single).objective
    assert "products" in LocalSearch(Wanda()).solve(single).notes[-1], "entries, not tiles"


@pytest.mark.parametrize(
    ("constraint", "strips"),
    [
        (Blocks(0.5, 2, 4), (Strips(6, 2, 4),)),
        (Groups(0.5, 4), (Strips(6, 6, 4),)),
        (StackedRows(((2, Groups(0.5)), (4, Blocks(0.5, 4, 2)))), (Strips(2, 2, 1), Strips(4, 4, 2))),
        (Unstructured(0.5), (Strips(6, 1, 1),)),
        (RowWise(0.5), (Strips(6, 1, 1, span=16),)),
        (NofM(2, 4), (Strips(6, 1, 1, span=4),)),
        (StackedRows(((2, Groups(0.5)), (4, RowWise(0.5)))), (Strips(2, 2, 1), Strips(4, 1, 1, span=16))),
        (StackedRows(((2, Groups(0.5)), (4, Product({"weight": RowWise(0.5)})))), None),
    ],
)
def test_strips_of_sets(constraint, strips) -> None:
    assert constraint.strips((ROWS, WIDTH)) == strips


def test_refusals() -> None:
    whole = Product({"weight": RowWise(0.5)})
    with pytest.raises(TypeError, match=r"ExchangeSearch needs a StripConstraint .*it exchanges tiles"):
        ExchangeSearch(Wanda()).solve(layer(whole))
    with pytest.raises(TypeError, match="ExchangeSearch needs a set made of tiles; StackedRows of LayerRec"):
        ExchangeSearch(Wanda()).solve(layer(StackedRows(((2, Groups(0.5)), (4, whole)))))
    with pytest.raises(TypeError, match=r"ExchangeSearch needs a Quadratic problem.*Bare"):
        ExchangeSearch().solve(Bare())
    for wrong in ({"rounds": -1}, {"candidates": 0}, {"transfers": -1}):
        ((name, _),) = wrong.items()
        with pytest.raises(UserError, match=f"{name} of ExchangeSearch must be at least"):
            ExchangeSearch(**wrong)


class OneBudgetInName(RowWise):
    def strips(self, shape) -> tuple[Strips]:
        return (Strips(shape[0], 1, 1),)


def test_a_set_that_is_not_as_its_strips_say_keeps_its_start() -> None:
    problem = layer(OneBudgetInName(0.5), rows=24)
    before = Wanda().solve(problem)
    after = ExchangeSearch(Wanda()).solve(problem)
    assert problem.constraint.contains(after.solution)
    assert after.objective == before.objective
    assert "nothing improved the start" in after.notes[-1]


def test_stacked_parts_keep_their_own_budgets() -> None:
    constraint = StackedRows(((2, Blocks(0.75, 1, 4)), (4, Blocks(0.25, 1, 4))))
    problem = layer(constraint)
    weight = ExchangeSearch(Magnitude()).solve(problem).solution["weight"]
    for rows, part, count in ((slice(0, 2), Blocks(0.75, 1, 4), 2), (slice(2, 6), Blocks(0.25, 1, 4), 12)):
        (strips,) = part.strips((len(weight[rows]), WIDTH))
        assert int(tiles(weight[rows], strips).sum()) == count
