"""Rows are proved to the gap, and their leaves prove it: against brute force and in rational numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from admm_prune.solvers.reference import BruteForce, TreeCertificate, prove_rows, trees
from tests.solvers.reference.instances import Toy, correlated, keeping, normal, spectral, toys
from tests.solvers.reference.test_dual import is_semidefinite


def stacked(width: int, rows: int, condition: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    each = [correlated(width, seed) if condition is None else spectral(width, seed, condition) for seed in range(rows)]
    return torch.stack(each), normal(rows, width, 0)


def covered(tree: TreeCertificate, row: int, keep: int) -> bool:
    """Whether every support of full size agrees with a leaf of the row."""
    leaves = tree.leaves[tree.row_of_leaf == row]
    width = leaves.shape[1]
    for chosen in combinations(range(width), keep):
        support = np.where(np.isin(np.arange(width), chosen), 1, -1)
        if not ((leaves == 0) | (leaves == support)).all(1).any():
            return False
    return True


@settings(max_examples=25, deadline=None)
@given(toys(max_width=9))
def test_bounds_are_below_the_optimum_and_values_are_attained(problem: Toy) -> None:
    keep = int(problem.constraint.select(problem.initial())["weight"].sum())
    tree = prove_rows(problem.hessian[None], problem.weight, [keep])
    optimum = BruteForce().solve(problem).objective
    assert tree.bounds[0] <= optimum * (1 + 1e-12)
    assert int((tree.weight != 0).sum()) <= keep
    away = tree.weight[0] - problem.weight[0].numpy()
    assert tree.values[0] == pytest.approx(away @ problem.hessian.numpy() @ away, rel=1e-6, abs=1e-12)
    assert covered(tree, 0, keep)


@pytest.mark.parametrize("keep", [3, 6, 10])
def test_rows_of_a_layer_are_proved_to_one_per_cent(keep: int) -> None:
    hessian, target = stacked(12, 6)
    tree = prove_rows(hessian, target, [keep] * 6)
    assert (tree.gaps <= 0.01).all()
    for row in range(6):
        optimum = BruteForce().solve(Toy(target[row : row + 1], hessian[row], keeping(keep, 12))).objective
        assert optimum * 0.99 <= tree.bounds[row] <= optimum * (1 + 1e-12)
        assert covered(tree, row, keep)


def test_the_leaves_prove_the_bound_in_rational_numbers() -> None:
    hessian, target = stacked(8, 2, 1e3)
    tree = prove_rows(hessian, target, [4, 3])
    for row, keep in enumerate([4, 3]):
        a = [[Fraction(x) for x in line] for line in hessian[row].tolist()]
        w = [Fraction(x) for x in target[row].tolist()]
        d = [Fraction(x) for x in tree.diagonal[row].tolist()]
        rest = [[a[i][j] - (d[i] if i == j else 0) for j in range(8)] for i in range(8)]
        assert is_semidefinite(rest)
        least = None
        for leaf in np.flatnonzero(tree.row_of_leaf == row):
            s = [Fraction(x) for x in tree.shift[leaf].tolist()]
            q = [sum((s[i] * rest[i][j] for i in range(8)), Fraction(0)) for j in range(8)]
            kept = [-q[j] * q[j] / d[j] for j in range(8)]
            removed = [d[j] * w[j] ** 2 - 2 * q[j] * w[j] for j in range(8)]
            fixed = tree.leaves[leaf]
            total = -sum(x * y for x, y in zip(s, q, strict=True))
            total += sum((kept[j] if fixed[j] > 0 else removed[j] for j in range(8)), Fraction(0))
            gains = sorted((removed[j] - kept[j] for j in range(8) if fixed[j] == 0), reverse=True)
            total -= sum(gains[: keep - int((fixed > 0).sum())], Fraction(0))
            least = total if least is None else min(least, total)
        assert least is not None
        assert tree.bounds[row] <= least


def test_everything_kept_nothing_kept_and_zero_targets() -> None:
    hessian, target = stacked(8, 3)
    target[2] = 0
    tree = prove_rows(hessian, target, [8, 0, 4])
    whole = float(target[1] @ hessian[1] @ target[1])
    assert tree.values.tolist() == [0.0, pytest.approx(whole), 0.0]
    assert tree.bounds[0] == tree.bounds[2] == 0.0
    assert 0.99 * whole <= tree.bounds[1] <= whole
    assert (tree.gaps <= 0.01).all()


def test_a_limit_of_nodes_leaves_a_valid_bound() -> None:
    hessian, target = stacked(24, 2, 1e6)
    short = prove_rows(hessian, target, [12, 12], max_nodes=1, gap=1e-6)
    assert int(short.nodes.sum()) == 2
    assert ((short.bounds >= 0) & (short.bounds <= short.values)).all()


def test_refuses() -> None:
    hessian, target = stacked(8, 2)
    with pytest.raises(ValueError, match=r"needs Hessians \(rows, in, in\)"):
        prove_rows(hessian[0], target, [4, 4])
    with pytest.raises(ValueError, match="from 0 to 8 entries"):
        prove_rows(hessian, target, [4, 9])
    with pytest.raises(ValueError, match="NaN or Inf"):
        prove_rows(hessian * torch.nan, target, [4, 4])
    with pytest.raises(ValueError, match="not symmetric"):
        prove_rows(hessian + torch.ones(8, 8).triu(1), target, [4, 4])
    with pytest.raises(ValueError, match="not positive definite"):
        prove_rows(torch.ones(2, 8, 8), target, [4, 4])
    for options in ({"gap": 1.0}, {"gap": -0.1}, {"gap": float("nan")}, {"iterations": 0}, {"max_nodes": -1}):
        with pytest.raises(ValueError, match="needs a gap from 0 to below 1"):
            prove_rows(hessian, target, [4, 4], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_every_root_and_no_other_node_has_three_times_the_iterations(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    hessian, target = stacked(12, 7, 1e4)
    bounded, seen = trees._bounded, []

    def watched(nodes: trees._Nodes, *arguments: object) -> object:
        seen.extend((bool((row == 0).all()), arguments[-1]) for row in nodes.fixed)
        return bounded(nodes, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trees, "_bounded", watched)
    monkeypatch.setattr(trees, "_BATCH", batch)
    tree = prove_rows(hessian, target, [4] * 7, iterations=10)
    assert sum(is_root for is_root, _ in seen) == 7 < len(seen) == int(tree.nodes.sum())
    assert all(iterations == (30 if is_root else 10) for is_root, iterations in seen)


@pytest.mark.bitwise
def test_repeats_bitwise() -> None:
    hessian, target = stacked(10, 3)
    first, second = prove_rows(hessian, target, [5] * 3), prove_rows(hessian, target, [5] * 3)
    assert np.array_equal(first.bounds, second.bounds)
    assert np.array_equal(first.leaves, second.leaves)
    assert np.array_equal(first.shift, second.shift)
