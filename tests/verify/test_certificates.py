"""Certificates against least squares and brute force on every swapped support, and what they say in words."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from admm_prune.data.layer_file import LayerFile
from admm_prune.methods.target import Target
from admm_prune.testing.instances import correlated_inputs, random_weight
from admm_prune.verify.certificates import Certificates, certify, fixed_swaps_across, fixed_swaps_within, refitted_swaps
from admm_prune.verify.recomputation import Array, Budget, Definition, define

WIDTH = 12
SEEDS = st.integers(0, 10_000)
CELLS = {"row": Target(0.5), "matrix": Target(0.5), "group": Target(None, (2, 4))}


def layer(seed: int, rows: int = 4) -> Definition:
    x = correlated_inputs(60, WIDTH, seed)
    return define(LayerFile(weight=random_weight(rows, WIDTH, seed), gram=x.T @ x), 0.02, 0.0)


def scaled(problem: Definition) -> tuple[Array, Array]:
    """A with a unit diagonal and the minimizer in those coordinates."""
    return problem.hessian / problem.scale / problem.scale[:, None], problem.minimizer * problem.scale


def loss_on(hessian: Array, target: Array, support: np.ndarray) -> float:
    """The least (w - v)^T A (w - v) on a support, from the inverse of A: another route than the one under test."""
    rest = np.flatnonzero(~support)
    if not len(rest):
        return 0.0
    inverse = np.linalg.inv(hessian)
    return float(target[rest] @ np.linalg.solve(inverse[np.ix_(rest, rest)], target[rest]))


def swapped(support: np.ndarray, group: int) -> list[np.ndarray]:
    found = []
    for i, j in product(np.flatnonzero(support), np.flatnonzero(~support)):
        if i // group == j // group:
            other = support.copy()
            other[[i, j]] = False, True
            found.append(other)
    return found


def random_support(seed: int, shape: tuple[int, ...], group: int) -> np.ndarray:
    """Half of every group kept."""
    draw = np.random.default_rng(seed)
    cells = np.tile(np.arange(group) < group // 2, (*shape[:-1], shape[-1] // group, 1))
    return draw.permuted(cells, axis=-1).reshape(shape)


@pytest.mark.parametrize("group", [12, 4])
@given(seed=SEEDS)
def test_refitted_swaps_are_least_squares_on_every_swapped_support(group: int, seed: int) -> None:
    hessian, targets = scaled(layer(seed))
    kept = random_support(seed, (WIDTH,), group)
    swaps = refitted_swaps(hessian, targets[0], kept, group)
    neighbours = swapped(kept, group)
    before = loss_on(hessian, targets[0], kept)
    best = min(before, *(loss_on(hessian, targets[0], support) for support in neighbours))
    assert swaps.pairs == len(neighbours)
    assert swaps.loss == pytest.approx(before, rel=1e-8)
    assert swaps.loss - swaps.gain == pytest.approx(best, rel=1e-8)
    dropped = [loss_on(hessian, targets[0], kept & (np.arange(WIDTH) != i)) for i in np.flatnonzero(kept)]
    added = [loss_on(hessian, targets[0], kept | (np.arange(WIDTH) == j)) for j in np.flatnonzero(~kept)]
    assert before + swaps.cheapest_drop == pytest.approx(min(dropped), rel=1e-8)
    assert before - swaps.best_add == pytest.approx(min(added), rel=1e-8)


@pytest.mark.parametrize("group", [12, 4])
@given(seed=SEEDS)
def test_fixed_swaps_are_the_best_value_of_the_entry_in_every_pair(group: int, seed: int) -> None:
    hessian, targets = scaled(layer(seed))
    kept = random_support(seed, targets.shape, group)
    point = np.where(kept, targets + 0.1 * np.random.default_rng(seed).standard_normal(targets.shape), 0.0)
    away = targets - point
    loss = ((away @ hessian) * away).sum(1)
    gains = []
    for row in range(len(targets)):
        for support in swapped(kept[row], group):
            (i,), (j,) = np.flatnonzero(kept[row] & ~support), np.flatnonzero(support & ~kept[row])
            v = point[row].copy()
            v[i] = 0.0
            v[j] = hessian[j] @ (targets[row] - v) / hessian[j, j]  # the minimum along this coordinate
            gains.append(loss[row] - (targets[row] - v) @ hessian @ (targets[row] - v))
    found = fixed_swaps_within(hessian, away @ hessian, point, loss, group)
    assert found.pairs == len(gains)
    best = max(found.gains, key=lambda gain: gain.absolute)
    assert best.absolute == pytest.approx(max(gains), rel=1e-8, abs=1e-10)
    assert best.touched in loss
    assert best.share == best.absolute / best.touched


@given(seed=SEEDS)
def test_swaps_across_rows_are_the_best_of_all_pairs_of_rows(seed: int) -> None:
    hessian, targets = scaled(layer(seed))
    kept = np.random.default_rng(seed).random(targets.shape) < 0.5
    point = np.where(kept, targets, 0.0)
    away = targets - point
    loss = ((away @ hessian) * away).sum(1)

    def changed(row: int, column: int, value: float) -> float:
        v = point[row].copy()
        v[column] = value
        return float(loss[row] - (targets[row] - v) @ hessian @ (targets[row] - v))

    best = max(
        (changed(a, i, 0.0) + changed(b, j, float((away @ hessian)[b, j])), -a, -b)
        for a, b in product(range(len(targets)), repeat=2)
        if a != b
        for i in np.flatnonzero(kept[a])
        for j in np.flatnonzero(~kept[b])
    )
    found = fixed_swaps_across(away @ hessian, point, loss)
    largest = max(found.gains, key=lambda gain: gain.absolute)
    assert largest.absolute == pytest.approx(best[0], rel=1e-8, abs=1e-10)
    assert largest.touched == pytest.approx(loss[-best[1]] + loss[-best[2]])
    assert found.pairs == sum(
        int(kept[a].sum()) * int((~kept[b]).sum()) for a, b in product(range(len(targets)), repeat=2) if a != b
    )


def certified(problem: Definition, cell: str, support: np.ndarray, fit: bool = True) -> Certificates:
    hessian, targets = scaled(problem)
    v = np.zeros_like(targets)
    for row, kept in enumerate(support):
        v[row, kept] = targets[row, kept]
        if fit:
            pull = hessian[np.ix_(kept, ~kept)] @ targets[row, ~kept]
            v[row, kept] += np.linalg.solve(hessian[np.ix_(kept, kept)], pull)
    v /= problem.scale
    return certify(problem, Budget(CELLS[cell], cell), v, 0)


@pytest.mark.parametrize("cell", ["row", "group"])
def test_the_optimum_is_certified_and_a_swap_away_from_it_is_not(cell: str) -> None:
    problem = layer(1)
    hessian, targets = scaled(problem)
    group = 4 if cell == "group" else WIDTH
    inside = [np.isin(np.arange(group), kept) for kept in combinations(range(group), group // 2)]
    supports = [np.concatenate(parts) for parts in product(inside, repeat=WIDTH // group)]
    best = np.stack([min(supports, key=lambda s: loss_on(hessian, w, s)) for w in targets])
    optimum = certified(problem, cell, best)
    assert optimum.swap_optimal == 1.0
    assert optimum.swap_gain == pytest.approx(0.0, abs=1e-9)
    assert optimum.fixed_swap_gain is not None
    assert optimum.fixed_swap_gain < 0
    assert all(said.startswith("no single swap lowers the error") for said in optimum.in_words())
    assert f"of the layer's loss over {optimum.swap_pairs:,} pairs tried" in optimum.in_words()[1]
    worse = best.copy()
    worse[2] = max(swapped(best[2], group), key=lambda s: loss_on(hessian, targets[2], s))
    told = certified(problem, cell, worse)
    assert told.swap_optimal <= 0.75
    assert told.swap_gain > 0.01
    assert "a single swap lowers the error, in 4 rows, all others refitted: by" in told.in_words()[1]
    assert told.reachable < problem.objective(problem.minimizer)[0] + sum(
        loss_on(hessian, w, s) for w, s in zip(targets, worse, strict=True)
    )


def test_rows_that_share_a_budget_are_swapped_with_one_another() -> None:
    """Each row at its own optimum for a bad split of the budget: no swap within a row helps, one across does."""
    problem = layer(3)
    hessian, targets = scaled(problem)
    sizes = (1, 11, 6, 6)
    support = np.stack(
        [
            min(
                (np.isin(np.arange(WIDTH), kept) for kept in combinations(range(WIDTH), size)),
                key=lambda s: loss_on(hessian, w, s),
            )
            for w, size in zip(targets, sizes, strict=True)
        ]
    )
    told = certified(problem, "matrix", support)
    assert told.swap_optimal == 1.0
    assert told.swap_gain > 0.01
    assert told.fixed_swap_gain is not None
    assert told.fixed_swap_gain > 0.01
    kept = int(support.sum())
    assert told.swap_pairs == told.fixed_swap_pairs == kept * (support.size - kept)


def test_nothing_kept_and_nothing_pruned_have_no_swaps() -> None:
    for support in (np.zeros((4, WIDTH), bool), np.ones((4, WIDTH), bool)):
        told = certified(layer(0), "matrix", support)
        assert (told.swap_pairs, told.fixed_swap_pairs, told.fixed_swap_gain) == (0, 0, None)
        assert told.in_words() == []


def test_words_say_how_many_were_tried_and_how_large_the_best_is() -> None:
    some = Certificates(0.0, 0.0, 1.0, 0.0, 8, 1234567, 1.0, 0.0, 0.0, 99, 0.0015, 0.71, 0.0)
    fixed, refitted = some.in_words()
    how = "a single swap lowers the error, all other weights fixed"
    assert fixed == f"{how}: by 0.0015 of the layer's loss (0.71 of its rows' loss), the best of 99 pairs tried"
    how = "no single swap lowers the error, in 8 rows, all others refitted"
    assert refitted == f"{how}: largest gain found 0 of the layer's loss over 1,234,567 pairs tried"
    assert len(replace(some, fixed_swap_gain=None).in_words()) == 1


def test_the_gain_of_one_row_among_many_is_small_for_the_layer() -> None:
    """One of 40 equal rows at a bad support: most of its own loss can be had, little of the layer's."""
    one = layer(1, rows=1)
    problem = replace(one, weight=one.weight.repeat(40, 0), minimizer=one.minimizer.repeat(40, 0))
    hessian, targets = scaled(problem)
    supports = [np.isin(np.arange(WIDTH), kept) for kept in combinations(range(WIDTH), WIDTH // 2)]
    best = min(supports, key=lambda s: loss_on(hessian, targets[0], s))
    bad = max(swapped(best, WIDTH), key=lambda s: loss_on(hessian, targets[0], s))
    told = certified(problem, "row", np.stack([bad] + [best] * 39))
    before, after = loss_on(hessian, targets[0], bad), loss_on(hessian, targets[0], best)
    assert told.swap_gain_of_rows == pytest.approx((before - after) / before)
    assert told.swap_gain == pytest.approx((before - after) / (before + 39 * after))
    assert told.swap_gain < 0.25 * told.swap_gain_of_rows
    assert f"by {told.swap_gain:.2g} of the layer's loss" in told.in_words()[1]


def test_the_residual_of_every_row_is_that_of_the_normal_equations() -> None:
    problem = layer(0)
    support = random_support(0, (4, WIDTH), WIDTH)
    exact = certified(problem, "row", support)
    assert exact.kkt_residual < 1e-12
    assert exact.kkt_exact == 1.0
    v = np.where(support, problem.minimizer, 0.0)
    rough = certified(problem, "row", support, fit=False)
    ratios = []
    for row, inside, target in zip(v, support, problem.minimizer, strict=True):
        block, right = problem.hessian[np.ix_(inside, inside)], (problem.hessian @ target)[inside]
        root = np.sqrt(np.diag(problem.hessian)[inside])
        ratios.append(np.linalg.norm((block @ row[inside] - right) / root) / np.linalg.norm(right / root))
    assert rough.kkt_residual == pytest.approx(max(ratios))
    assert rough.kkt_exact == 0.0
