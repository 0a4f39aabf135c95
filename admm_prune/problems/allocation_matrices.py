"""Allocation of weights: how many each matrix of a model loses, so that all of them together meet one budget exactly.

A rule by features gives matrix l a sparsity s_l(t) that never falls with a level t, common to all matrices; the budget
determines t. A rule by curves compares what the next weight costs: `allocation` has those, for curves made by
`interpolated`. Counts are whole weights and add up to the budget. Patterns N:M have few levels, and meet it to less
than one step of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from admm_prune.problems.allocation import Allocation, Curve, take_steps

Sparsities = Callable[[float], Tensor]  # a level -> the sparsity of every matrix, (matrices,), never falling

_HALVINGS = 60
_CLOSE = 1e-3  # weights
_HIGHEST = 2.0**60  # level
_STEPS = 200  # of an interpolated curve
_TAIL = 0.5  # the part of the eigenvalues that the tail of a spectrum has


def shifted(offsets: Tensor, most: float = 1.0) -> Sparsities:
    """s_l(t) = t + offset_l, within 0 and `most`. Offsets of zero are the same sparsity everywhere."""
    return lambda level: (level + offsets).clamp(0.0, most)


def scaled(rates: Tensor, most: float = 1.0) -> Sparsities:
    """s_l(t) = min(most, t rate_l). Rates exp(-e_l / T) are the softmax of energies e_l: see `CappedSoftmax`."""
    return lambda level: (level * rates).clamp(0.0, most)


def owl_offsets(outliers: Tensor, spread: float = 0.08) -> Tensor:
    """mean(d) - d_l, d_l = 2 lambda (D_l - min D) / (max D - min D): blocks with more outliers lose less.

    Args:
        outliers: D_l (blocks,), the fraction of a block's scores |w_ij| ||x_j|| above M times their mean, M = 5.
        spread: lambda; the sparsities span 2 lambda.

    Source: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), 2023, section 3.2, and its released code.
    """
    density = 2.0 * spread * _unit_range(outliers)
    return density.mean() - density


def outlier_fraction(scores: Sequence[Tensor], factor: float = 5.0) -> float:
    """D: the fraction of all scores that are larger than `factor` times their mean."""
    total = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / total
    return sum(int((score > factor * mean).sum()) for score in scores) / total


def alpha_rates(exponents: Tensor, spread: float = 0.3) -> Tensor:
    """1 - eps + 2 eps (alpha_l - min) / (max - min): blocks with heavy tails, small exponents, lose less.

    Args:
        exponents: alpha_l (blocks,), the mean of `tail_exponent` over the matrices of a block.
        spread: eps.

    Source: Lu et al., AlphaPruning, 2024, eq. 2, and its released code.
    """
    return 1.0 - spread + 2.0 * spread * _unit_range(exponents)


def tail_exponent(singular_values: Tensor) -> float:
    """alpha = 1 + k / sum_{i <= k} ln(lambda_i / lambda_{k+1}), Hill's estimator on the k = n / 2 largest eigenvalues.

    lambda are the eigenvalues of W^T W, the squares of the singular values. Infinite where the tail is flat.

    Source: Hill, A Simple General Approach to Inference About the Tail of a Distribution, 1975; Lu et al., 2024, eq. 1.
    """
    eigenvalues = singular_values.double().square().sort(descending=True).values
    k = max(1, math.floor(_TAIL * len(eigenvalues)))
    tail = eigenvalues[: k + 1]
    if len(tail) < 2 or float(tail[-1]) <= 0:  # a matrix of low rank: the tail is as heavy as it can be
        return 1.0
    excess = float((tail[:k] / tail[k]).log().sum())
    return 1.0 + k / excess if excess > 0 else math.inf


def counts(sizes: Sequence[int], sparsities: Sparsities, budget: int) -> list[int]:
    """The weights that every matrix loses: round(s_l(t) n_l) at the level t where they add up to the budget.

    Fractions of weights go to the matrices with the largest; where several matrices jump at one level, each gets the
    same part of its jump. So the sum is the budget exactly, and no count is more than one from s_l n_l.

    Args:
        sizes: n_l.
        sparsities: that reach 0 for every matrix at a level low enough.

    Raises:
        ValueError: a budget below zero, or of more weights than can go.
    """
    total = sum(sizes)
    if not 0 <= budget <= total:
        raise ValueError(f"{budget} of {total} weights cannot go")
    n = torch.tensor(sizes, dtype=torch.float64)

    def removed(level: float) -> Tensor:
        return sparsities(level).double() * n

    low, high = -1.0, 1.0
    while float(removed(low).sum()) > budget:
        low *= 2.0
    while float(removed(high).sum()) < budget - 0.5:
        high *= 2.0
        if high > _HIGHEST:
            raise ValueError(f"{budget} of {total} weights are to go, and {round(float(removed(high).sum()))} can go")
    below, above = removed(low), removed(high)
    for _ in range(_HALVINGS):
        if float((above - below).sum()) < _CLOSE:
            break
        middle = (low + high) / 2
        between = removed(middle)
        if float(between.sum()) >= budget:
            high, above = middle, between
        else:
            low, below = middle, between
    jump = float((above - below).sum())
    part = (budget - float(below.sum())) / jump if jump > 0 else 0.0
    return _rounded(below + min(1.0, max(0.0, part)) * (above - below), sizes, budget)


def nearest_levels(curves: Sequence[Curve], removed: Sequence[int], budget: float) -> Allocation:
    """The levels of curves nearest to given sparsities, moved by a common shift until the budget is met.

    Args:
        curves: savings are weights removed; the last level of each removes all that it can.
        removed: the weights that every matrix is to lose.

    Raises:
        ValueError: the curves cannot save so much.
    """

    def price(l: int, middle: Tensor) -> Tensor:
        step = (middle * curves[l].count).long().clamp_max(curves[l].count - 1)
        savings = curves[l].savings
        return ((savings[step] + savings[step + 1]) / 2 - removed[l]) / savings[-1]

    return take_steps(curves, budget, price)


def interpolated(
    name: str, sparsities: Sequence[float], errors: Sequence[float], size: int, *, most: float = 1.0
) -> Curve:
    """A curve of 200 steps through the errors of a matrix at a few sparsities.

    Between two sparsities ln E is linear in s; below the first, E = E_1 (s / s_1)^2. Errors that fall are raised to
    those before them.

    Args:
        sparsities: ascending, within 0 and 1; the first positive.
        errors: at each, non-negative.
        size: weights of the matrix, of which step k removes round(k n / 200).
        most: the largest sparsity; the step that reaches it removes so much.

    Raises:
        ValueError: series of other lengths or orders, or errors that are negative or not finite.
    """
    if (
        len(sparsities) != len(errors)
        or not errors
        or list(sparsities) != sorted(set(sparsities))
        or sparsities[0] <= 0
    ):
        raise ValueError(f"{name}: errors are needed at ascending positive sparsities")
    if not all(math.isfinite(error) and error >= 0 for error in errors):
        raise ValueError(f"{name}: the errors {list(errors)} are not finite and non-negative")
    knots = torch.tensor(sparsities, dtype=torch.float64)
    heights = torch.tensor(errors, dtype=torch.float64).cummax(0).values
    s = torch.arange(_STEPS + 1, dtype=torch.float64) / _STEPS
    last = math.ceil(most * _STEPS - 1e-9)  # the step at which the largest sparsity is reached
    s[last] = most
    right = torch.searchsorted(knots, s).clamp(1, max(1, len(knots) - 1))
    if len(knots) == 1:
        values = heights[0] * (s / knots[0]).square()
    else:
        low, high = heights[right - 1], heights[right]
        part = ((s - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0.0, 1.0)
        logarithmic = low * (high / low.clamp_min(torch.finfo(torch.float64).tiny)).pow(part)
        values = torch.where(low > 0, logarithmic, part * high)
        values = torch.where(s < knots[0], heights[0] * (s / knots[0]).square(), values)
    savings = torch.tensor([round(k * size / _STEPS) for k in range(_STEPS + 1)], dtype=torch.float64)
    savings[last] = min(float(savings[last]), math.floor(most * size + 1e-9))
    return Curve(name, values.cummax(0).values, savings.cummax(0).values, least=_STEPS - last)


def met_exactly(curves: Sequence[Curve], removed: Sequence[int], budget: int) -> list[int]:
    """Weights removed from every matrix, with what an allocation removes beyond the budget given back.

    The last steps are undone, the steepest (loss per weight) first, the last of them in part, so that the sum is the
    budget exactly. A curve is taken as linear within a step.

    Args:
        removed: the level of every curve.

    Raises:
        ValueError: the allocation removes less than the budget.
    """
    levels, exact = list(removed), [int(curve.savings[k]) for curve, k in zip(curves, removed, strict=True)]
    surplus = sum(exact) - budget
    if surplus < 0:
        raise ValueError(f"{-surplus} weights more are to go than the levels remove")
    while surplus > 0:
        steepest = max((l for l, k in enumerate(levels) if k > 0), key=lambda l: _slope(curves[l], levels[l]))
        least = int(curves[steepest].savings[levels[steepest] - 1])
        back = min(surplus, exact[steepest] - least)
        exact[steepest] -= back
        surplus -= back
        if exact[steepest] == least:
            levels[steepest] -= 1
    return exact


def _slope(curve: Curve, level: int) -> float:
    width = float(curve.savings[level] - curve.savings[level - 1])
    return float(curve.losses[level] - curve.losses[level - 1]) / width if width > 0 else -math.inf


def _unit_range(values: Tensor) -> Tensor:
    """(x - min) / (max - min), zeros where all are equal; infinite values count as the largest finite one."""
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return torch.zeros_like(values)
    values = values.clamp(max=float(finite.max()))
    width = values.max() - values.min()
    return (values - values.min()) / width if width > 0 else torch.zeros_like(values)


def _rounded(exact: Tensor, sizes: Sequence[int], budget: int) -> list[int]:
    """Whole numbers nearest to some that add up to the budget; the largest fractional parts are rounded up."""
    whole = [min(size, math.floor(x)) for x, size in zip(exact.tolist(), sizes, strict=True)]
    order = sorted(range(len(whole)), key=lambda l: (whole[l] - float(exact[l]), l))
    while (missing := budget - sum(whole)) != 0:
        sign = 1 if missing > 0 else -1
        room = [l for l in order if 0 <= whole[l] + sign <= sizes[l]][: abs(missing)]
        for l in room:
            whole[l] += sign
    return whole
