"""Structured pruning of a whole model in two passes, which hold the statistics of one block at a time.

STRUPRUNE (arXiv 2510.03246) splits global structured pruning into problems of single modules, with an allocation from
energies and an entropy. Its equations are not public: this is a reconstruction from the published description.

STRUCTURED lists the structured methods: one class in several configurations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError, check_at_least
from admm_prune.methods.base import (
    IN_PROCESS,
    Budget,
    Capabilities,
    LayerReport,
    Outcome,
    Recipe,
    Runtime,
    Stages,
    Task,
    report_of,
)
from admm_prune.methods.block_loop import BlockResult, PassSettings, for_each_block
from admm_prune.methods.struprune.selectors import Selector
from admm_prune.methods.struprune.sublayer import Pruner, check_slicing
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.export import Form, admits, check_exportable, export, groups_by_block
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.models.sublayers import UNITS, Sublayer, Unit, heads_stay, keep_groups, savings, sublayers
from admm_prune.problems.allocation import Allocation, Allocator, Curve, EqualSlope, Uniform, refined, together
from admm_prune.statistics import LayerStatistics

_SURPLUS = 0.01  # tolerated surplus over the budget, as a fraction of the whole, without a refinement or a note
RECONSTRUCTION = "a reconstruction of STRUPRUNE (arXiv 2510.03246), whose equations are not public"


@dataclass(frozen=True, kw_only=True)
class StruPrune(Capabilities):
    """Removes neurons and groups of attention heads, selected over the whole model; the result is a smaller model.

    A sublayer l, attention or feed-forward, has an output matrix V (d, D) with inputs A (n, D). Its structured groups
    are sets of columns of V: neurons, or heads that share a key and a value. c_l is what removing one group saves, in
    the unit of the budget B:

        E_l(k) = min |A V^T - A V_0^T|^2 / |h_l|^2   over V without k groups, h_l the residual stream after the block,
        k_l <- argmin sum_l E_l(k_l) - T * entropy   over sum_l c_l k_l = B,
        V <- V_0 (H + Lambda)_{:S} ((H + Lambda)_SS)^-1   with H = A^T A, on the columns S of the remaining groups,
        b <- b + (V_0 - V) mean(A)   if the output has a bias; H is then centred.

    E_l is measured on the dense model. Without compensation the allocation uses the sums of the smallest losses of
    single groups instead, without their interactions; the reported loss includes them. V and b are computed on the
    outputs of the pruned blocks before it, those of attention before those of the feed-forward network.

    Args:
        samples: the default number of calibration sequences.
        selector: how the groups to remove are selected, see `selectors.SELECTORS`.
        compensate: refit the remaining columns by least squares; otherwise they are unchanged.
        fold_bias: if the output has a bias, it absorbs the mean of the error.
        allocator: computes the counts k_l from the curves E_l.
        relative: losses are relative to the energy of the residual stream; otherwise absolute.
        unit: the unit of the budget, to which the fraction of the target refers.
        inputs: "pruned" computes V on the outputs of the pruned blocks before it; "dense" on those of the dense model,
            as if all blocks were pruned at once.
        uniform: remove the same number of groups from every block, which gives a standard model.
        form: how a model whose blocks have different widths is saved.
        multiple: the number of remaining neurons is a multiple of this.
        ridge: of the group problems, relative to diag(H).
    """

    options: ClassVar[tuple[str, ...]] = ("unit", "multiple")
    stages: ClassVar[Stages | None] = "groups"
    shrinks: ClassVar[bool] = True

    name: str = "struprune"
    summary: str = "removes neurons and head groups, with compensation: a smaller model (a reconstruction)"
    samples: int = 128
    selector: Selector = "obs-one-shot"
    compensate: bool = True
    fold_bias: bool = True
    allocator: Allocator = EqualSlope(temperature=1.0)
    relative: bool = True
    unit: Unit = "parameters"
    inputs: Literal["pruned", "dense"] = "pruned"
    uniform: bool = False
    form: Form = "per-layer"
    multiple: int = 1
    ridge: float = 0.01

    def __post_init__(self) -> None:
        check_at_least(self, samples=1, multiple=1, ridge=0)

    @property
    def budget(self) -> Budget:
        return "model" if self.unit == "parameters" or self.unit == "bytes" else self.unit  # noqa: PLR1714  # narrows

    def streaming_obstacle(self) -> str | None:
        if self.form != "padded":
            return None
        return f"{self.name} pads to the widest block, which is known only at the end: use --no-stream or struprune"

    def check(self, model: nn.Module, target: Target) -> None:
        if target.layers:
            raise UserError(
                f"{self.name} removes structured groups: it takes no targets, ignore or overrides of matrices"
            )
        if target.pattern is not None:
            raise UserError(f"{self.name} removes structured groups: give a sparsity such as 0.3, not a pattern")
        parts = [sublayers(block) for block in decoder_blocks(model)]
        if not self.uniform:
            check_exportable(model, self.form)
        elif any(groups != groups_by_block(parts)[0] for groups in groups_by_block(parts)):
            raise UserError(f"{self.name}: the blocks differ already and cannot lose the same number of groups each")
        curves = {sublayer.name: self._curve(model, sublayer) for block in parts for sublayer in block}
        self._allocate(model, parts, curves, target)

    def check_task(self, task: Task) -> None:
        super().check_task(task)
        if task.bounds:
            raise UserError(f"{self.name} removes groups, and has no layer problems to bound: leave --bounds out")

    def ridge_obstacle(self, task: Task) -> str | None:
        return f"{self.name} does not choose a ridge: give a number" if task.ridge == "auto" else None

    def prune(
        self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS, curves: Mapping[str, Curve] | None = None
    ) -> Outcome:
        """See `Recipe.prune`.

        Args:
            curves: the result of `measure` on the same model and text, for any target; None to measure them now.
        """
        self.check(model, task.target)
        obstacle = self.streaming_obstacle()
        if runtime.offloading.is_offloaded and obstacle is not None:
            raise UserError(obstacle)
        pruner = self._pruner(task, runtime)
        blocks = decoder_blocks(model)
        parts = [sublayers(block) for block in blocks]
        removed: dict[str, int] = {}
        allocation: dict[str, Any] = {}
        if task.target.fraction > 0:
            losing = {
                sublayer.name for block in parts for sublayer in block if self._curve(model, sublayer).levels()[-1] > 0
            }
            check_slicing(model, blocks, runtime.offloading, losing)
            # 1. E_l(k), k = 0..n: the loss of each sublayer l without k of its groups, on the dense model.
            measured = self.measure(model, task, runtime) if curves is None else curves
            # 2. k_l <- argmin sum_l E_l(k_l) over sum_l c_l k_l = B, with the allocator's entropy.
            # From the journal in a resumed run, which would measure other latencies.
            allocation = runtime.journal.once(
                "allocation",
                lambda: runtime.world.broadcast_from_rank0(lambda: self._summary(model, parts, measured, task.target)),
            )
            removed = allocation["removed"]

        # 3. Block by block: V <- argmin_V |A V^T - Y|^2 on the columns that stay, b <- b + (V_0 - V) mean(A), slice.
        def prune_block(stream: BlockStream, index: int, block: Block) -> BlockResult:
            return BlockResult(layers=self._prune_block(stream, index, block, parts[index], removed, pruner))

        def reshape(index: int) -> None:
            for sublayer in parts[index]:
                if removed.get(sublayer.name, 0) > 0:
                    keep_groups(sublayer, torch.arange(sublayer.count - removed[sublayer.name]))

        count = len(blocks)
        settings = PassSettings(dense_inputs=self.inputs == "dense", reshape=reshape, steps=(count, 2 * count))
        results = for_each_block(model, task, runtime, prune_block, settings)
        layers = [report for result in results for report in result.layers]
        runtime.report_progress(2 * count, 2 * count)
        if task.target.fraction == 0:
            return Outcome(layers=layers)
        # 4. A model of these widths, in a form that can be saved; padding changes the counts.
        units = {sublayer.name: sublayer.count for block in parts for sublayer in block}
        details = {"method": RECONSTRUCTION, "form": export(model, parts, self.form), "unit": self.unit}
        details |= {name: allocation[name] for name in ("saved", "loss", "bound", "price")}
        stay = heads_stay(blocks[0])
        notes = (*allocation["notes"], *(() if stay is None else (f"heads stay: {stay}",)))
        return Outcome(layers=layers, notes=notes, details={**details, "units": units, "removed": removed})

    def measure(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> dict[str, Curve]:
        """The first pass: the loss curve of every prunable sublayer, block after block, on dense inputs.

        Raises:
            UserError: as `Recipe.check` and `Recipe.prune`.
        """
        pruner = self._pruner(task, runtime)
        parts = [sublayers(block) for block in decoder_blocks(model)]

        def measure_block(stream: BlockStream, index: int, block: Block) -> BlockResult:
            losses = pruner.losses(parts[index], _statistics(stream, index, parts[index], pruner.fold_bias))
            stream.advance(index)
            scale = (stream.energy() if self.relative else 0.0) or 1.0  # a residual stream of zeros has no energy
            return BlockResult(tensors={name: curve / scale for name, curve in losses.items()})

        settings = PassSettings(part="curves", note=", curves", changes=False, steps=(0, 2 * len(parts)))
        results = for_each_block(model, task, runtime, measure_block, settings)
        losses = {name: curve for result in results for name, curve in result.tensors.items()}
        try:
            return {part.name: self._curve(model, part, losses[part.name]) for block in parts for part in block}
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error

    def _summary(
        self, model: nn.Module, parts: Sequence[Sequence[Sublayer]], curves: Mapping[str, Curve], target: Target
    ) -> dict[str, Any]:
        """A summary of the allocation, as JSON values."""
        allocation = self._allocate(model, parts, curves, target)
        summary = {name: getattr(allocation, name) for name in ("removed", "saved", "loss", "bound", "price", "notes")}
        summary["saved"] /= self._weight(model, curves)
        reported = {name: curve.reported for name, curve in curves.items() if curve.reported is not None}
        if reported:  # the curves approximate the losses, and the bound is of these approximations
            losses = [reported[name][k] for name, k in allocation.removed.items()]
            summary |= {"loss": float(torch.stack(losses).sum()), "bound": None}
        return summary

    def _prune_block(
        self,
        stream: BlockStream,
        index: int,
        block: Block,
        parts: Sequence[Sublayer],
        removed: Mapping[str, int],
        pruner: Pruner,
    ) -> list[LayerReport]:
        """The second pass on one block."""
        shapes = {view.name: view.shape for view in block.weights}
        losing = [sublayer for sublayer in parts if removed.get(sublayer.name, 0) > 0]
        solved: list[LayerReport] = []
        statistics = partial(_statistics, stream, index, fold_bias=pruner.fold_bias)
        if self.inputs == "dense":  # all statistics, and the next block's inputs, before anything is changed
            before = statistics(losing)
            stream.advance(index)
            solved += pruner.prune(losing, before, removed)
        else:  # attention first, so that the feed-forward part reads its new outputs
            for sublayer in losing:
                solved += pruner.prune([sublayer], statistics([sublayer]), removed, lambda: stream.preview(index))
        reports = {report.name: report for report in solved}
        return [reports.get(view.name) or report_of(view, shapes[view.name]) for view in block.weights]

    def _pruner(self, task: Task, runtime: Runtime) -> Pruner:
        self.check_task(task)
        assert task.ridge != "auto"
        return Pruner(
            selector=self.selector,
            compensate=self.compensate,
            fold_bias=self.fold_bias,
            ridge=self.ridge if task.ridge is None else task.ridge,
            world=runtime.world,
        )

    def _curve(self, model: Any, sublayer: Sublayer, losses: Tensor | None = None) -> Curve:
        """The curve of a sublayer: its savings, and its losses (2, n + 1) if they are given, otherwise zeros."""
        saved = savings(sublayer, self.unit)
        stays: frozenset[int] | None = None
        if self.uniform:  # the standard class must admit their number
            counts = range(1, sublayer.count + 1)
            admitted = frozenset(n for n in counts if admits(model.config, sublayer, n))
            stays = None if len(admitted) == len(counts) else admitted
        multiple = self.multiple if sublayer.kind == "neurons" else 1
        return Curve(
            sublayer.name,
            torch.zeros_like(saved) if losses is None else losses[0],
            saved,
            least=min(multiple, sublayer.count),
            multiple=multiple,
            stays=stays,
            reported=None if losses is None or self.compensate else losses[1],
        )

    def _weight(self, model: nn.Module, curves: Mapping[str, Curve]) -> float:
        """The total to which the fraction of the target refers: all matrices of the blocks for parameters and bytes,
        all structured groups for other units."""
        if self.unit in ("parameters", "bytes"):
            matrices = [view.read() for block in decoder_blocks(model) for view in block.weights]
            return float(sum(w.numel() * (w.element_size() if self.unit == "bytes" else 1) for w in matrices))
        return sum(float(curve.savings[-1]) for curve in curves.values())

    def _allocate(
        self, model: nn.Module, parts: Sequence[Sequence[Sublayer]], curves: Mapping[str, Curve], target: Target
    ) -> Allocation:
        """The number of structured groups to remove from each sublayer.

        Raises:
            UserError: the target cannot be reached.
        """
        weight = self._weight(model, curves)
        if weight == 0:
            why = heads_stay(decoder_blocks(model)[0]) or "no sublayer has any"
            raise UserError(f"{self.name}: nothing can be saved in the unit {self.unit}: heads stay, as {why}")
        budget, most = target.fraction * weight, sum(float(c.savings[c.levels()[-1]]) for c in curves.values())
        if budget > most * (1 + 1e-9):
            stay = heads_stay(decoder_blocks(model)[0])
            raise UserError(
                f"{self.name}: {target.label} of the blocks is to go, and {100 * most / weight:.4g}% can go at most"
                + (f": heads stay, as {stay}" if stay else ": every sublayer keeps its minimum")
            )
        kinds: dict[str, list[Curve]] = {}
        for sublayer in (sublayer for block in parts for sublayer in block):
            kinds.setdefault(sublayer.kind, []).append(curves[sublayer.name])
        posed = [together(kind, alike) for kind, alike in kinds.items()] if self.uniform else list(curves.values())
        try:
            allocation = refined(posed, self.allocator.allocate(posed, budget), budget, _SURPLUS * weight)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        if allocation.saved > budget + _SURPLUS * weight:
            steps = "every step takes a group of each block" if self.uniform else "the groups are large"
            note = f"{allocation.saved / weight:.2%} is saved, where {target.label} was to go: {steps}"
            allocation = replace(allocation, notes=(*allocation.notes, note))
        if not self.uniform:
            return allocation
        removed = {curve.name: allocation.removed[kind] for kind, alike in kinds.items() for curve in alike}
        return replace(allocation, removed=removed)


def _statistics(
    stream: BlockStream, index: int, parts: Sequence[Sublayer], fold_bias: bool
) -> dict[str, LayerStatistics]:
    """The statistics of the inputs of the output matrices, by the name of the sublayer."""
    if not parts:
        return {}
    names = {sublayer.output.name: sublayer.name for sublayer in parts}
    centre = fold_bias and any(sublayer.output.bias is not None for sublayer in parts)
    shared = stream.collect(index, only=names, centre=centre)
    # No ridge is selected: the statistics of the validation tokens are not needed.
    views = [(view.name, inputs.statistics) for inputs in shared for view in inputs.weights]
    return {names[name]: replace(statistics, validation=None) for name, statistics in views}


STRUCTURED: tuple[StruPrune, ...] = (
    StruPrune(),
    StruPrune(
        name="struprune-uniform", summary="struprune with equal widths in all blocks: a standard model", uniform=True
    ),
    StruPrune(
        name="struprune-padded",
        summary="struprune, padded with zeros to the widest block: a standard model",
        form="padded",
    ),
    StruPrune(
        name="structured-global",
        summary="baseline: a single greedy selection over the whole model, from statistics of the dense model",
        allocator=EqualSlope(),
        inputs="dense",
    ),
    StruPrune(
        name="structured-wanda",
        summary="baseline: the same fraction of every sublayer by Wanda's score, without compensation",
        selector="mask",
        compensate=False,
        fold_bias=False,
        allocator=Uniform(),
        ridge=0.0,
    ),
)


def configured(recipe: Recipe, unit: str | None = None, multiple: int | None = None) -> Recipe:
    """The recipe with another unit of the budget or multiple of neurons, where they are not None.

    Raises:
        UserError: the recipe is not structured, the unit is unknown, or the multiple is below 1.
    """
    if unit is None and multiple is None:
        return recipe
    if not isinstance(recipe, StruPrune):
        names = ", ".join(known.name for known in STRUCTURED)
        raise UserError(f"{recipe.name} removes no structured groups: --unit and --multiple are for {names}")
    if unit is not None and unit not in UNITS:
        raise UserError(f"unit must be {', '.join(UNITS[:-1])} or {UNITS[-1]}, not '{unit}'")
    if multiple is not None and multiple < 1:
        raise UserError(f"multiple must be at least 1, not {multiple}")
    return replace(recipe, unit=unit or recipe.unit, multiple=multiple or recipe.multiple)
