"""Every sparse set through the conformance kit, the rules for ties, and refusals."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, Groups, NofM, Product, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.testing import assert_constraint_conforms

SETS = {
    "unstructured": Unstructured(0.5),
    "unstructured, odd": Unstructured(0.7),
    "row-wise": RowWise(0.5),
    "row-wise, uneven": RowWise(0.6),
    "1:2": NofM(1, 2),
    "2:3": NofM(2, 3),
    "tiles": Blocks(0.5, 1, 3),
    "tiles, tall": Blocks(0.4, 2, 2),
    "product": Product({"weight": RowWise(0.34)}),
    "stacked": StackedRows(((1, NofM(1, 3)), (1, Unstructured(0.5)))),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", SETS)
def test_every_set_keeps_its_promises(name) -> None:
    """Against brute force over all supports of 12 entries; sets of the catalogue go through `test_conformance.py`."""
    assert_constraint_conforms(SETS[name], shape=(2, 6))


def test_ties_go_to_the_lower_index() -> None:
    ones = Point(weight=torch.ones(2, 4))
    assert Unstructured(0.5).select(ones)["weight"].tolist() == [[True] * 4, [False] * 4]
    assert RowWise(0.5).select(ones)["weight"].tolist() == [[True, True, False, False]] * 2
    assert NofM(2, 4).select(ones)["weight"].tolist() == [[True, True, False, False]] * 2
    assert RowWise(0.6).select(ones)["weight"].sum(1).tolist() == [2, 1]  # 3 of 8: the first row takes one more


@pytest.mark.parametrize(
    "constraint",
    [
        *SETS.values(),
        StackedRows(((1, NofM(1, 3)), (1, NofM(1, 3)))),
        StackedRows(((1, RowWise(0.5)), (1, NofM(3, 6)))),
    ],
    ids=repr,
)
def test_runs_are_what_is_selected(constraint) -> None:
    """Whole runs, of which the first of the largest are kept; with ties."""
    runs = None if isinstance(constraint, Product) else constraint.runs((2, 6))
    if runs is None:
        assert isinstance(constraint, (Blocks, Product, StackedRows)) or constraint == RowWise(0.6)
        return
    keep, run = runs
    for seed in range(20):
        score = torch.randint(0, 4, (2, 6), generator=torch.Generator().manual_seed(seed)).float()
        order = score.view(-1, run).sort(dim=1, descending=True, stable=True).indices[:, :keep]
        expected = torch.zeros(12 // run, run, dtype=torch.bool).scatter_(1, order, True).view(2, 6)
        assert torch.equal(constraint.select(Point(weight=score))["weight"], expected)


def test_one_budget_over_several_tensors() -> None:
    v = Point(a=torch.tensor([[3.0, 1.0]]), b=torch.tensor([[2.0, -4.0]]))
    z = Unstructured(0.5).project(v)
    assert z["a"].tolist() == [[3.0, 0.0]]
    assert z["b"].tolist() == [[0.0, -4.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unstructured(1.2), "between 0 and 1"),
        (lambda: RowWise(-0.1), "between 0 and 1"),
        (lambda: Unstructured(0.5, keep=2.5), "keep is a whole number of at least 0, not 2.5"),
        (lambda: StackedRows(()), "stacked sets are at least one"),
        (lambda: StackedRows(((0, RowWise(0.5)), (2, RowWise(0.5)))), "each of at least 1 row"),
        (lambda: StackedRows(((2, RowWise(0.5)), (2, RowWise(0.5)))).project(Point(weight=torch.ones(4))), "matrices"),
        (lambda: NofM(5, 4), "5:4"),
        (lambda: NofM(0, 4), "0:4"),
        (lambda: NofM(2, 4).project(Point(weight=torch.ones(2, 6))), "4 divides, not 6"),
        (lambda: NofM(1, 2).project(Point(weight=torch.ones(4))), "matrices"),
        (lambda: Blocks(0.5, 4, 4).project(Point(weight=torch.ones(6, 8))), "do not divide"),
        (lambda: Product({"a": RowWise(0.5)}).project(Point(b=torch.ones(2, 2))), "names"),
        (lambda: StackedRows(((3, RowWise(0.5)),)).project(Point(weight=torch.ones(2, 2))), "3 rows"),
        (lambda: Unstructured(0.5).project(Point(weight=torch.tensor([[1.0, float("nan")]]))), "NaN"),
    ],
)
def test_refusals_say_what_is_wrong(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_all_supports_of_a_pattern_are_admitted() -> None:
    for pair in combinations(range(4), 2):
        z = torch.zeros(1, 4)
        z[0, list(pair)] = 1
        assert NofM(2, 4).contains(Point(weight=z))
    assert not NofM(2, 4).contains(Point(weight=torch.tensor([[1.0, 1.0, 1.0, 0.0]])))


ONE_OF_TWO = {  # each keeps one of every two columns of a (1, 4) matrix
    "unstructured": Unstructured(0.5),
    "row-wise": RowWise(0.5),
    "1:2": NofM(1, 2),
    "tiles": Blocks(0.5, 1, 1),
    "columns": Groups(0.5),
    "product": Product({"weight": RowWise(0.5)}),
    "stacked": StackedRows(((1, Groups(0.5)),)),
}


def kept(constraint: SparseSet, v: Tensor, metric: Tensor | None = None) -> list[int]:
    point = None if metric is None else Point(weight=metric[None])
    return constraint.project(Point(weight=v[None]), point)["weight"][0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", ONE_OF_TWO)
def test_products_with_a_metric_beyond_the_range_of_the_dtype(name) -> None:
    constraint = ONE_OF_TWO[name]
    half = [300.0, 400.0, 0.3, 0.2]  # squares and products overflow float16
    for dtype in (torch.float16, torch.bfloat16):
        for metric_dtype in (dtype, torch.float32):
            v, metric = torch.tensor(half, dtype=dtype), torch.tensor([6e4] * 4, dtype=metric_dtype)
            assert kept(constraint, v, metric) == ([1, 2] if name == "1:2" else [0, 1])
            assert kept(constraint, v / 400, torch.full_like(metric, 1e-4)) == ([1, 2] if name == "1:2" else [0, 1])
    for dtype, large in ((torch.float32, 1e30), (torch.float64, 1e250)):
        v = torch.tensor([1 / large, 2 / large, 2 * large, large], dtype=dtype)
        small = 1 / large if dtype is torch.float32 else large  # in float64, 600 decades are told apart
        metric = torch.tensor([small, small, large, large], dtype=dtype)
        assert kept(constraint, v, metric) == ([1, 2] if name == "1:2" else [2, 3])
        assert kept(constraint, v[[0, 1, 0, 1]], 1 / metric[[3, 3, 3, 3]]) == [1, 3]
        assert kept(constraint, v[[2, 3, 3, 2]], metric[[3, 3, 3, 3]]) == [0, 3]
        assert kept(constraint, v[[1, 0, 0, 1]]) == [0, 3]


@pytest.mark.parametrize("name", ONE_OF_TWO)
def test_an_infinite_entry_is_kept_before_finite_ones(name) -> None:
    constraint = ONE_OF_TWO[name]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        v = torch.tensor([1.0, 2.0, torch.inf, 3.0], dtype=dtype)
        assert kept(constraint, v) == ([1, 2] if name == "1:2" else [2, 3])
        small = torch.full_like(v, 1e-7)  # its root times the score may not become zero times infinity
        assert kept(constraint, v, small) == ([1, 2] if name == "1:2" else [2, 3])
        assert kept(constraint, -v, small) == ([1, 2] if name == "1:2" else [2, 3])
        assert kept(constraint, torch.zeros(4, dtype=dtype), small) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constraint", [Blocks(0.5, 2, 2), Groups(0.5), Groups(0.5, 2)])
def test_whole_groups_of_zeros_and_of_infinities(constraint, dtype) -> None:
    zeros = torch.zeros(2, 4, dtype=dtype)
    assert constraint.select(Point(w=zeros))["w"].tolist() == [[True, True, False, False]] * 2
    assert constraint.select(Point(w=zeros + torch.inf))["w"].tolist() == [[True, True, False, False]] * 2
    one = zeros.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.inf, dtype=dtype))
    assert constraint.select(Point(w=one + 1))["w"][:, 2].all()


def test_sums_of_squares_beyond_the_range_of_float64() -> None:
    v = torch.tensor([1e200, 1, 1e-200, 2e-200, 1e-200, 1e-200, 2e-200, 2e-200], dtype=torch.float64)
    assert kept(Blocks(0.25, 1, 2), v) == [0, 1, 2, 3, 6, 7]
    huge = torch.tensor([1.6e308] * 2 + [1e308] * 2 + [1.7e308] * 2 + [1.0] * 2, dtype=torch.float64)
    assert kept(Blocks(0.5, 1, 2), huge) == [0, 1, 4, 5]


def test_equal_sums_of_unlike_squares_are_ties() -> None:
    """3^2 + 4^2 = 5^2 + 0: the lower tile is kept, whatever the largest score is."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        for largest in (5.0, 7.0, 11.0):
            v = torch.tensor([largest, largest, 3, 4, 5, 0, 0, 5], dtype=dtype)
            assert Blocks(0.5, 1, 2).select(Point(w=v[None]))["w"][0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("name", ONE_OF_TWO)
def test_nan_is_refused_in_the_point_and_in_the_metric(name) -> None:
    bad, ones = torch.tensor([1.0, 2.0, torch.nan, 0.0]), torch.ones(4)
    with pytest.raises(ValueError, match="the point contains NaN"):
        kept(ONE_OF_TWO[name], bad)
    with pytest.raises(ValueError, match="the metric contains NaN"):
        kept(ONE_OF_TWO[name], ones, bad)
    with pytest.raises(ValueError, match="NaN"):
        ONE_OF_TWO[name].select(Point(weight=bad[None]))


@pytest.mark.parametrize("constraint", [*SETS.values(), Groups(0.5)], ids=str)
def test_a_negative_metric_is_refused_and_one_of_zero_drops_its_entry(constraint) -> None:
    v, metric = (Point(weight=torch.ones(2, 6)) for _ in range(2))
    metric["weight"][:, -1] = 0.0
    assert constraint.project(v, metric)["weight"].count_nonzero() == constraint.project(v)["weight"].count_nonzero()
    metric["weight"][0, 0] = -1.0
    with pytest.raises(ValueError, match="the metric contains NaN or negative numbers"):
        constraint.project(v, metric)


@pytest.mark.parametrize("constraint", [Unstructured(0.5), RowWise(0.5), NofM(1, 2), Blocks(0.5, 1, 2), Groups(0.5, 2)])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_matrix_without_entries_is_its_own_projection(constraint, shape) -> None:
    empty = Point(weight=torch.ones(shape))
    assert constraint.contains(empty)
    assert constraint.project(empty)["weight"].shape == shape
