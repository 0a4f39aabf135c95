"""Searches for the allocation with the least loss on held-out calibration text: a pattern search and an evolutionary
one.

As in EvoPress, both evaluate allocations from a table that has each matrix pruned to a few levels: an evaluation is one
forward pass over the held-out text. The method of the run then prunes the model to the best allocation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.methods.allocation.measurements import mean_loss
from admm_prune.methods.base import Journal
from admm_prune.models.structure import WeightView
from admm_prune.problems.allocation import Curve
from admm_prune.problems.allocation_matrices import counts, nearest_levels

_STEP = 0.5  # first step of a group, in logits
_GROWTH, _SHRINKAGE = 1.5, 0.5  # factors of the step after an accepted and after a rejected move
_SMALLEST, _LARGEST = 0.06, 8.0  # steps beyond which a group is no longer moved
_OFFSPRING = 16
_MOST_SWITCHES = 3
_PART = "allocation-search"  # name of the search in the journal

Loss = Callable[[Sequence[int]], float]  # from the level of each matrix to the loss


@dataclass(eq=False)
class Table:
    """The loss of a model as a function of the level of each matrix; level 0 is dense.

    Args:
        text: on which the loss is measured.
        views: the matrices.
        weights: for each matrix, its pruned weights at levels 1, 2, ...

    Attributes:
        current: the level at which each matrix is now.
    """

    model: nn.Module
    text: Sequences
    views: Sequence[WeightView]
    weights: Sequence[Sequence[Tensor]]
    current: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.current = [0] * len(self.views)
        self._dense = [view.read().clone() for view in self.views]

    def loss(self, chosen: Sequence[int]) -> float:
        """The mean cross-entropy of the held-out text, in nats."""
        for i, (view, level) in enumerate(zip(self.views, chosen, strict=True)):
            if level != self.current[i]:
                view.write(self._dense[i] if level == 0 else self.weights[i][level - 1])
                self.current[i] = level
        return mean_loss(self.model, self.text)

    def restore(self) -> None:
        """Makes the matrices dense again."""
        for view, dense in zip(self.views, self._dense, strict=True):
            view.write(dense)
        self.current = [0] * len(self.views)


@dataclass(frozen=True)
class Space:
    """Allocations s_l = most * sigma(z_l + t), parameterized by z; t is determined by the budget.

    Args:
        sizes: the number of weights of each matrix.
        curves: whose savings are the weights that each level of a matrix removes.
        budget: the number of weights to remove.
        most: the largest sparsity of a matrix.
    """

    sizes: Sequence[int]
    curves: Sequence[Curve]
    budget: int
    most: float = 1.0

    def removed(self, z: Tensor) -> list[int]:
        """The number of weights that each matrix loses; they add up to the budget."""
        return counts(self.sizes, lambda t: (z + t).sigmoid() * self.most, self.budget)

    def levels(self, z: Tensor) -> list[int]:
        """The levels of the table nearest to `removed`."""
        chosen = nearest_levels(self.curves, self.removed(z), self.budget)
        return [chosen.removed[curve.name] for curve in self.curves]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        levels: the level of each matrix in the best allocation.
        loss: the held-out loss of that allocation.
        start: the held-out loss of the first allocation.
        passes: the number of forward passes over the held-out text.
    """

    levels: list[int]
    loss: float
    start: float
    passes: int


class _Counted:
    """A loss that counts its evaluations, and reads those of an interrupted run from the journal."""

    def __init__(self, loss: Loss, journal: Journal) -> None:
        self._loss, self._journal = loss, journal
        self._known = journal.finished(_PART)
        self.count = 0

    def __call__(self, chosen: Sequence[int]) -> float:
        index, self.count = self.count, self.count + 1
        known = self._known[index] if index < len(self._known) else None
        if known is not None and known["levels"] == [*chosen]:  # gradients may differ in the last bits after a restart
            return float(known["loss"])
        value = self._loss(chosen)
        if known is None:
            self._journal.commit(_PART, index, {"loss": value, "levels": [*chosen]})
        return value


def pattern_search(
    space: Space, loss: Loss, starts: Sequence[Tensor], groups: Sequence[Sequence[int]], passes: int, journal: Journal
) -> SearchResult:
    """The coordinate search of Hooke and Jeeves along groups of matrices: moves budget between a group and all other
    matrices, and accepts a move if the held-out loss decreases.

    The groups take turns, each with its own step in z, which is multiplied by 1.5 after an accepted move, and by -0.5
    after a rejected one. They are ordered from coarse (matrices of one kind, ranges of blocks) to fine (one block, one
    matrix), so that the first evaluations decide what most of the loss depends on. Once all steps are short they are
    reset, until a round accepts no move. Every evaluation is committed to the journal.

    Args:
        starts: values of z; the search begins at the best one.
        groups: the indices of their matrices, coarse groups first.
        passes: the maximum number of evaluations, including those of the starts.
        journal: of the run.
    """
    value = _Counted(loss, journal)
    values = [value(space.levels(z)) for z in starts[:passes]]
    best = min(range(len(values)), key=values.__getitem__)
    z, least, start = starts[best].clone(), values[best], values[0]
    current = tuple(space.levels(z))
    seen, improved = {current}, True
    while value.count < passes and improved:
        improved = False
        steps = [_STEP] * len(groups)
        moved = [False] * len(groups)  # whether a step has changed a level
        while value.count < passes and any(steps):
            for g, group in enumerate(groups):
                if value.count >= passes:
                    break
                if steps[g] == 0.0:
                    continue
                trial = z.clone()
                trial[list(group)] += steps[g]
                chosen = tuple(space.levels(trial))
                if chosen == current:  # too short to change a level
                    steps[g] = 0.0 if moved[g] or steps[g] > _LARGEST else _GROWTH * steps[g]
                    continue
                moved[g] = True
                reached = math.inf if chosen in seen else value(chosen)
                seen.add(chosen)
                better = reached < least
                if better:
                    z, least, current, improved = trial, reached, chosen, True
                steps[g] *= _GROWTH if better else -_SHRINKAGE
                if abs(steps[g]) < _SMALLEST:
                    steps[g] = 0.0
    return SearchResult(list(current), least, start, value.count)


def evolutionary_search(
    space: Space, loss: Loss, start: Sequence[int], passes: int, journal: Journal, seed: int = 0
) -> SearchResult:
    """The search of EvoPress, a baseline: level switches between matrices of equal size; the best offspring survives.

    Each generation has 16 offspring of the best allocation so far. A mutation raises the level of one matrix and lowers
    that of another one of the same size; an offspring has min(u, v) mutations, u and v uniform in {1, 2, 3}.
    Selection is one step, by the loss on the whole held-out text. The search ends early if no mutation is possible.

    Source: Sieberling et al., EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search, 2024,
    algorithm 1 and section 3.3, whose selection has several steps on growing texts, by the KL divergence.
    """
    value, generator = _Counted(loss, journal), random.Random(seed)
    alike: dict[int, list[int]] = {}
    for i, size in enumerate(space.sizes):
        alike.setdefault(size, []).append(i)
    parent = list(start)
    least = first = value(parent)
    while value.count < passes:
        offspring = [_mutated(parent, space.sizes, alike, space.curves, generator) for _ in range(_OFFSPRING)]
        if all(child == parent for child in offspring):
            if not any(_partners(parent, i, space.sizes, alike, space.curves) for i in _raisable(parent, space.curves)):
                break
            continue
        values = [value(child) for child in offspring[: passes - value.count]]
        best = min(range(len(values)), key=values.__getitem__)
        if values[best] < least:
            parent, least = offspring[best], values[best]
    return SearchResult(parent, least, first, value.count)


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
