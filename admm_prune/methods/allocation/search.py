"""Searches for the allocation with the least loss on held-out calibration text: one along gradients of the loss, and an
evolutionary one.

As in EvoPress, both evaluate allocations from a table that has each matrix pruned to a few levels: an evaluation is one
forward pass over the held-out text. The method of the run then prunes the model to the best allocation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.methods.allocation.measurements import backward, check_finite_gradients, mean_loss
from admm_prune.methods.base import Journal
from admm_prune.models.structure import WeightView
from admm_prune.problems.allocation import Curve
from admm_prune.problems.allocation_matrices import counts, nearest_levels

_STEP = 0.5  # first step, in logits
_FAILURES = 3  # allocations in turn that are not better, after which the step is shortened
_SHRINKAGE = 0.5  # of the step
_SMALLEST = 0.06  # the search ends when the step is shorter
_CLIP = 2.0  # of the deviation of d_l from the mean, relative to the mean of |d_l|
_EXTREMES = (1e-3, 1.0 - 1e-3)  # of s_l / most where z_l is derived from it
_FLATTEST = 0.02  # least s_l (1 - s_l / most) in the weights of these means: they include matrices at sparsity 0
GRADIENT_PASSES = 3  # forward passes that take as long as a gradient: a backward pass takes as long as two
_OFFSPRING = 16
_MOST_SWITCHES = 3
_PART = "allocation-search"  # name of the search in the journal


class Losses(Protocol):
    """The loss of a model as a function of the level of each matrix."""

    def loss(self, chosen: Sequence[int]) -> float:
        """The loss on held-out text."""
        ...

    def rises(self, chosen: Sequence[int], step: int) -> list[float]:
        """For each matrix, the first-order change of the loss from the level below the given one to the level above it,
        on text that is not held out, another part of it in every step."""
        ...


@dataclass(eq=False)
class Table:
    """The loss of a model from its matrices at each level.

    Args:
        text: on which gradients are taken, at most as many sequences at a time as are held out.
        held_out: on which the loss is measured.
        views: the matrices.
        weights: for each matrix, its weights at each level; None where it is dense.

    Attributes:
        current: the level at which each matrix is now; None before the first evaluation.
    """

    model: nn.Module
    text: Sequences
    held_out: Sequences
    views: Sequence[WeightView]
    weights: Sequence[Sequence[Tensor | None]]
    current: list[int | None] = field(init=False)

    def __post_init__(self) -> None:
        self.current = [None] * len(self.views)
        self._dense = [view.read().clone() for view in self.views]

    def loss(self, chosen: Sequence[int]) -> float:
        """The mean cross-entropy of the held-out text, in nats per token."""
        self._write(chosen)
        return mean_loss(self.model, self.held_out)

    def rises(self, chosen: Sequence[int], step: int) -> list[float]:
        """For each matrix <g, W_above - W_below>, in nats per token: g is the gradient of the mean loss on a part of
        the text at the given levels, W_above and W_below are the matrix at the levels around its own.

        Raises:
            UserError: the gradients of a matrix, named in the message, are not finite.
        """
        self._write(chosen)
        count = len(self.held_out.rows)
        parts = -(-len(self.text.rows) // count)
        part = replace(self.text, rows=self.text.rows[step % parts :: parts])
        index = {view.name: i for i, view in enumerate(self.views)}
        changes = torch.zeros(len(self.views), dtype=torch.float64)

        def reduce(view: WeightView, gradient: Tensor) -> None:
            i = index[view.name]
            below, above = neighbours(len(self.weights[i]) - 1, chosen[i])
            change = self._at(i, above).to(gradient) - self._at(i, below).to(gradient)
            changes[i] += (gradient * change).sum(dtype=torch.float64).cpu()

        tokens = backward(self.model, part.batches, self.views, reduce)
        for view, change in zip(self.views, changes, strict=True):
            check_finite_gradients(view, change)
        return [float(change) / tokens for change in changes]

    def _at(self, i: int, level: int) -> Tensor:
        weight = self.weights[i][level]
        return self._dense[i] if weight is None else weight

    def _write(self, chosen: Sequence[int]) -> None:
        for i, (view, level) in enumerate(zip(self.views, chosen, strict=True)):
            if level != self.current[i]:
                view.write(self._at(i, level))
                self.current[i] = level

    def restore(self) -> None:
        """Makes the matrices dense again."""
        for view, dense in zip(self.views, self._dense, strict=True):
            view.write(dense)
        self.current = [None] * len(self.views)


@dataclass(frozen=True)
class Space:
    """Allocations s_l = most * sigma(z_l + t), parameterized by z; t is determined by the budget.

    Args:
        sizes: the number of weights of each matrix.
        curves: whose savings are the weights that each level of a matrix removes in addition to its first level.
        budget: the number of weights to remove.
        most: the largest sparsity of a matrix.
        first: for each matrix, the number of weights that its first level removes.
    """

    sizes: Sequence[int]
    curves: Sequence[Curve]
    budget: int
    most: float
    first: Sequence[int]

    def logits(self, levels: Sequence[int]) -> Tensor:
        """The z at which each matrix has the sparsity of its level, at t = 0; within +-7."""
        return (self.sparsities(levels) / self.most).clamp(*_EXTREMES).logit()

    def within_levels(self, z: Tensor) -> Tensor:
        """z within the levels of each matrix."""
        return z.clamp(self.logits([0] * len(self.curves)), self.logits([curve.count for curve in self.curves]))

    def removed(self, z: Tensor) -> list[int]:
        """The number of weights that each matrix loses; they add up to the budget."""
        return counts(self.sizes, lambda t: (z + t).sigmoid() * self.most, self.budget)

    def levels(self, z: Tensor) -> list[int]:
        """The levels of the table nearest to `removed`."""
        removed = [count - first for count, first in zip(self.removed(z), self.first, strict=True)]
        chosen = nearest_levels(self.curves, removed, self.budget - sum(self.first))
        return [chosen.removed[curve.name] for curve in self.curves]

    def removed_at(self, levels: Sequence[int]) -> Tensor:
        """The number of weights that each matrix loses at its level."""
        added = torch.stack([curve.savings[k] for curve, k in zip(self.curves, levels, strict=True)])
        return added + torch.tensor(self.first, dtype=torch.float64)

    def sparsities(self, levels: Sequence[int]) -> Tensor:
        """The fraction of its weights that each matrix loses at its level."""
        return self.removed_at(levels) / torch.tensor(self.sizes, dtype=torch.float64)


def neighbours(highest: int, level: int) -> tuple[int, int]:
    """The levels below and above a level, or the level itself at either end."""
    return max(level - 1, 0), min(level + 1, highest)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        levels: the level of each matrix in the best allocation.
        loss: the held-out loss of that allocation.
        start: the held-out loss of the first allocation.
        passes: the number of forward passes over the held-out text; gradients count as three.
    """

    levels: list[int]
    loss: float
    start: float
    passes: int


class _Counted:
    """Losses that count their passes, and read the values of an interrupted run from the journal."""

    def __init__(self, losses: Losses, journal: Journal) -> None:
        self._losses, self._journal = losses, journal
        self._known = journal.finished(_PART)
        self._index = 0
        self.passes = 0

    def loss(self, chosen: Sequence[int]) -> float:
        self.passes += 1
        return float(self._value("loss", chosen, lambda: self._losses.loss(chosen)))

    def rises(self, chosen: Sequence[int], step: int) -> list[float]:
        self.passes += GRADIENT_PASSES
        return [*self._value("rises", chosen, lambda: self._losses.rises(chosen, step))]

    def _value(self, kind: str, chosen: Sequence[int], measure: Callable[[], Any]) -> Any:
        index, self._index = self._index, self._index + 1
        known = self._known[index] if index < len(self._known) else None
        if known is not None and kind in known and known["levels"] == [*chosen]:
            return known[kind]  # otherwise gradients differ in the last bits after a restart, and led elsewhere
        value = measure()
        if known is None:
            self._journal.commit(_PART, index, {kind: value, "levels": [*chosen]})
        return value


def gradient_search(space: Space, losses: Losses, start: Tensor, passes: int, journal: Journal) -> SearchResult:
    """Descends the loss of the pruned model along its gradient by the levels, on one part of the text after another.

    With d_l the change of the loss per weight that matrix l loses in addition, an allocation within the budget is
    stationary where all d_l are equal. A step is

        z_l <- z_l - step * clip((d_l - mu) / m, -2, 2),

    where mu is the mean of d_l and m that of |d_l|, weighted by n_l s_l (1 - s_l / most), the weights that matrix l
    loses per unit of z_l (with s_l (1 - s_l / most) at least 0.02). d_l is the difference quotient of the first-order
    change between the neighbouring levels. z_l stays within the levels of the matrix. After three allocations in turn
    that do not lower the held-out loss, or one at which it is not finite, the search returns to the best one and halves
    its step. It ends when the passes are used or the step is short. Every measurement is committed to the journal.

    Args:
        start: z at the beginning.
        passes: the maximum number of forward passes over the held-out text, including that of the start. A gradient
            counts as three.
        journal: of the run.
    """
    value = _Counted(losses, journal)
    first = least = value.loss(space.levels(start))
    z = best = start
    step, failures, gradients = _STEP, 0, 0
    while value.passes + GRADIENT_PASSES < passes and step >= _SMALLEST:
        levels = space.levels(z)
        z = space.within_levels(z - step * _direction(space, levels, value.rises(levels, gradients)))
        gradients += 1
        trial = space.levels(z)
        reached = value.loss(trial) if trial != levels else least
        if reached < least:
            best, least, failures = z, reached, 0
        else:
            failures += 1
        if failures == _FAILURES or math.isinf(reached):
            z, step, failures = best, _SHRINKAGE * step, 0
    return SearchResult(space.levels(best), least, first, value.passes)


def _direction(space: Space, levels: Sequence[int], rises: Sequence[float]) -> Tensor:
    """clip((d_l - mu) / m, -2, 2), see `gradient_search`; 0 for a matrix that has no other level."""
    around = [neighbours(curve.count, k) for curve, k in zip(space.curves, levels, strict=True)]
    widths = space.removed_at([above for _, above in around]) - space.removed_at([below for below, _ in around])
    free = widths > 0
    sizes = torch.tensor(space.sizes, dtype=torch.float64)
    sparsities = space.sparsities(levels)
    d = torch.where(free, torch.tensor(rises, dtype=torch.float64) / widths.clamp_min(1.0), 0.0)
    weights = free * sizes * (sparsities * (1.0 - sparsities / space.most)).clamp_min(_FLATTEST)
    total = weights.sum()
    magnitude = (weights * d.abs()).sum() / total
    if not magnitude > 0:  # no matrix can change, or the loss depends on none
        return torch.zeros_like(d)
    mean = (weights * d).sum() / total
    return torch.where(free, ((d - mean) / magnitude).clamp(-_CLIP, _CLIP), 0.0)


def evolutionary_search(
    space: Space, losses: Losses, start: Sequence[int], passes: int, journal: Journal, seed: int = 0
) -> SearchResult:
    """The search of EvoPress, a baseline: level switches between matrices of equal size; the best offspring survives.

    Each generation has 16 offspring of the best allocation so far. A mutation raises the level of one matrix and lowers
    that of another one of the same size; an offspring has min(u, v) mutations, u and v uniform in {1, 2, 3}.
    Selection is one step, by the loss on the whole held-out text. The search ends early if no mutation is possible.

    Source: Sieberling et al., EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search, 2024,
    algorithm 1 and section 3.3, whose selection has several steps on growing texts, by the KL divergence.
    """
    value, generator = _Counted(losses, journal), random.Random(seed)
    alike: dict[int, list[int]] = {}
    for i, size in enumerate(space.sizes):
        alike.setdefault(size, []).append(i)
    parent = list(start)
    least = first = value.loss(parent)
    while value.passes < passes:
        offspring = [_mutated(parent, space.sizes, alike, space.curves, generator) for _ in range(_OFFSPRING)]
        if all(child == parent for child in offspring):
            if not any(_partners(parent, i, space.sizes, alike, space.curves) for i in _raisable(parent, space.curves)):
                break
            continue
        values = [value.loss(child) for child in offspring[: passes - value.passes]]
        best = min(range(len(values)), key=values.__getitem__)
        if values[best] < least:
            parent, least = offspring[best], values[best]
    return SearchResult(parent, least, first, value.passes)


def _mutated(
    parent: Sequence[int],
    sizes: Sequence[int],
    alike: Mapping[int, Sequence[int]],
    curves: Sequence[Curve],
    generator: random.Random,
) -> list[int]:
    child = list(parent)
    switches = min(generator.randint(1, _MOST_SWITCHES), generator.randint(1, _MOST_SWITCHES))
    for _ in range(switches):
        raisable = _raisable(child, curves)
        if not raisable:  # all matrices are at their last level
            break
        raised = generator.choice(raisable)
        others = _partners(child, raised, sizes, alike, curves)
        if others:
            child[raised] += 1
            child[generator.choice(others)] -= 1
    return child


def _raisable(levels: Sequence[int], curves: Sequence[Curve]) -> list[int]:
    """The indices of the matrices that have a higher level."""
    return [i for i in range(len(levels)) if levels[i] < curves[i].count]


def _partners(
    levels: Sequence[int],
    raised: int,
    sizes: Sequence[int],
    alike: Mapping[int, Sequence[int]],
    curves: Sequence[Curve],
) -> list[int]:
    """The indices of the matrices whose level can be lowered when that of another one is raised, at equal cost."""
    step = _step(curves[raised], levels[raised] + 1)
    return [
        i
        for i in alike[sizes[raised]]
        if i != raised and levels[i] > 0 and abs(_step(curves[i], levels[i]) - step) <= 1  # up to rounding
    ]


def _step(curve: Curve, level: int) -> float:
    """The number of weights that a level removes in addition to the one below it."""
    return float(curve.savings[level] - curve.savings[level - 1])
