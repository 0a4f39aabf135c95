"""Every sparse set through the conformance kit, the rules for ties, and refusals."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, NofM, Product, RowWise, StackedRows, Unstructured
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
