"""The levels to which an allocation rule prunes each matrix: sparsities, or patterns N:M."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from admm_prune.errors import UserError
from admm_prune.methods.target import Target, target_named
from admm_prune.models.structure import WeightView

DENSITIES = (2.2, 1.5, 1.0, 0.5, 0.25)  # of the levels of a curve, relative to the density of the whole
LOWER, HIGHER = 8, 3  # levels of EvoPress's table below and above the common sparsity s, (1 - s) / (HIGHER + 1) apart
NEARBY = (4 / 3, 3 / 4)  # densities next to that of the start of a search, relative to it
MIXED = ("4:8", "2:4", "1:4")  # the levels of the rule "patterns", in addition to dense


def curve_levels(target: Target, fraction: float) -> list[Target]:
    """The levels at which the error of a matrix is measured, without the dense level: all patterns, or sparsities.

    Args:
        fraction: the sparsity of the matrices that share the budget.
    """
    if target.pattern is not None:
        return _patterns(target.pattern[1])
    sparsities = {round(max(1.0 - factor * (1.0 - fraction), 0.05 * fraction), 6) for factor in DENSITIES}
    return [Target(sparsity=s) for s in sorted(sparsities - {1.0})]


def table_levels(target: Target, fraction: float) -> list[Target]:
    """The levels in the table of the evolutionary search, without the dense level: all patterns, or equidistant
    sparsities."""
    if target.pattern is not None:
        return _patterns(target.pattern[1])
    step = (1.0 - fraction) / (HIGHER + 1)
    return [Target(sparsity=s) for k in range(-LOWER, HIGHER + 1) if (s := fraction + k * step) > 0]


def _patterns(group: int) -> list[Target]:
    return [Target(pattern=(count, group)) for count in range(group - 1, 0, -1)]


@dataclass(frozen=True)
class NearbyLevels:
    """The levels of a matrix at and next to the level of an allocation.

    Attributes:
        targets: in order of increasing sparsity.
        start: the index of the level of the allocation.
    """

    targets: Sequence[Target]
    start: int


def nearby_levels(start: Target, most: float) -> NearbyLevels:
    """The levels of a matrix in the table of the search: its level in the start, a lower and a higher one.

    Args:
        start: the level in the start: a sparsity, or a pattern N:M.
        most: the largest sparsity of a matrix.
    """
    if start.pattern is not None:
        n, m = start.pattern
        levels = [Target(pattern=(count, m)) for count in (n + 1, n, n - 1) if 1 <= count <= m]
    else:
        nearby = (1.0 - factor * (1.0 - start.fraction) for factor in NEARBY)
        sparsities = {start.fraction, *(round(min(max(s, 0.0), max(most, start.fraction)), 6) for s in nearby)}
        levels = [Target(sparsity=s) for s in sorted(sparsities)]
    return NearbyLevels(levels, [str(level) for level in levels].index(str(start)))


def last_levels(rule: str, views: Sequence[WeightView], target: Target) -> list[Target]:
    """The level of each matrix that removes the most weights: 1:M for a pattern N:M, otherwise all of them."""
    if rule == "patterns":
        return [fitting(view)[-1] for view in views]
    return [Target(sparsity=1.0) if target.pattern is None else Target(pattern=(1, target.pattern[1]))] * len(views)


def most_removed(last: Sequence[Target], sizes: Sequence[int]) -> int:
    """The number of weights that matrices of these sizes lose together at their last levels."""
    return sum(level.removed_from(size) for level, size in zip(last, sizes, strict=True))


def fitting(view: WeightView) -> list[Target]:
    """The patterns of the rule "patterns" whose groups divide the inputs of a matrix.

    Raises:
        UserError: there are none.
    """
    targets = [target_named(text) for text in MIXED]
    targets = [to for to in targets if to.pattern is not None and view.shape[1] % to.pattern[1] == 0]
    if not targets:
        raise UserError(f"{view.name}: its {view.shape[1]} inputs fit none of the patterns {', '.join(MIXED)}")
    return targets


def dense_level(levels: Sequence[Target]) -> Target:
    """The target that keeps every weight: 0.0 or M:M and not "dense", so that the matrix still counts as pruned."""
    pattern = levels[0].pattern
    return Target(sparsity=0.0) if pattern is None else Target(pattern=(pattern[1], pattern[1]))
