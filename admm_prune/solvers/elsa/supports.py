"""The support of the largest scores, for weights in one process or sharded over many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.ops import histogram, selection
from admm_prune.point import Point
from admm_prune.problem import SupportConstraint
from admm_prune.prunable import kept_count
from admm_prune.solvers.elsa.anchors import Processes, Weight, all_gather, local_shard, processes_of, totals
from admm_prune.solvers.elsa.settings import Score, check_choice

# An F that underflowed counts as just under the smallest float32, a power of 2, so that |a| decides, without rounding.
LEAST_FISHER = 2.0**-152
_LEAST_FACTOR = 2.0**-100
_ROUNDING = 1e-9  # of a fraction that is a quotient of two sparsities

Scope = Literal["matrix", "model"]
Selected = Iterator[tuple[Weight, Tensor, Tensor]]
ScoreOf = Callable[[Weight], Tensor]


class Support(Protocol):
    """A family of supports of several weights."""

    def select(self, weights: Sequence[Weight], score: ScoreOf, fraction: float) -> Selected:
        """Yields each weight once with its mask and its scores, both for the local shard.

        Args:
            score: computes the scores of a weight's local shard, in its stored shape.
            fraction: of the final sparsity.
        """
        ...


@dataclass(frozen=True)
class Budget:
    """round((1 - sparsity) n) entries of every matrix of n, those of each expert too, or of all together.

    "model" compares scores between matrices, those of each expert too, after a division by their mean. Matrices
    sharded by rows are compared by a histogram: only counts are communicated, never scores.
    """

    sparsity: float
    scope: Scope = "matrix"

    def __post_init__(self) -> None:
        check_choice("scope of a sparsity", self.scope, Scope)
        if not 0.0 <= self.sparsity <= 1.0:
            raise UserError(f"sparsity must lie between 0 and 1, not {self.sparsity}")

    def select(self, weights: Sequence[Weight], score: ScoreOf, fraction: float) -> Selected:
        if self.scope == "model":
            yield from self._jointly(weights, score, fraction)
            return
        divided: dict[Processes, list[Weight]] = {}
        for weight in weights:
            processes = processes_of(weight.parameter)
            if processes is None:
                scores = score(weight)
                each = list(scores) if weight.stacked else [scores]
                expert_masks = [selection.largest(matrix, self._keep(matrix.numel(), fraction)) for matrix in each]
                yield weight, torch.stack(expert_masks) if weight.stacked else expert_masks[0], scores
            elif weight.stacked:
                raise UserError(f"{weight.name} holds the matrices of experts and is sharded: give a pattern instead")
            else:
                divided.setdefault(processes, []).append(weight)
        for processes, group in divided.items():
            all_scores = [score(weight).float() for weight in group]
            budgets = [
                histogram.Budget([scores], self._keep(weight.entries, fraction))
                for weight, scores in zip(group, all_scores, strict=True)
            ]
            masks = (mask for (mask,) in histogram.largest(budgets, processes))
            yield from zip(group, masks, all_scores, strict=True)

    def _jointly(self, weights: Sequence[Weight], score: ScoreOf, fraction: float) -> Selected:
        groups = {processes_of(weight.parameter) for weight in weights}
        if len(groups) > 1:
            raise UserError("one budget for the model needs weights that are sharded over the same processes, or none")
        scores = [score(weight).float() for weight in weights]
        sums = totals(
            [weight.parameter for weight in weights], torch.stack([s.sum(dtype=torch.float64) for s in scores])
        )
        for weight, scores_here, total in zip(weights, scores, sums.tolist(), strict=True):
            if weight.stacked:  # experts are whole in every process
                means = scores_here.flatten(1).mean(1, dtype=torch.float64)
                scores_here.div_(means.where(means > 0, 1.0).to(scores_here)[:, None, None])
            else:
                scores_here.mul_(weight.entries / total if total > 0 else 1.0)
        keep = self._keep(sum(weight.entries for weight in weights), fraction)
        (masks,) = histogram.largest([histogram.Budget(scores, keep)], groups.pop() or histogram.Alone())
        yield from zip(weights, masks, scores, strict=True)

    def _keep(self, entries: int, fraction: float) -> int:
        sparsity = self.sparsity * fraction
        return max(kept_count(sparsity, entries), 0 if sparsity == 1.0 else 1)


@dataclass(frozen=True)
class Pattern:
    """n kept of every m consecutive inputs. Rows are whole in every process, so nothing is exchanged."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise UserError(f"pattern {self.n}:{self.m} must keep from 1 to {self.m} of every {self.m}")

    def select(self, weights: Sequence[Weight], score: ScoreOf, fraction: float) -> Selected:
        # Rounded up: the last weights of a group are removed at the end of the ramp.
        n = self.m - int((self.m - self.n) * fraction + _ROUNDING)
        for weight in weights:
            scores = score(weight)
            if weight.transposed and processes_of(weight.parameter) is not None:
                raise UserError(
                    f"{weight.name} is stored transposed and sharded, which cuts its groups apart: give a sparsity"
                )
            by_rows = scores.mT if weight.transposed else scores
            if by_rows.shape[-1] % self.m:
                raise UserError(
                    f"{weight.name}: {self.m} does not divide its {by_rows.shape[-1]} inputs: give a sparsity"
                )
            mask = selection.largest_per_group(by_rows, n, self.m)
            yield weight, (mask.mT if weight.transposed else mask), scores


@dataclass(frozen=True)
class Within:
    """The supports of any SupportConstraint over the point of all the weights.

    It needs all rows: sharded scores are gathered in every process.
    """

    constraint: SupportConstraint

    def select(self, weights: Sequence[Weight], score: ScoreOf, fraction: float) -> Selected:
        constraint = self.constraint if fraction >= 1.0 else self.constraint.scaled_to(fraction)
        scores = {weight.name: score(weight) for weight in weights}
        whole = {weight.name: all_gather(weight.parameter, scores[weight.name]) for weight in weights}
        masks = constraint.select(Point({w.name: whole[w.name].mT if w.transposed else whole[w.name] for w in weights}))
        for weight in weights:
            mask = masks[weight.name].mT if weight.transposed else masks[weight.name]
            yield weight, local_shard(weight.parameter, mask), scores[weight.name]


def scores_of(weight: Weight, a: Tensor, score: Score, fisher: Tensor | None) -> Tensor:
    """|a| F^power, times 1 + hysteresis in the support.

    Args:
        a: x + u of the local shard; overwritten.
        fisher: F >= 0 of the shard, float32; None for F = 1. Where all F of an expert are 0, since it has had no
            gradient yet, they count as 1.
    """
    result = a.abs_()
    if score.hysteresis:
        result.mul_(torch.where(weight.mask(), 1.0 + score.hysteresis, 1.0))
    if fisher is None:
        return result
    if weight.stacked:
        idle = fisher.flatten(1).amax(1) == 0
        fisher = fisher.masked_fill(idle[:, None, None], 1.0)
    factor = fisher.sqrt() if score.power == 0.5 else fisher.pow(score.power)
    return result.mul_(factor.clamp_min_(max(LEAST_FISHER**score.power, _LEAST_FACTOR)))
