"""Allocation of weights to matrices: budgets to one weight, published formulas, a linear program as reference."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from admm_prune.problems.allocation import Curve, EqualSlope
from admm_prune.problems.allocation_knapsack import Knapsack
from admm_prune.problems.allocation_matrices import (
    alpha_rates,
    counts,
    interpolated,
    met_exactly,
    nearest_levels,
    outlier_fraction,
    owl_offsets,
    scaled,
    shifted,
    tail_exponent,
)

sizes_of_matrices = st.lists(st.integers(1, 5000), min_size=1, max_size=8)


@settings(max_examples=30)
@given(sizes=sizes_of_matrices, share=st.floats(0, 1), seed=st.integers(0, 999), relative=st.booleans())
def test_counts_add_up_to_the_budget_and_are_within_one_weight_of_a_level(sizes, share, seed, relative) -> None:
    g = torch.Generator().manual_seed(seed)
    features = torch.rand(len(sizes), generator=g, dtype=torch.float64)
    family = scaled(0.2 + features) if relative else shifted(0.3 * features)
    budget = round(share * sum(sizes))
    exact = counts(sizes, family, budget)
    assert sum(exact) == budget
    assert all(0 <= count <= size for count, size in zip(exact, sizes, strict=True))
    low, high = -2.0, 8.0  # the level at which the continuous counts add up to the budget
    n = torch.tensor(sizes, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if float((family(middle) * n).sum()) >= budget else (middle, high)
    ideal = family(high) * n
    assert all(abs(count - x) <= 1 + 1e-6 for count, x in zip(exact, ideal.tolist(), strict=True))


def test_a_level_at_which_several_matrices_jump_is_taken_in_part() -> None:
    steps = lambda level: torch.tensor([float(level >= 0.5), float(level >= 0.5), 0.0])  # noqa: E731
    assert counts([100, 200, 50], steps, 150) == [50, 100, 0]


@pytest.mark.parametrize("budget", [-1, 11])
def test_more_than_there_is_cannot_go(budget: int) -> None:
    with pytest.raises(ValueError, match="of 10 weights cannot go"):
        counts([4, 6], shifted(torch.zeros(2)), budget)


def test_a_cap_that_leaves_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="9 of 10 weights are to go, and 5 can go"):
        counts([4, 6], shifted(torch.zeros(2), most=0.5), 9)


def test_owl_is_what_its_authors_compute() -> None:
    """The three lines of the released code, in numpy, for densities."""
    ratios, spread, sparsity = np.array([4.8, 5.3, 4.7, 3.1]), 0.08, 0.7
    density = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    density = density - np.mean(density) + (1 - sparsity)
    ours = sparsity + owl_offsets(torch.tensor(ratios), spread)
    assert torch.allclose(ours, torch.tensor(1 - density), atol=1e-12)
    assert torch.equal(owl_offsets(torch.full((3,), 2.0)), torch.zeros(3)), "blocks that are alike lose the same"


def test_outliers_are_counted_over_all_matrices_of_a_block() -> None:
    first, second = torch.tensor([[1.0, 1.0], [1.0, 60.0]]), torch.full((3, 4), 1.0)
    mean = (63 + 12) / 16
    assert 5 * mean < 60
    assert outlier_fraction([first, second]) == 1 / 16


def test_alphapruning_is_what_its_authors_compute() -> None:
    exponents, spread, sparsity = np.array([2.1, 3.4, 2.6]), 0.3, 0.7
    sizes = [1000, 2000, 3000]
    low, high = 1 - spread, 1 + spread
    ratios = (exponents - exponents.min()) / (exponents.max() - exponents.min()) * (high - low) + low
    ratios = ratios * sum(sizes) * sparsity / np.sum(ratios * np.array(sizes))
    exact = counts(sizes, scaled(alpha_rates(torch.tensor(exponents), spread)), round(sparsity * sum(sizes)))
    assert np.abs(np.array(exact) - ratios * np.array(sizes)).max() <= 1


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_the_tail_of_a_power_law_has_its_exponent(exponent: float) -> None:
    """Density x^-alpha from 1 on: 1 - u^... by inversion, x = (1 - u)^(-1 / (alpha - 1))."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    eigenvalues = (1 - u) ** (-1 / (exponent - 1))
    assert tail_exponent(eigenvalues.sqrt()) == pytest.approx(exponent, rel=2e-3)


def test_flat_and_deficient_spectra() -> None:
    assert tail_exponent(torch.ones(8)) == math.inf
    assert tail_exponent(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 1.0
    rates = alpha_rates(torch.tensor([2.0, math.inf, 4.0]))
    assert torch.allclose(rates, torch.tensor([0.7, 1.3, 1.3]))


@settings(max_examples=40)
@given(seed=st.integers(0, 999), size=st.integers(200, 100_000), knots=st.integers(1, 6))
def test_a_curve_passes_through_its_errors_and_never_falls(seed, size, knots) -> None:
    g = torch.Generator().manual_seed(seed)
    at = sorted({round(x, 2) for x in (0.02 + 0.97 * torch.rand(knots, generator=g)).tolist()})
    errors = torch.rand(len(at), generator=g, dtype=torch.float64).cumsum(0).tolist()
    curve = interpolated("w", at, errors, size)
    assert float(curve.losses[0]) == 0.0
    assert bool((curve.losses.diff() >= 0).all())
    assert int(curve.savings[-1]) == size
    for s, error in zip(at, errors, strict=True):
        left, right = math.floor(s * 200 + 1e-9), math.ceil(s * 200 - 1e-9)
        assert float(curve.losses[left]) - 1e-9 <= error <= float(curve.losses[right]) + 1e-9


def test_between_two_errors_the_logarithm_is_linear() -> None:
    curve = interpolated("w", [0.4, 0.6], [1.0, 4.0], 1000)
    assert float(curve.losses[100]) == pytest.approx(2.0)
    assert float(curve.losses[40]) == pytest.approx(0.25), "below the first, its square"


@pytest.mark.parametrize(
    ("at", "errors", "reason"),
    [
        ([], [], "ascending positive"),
        ([0.5, 0.4], [1.0, 2.0], "ascending positive"),
        ([0.0, 0.4], [0.0, 2.0], "ascending positive"),
        ([0.5], [math.nan], "not finite and non-negative"),
        ([0.5], [-1.0], "not finite and non-negative"),
    ],
)
def test_errors_that_make_no_curve(at: list[float], errors: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        interpolated("w", at, errors, 10)


def drawn_curves(seed: int, count: int) -> list[Curve]:
    g = torch.Generator().manual_seed(seed)
    curves = []
    for l in range(count):
        errors = (0.05 + torch.rand(4, generator=g, dtype=torch.float64)).cumsum(0) ** 2
        curves.append(interpolated(f"w{l}", [0.3, 0.6, 0.8, 1.0], errors.tolist(), 500 + 977 * l))
    return curves


def convex_loss(curve: Curve, count: float) -> float:
    """The lower convex hull of a curve at a count."""
    x, y = curve.savings.numpy(), curve.losses.numpy()
    hull: list[int] = []
    for k in range(len(x)):
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (x[k] - x[hull[-2]]) >= (y[k] - y[hull[-2]]) * (
            x[hull[-1]] - x[hull[-2]]
        ):
            hull.pop()
        hull.append(k)
    return float(np.interp(count, x[hull], y[hull]))


@settings(max_examples=20)
@given(seed=st.integers(0, 999), share=st.floats(0.05, 0.95))
def test_equal_slopes_met_exactly_are_the_optimum_of_the_linear_program(seed, share) -> None:
    curves = drawn_curves(seed, 3)
    budget = round(share * sum(float(c.savings[-1]) for c in curves))
    found = EqualSlope().allocate(curves, budget)
    exact = met_exactly(curves, [found.removed[c.name] for c in curves], budget)
    assert sum(exact) == budget
    # min sum_l sum_k lambda_lk E_l(k), sum_lk lambda_lk saving_lk >= budget, sum_k lambda_lk = 1
    losses = np.concatenate([c.losses.numpy() for c in curves])
    savings = np.concatenate([c.savings.numpy() for c in curves])
    owner = np.repeat(np.arange(3), [len(c.losses) for c in curves])
    program = linprog(
        losses, -savings[None], [-budget], (owner == np.arange(3)[:, None]).astype(float), np.ones(3), bounds=(0, 1)
    )
    reached = sum(convex_loss(c, count) for c, count in zip(curves, exact, strict=True))
    assert reached == pytest.approx(program.fun, rel=2e-3)


@settings(max_examples=5)
@given(seed=st.integers(0, 999), share=st.floats(0.05, 0.9))
def test_giving_back_a_surplus_meets_the_budget_and_never_raises_a_count(seed, share) -> None:
    curves = drawn_curves(seed, 4)
    budget = round(share * sum(float(c.savings[-1]) for c in curves))
    found = Knapsack(choices=12, time_limit=2.0, max_nodes=50).allocate(curves, budget)
    removed = [found.removed[c.name] for c in curves]
    exact = met_exactly(curves, removed, budget)
    assert sum(exact) == budget
    assert all(count <= int(c.savings[k]) for c, k, count in zip(curves, removed, exact, strict=True))


def test_an_allocation_that_removes_too_little_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="weights more are to go"):
        met_exactly(drawn_curves(0, 2), [0, 0], 10)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), budget=st.integers(0, 18))
def test_the_nearest_levels_of_a_pattern_are_those_of_an_exhaustive_search(seed, budget) -> None:
    """min sum_l (level_l - 4 s_l)^2 over all levels 0..3 of 4 that remove as much."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 401, (6,), generator=g).div(100).tolist()
    levels = 100 * torch.arange(4, dtype=torch.float64)
    curves = [Curve(str(l), torch.zeros(4, dtype=torch.float64), levels, least=0) for l in range(6)]
    found = nearest_levels(curves, [round(100 * x) for x in target], 100 * budget)
    chosen = [found.removed[c.name] for c in curves]
    assert sum(chosen) == budget

    def distance(choice: tuple[int, ...] | list[int]) -> float:
        return sum((k - x) ** 2 for k, x in zip(choice, target, strict=True))

    best = min(distance(choice) for choice in product(range(4), repeat=6) if sum(choice) == budget)
    assert distance(chosen) == pytest.approx(best, abs=1e-9)


def test_uneven_levels_are_compared_by_what_they_remove() -> None:
    savings: Tensor = torch.tensor([0.0, 10.0, 80.0, 100.0], dtype=torch.float64)
    curves = [Curve(name, torch.zeros(4, dtype=torch.float64), savings, least=0) for name in "ab"]
    found = nearest_levels(curves, [10, 80], 90)
    assert found.removed == {"a": 1, "b": 2}


@pytest.mark.parametrize("most", [0.95, 0.9975, 0.9926, 1.0])
def test_a_curve_reaches_the_largest_sparsity_exactly(most: float) -> None:
    """Which lies between two of its steps: rounded down, a budget close to it could not be met."""
    size = 10_000
    curve = interpolated("w", [0.5, 0.9, 1.0], [1.0, 3.0, 9.0], size, most=most)
    levels = curve.levels()
    assert float(curve.savings[levels[-1]]) == math.floor(most * size + 1e-9)
    assert bool((curve.savings.diff() >= 0).all())
    assert EqualSlope().allocate([curve, curve], 2 * math.floor(most * size)).saved == 2 * math.floor(most * size)
