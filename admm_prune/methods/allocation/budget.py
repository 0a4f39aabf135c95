"""The budget that the matrices of a model share, and the targets that each allocation rule derives from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.allocation import measurements
from admm_prune.methods.allocation.levels import (
    NearbyLevels,
    curve_levels,
    dense_level,
    fitting,
    last_levels,
    most_removed,
    nearby_levels,
    table_levels,
)
from admm_prune.methods.allocation.measurements import Gradients, Levels
from admm_prune.methods.allocation.search import SearchResult, Space, Table, evolutionary_search, gradient_search
from admm_prune.methods.base import Runtime, Task
from admm_prune.methods.local import Method
from admm_prune.methods.target import DENSE, Target, target_named
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.problems.allocation import Curve, EqualSlope, standardized
from admm_prune.problems.allocation_knapsack import Knapsack
from admm_prune.problems.allocation_matrices import (
    Sparsities,
    alpha_rates,
    counts,
    interpolated,
    met_exactly,
    nearest_levels,
    owl_offsets,
    scaled,
    shifted,
)

MOST = 0.95  # largest sparsity of a matrix, unless the sparsity of the whole exceeds 0.9
_ROUNDED = 1e-6  # rounding of the fractions of levels
HELD_OUT = 0.25  # most of the calibration sequences that a search evaluates on, as a fraction
SEARCH_TOKENS = 2048  # about as many tokens it evaluates on, in whole sequences
LOSS_TOKENS = 4096  # tokens on which the loss with a pruned block is measured


def budget_of(model: nn.Module, target: Target) -> tuple[list[tuple[int, WeightView]], int]:
    """The matrices that share the budget, those without a target of their own.

    Returns:
        (index of the block, matrix) for each of them, and the number of weights to remove from all of them together.

    Raises:
        UserError: with the targets of the other matrices, the target of the whole cannot be reached.
    """
    overrides = dict(target.layers)
    placed = [(i, view) for i, block in enumerate(decoder_blocks(model)) for view in block.weights]
    pruned = [(i, view) for i, view in placed if overrides.get(view.name) != DENSE]
    sharing = [(i, view) for i, view in pruned if view.name not in overrides]
    budget = target.removed_from(sum(math.prod(view.shape) for _, view in pruned))
    for _, view in pruned:
        if view.name in overrides:
            budget -= target_named(overrides[view.name]).removed_from(math.prod(view.shape))
    if not 0 <= budget <= sum(math.prod(view.shape) for _, view in sharing):
        raise UserError(
            f"the overrides alone leave no way to {target.label} of all matrices: change them or the sparsity"
        )
    return sharing, budget


def held_out(text: Sequences) -> tuple[Sequences, Sequences]:
    """The text on which a search prunes matrices, and the held-out text on which it evaluates allocations.

    Raises:
        UserError: there is only one sequence.
    """
    if len(text.rows) < 2:
        raise UserError("a search needs held-out text: give at least two calibration sequences")
    return text.split(min(HELD_OUT, SEARCH_TOKENS / text.tokens))


@dataclass(frozen=True, kw_only=True)
class BudgetProblem:
    """The allocation of a budget over the matrices of a model.

    Attributes:
        passes: the number of forward passes in a search.
        method: the layer method of the run.
        views: the matrices that share the budget.
        blocks: for each matrix, the index of its block.
        sizes: for each matrix, the number of its weights.
        budget: the number of weights to remove from all of them together.
    """

    model: nn.Module
    task: Task
    runtime: Runtime
    passes: int
    method: Method
    views: Sequence[WeightView]
    blocks: Sequence[int]
    sizes: Sequence[int]
    budget: int

    @classmethod
    def of(cls, model: nn.Module, task: Task, runtime: Runtime, passes: int, method: Method) -> BudgetProblem:
        """Raises UserError as `budget_of`."""
        placed, budget = budget_of(model, task.target)
        return cls(
            model=model,
            task=task,
            runtime=runtime,
            passes=passes,
            method=method,
            views=[view for _, view in placed],
            blocks=[block for block, _ in placed],
            sizes=[math.prod(view.shape) for _, view in placed],
            budget=budget,
        )

    @property
    def names(self) -> frozenset[str]:
        return frozenset(view.name for view in self.views)

    @property
    def _overrides(self) -> dict[str, Target]:
        """The targets of the other matrices, except those that stay dense."""
        return {name: target_named(text) for name, text in self.task.target.layers if text != DENSE}

    @property
    def fraction(self) -> float:
        return self.budget / sum(self.sizes)

    @property
    def most(self) -> float:
        """The largest sparsity of a matrix."""
        return max(MOST, (1 + self.fraction) / 2)

    def solved(self, rule: str) -> dict[str, Any]:
        """Applies a rule; returns the target of each matrix and the figures of the rule, as JSON values."""
        solve: dict[str, Callable[[], tuple[dict[str, str], dict[str, Any]]]] = {
            "uniform": lambda: self._by_features(shifted(torch.zeros(len(self.views), dtype=torch.float64))),
            "owl": self._owl,
            "alphapruning": self._alphapruning,
            "softmax": self._softmax,
            "equal-slope": lambda: self._by_slopes(self._relative(self._levels(self._path()))),
            "fisher": lambda: self._by_slopes(self._sensitive(order=2)),
            "taylor": lambda: self._by_slopes(self._sensitive(order=1)),
            "measured": lambda: self._by_slopes(self._sensitive(order=2, measured=True)),
            "knapsack": self._knapsack,
            "patterns": self._patterns,
            "search": self._search,
            "evolutionary": self._evolutionary,
        }
        last = last_levels(rule, self.views, self.task.target)
        if self.budget == most_removed(last, self.sizes):  # only one allocation is feasible: nothing is measured
            figures: dict[str, Any] = {}
            targets = {view.name: str(level) for view, level in zip(self.views, last, strict=True)}
        else:
            targets, figures = solve["uniform" if self.budget == 0 else rule]()
        removed = sum(target_named(targets[view.name]).removed_from(size) for view, size in self._sized())
        return {"rule": rule, "budget": self.budget, "removed": removed, **figures, "targets": targets}

    # Rules by features of blocks or matrices

    def _by_features(self, sparsities: Sparsities, **figures: Any) -> tuple[dict[str, str], dict[str, Any]]:
        exact = counts(self.sizes, sparsities, self.budget)
        if self.task.target.pattern is None:
            return self._fractions(exact), figures
        paths = self._path()
        curves = [self._of_levels(view, size, paths[view.name]) for view, size in self._sized()]
        chosen = nearest_levels(curves, exact, self.budget)
        return self._level_targets([chosen.removed[curve.name] for curve in curves], paths), figures

    def _owl(self) -> tuple[dict[str, str], dict[str, Any]]:
        measured = measurements.outliers(self.model, self.task, self.runtime, self.names)
        present = sorted(set(self.blocks))
        offsets = dict(
            zip(present, owl_offsets(torch.tensor([measured[b] for b in present]).double()).tolist(), strict=True)
        )
        return self._by_features(shifted(self._per_block(offsets), self.most), outliers=measured)

    def _alphapruning(self) -> tuple[dict[str, str], dict[str, Any]]:
        measured = measurements.exponents(self.model, self.runtime, self.names)
        means = {
            block: _mean([measured[view.name] for view, b in zip(self.views, self.blocks, strict=True) if b == block])
            for block in sorted(set(self.blocks))
        }
        rates = alpha_rates(torch.tensor(list(means.values()), dtype=torch.float64)).tolist()
        rates_by_block = dict(zip(means, rates, strict=True))
        return self._by_features(scaled(self._per_block(rates_by_block), self.most), exponents=list(means.values()))

    def _softmax(self) -> tuple[dict[str, str], dict[str, Any]]:
        curves = self._relative(self._levels(self._path()))
        errors = []
        for curve, size in zip(curves, self.sizes, strict=True):
            level = int((curve.savings - self.fraction * size).abs().argmin())
            errors.append(float(curve.losses[level]))
        standard = torch.tensor(standardized(errors), dtype=torch.float64)
        return self._by_features(scaled((-standard).exp(), self.most))

    def _per_block(self, values: Mapping[int, float]) -> Tensor:
        return torch.tensor([values[block] for block in self.blocks], dtype=torch.float64)

    # Rules by curves

    def _path(self, *, mixed: bool = False) -> dict[str, list[Target]]:
        """The levels of each matrix in order of increasing sparsity, without the dense level.

        Args:
            mixed: the levels of the rule "patterns".
        """
        if mixed:
            return {view.name: fitting(view) for view in self.views}
        return {view.name: curve_levels(self.task.target, self.fraction) for view in self.views}

    def _levels(self, path: Mapping[str, Sequence[Target]], **how: Any) -> Levels:
        return measurements.levels(self.model, self.task, self.runtime, path, **how)

    def _relative(self, measured: Levels) -> list[Curve]:
        """Curves of the relative output errors."""
        path = self._path()
        errors = {
            name: rows.sum(1) / rows[-1].sum().clamp_min(torch.finfo(torch.float64).tiny)
            for name, rows in measured.rows.items()
        }
        return self._curves(errors, path)

    def _sensitive(
        self,
        *,
        order: int,
        measured: bool = False,
        path: dict[str, list[Target]] | None = None,
    ) -> list[Curve]:
        """Curves of the estimated increase of the loss, in nats per token.

        The second-order term is 1/2 sum_ti d_ti^2 (x_t . dw_i)^2 / tokens, where d_ti = dL / dy_ti is the gradient with
        respect to output i at token t: the diagonal of the empirical Fisher information of the outputs. If d is
        independent of x it is 1/2 sum_i F_i |X dw_i|^2 / (tr(H) tokens) with F_i = sum_j g_ij^2, summed over the
        sequences, which needs only the gradients g with respect to the weights. The first-order term is |<g, dW>|, with
        g the gradient of the mean loss.

        Args:
            order: 2 for the second-order term alone, 1 for the sum of both terms.
            measured: scale the curves of each block, so that their sum at the sparsity of the whole is the increase
                measured with this block pruned.
            path: the levels of each matrix; by default those of `_path`.
        """
        path = path or self._path()
        reference = self._reference(path)
        slopes = measurements.gradients(self.model, self.task.calibration, self.names, keep=order == 1)
        how: dict[str, Any] = {}
        if order == 1:
            how["gradients"] = slopes.means
        before = 0.0
        if measured:
            text = self.task.calibration
            rows = text.rows[:: max(1, round(text.tokens / LOSS_TOKENS))]
            part = replace(text, rows=rows)
            before = measurements.mean_loss(self.model, part)
            how["loss"] = lambda: measurements.mean_loss(self.model, part)
            how["reference"] = reference
        levels = self._levels(path, **how)
        errors = {view.name: _estimated(view.name, levels, slopes) for view in self.views}
        if measured:
            for block in set(self.blocks):
                names = [view.name for view, b in zip(self.views, self.blocks, strict=True) if b == block]
                estimate = sum(float(errors[name][reference]) for name in names)
                rise = max(levels.losses[block] - before, 1e-3 * estimate)
                for name in names:
                    errors[name] = errors[name] * (rise / estimate if estimate > 0 else 1.0)
        return self._curves(errors, path)

    def _reference(self, path: Mapping[str, Sequence[Target]]) -> int:
        """The index of the level nearest to the sparsity of the whole, the same for all matrices."""
        levels = next(iter(path.values()))
        return min(range(len(levels)), key=lambda k: abs(levels[k].fraction - self.fraction))

    def _curves(self, errors: Mapping[str, Tensor], path: Mapping[str, Sequence[Target]]) -> list[Curve]:
        """A curve for each matrix: over all counts of weights, interpolated between the errors at its levels and at
        sparsity 1; for patterns over the levels alone."""
        curves = []
        for view, size in self._sized():
            levels, values = path[view.name], errors[view.name].tolist()
            if any(level.pattern is not None for level in levels):
                curves.append(self._of_levels(view, size, levels, values[:-1]))
            else:
                knots = [*(level.fraction for level in levels), 1.0]
                curves.append(interpolated(view.name, knots, values, size, most=self.most))
        return curves

    def _of_levels(
        self, view: WeightView, size: int, levels: Sequence[Target], errors: Sequence[float] | None = None
    ) -> Curve:
        """A curve over levels alone; its losses are zero if no errors are given."""
        removed = [0, *(level.removed_from(size) for level in levels)]
        losses = torch.tensor([0.0, *(errors or [0.0] * len(levels))], dtype=torch.float64).cummax(0).values
        return Curve(view.name, losses, torch.tensor(removed, dtype=torch.float64), least=0)

    def _by_slopes(self, curves: list[Curve]) -> tuple[dict[str, str], dict[str, Any]]:
        allocation = EqualSlope().allocate(curves, self.budget)
        removed = [allocation.removed[curve.name] for curve in curves]
        return self._met(curves, removed, self._path()), {"loss": allocation.loss}

    def _knapsack(self) -> tuple[dict[str, str], dict[str, Any]]:
        """The knapsack over the levels of the path, after which surplus weights are restored. The gap is that of the
        levels."""
        path = self._path()
        curves = self._sensitive(order=2)
        if self.task.target.pattern is None:
            curves = [self._at_levels(curve, path[curve.name]) for curve in curves]
        removed, figures = self._least_loss(curves)
        return self._met(curves, removed, path), figures

    def _at_levels(self, curve: Curve, levels: Sequence[Target]) -> Curve:
        """A curve restricted to the levels of a path."""
        size = float(curve.savings[-1])
        levels = [level for level in levels if level.fraction <= self.most + _ROUNDED]
        last = curve.count - curve.least
        steps = [0, *(min(last, round(level.fraction * curve.count)) for level in levels)]
        savings = torch.tensor([0.0, *(round(level.fraction * size) for level in levels)], dtype=torch.float64)
        return Curve(curve.name, curve.losses[steps], savings, least=0)

    def _patterns(self) -> tuple[dict[str, str], dict[str, Any]]:
        path = self._path(mixed=True)
        removed, figures = self._least_loss(self._sensitive(order=2, path=path))
        return self._level_targets(removed, path), figures

    def _least_loss(self, curves: Sequence[Curve]) -> tuple[list[int], dict[str, Any]]:
        """The level of each curve with the least total loss, by the knapsack, and the figures of the solution."""
        allocation = Knapsack().allocate(curves, self.budget)
        figures = {"loss": allocation.loss, "bound": allocation.bound, "gap": allocation.gap}
        return [allocation.removed[curve.name] for curve in curves], figures

    # Searches

    def _search(self) -> tuple[dict[str, str], dict[str, Any]]:
        text, evaluated = held_out(self.task.calibration)
        fitted = replace(self, task=replace(self.task, calibration=text))
        start, _ = fitted._by_slopes(fitted._sensitive(order=2))
        nearby = {name: nearby_levels(target_named(target), self.most) for name, target in start.items()}
        overridden = {name: NearbyLevels([target], 0) for name, target in self._overrides.items()}
        weights = measurements.pruned_nearby(self.model, fitted.task, self.runtime, nearby | overridden, self.method)
        path = {name: levels.targets for name, levels in nearby.items()}
        space = self._space(path)
        z = space.logits([nearby[view.name].start for view in self.views])
        table = Table(self.model, text, evaluated, self.views, [weights[view.name] for view in self.views])
        search = partial(gradient_search, space, table, z, self.passes, self.runtime.journal)
        return self._searched(search, table, path, space, weights)

    def _evolutionary(self) -> tuple[dict[str, str], dict[str, Any]]:
        text, evaluated = held_out(self.task.calibration)
        levels = {view.name: table_levels(self.task.target, self.fraction) for view in self.views}
        part = replace(self.task, calibration=text)
        overridden = {name: [target] for name, target in self._overrides.items()}
        measured = measurements.levels(self.model, part, self.runtime, levels | overridden, keep=True, part="table")
        path = {name: [dense_level(pruned), *pruned] for name, pruned in levels.items()}
        space = self._space(path)
        start = space.levels(torch.zeros(len(self.views), dtype=torch.float64))
        weights = [[None, *measured.weights[view.name]] for view in self.views]
        table = Table(self.model, text, evaluated, self.views, weights)
        search = partial(evolutionary_search, space, table, start, self.passes, self.runtime.journal, self.task.seed)
        return self._searched(search, table, path, space, measured.weights)

    def _space(self, path: Mapping[str, Sequence[Target]]) -> Space:
        """The allocations over the levels of a path."""
        removed = [[level.removed_from(size) for level in path[view.name]] for view, size in self._sized()]
        curves = [
            Curve(view.name, torch.zeros(len(counts), dtype=torch.float64), counts - counts[0], least=0)
            for view, counts in zip(self.views, (torch.tensor(r, dtype=torch.float64) for r in removed), strict=True)
        ]
        return Space(self.sizes, curves, self.budget, self.most, [counts[0] for counts in removed])

    def _searched(
        self,
        search: Callable[[], SearchResult],
        table: Table,
        path: Mapping[str, Sequence[Target]],
        space: Space,
        weights: Mapping[str, Sequence[Tensor]],
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """The targets of the best levels of a search, and its figures. Levels of fractions are adjusted to the budget,
        which they miss by the rounding of each matrix. The model is dense afterwards.

        Args:
            weights: by name; the only ones of a matrix with a target of its own are those that it has in the search.
        """
        overridden = self._overrides
        views = [view for block in decoder_blocks(self.model) for view in block.weights if view.name in overridden]
        try:
            with measurements.replaced((view, weights[view.name][0]) for view in views):
                result = search()
        finally:
            table.restore()
        figures = {
            "held_out_loss": result.loss,
            "held_out_loss_at_start": result.start,
            "passes": result.passes,
        }
        if self.task.target.pattern is not None:
            chosen = zip(self.views, result.levels, strict=True)
            return {view.name: str(path[view.name][level]) for view, level in chosen}, figures
        budget = self.budget - sum(space.first)
        added = met_exactly(space.curves, _removing_enough(space.curves, result.levels, budget), budget)
        return self._fractions([first + count for first, count in zip(space.first, added, strict=True)]), figures

    # Targets

    def _sized(self) -> list[tuple[WeightView, int]]:
        return list(zip(self.views, self.sizes, strict=True))

    def _met(
        self, curves: Sequence[Curve], levels: Sequence[int], path: Mapping[str, Sequence[Target]]
    ) -> dict[str, str]:
        """The targets of levels that remove at least the budget; for fractions, surplus weights are restored."""
        if self.task.target.pattern is not None:
            return self._level_targets(levels, path)
        return self._fractions(met_exactly(curves, levels, self.budget))

    def _fractions(self, exact: Sequence[int]) -> dict[str, str]:
        return {view.name: repr(count / size) for (view, size), count in zip(self._sized(), exact, strict=True)}

    def _level_targets(self, chosen: Sequence[int], path: Mapping[str, Sequence[Target]]) -> dict[str, str]:
        targets = {}
        for view, level in zip(self.views, chosen, strict=True):
            levels = path[view.name]
            targets[view.name] = str(levels[level - 1]) if level else str(dense_level(levels))
        return targets


def _removing_enough(curves: Sequence[Curve], levels: Sequence[int], budget: int) -> list[int]:
    """Levels that remove at least the budget, from levels that may miss it by a few weights due to rounding: raises the
    levels of the smallest matrices first."""
    levels = list(levels)
    for l in sorted(range(len(curves)), key=lambda l: float(curves[l].savings[-1])):
        if sum(float(curve.savings[k]) for curve, k in zip(curves, levels, strict=True)) >= budget:
            break
        levels[l] = min(levels[l] + 1, curves[l].count)
    return levels


def _estimated(name: str, levels: Levels, slopes: Gradients) -> Tensor:
    """The estimated increase of the loss per token at each level of a matrix: see `_sensitive`."""
    trace = levels.traces[name]
    if trace <= 0:  # never used
        return torch.zeros(len(levels.rows[name]), dtype=torch.float64)
    rise = levels.rows[name] @ (slopes.squares[name] / (2.0 * trace * slopes.tokens))
    return rise + levels.first_order[name].abs() if levels.first_order else rise


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf
