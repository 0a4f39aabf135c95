"""Allocation rules by name, and the measurements that each of them needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from admm_prune.errors import UserError, check_at_least, unknown
from admm_prune.methods.allocation.budget import BudgetProblem, budget_of, held_out
from admm_prune.methods.allocation.levels import (
    DENSITIES,
    HIGHER,
    LOWER,
    MIXED,
    NEARBY,
    curve_levels,
    last_levels,
    most_removed,
    table_levels,
)
from admm_prune.methods.allocation.measurements import SOLVER
from admm_prune.methods.base import Recipe, Runtime, Task, TextUse
from admm_prune.methods.local import Method
from admm_prune.methods.target import Target
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.structure import WeightView

SEARCHES = ("search", "evolutionary")
PASSES = 64  # forward passes of a search, by default


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The measurements that a rule needs, from which `plan` estimates its cost.

    Attributes:
        summary: one line for the documentation.
        collects: whether it needs statistics of the inputs of every matrix, from a pass over the blocks.
        levels: the number of levels at which the error of every matrix is measured, at most (`AllocationRule.levels`).
        nearby: the number of levels to which the method of the run prunes every matrix before a search.
        gradients: whether it needs gradients of the calibration loss, which need the whole model in memory.
        losses: whether it needs losses of the model with pruned blocks or matrices, which also need it in memory.
    """

    summary: str
    collects: bool = True
    levels: int = 0
    nearby: int = 0
    gradients: bool = False
    losses: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether the rule depends on the calibration text."""
        return self.collects or self.levels > 0 or self.whole

    @property
    def whole(self) -> bool:
        """Whether the rule needs the whole model in memory."""
        return self.gradients or self.losses


_CURVES = len(DENSITIES)
RULES: Mapping[str, Rule] = {
    "uniform": Rule(summary="the same sparsity for every matrix", collects=False),
    "owl": Rule(summary="blocks with more outliers among their scores lose less (OWL)"),
    "alphapruning": Rule(summary="blocks whose spectra have heavy tails lose less (AlphaPruning)", collects=False),
    "softmax": Rule(summary="softmax of the matrices' relative errors (STRUPRUNE's rule)", levels=_CURVES),
    "equal-slope": Rule(summary="the next weight raises every matrix's relative error alike", levels=_CURVES),
    "fisher": Rule(summary="equal slope of the loss, estimated to second order", levels=_CURVES, gradients=True),
    "taylor": Rule(summary="equal slope of the loss, to first and second order", levels=_CURVES, gradients=True),
    "measured": Rule(
        summary="fisher, scaled by the measured loss with each block pruned alone",
        levels=_CURVES,
        gradients=True,
        losses=True,
    ),
    "knapsack": Rule(
        summary="the least loss of fisher over discrete levels, with a proven gap", levels=_CURVES, gradients=True
    ),
    "patterns": Rule(summary="knapsack over the levels dense, 4:8, 2:4 and 1:4", levels=len(MIXED), gradients=True),
    "search": Rule(
        summary="from fisher, along the gradient of the loss of the pruned model, compared on held-out text",
        levels=_CURVES,
        nearby=1 + len(NEARBY),
        gradients=True,
        losses=True,
    ),
    "evolutionary": Rule(
        summary="EvoPress's level switches from uniform: the baseline of search", levels=LOWER + 1 + HIGHER, losses=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """The result of a rule.

    Attributes:
        target: the target of the run, with an entry in `Target.layers` for each matrix.
        details: the rule, its figures, and the targets, as JSON values.
    """

    target: Target
    details: dict[str, Any]


@dataclass(frozen=True)
class AllocationRule:
    """An allocation rule with its settings.

    Args:
        name: a key of `RULES`.
        passes: the number of forward passes over the held-out text, for rules that search.
    """

    name: str
    passes: int = PASSES

    def __post_init__(self) -> None:
        check_at_least(self, passes=1)

    @classmethod
    def named(cls, name: str | None, passes: int | None = None) -> AllocationRule | None:
        """The rule of this name; None if `name` is None.

        Raises:
            UserError: there is no such rule, or passes are given for a rule that does not search.
        """
        if passes is not None and name not in SEARCHES:
            raise UserError(f"allocation passes are for the allocations {' and '.join(SEARCHES)}")
        if name is None:
            return None
        if name not in RULES:
            raise unknown("allocation", name, RULES)
        return cls(name, PASSES if passes is None else passes)

    def levels(self, target: Target) -> int:
        """The number of levels to which every matrix is pruned for a target; 0 for a rule without levels."""
        measured = RULES[self.name].levels
        if not measured or self.name == "patterns":
            return measured
        return len((table_levels if self.name == "evolutionary" else curve_levels)(target, target.fraction))

    def text_use(self, recipe: Recipe) -> TextUse:
        """What the calibration text is used for by a method whose targets come from this rule."""
        return "calibration" if RULES[self.name].reads_text else recipe.text_use

    def check(
        self, recipe: Recipe, model: nn.Module, target: Target, *, offloaded: bool = False, world: World = ALONE
    ) -> None:
        """Rejects a method, model or target that the rule does not support.

        Raises:
            UserError: the method trains, or allocates its budget itself; the model is offloaded or there are several
                processes, and the rule needs the whole model in one; the budget cannot be met; or the rule mixes
                patterns and the target is a pattern, or a matrix fits none of them.
        """
        if recipe.stages not in ("layers", "networks"):
            why = "allocates its budget itself" if recipe.stages == "groups" else "trains all weights to one target"
            raise UserError(f"{recipe.name} {why}: an allocation is for methods that go layer by layer")
        if offloaded and RULES[self.name].whole:
            names = ", ".join(name for name, one in RULES.items() if not one.whole)
            raise UserError(
                f"the allocation {self.name} needs the whole model in memory: use --no-stream, or one of {names}"
            )
        if world.size > 1 and self.name != "uniform":
            raise UserError(f"the allocation {self.name} is made by one process: start one, or give no allocation")
        if self.name == "patterns" and target.pattern is not None:
            raise UserError("the allocation patterns mixes patterns itself: give a sparsity such as 0.4")
        if self.name == "patterns" and (sets := getattr(getattr(recipe, "method", None), "sets", None)) is not None:
            raise UserError(f"the allocation patterns mixes patterns, which are sparse sets: it takes no {sets.name}")
        sharing, budget = budget_of(model, target)
        self._check_budget([view for _, view in sharing], budget, target)

    def check_task(self, task: Task) -> None:
        """Rejects a text that the rule cannot use.

        Raises:
            UserError: a search has no text to hold out.
        """
        if self.name in SEARCHES:
            held_out(task.calibration)

    def _check_budget(self, views: Sequence[WeightView], budget: int, target: Target) -> None:
        """Raises UserError if the matrices cannot reach the budget at their last levels."""
        sizes = [math.prod(view.shape) for view in views]
        last = last_levels(self.name, views, target)
        most, total = most_removed(last, sizes), sum(sizes)
        if budget > most:
            levels = ", ".join(sorted({str(level) for level in last}))
            raise UserError(
                f"the allocation {self.name}: {100 * budget / total:.4g}% of the weights that share the budget is to "
                f"go, and {100 * most / total:.4g}% can go at most, at {levels}: prune less"
            )

    def applied(self, model: nn.Module, task: Task, runtime: Runtime, recipe: Recipe | None = None) -> Allocated:
        """Distributes the budget of the target over the matrices that have no target of their own. The model stays
        dense.

        The pruned matrices, including those with a target of their own, lose exactly round(s n) of their n weights
        together; with patterns at least as many, and less than one step of one matrix more.

        Args:
            recipe: the method of the run, whose layer method prunes the matrices of a search; without one, sparsegpt.

        Raises:
            UserError: the budget cannot be met, or the text or a matrix cannot be used.
        """
        problem = BudgetProblem.of(model, task, runtime, self.passes, layer_method(recipe))
        self._check_budget(problem.views, problem.budget, task.target)
        if task.target.fraction == 0 or not problem.views:
            return Allocated(target=task.target, details={"rule": self.name, "targets": {}})
        try:
            details = runtime.journal.once("allocation", lambda: problem.solved(self.name))
        except ValueError as error:
            raise UserError(f"the allocation {self.name}: {error}") from error
        layers = tuple((dict(task.target.layers) | details["targets"]).items())
        return Allocated(target=replace(task.target, layers=layers), details=details)


def layer_method(recipe: Recipe | None) -> Method:
    """The layer method of a run, with which a search prunes its matrices; sparsegpt if there is none."""
    method = getattr(recipe, "method", None)
    return method if isinstance(method, Method) else SOLVER
