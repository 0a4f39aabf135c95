"""Swept normal equations against least squares that is solved afresh for every support."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.ops import quadratic
from admm_prune.ops.group_compensation import minimize_on_columns
from admm_prune.ops.sweep import Swept
from tests.catalogue import WIDTH, correlated_inputs

HEIGHT, STRIPS = 3, 2
widths = pytest.mark.parametrize("width", [1, 2, 4])
seeds = st.integers(0, 10_000)


def drawn(width: int, seed: int) -> tuple[Tensor, Swept]:
    """A with a unit diagonal, and some strips with random supports."""
    g = torch.Generator().manual_seed(seed)
    x = correlated_inputs(64, WIDTH, seed)
    a, _ = quadratic.unit_diagonal(x.T @ x + 0.01 * torch.eye(WIDTH, dtype=x.dtype))
    target = torch.randn(STRIPS, HEIGHT, WIDTH, generator=g, dtype=torch.float64)
    return a, Swept.at(a, target, torch.rand(STRIPS, WIDTH // width, generator=g) < 0.5, width)


def least(a: Tensor, target: Tensor, kept: Tensor, width: int) -> tuple[Tensor, float]:
    """The least-squares weights of a strip on a support, and f."""
    v = minimize_on_columns(a, target, kept.repeat_interleave(width))
    return v, float((((target - v) @ a) * (target - v)).sum())


def moved(kept: Tensor, *groups: int) -> Tensor:
    kept = kept.clone()
    for group in groups:
        kept[group] = ~kept[group]
    return kept


@widths
@given(seed=seeds)
def test_weights_losses_and_gains_are_those_of_least_squares(width, seed) -> None:
    a, swept = drawn(width, seed)
    losses, gains = swept.losses(), swept.gains()
    for i, (target, kept) in enumerate(zip(swept.target, swept.support, strict=True)):
        v, f = least(a, target, kept, width)
        torch.testing.assert_close(swept.weights()[i], v)
        assert float(swept.values()[i]) == pytest.approx(f, rel=1e-9, abs=1e-12)
        for group in range(len(kept)):
            change = least(a, target, moved(kept, group), width)[1] - f
            expected = (change, -torch.inf) if kept[group] else (torch.inf, -change)
            assert (float(losses[i, group]), float(gains[i, group])) == pytest.approx(expected, rel=1e-7, abs=1e-10)


@widths
@given(seed=seeds)
def test_the_best_swap_is_the_best_of_all_pairs(width, seed) -> None:
    a, swept = drawn(width, seed)
    gain, drop, add = swept.best_swaps(torch.arange(STRIPS))
    for i, (target, kept) in enumerate(zip(swept.target, swept.support, strict=True)):
        f = least(a, target, kept, width)[1]
        pairs = [(p, q) for p in kept.nonzero()[:, 0].tolist() for q in (~kept).nonzero()[:, 0].tolist()]
        if not pairs:
            assert float(gain[i]) == -torch.inf
            continue
        falls = {pair: f - least(a, target, moved(kept, *pair), width)[1] for pair in pairs}
        best = max(falls.values())
        assert float(gain[i]) == pytest.approx(best, rel=1e-7, abs=1e-10)
        assert falls[int(drop[i]), int(add[i])] == pytest.approx(best, rel=1e-7, abs=1e-10)


@widths
@given(seed=seeds)
def test_after_sweeps_all_is_as_made_afresh(width, seed) -> None:
    a, swept = drawn(width, seed)
    g = torch.Generator().manual_seed(seed)
    for _ in range(6):
        strips = torch.randperm(STRIPS, generator=g)[: 1 + seed % 2]
        swept.sweep(strips, torch.randint(WIDTH // width, (len(strips),), generator=g))
    fresh = Swept.at(a, swept.target, swept.support, width)
    torch.testing.assert_close(swept.z, fresh.z)
    torch.testing.assert_close(swept.y, fresh.y)


def test_few_candidates_are_the_cheapest_to_drop() -> None:
    _, swept = drawn(1, 3)
    strips = torch.arange(STRIPS)
    _, drop, _ = swept.best_swaps(strips, 2)
    cheapest = swept.losses().argsort(1)[:, :2]
    assert bool((cheapest == drop[:, None]).any(1).all())
    gains = [swept.best_swaps(strips, count)[0] for count in (1, 2, 4, None)]
    assert all(bool((more >= fewer).all()) for fewer, more in pairwise(gains))


def test_a_singular_support_is_refused() -> None:
    a = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        Swept.at(a, torch.ones(1, 1, 4, dtype=torch.float64), torch.tensor([[True, True, False, False]]), 1)
