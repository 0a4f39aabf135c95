"""What is done to several matrices of a block together, beside a method's own work: coordination and refit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from admm_prune.errors import UserError, did_you_mean
from admm_prune.methods.base import LayerReport, Runtime, Task
from admm_prune.methods.coordination import DenseAttention
from admm_prune.methods.local import Method
from admm_prune.methods.refit import TOKENS, refit_block
from admm_prune.models.attention import attention_views
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block, decoder_blocks

COORDINATED = ("attention",)
REFITS = ("block",)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The steps on several matrices of a block together.

    Args:
        coordinate: "attention": value and output projections as one problem, see `AttentionOutput`.
        refit: "block": all surviving weights of a block on its dense output, see `BlockOutput`; None for none.

    Raises:
        UserError: there is no such step.
    """

    coordinate: tuple[str, ...] = ()
    refit: str | None = None

    def __post_init__(self) -> None:
        for name in self.coordinate:
            if name not in COORDINATED:
                raise UserError(
                    f"coordinate must be {' or '.join(COORDINATED)}, not '{name}'{did_you_mean(name, COORDINATED)}"
                )

    @classmethod
    def of(cls, coordinate: str | Sequence[str], refit: str | None) -> Self:
        """From user input: names as a comma-separated list or a sequence, which count once each.

        Raises:
            UserError: a list without names, or no such step.
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
        """The options that ask for it."""
        coordinate = f"--coordinate {','.join(self.coordinate)}" if self.coordinate else ""
        return " and ".join(filter(None, [coordinate, f"--refit {self.refit}" if self.refit else ""]))

    def check(self, model: nn.Module) -> None:
        """Raises UserError for a block whose attention cannot be coordinated; the message names it."""
        if self.coordinate:
            for block in decoder_blocks(model):
                attention_views(block)

    def task(self, task: Task, runtime: Runtime) -> Task:
        """The task, with batches that are small enough to differentiate a block.

        Raises:
            UserError: there are several processes.
        """
        if not self:
            return task
        if runtime.world.size > 1:
            raise UserError(f"{self.label} is for a single process: run it without torchrun")
        text = task.calibration
        return replace(task, calibration=replace(text, batch_size=max(1, min(text.batch_size, TOKENS // text.length))))

    def begin(self, stream: BlockStream, index: int, block: Block, pruned: Collection[str]) -> JointBlock:
        """Reads what is needed of a block before it is pruned.

        Args:
            pruned: the names of its matrices to prune.
        """
        dense = DenseAttention.of(stream, index, block) if self.coordinate and pruned else None
        return JointBlock(self, stream, index, block, dense if dense is not None and dense.prunes(pruned) else None)


@dataclass
class JointBlock:
    """The steps on one block.

    Attributes:
        outputs: of the dense block, as `BlockStream.collect` fills it in; empty where no refit needs them.
        figures: JSON values.
    """

    joint: Joint
    stream: BlockStream
    index: int
    block: Block
    attention: DenseAttention | None
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])

    def stages(self, pruned: Collection[str]) -> list[set[str]]:
        """The matrices to prune, in the stages in which their inputs are collected: attention before all others, where
        it is coordinated."""
        if self.attention is None:
            return [set(pruned)] if pruned else []
        first = {view.name for view in self.attention.views.weights} & set(pruned)
        return [names for names in (first, set(pruned) - first) if names]

    def coordinated(self, reports: Sequence[LayerReport], method: Method, task: Task) -> list[LayerReport]:
        """The reports of matrices just pruned; value and output projections, if among them, are then solved as one."""
        if self.attention is None or not self.attention.prunes([report.name for report in reports]):
            return list(reports)
        renewed, self.figures["attention"] = self.attention.coordinated(
            self.stream, self.index, self.block, reports, method, task
        )
        return renewed

    def refitted(self, reports: Sequence[LayerReport], method: Method, task: Task) -> list[LayerReport]:
        """The reports of all pruned matrices of the block, whose weights are then refitted, if there is a refit."""
        self.attention = None
        if not self.joint.refit or not reports:
            return list(reports)
        renewed, self.figures["refit"] = refit_block(
            self.stream, self.index, self.block, self.outputs, reports, method, task
        )
        return renewed
