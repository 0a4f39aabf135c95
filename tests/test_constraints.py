"""Projections against brute force over all supports, and the rules that every sparse set keeps."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from catalogue import CONSTRAINTS
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, NofM, Product, RowWise, StackedRows, Unstructured

SHAPE = (2, 6)
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
# Ties, zeros, signs, and magnitudes far apart.
entries = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, allow_subnormal=False))
metrics = st.one_of(st.just(1.0), st.floats(1e-6, 1e6))


def matrix(elements: st.SearchStrategy[float]) -> st.SearchStrategy[torch.Tensor]:
    count = SHAPE[0] * SHAPE[1]
    return st.lists(elements, min_size=count, max_size=count).map(
        lambda v: torch.tensor(v, dtype=torch.float64).view(SHAPE)
    )


@pytest.fixture(scope="module")
def admissible() -> dict[str, torch.Tensor]:
    """Every support that each set admits, by membership alone: (supports, entries)."""
    count = SHAPE[0] * SHAPE[1]
    bits = ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()
    return {
        name: torch.stack([b for b in bits if constraint.contains(Point(weight=b.view(SHAPE)))])
        for name, constraint in SETS.items()
    }


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=60)
@given(v=matrix(entries), metric=matrix(metrics))
def test_projection_equals_brute_force(name, v, metric, admissible) -> None:
    z = SETS[name].project(Point(weight=v), Point(weight=metric))
    cost = metric * v.square()
    best = (cost.flatten() * (1 - admissible[name])).sum(1).min()
    mine = (metric * (z["weight"] - v).square()).sum()
    assert SETS[name].contains(z)
    assert mine <= best * (1 + 1e-12)
    kept = z["weight"] != 0
    assert torch.equal(z["weight"][kept], v[kept])


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=30)
@given(v=matrix(entries))
def test_support_has_the_full_size_and_projection_is_idempotent(name, v, admissible) -> None:
    constraint = SETS[name]
    support = constraint.select(Point(weight=v.abs()))["weight"]
    assert int(support.sum()) == int(admissible[name].sum(1).max())
    z = constraint.project(Point(weight=v))
    again = constraint.project(z)
    assert torch.equal(again["weight"], z["weight"])


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_projection_keeps_dtype_and_count(constraint, dtype) -> None:
    v = Point(weight=(torch.arange(96).view(6, 16) % 7 + 1).to(dtype))  # many ties, no zeros
    z = constraint.project(v)
    assert z["weight"].dtype == dtype
    assert z.count_nonzero() == int(constraint.select(v)["weight"].sum())
    assert constraint.contains(z)


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_shares_of_columns_add_up(constraint) -> None:
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    whole = int(constraint.select(Point(weight=score))["weight"].sum())
    step = max(constraint.group_width, 4)
    parts = [
        constraint.share(i, i + step, (6, 16)).select(Point(weight=score[:, i : i + step]))["weight"]
        for i in range(0, 16, step)
    ]
    assert sum(int(part.sum()) for part in parts) == whole


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_tightening_goes_from_everything_to_the_set_itself(constraint) -> None:
    score = Point(weight=torch.rand(6, 16, generator=torch.Generator().manual_seed(0)))
    sizes = [int(constraint.tightened(f).select(score)["weight"].sum()) for f in (0.0, 0.3, 0.7, 1.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 96
    assert sizes[-1] == int(constraint.select(score)["weight"].sum())


def test_ties_go_to_the_lower_index() -> None:
    ones = Point(weight=torch.ones(2, 4))
    assert Unstructured(0.5).select(ones)["weight"].tolist() == [[True] * 4, [False] * 4]
    assert RowWise(0.5).select(ones)["weight"].tolist() == [[True, True, False, False]] * 2
    assert NofM(2, 4).select(ones)["weight"].tolist() == [[True, True, False, False]] * 2
    assert RowWise(0.6).select(ones)["weight"].sum(1).tolist() == [2, 1]  # 3 of 8: the first row takes one more


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
