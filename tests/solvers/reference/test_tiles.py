"""References that work in batches, beside all at once and beside brute force: the batches are made small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admm_prune.problems.constraints import NofM, RowWise, StackedRows, Unstructured
from admm_prune.solvers.reference import BranchAndBound, BruteForce, branch_and_bound, dual, prove_rows, rows, trees
from tests.solvers.reference.instances import Toy
from tests.solvers.reference.test_trees import covered, keeping, stacked
from tests.unchanged import unchanged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "leaves"), [(1, 1), (3, 2), (2048, 5)])
def test_trees_in_small_batches(batch: int, leaves: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_BATCH", batch)
    monkeypatch.setattr(dual, "_LEAVES", leaves)
    hessian, target = (x.to(dtype) for x in stacked(10, 3))
    hessian = (hessian + hessian.mT) / 2
    keep = [3, 5, 8]
    with unchanged(hessian, target):
        tree = prove_rows(hessian, target, keep, gap=1e-3)
    assert (tree.gaps <= 1e-3).all()
    assert len(tree.leaves) > 3
    for row in range(3):
        one = Toy(target[row : row + 1].double(), hessian[row].double(), keeping(keep[row], 10))
        optimum = BruteForce().solve(one).objective
        assert optimum * 0.999 <= tree.bounds[row] <= optimum * (1 + 1e-12)
        assert tree.values[row] == pytest.approx(optimum, rel=1e-3)
        assert covered(tree, row, keep[row])


@pytest.mark.parametrize("leaves", [1, 3, 7])
def test_leaves_are_bounded_alike_in_any_batches(leaves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, target = stacked(12, 2, 1e3)
    tree = prove_rows(hessian, target, [4, 3], gap=1e-4)
    data = (hessian, torch.from_numpy(tree.diagonal), target, torch.tensor([4, 3]))
    data += tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in (tree.row_of_leaf, tree.leaves, tree.shift))
    whole = dual.proved_leaves(*data)
    assert len(whole) > 8
    monkeypatch.setattr(dual, "_LEAVES", leaves)
    with unchanged(*data):
        parts = dual.proved_leaves(*data)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "memory"), [(1, 1 << 28), (3, 1 << 28), (256, 1)])
def test_branch_and_bound_in_small_batches(
    batch: int, memory: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory, it dives."""
    monkeypatch.setattr(branch_and_bound, "_BATCH", batch)
    monkeypatch.setattr(branch_and_bound, "_MEMORY", memory)
    hessian, target = (x.to(dtype) for x in stacked(12, 1, 1e3))
    hessian = (hessian[0] + hessian[0].mT) / 2
    problem = Toy(target, hessian, keeping(5, 12))
    with unchanged(target, hessian):
        found = BranchAndBound().solve(problem)
    optimum = BruteForce().solve(problem).objective
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    assert found.objective == pytest.approx(optimum, rel=rounding)
    assert found.bound is not None
    assert found.bound <= optimum * (1 + rounding)
    assert found.bound == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("exact", [1, 1 << 24])
@pytest.mark.parametrize(
    "constraint",
    [RowWise(0.5), NofM(2, 4), NofM(3, 8), Unstructured(0.7), StackedRows(((2, NofM(1, 4)), (4, RowWise(0.7))))],
    ids=str,
)
def test_budgets_of_large_matrices_are_recognised_from_fewer_scorings(
    constraint: RowWise | NofM | Unstructured | StackedRows, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rows.recognise("test", constraint, (6, 16))
    monkeypatch.setattr(rows, "_MANY", 1)
    monkeypatch.setattr(rows, "_EXACT", exact)
    assert len(list(rows._scorings(6, 16))) == 3
    assert rows.recognise("test", constraint, (6, 16)) == known
