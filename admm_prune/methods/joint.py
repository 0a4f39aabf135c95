"""Joint steps on several matrices of a block, in addition to pruning each of them: coordination and refit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from admm_prune.errors import UserError, did_you_mean
from admm_prune.methods.base import LayerReport, Runtime, Task
from admm_prune.methods.coordination import DenseAttention
from admm_prune.methods.local import Method
from admm_prune.methods.parts import LAYER
from admm_prune.methods.refit import TOKENS, refit_block
from admm_prune.models.attention import AttentionViews, attention_views
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.statistics import LayerStatistics

COORDINATED = ("attention",)
REFITS = ("block",)
STEPS = ("attention", "refit")  # the keys of their figures


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The joint steps that a run takes.

    Args:
        coordinate: ("attention",) to prune value and output projections as one problem, see `AttentionOutput`.
        refit: "block" to fit all pruned matrices of a block, on their supports, to its dense output, see `BlockOutput`.

    Raises:
        UserError: an unknown step.
    """

    coordinate: tuple[str, ...] = ()
    refit: str | None = None

    def __post_init__(self) -> None:
        for name in self.coordinate:
            if name not in COORDINATED:
                raise UserError(
                    f"coordinate must be {' or '.join(COORDINATED)}, not '{name}'{did_you_mean(name, COORDINATED)}"
                )
        if self.refit is not None and self.refit not in REFITS:
            raise UserError(
                f"refit must be {' or '.join(REFITS)}, not '{self.refit}'{did_you_mean(str(self.refit), REFITS)}"
            )

    @classmethod
    def of(cls, coordinate: str | Sequence[str], refit: str | None) -> Self:
        """From user input: the names to coordinate as a comma-separated list or a sequence; duplicates are ignored.

        Raises:
            UserError: a list without names, or an unknown step.
        """
        items = coordinate.split(",") if isinstance(coordinate, str) else coordinate
        parts = tuple(dict.fromkeys(filter(None, (item.strip() for item in items))))
        if not parts and (coordinate or isinstance(coordinate, str)):
            raise UserError(f"coordinate names no part: choose {' or '.join(COORDINATED)}")
        return cls(coordinate=parts, refit=refit)

    def __bool__(self) -> bool:
        return bool(self.coordinate or self.refit)

    @property
    def label(self) -> str:
        """The command-line options that select the steps, for messages."""
        coordinate = f"--coordinate {','.join(self.coordinate)}" if self.coordinate else ""
        return " and ".join(filter(None, [coordinate, f"--refit {self.refit}" if self.refit else ""]))

    def check(self, model: nn.Module, method: Method) -> None:
        """Rejects methods and models that the steps do not support.

        Raises:
            UserError: the method has an objective of its own, or the attention of a block cannot be coordinated.
        """
        if self and method.problem.name != LAYER:
            raise UserError(f"{self.label} weights all tokens alike: it takes no {method.problem.name}")
        if self.coordinate:
            for block in decoder_blocks(model):
                attention_views(block)

    def notes(self, blocks: Sequence[Mapping[str, Any]], task: Task) -> tuple[str, ...]:
        """Notes for the user on steps that were skipped, rejected or failed.

        Args:
            blocks: the figures of every block.
        """
        notes = []
        count = len(blocks)
        if self.coordinate and (absent := sum("attention" not in figures for figures in blocks)):
            notes.append(
                f"attention was not coordinated in {absent} of {count} blocks: their value or output projection is not "
                "pruned"
            )
        for step, what in (("attention", "the joint solution of value and output projection"), ("refit", "the refit")):
            done = [figures[step] for figures in blocks if step in figures]
            if rejected := sum(not one["accepted"] for one in done):
                notes.append(f"{what} was rejected in {rejected} of {count} blocks: no less error on held-out tokens")
            if failed := sum("status" in one for one in done):
                notes.append(f"{what} was not finite in {failed} of {count} blocks, which are left as they were")
        if self and len(task.calibration.rows) == 1:
            notes.append(
                "there is one calibration sequence: what the steps on several matrices gain is measured on the tokens "
                "that they are fitted to"
            )
        return tuple(notes)

    def task(self, task: Task, runtime: Runtime) -> Task:
        """The task, with batches that are small enough to backpropagate through a block.

        Raises:
            UserError: the run has several processes.
        """
        if not self:
            return task
        if runtime.world.size > 1:
            raise UserError(f"{self.label} is for a single process: run it without torchrun")
        text = task.calibration
        return replace(task, calibration=replace(text, batch_size=max(1, min(text.batch_size, TOKENS // text.length))))

    def begin(self, stream: BlockStream, index: int, block: Block, pruned: Collection[str]) -> JointBlock:
        """Stores what the steps need of a block before it is pruned.

        Args:
            pruned: the names of the matrices that will be pruned.
        """
        attention = DenseAttention.of(stream, index, block) if self.coordinate and pruned else None
        if attention is not None and not attention.prunes(pruned):
            attention = None
        changed: Collection[str] = pruned if self.refit else () if attention is None else attention.names
        dense = {view.name: view.read().clone() for view in block.weights if view.name in changed}
        biases = {
            view.name: view.bias.detach().clone()
            for view in block.weights
            if view.name in changed and view.bias is not None
        }
        return JointBlock(self, stream, index, block, dense, biases, attention)


def in_stages(attention: AttentionViews | None, pruned: Collection[str]) -> list[set[str]]:
    """The matrices to prune, in the stages in which their inputs are collected: attention before all others, where it
    is coordinated."""
    first = set() if attention is None else {view.name for view in attention.weights} & set(pruned)
    return [names for names in (first, set(pruned) - first) if names]


@dataclass
class JointBlock:
    """The joint steps on one block.

    Attributes:
        dense, biases: copies of the dense matrices that the steps may change, by name, and of their biases.
        attention: the dense value and output projections; None if they are not coordinated.
        outputs: of the dense block, filled in by `BlockStream.collect`; empty unless the block is refitted.
        figures: the results of the steps, as JSON values.
        outdated: names of matrices that a step changed after their errors as layers were measured.
        held_out: names of matrices that were fitted without the validation tokens.
    """

    joint: Joint
    stream: BlockStream
    index: int
    block: Block
    dense: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    attention: DenseAttention | None
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    outdated: set[str] = field(default_factory=set[str])
    held_out: set[str] = field(default_factory=set[str])

    def stages(self, pruned: Collection[str]) -> list[set[str]]:
        """As `in_stages`."""
        return in_stages(None if self.attention is None else self.attention.views, pruned)

    def coordinated(self, reports: Sequence[LayerReport], method: Method, task: Task) -> list[LayerReport]:
        """Coordinates the value and output projections if both have just been pruned; returns the updated reports."""
        if self.attention is None or not self.attention.prunes([report.name for report in reports]):
            return list(reports)
        renewed, self.figures["attention"] = self.attention.coordinated(
            self.stream, self.index, self.block, reports, method, task
        )
        self._note(reports, renewed)
        if self.figures["attention"]["accepted"]:  # fitted to the calibration tokens without the validation tokens
            self.held_out |= self.attention.names
        return renewed

    def finished(self, reports: Sequence[LayerReport], method: Method, task: Task) -> list[LayerReport]:
        """Refits the pruned block, if the run has a refit, and returns the updated reports with the errors of all
        matrices that were changed again. The stream may advance to the next block."""
        self.attention = None
        done = list(reports)
        if self.joint.refit and reports:
            done, self.figures["refit"] = refit_block(
                self.stream, self.index, self.block, self.outputs, reports, method, task
            )
            self._note(reports, done)
        return self._measured(done, method, task)

    def _note(self, before: Sequence[LayerReport], after: Sequence[LayerReport]) -> None:
        for old, new in zip(before, after, strict=True):
            if old.relative_error is not None and new.relative_error is None:
                self.outdated.add(old.name)

    def _measured(self, reports: Sequence[LayerReport], method: Method, task: Task) -> list[LayerReport]:
        """The reports, with the errors of the outdated matrices measured on their present inputs, which are collected
        while the stream advances."""
        if not self.outdated:
            return list(reports)
        errors: dict[str, tuple[float, float | None]] = {}
        by_name = {report.name: report for report in reports}
        for shared in self.stream.collect(self.index, self.outdated, advance=True):
            for view in shared.weights:
                errors[view.name] = self._errors(view, shared.statistics, by_name[view.name], method, task)
        return [
            replace(report, relative_error=pair[0], relative_error_validation=pair[1]) if pair else report
            for report, pair in ((report, errors.get(report.name)) for report in reports)
        ]

    def _errors(
        self, view: WeightView, statistics: LayerStatistics, report: LayerReport, method: Method, task: Task
    ) -> tuple[float, float | None]:
        """The relative errors of a matrix and its bias on all tokens, and on the validation tokens (None if the matrix
        was fitted to them)."""
        layer = method.problem.posed(
            self.dense[view.name],
            statistics.gram,
            method.constraint(task.target.of_pruned(view.name)),
            ridge=report.ridge or 0.0,
            damping=report.damping or 0.0,
        )
        written = Point(weight=view.read().to(layer.weight.dtype))
        bias = self._bias_error(view, statistics.gram, statistics.mean, statistics.tokens)
        error = max(layer.relative_error(written) + bias, 0.0)  # in this order NaN stays NaN
        validation = statistics.validation
        if validation is None or (view.name not in self.held_out and method.reads_inputs):
            return error, None
        bias = self._bias_error(view, validation, statistics.validation_mean, statistics.validation_tokens)
        return error, max(layer.relative_error(written, validation) + bias, 0.0)

    def _bias_error(self, view: WeightView, gram: Tensor, mean: Tensor | None, tokens: int) -> float:
        """The last two terms of the squared error with a changed bias, relative to tr(W H W^T):

        |X E^T + 1 d^T|^2 = tr(E H E^T) + 2 n d^T E mu + n |d|^2,    E = V - W, d = b_V - b_W, mu the mean input.
        """
        if view.name not in self.biases or view.bias is None:
            return 0.0
        change = view.bias.double() - self.biases[view.name].double()
        if not bool(change.any()):
            return 0.0
        energy = quadratic.energy(self.dense[view.name], gram)
        assert mean is not None, "collected statistics have it"
        shift = (view.read().double() - self.dense[view.name].double()) @ mean.to(change)
        error = tokens * float(change @ (2 * shift + change))
        if energy <= 0:  # the outputs are zero without the bias
            return math.inf if error > 0 else 0.0
        return error / energy
