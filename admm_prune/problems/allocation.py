"""Allocation: how many groups to remove from each sublayer of a model, to meet a budget together.

Sublayers are coupled only through curves: the cost and the saving of removing k groups. Every rule here gives each
step of each curve a price, which rises along the curve; steps are taken in the order of their prices, all sublayers
together, until the budget is met. So a larger budget never takes less from any sublayer, and the budget is exceeded by
less than the last step. Where that is too much, `refined` gives up the first property.

These formulas are a reconstruction, derived from the public description of STRUPRUNE (arXiv 2510.03246): energies, an
entropy by Stirling's formula, a softmax; the paper's own equations are not public.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from admm_prune.errors import UserError, check_at_least, check_fractions

_ROUNDING = 1e-9  # of all that could be saved
_SKEWED = 10.0  # energies whose largest is so many times their median are compared by their logarithms


@dataclass(frozen=True, eq=False)
class Curve:
    """The cost of removing k = 0..n groups from a sublayer, in the best order, and the saving.

    Args:
        name: of the sublayer.
        losses: (n + 1,), float64, losses[0] = 0, nondecreasing and finite.
        reported: (n + 1,), the losses to report where `losses` approximates them; by default these.
        savings: (n + 1,), float64, savings[0] = 0, nondecreasing, in units of the budget.
        least: groups that must be kept.
        multiple: the number of groups kept must be a multiple of it, unless all are kept.
        stays: the admissible numbers of groups kept, if restricted; keeping all is always admissible.
    """

    name: str
    losses: Tensor
    savings: Tensor
    least: int = 1
    multiple: int = 1
    stays: frozenset[int] | None = None
    reported: Tensor | None = None

    def __post_init__(self) -> None:
        if self.losses.shape != self.savings.shape or self.losses.ndim != 1 or len(self.losses) < 2:
            raise ValueError(f"{self.name}: losses and savings must be two series of one length, over 0..n groups")
        if not bool(self.losses.isfinite().all()):
            raise ValueError(f"{self.name}: the losses of a curve must be finite")

    @property
    def count(self) -> int:
        return len(self.losses) - 1

    def levels(self, most: float = 1.0) -> list[int]:
        """The numbers of groups that may be removed, ascending from 0, up to a fraction of all."""
        limit = min(self.count - self.least, math.floor(most * self.count + 1e-9))
        left = {k: self.count - k for k in range(limit + 1)}
        return [
            k for k, n in left.items() if k == 0 or (n % self.multiple == 0 and (self.stays is None or n in self.stays))
        ]

    def energy(self, fraction: float) -> float:
        """The mean loss per unit of saving, where this fraction of the groups, at least one, is removed."""
        k = min(self.count, max(1, round(fraction * self.count)))
        saved = float(self.savings[k])
        return float(self.losses[k]) / saved if saved > 0 else math.inf


@dataclass(frozen=True)
class Allocation:
    """The number of groups removed from each sublayer.

    Attributes:
        removed: by the name of the sublayer.
        saved: by all of it together.
        loss: the sum of the curves' losses.
        price: of the last step taken; its meaning depends on the rule.
        bound: a proven lower bound of the loss of every allocation that saves as much; None without a proof.
        order: the steps of all curves, as names and the groups removed after each, in the order of their prices; empty
            where the rule has none.
    """

    removed: dict[str, int]
    saved: float
    loss: float
    price: float | None = None
    bound: float | None = None
    notes: tuple[str, ...] = ()
    order: tuple[tuple[str, int], ...] = field(default=(), repr=False)

    @property
    def gap(self) -> float | None:
        """(loss - bound) / loss."""
        if self.bound is None:
            return None
        return 0.0 if self.loss == 0 else max((self.loss - self.bound) / self.loss, 0.0)  # NaN stays NaN


class Allocator(Protocol):
    """A rule. A frozen configuration."""

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        """Units to take from every sublayer.

        Args:
            budget: the total saving.

        Raises:
            ValueError: the curves cannot save so much; the message says how much they can.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """s_l = s: the same fraction of every sublayer; the limit of all temperatures at infinity."""

    most: float = 1.0

    def __post_init__(self) -> None:
        check_fractions(self, "most")

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        return take_steps(curves, budget, lambda _, middle: middle, self.most)


@dataclass(frozen=True)
class CappedSoftmax:
    """s_l = min(most, t exp(-e_l / T)): min sum N_l [e_l s_l + T s_l (ln s_l - 1)], s_l <= most, at the price t.

    The multinomial count of ways to spread what is removed, by Stirling's formula, gives N_l exp(-e_l / T) / (sum of
    these) of the budget to sublayer l, which can be more than the sublayer has; this is that problem with its box.

    Args:
        temperature: T, in standard deviations of the energies e_l (see `standardized`).
        most: the largest fraction that a sublayer may lose.
    """

    temperature: float = 1.0
    most: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, temperature=0)
        if self.temperature == 0:
            raise UserError("temperature of CappedSoftmax must be positive, not 0")
        check_fractions(self, "most")

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        shift = [e / self.temperature for e in standardized(energies(curves, budget))]
        return take_steps(curves, budget, lambda l, middle: middle.log() + shift[l], self.most)


@dataclass(frozen=True)
class Binomial:
    """s_l = most sigma((mu - e_l) / T): min sum N_l [e_l s_l - T h(s_l)], h the binary entropy, at the price mu.

    Counts the ways to choose the removed groups, prod C(n_l, k_l), by Stirling's formula; always within the box.
    T to infinity is uniform; T to 0 empties the sublayers of the least energy first.
    """

    temperature: float = 1.0
    most: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, temperature=0)
        check_fractions(self, "most")

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        e = standardized(energies(curves, budget))
        t = self.temperature
        return take_steps(curves, budget, lambda l, middle: e[l] + t * torch.logit(middle / self.most), self.most)


@dataclass(frozen=True)
class EqualSlope:
    """e_l'(s_l) + T logit(s_l / most) = mu: the slopes of the convexified curves are equal, up to an entropy.

    At T = 0 this is the global greedy choice (water filling): of sorted scores Q_gg, one threshold Q_gg / c_g over all
    sublayers; at T = inf it is uniform. T is in standard deviations of the sublayers' mean slopes.
    """

    temperature: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, temperature=0)
        check_fractions(self, "most")

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        if math.isinf(self.temperature):
            return Uniform(self.most).allocate(curves, budget)
        slopes = [convex_slopes(curve.losses, curve.savings) for curve in curves]
        spread = _deviation(energies(curves, budget)) * self.temperature

        def price(l: int, middle: Tensor) -> Tensor:
            at = (middle * curves[l].count).long().clamp_max(curves[l].count - 1)
            entropy = spread * torch.logit(middle / self.most) if spread > 0 else 0.0
            return slopes[l][at] + entropy

        return take_steps(curves, budget, price, self.most)


@dataclass(frozen=True)
class Owl:
    """s_l = s + lambda (mean D - D_l) / max |D - mean D|: sublayers with more outliers lose less, by at most lambda.

    D_l is the fraction of groups whose own loss is more than `factor` times the sublayer's mean.

    Source: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), 2023, whose groups are weights.
    """

    spread: float = 0.08
    factor: float = 5.0

    def __post_init__(self) -> None:
        check_at_least(self, spread=0, factor=0)

    def allocate(self, curves: Sequence[Curve], budget: float) -> Allocation:
        shares = []
        for curve in curves:
            rises = curve.losses.diff()
            shares.append(float((rises > self.factor * rises.mean()).double().mean()))
        mean = sum(shares) / len(shares)
        largest = max(abs(share - mean) for share in shares) or 1.0
        shift = [self.spread * (share - mean) / largest for share in shares]
        return take_steps(curves, budget, lambda l, middle: middle + shift[l])


class Price(Protocol):
    def __call__(self, l: int, middle: Tensor, /) -> Tensor:
        """The prices at some fractions of curve l, never falling."""
        ...


def take_steps(curves: Sequence[Curve], budget: float, price: Price, most: float = 1.0) -> Allocation:
    """Takes steps of the curves in the order of their prices until the budget is met.

    Args:
        price: of a step, at the fraction in its middle. Ties: the step that leads to the smaller fraction goes first,
            then the earlier curve.
        most: the largest fraction of a sublayer.

    Raises:
        ValueError: the curves cannot save so much.
    """
    check_budget(curves, budget, most)
    steps: list[tuple[float, float, int, int]] = []  # (price, fraction, curve, groups gone after it)
    for l, curve in enumerate(curves):
        levels = curve.levels(most)
        if len(levels) > 1:
            at = torch.tensor(levels, dtype=torch.float64)
            prices = price(l, (at[1:] + at[:-1]) / 2 / curve.count).cummax(0).values
            steps += [(float(p), to / curve.count, l, to) for p, to in zip(prices, levels[1:], strict=True)]
    removed = [0] * len(curves)
    saved, needed, last = 0.0, required_saving(curves, budget), None
    steps.sort()
    for worth, _, l, to in steps:
        if saved >= needed:
            break
        saved += float(curves[l].savings[to] - curves[l].savings[removed[l]])
        removed[l], last = to, worth
    order = tuple((curves[l].name, to) for _, _, l, to in steps)
    return replace(allocation(curves, removed, price=last), order=order)


def refined(curves: Sequence[Curve], start: Allocation, budget: float, tolerance: float) -> Allocation:
    """An allocation with less surplus, where it saves more than the budget by more than a tolerance.

    A step of a curve with few groups may be larger than all that is missing. Two remedies are tried: steps before it
    are undone, the dearest by the rule first, as long as the budget is met; or the steps that save too much are left
    out, for those of the other curves that come next. Of those within the tolerance the one of less loss is taken,
    otherwise the one of less surplus.

    Args:
        start: by `take_steps`; an allocation without an order is returned as it is.
        tolerance: in units of the budget.
    """
    needed = required_saving(curves, budget)
    if not start.order or start.saved <= needed + tolerance:
        return start
    named = {curve.name: curve for curve in curves}
    tried = [
        allocation(curves, [removed[curve.name] for curve in curves], price=start.price)
        for removed in (start.removed, _undone(named, start, needed), _without(named, start, needed, tolerance))
        if removed is not None
    ]
    best = min(tried, key=lambda one: (max(one.saved - needed, tolerance), one.loss, one.saved))
    return replace(best, order=start.order)


def _undone(curves: Mapping[str, Curve], start: Allocation, needed: float) -> dict[str, int]:
    """What is removed without the dearest steps that the budget can spare."""
    before, last = _levels_before(start.order), dict(start.removed)
    surplus = start.saved - needed
    for name, to in reversed(start.order):
        if last[name] == to:  # steps below one that stays are not undone
            width = float(curves[name].savings[to] - curves[name].savings[before[name, to]])
            if width <= surplus:
                surplus -= width
                last[name] = before[name, to]
    return last


def _without(curves: Mapping[str, Curve], start: Allocation, needed: float, tolerance: float) -> dict[str, int] | None:
    """What is removed where curves end before a step that saves too much; None where that does not meet the budget."""
    before, removed, saved = _levels_before(start.order), dict.fromkeys(curves, 0), 0.0
    for name, to in start.order:
        if saved >= needed:
            break
        if removed[name] == before[name, to]:  # none of its steps was left out
            width = float(curves[name].savings[to] - curves[name].savings[removed[name]])
            if saved + width <= needed + tolerance:
                saved += width
                removed[name] = to
    return removed if saved >= needed else None


def _levels_before(order: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """The groups removed before every step, which come in ascending order for each curve."""
    at: dict[str, int] = {}
    before: dict[tuple[str, int], int] = {}
    for name, to in order:
        before[name, to] = at.get(name, 0)
        at[name] = to
    return before


def energies(curves: Sequence[Curve], budget: float) -> list[float]:
    """e_l: the mean loss per unit of saving where every sublayer has lost the mean fraction."""
    total = sum(float(curve.savings[-1]) for curve in curves)
    return [curve.energy(budget / total if total > 0 else 0.0) for curve in curves]


def standardized(values: Sequence[float]) -> list[float]:
    """(e - mean) / deviation, of the logarithms where a few energies outweigh the others; zeros where all are equal."""
    finite = [value for value in values if math.isfinite(value)]
    middle = sorted(finite)[len(finite) // 2] if finite else 0.0
    if finite and min(finite) > 0 and max(finite) > _SKEWED * middle:
        values = [math.log(value) if math.isfinite(value) else value for value in values]
    deviation = _deviation(values)
    known = [value for value in values if math.isfinite(value)]
    mean = sum(known) / len(known) if known else 0.0
    return [(value - mean) / deviation if deviation > 0 else 0.0 for value in values]


def convex_slopes(losses: Tensor, savings: Tensor) -> Tensor:
    """Slopes d loss / d saving of the steps of a curve, made never falling: those of its lower convex hull.

    Steps that save nothing cost infinitely much.
    """
    rises, widths = losses.diff().tolist(), savings.diff().tolist()
    blocks: list[list[float]] = []  # [rise, width, steps]
    for rise, width in zip(rises, widths, strict=True):
        blocks.append([rise, width, 1.0])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            pooled = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], pooled, strict=True)]
    slopes = [rise / width if width > 0 else math.inf for rise, width, steps in blocks for _ in range(int(steps))]
    return torch.tensor(slopes, dtype=torch.float64)


def together(name: str, curves: Sequence[Curve]) -> Curve:
    """A common curve for sublayers of the same size that lose the same number of groups."""
    return Curve(
        name,
        torch.stack([curve.losses for curve in curves]).sum(0),
        torch.stack([curve.savings for curve in curves]).sum(0),
        least=max(curve.least for curve in curves),
        multiple=curves[0].multiple,
        stays=curves[0].stays,
    )


def check_budget(curves: Sequence[Curve], budget: float, most: float = 1.0) -> None:
    """Raises ValueError where the curves cannot save so much; the message says how much they can."""
    possible = sum(float(curve.savings[curve.levels(most)[-1]]) for curve in curves)
    if possible < required_saving(curves, budget):
        total = sum(float(curve.savings[-1]) for curve in curves) or 1.0
        raise ValueError(
            f"{budget / total:.2%} is to go, and {possible / total:.2%} can go at most: each sublayer keeps its minimum"
        )


def allocation(
    curves: Sequence[Curve],
    removed: Sequence[int],
    *,
    price: float | None = None,
    bound: float | None = None,
    notes: tuple[str, ...] = (),
) -> Allocation:
    """The saving and the cost of removing given numbers of groups from every curve."""
    pairs = list(zip(curves, removed, strict=True))
    return Allocation(
        removed={curve.name: k for curve, k in pairs},
        saved=sum(float(curve.savings[k]) for curve, k in pairs),
        loss=sum(float(curve.losses[k]) for curve, k in pairs),
        price=price,
        bound=bound,
        notes=notes,
    )


def required_saving(curves: Sequence[Curve], budget: float) -> float:
    """The saving that meets the budget, up to rounding."""
    return budget - _ROUNDING * sum(float(curve.savings[-1]) for curve in curves)


def _deviation(values: Iterable[float]) -> float:
    known = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    return float(known.std(correction=0)) if len(known) else 0.0
