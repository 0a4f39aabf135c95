"""Structured pruning of one sublayer of a block: its problem, the selection, the compensation, the slicing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.hub import first_line
from admm_prune.data.sequences import Batch
from admm_prune.errors import UserError
from admm_prune.methods.base import LayerReport
from admm_prune.methods.struprune import selectors
from admm_prune.methods.struprune.selectors import Selector
from admm_prune.models.activation_store import ActivationStore, record, returned_form
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import Offloading
from admm_prune.models.structure import Block, WeightView
from admm_prune.models.sublayers import Sublayer, keep_groups, sublayers
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.statistics import LayerStatistics

_TRIED = 8  # tokens
_CHANGE = 1e-3  # tolerated change of a block's outputs by slicing, relative to the largest, in float32

Outputs = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """How sublayers are pruned; see `StruPrune` for the settings.

    Several processes, with the same statistics, solve one sublayer each and exchange the results.
    """

    selector: Selector
    compensate: bool
    fold_bias: bool
    ridge: float
    world: World = ALONE

    def problem(self, sublayer: Sublayer, statistics: LayerStatistics, keep: int) -> GroupReconstruction:
        """The group problem of a sublayer with a given number of groups to keep.

        Raises:
            UserError: the statistics cannot be used; the message names the weight.
        """
        mean = statistics.mean if self.fold_bias and sublayer.output.bias is not None else None
        try:
            return GroupReconstruction(
                sublayer.output.read().clone(),  # `read` returns a view of the parameter
                statistics.gram,
                Groups(1 - keep / sublayer.count, sublayer.width, keep),
                mean=mean,
                tokens=statistics.tokens,
                centred_gram=None if mean is None else statistics.centred,
                ridge=self.ridge,
            )
        except ValueError as error:
            raise UserError(f"{sublayer.output.name}: {error}") from error

    def losses(self, parts: Sequence[Sublayer], statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
        """E(k), the loss of every sublayer without k = 0..n of its groups: (n + 1,), by the sublayer's name."""

        def of(sublayer: Sublayer) -> Tensor:
            problem = self.problem(sublayer, statistics[sublayer.name], sublayer.count)
            try:
                return selectors.losses(problem, sublayer.width, self.selector, self.compensate)
            except LinAlgError as error:
                raise UserError(f"{sublayer.output.name}: {error}: give a larger ridge (run --ridge)") from error

        costs = [_cost(sublayer) for sublayer in parts]
        curves = self.world.divided(costs, lambda indices: [of(parts[i]) for i in indices])
        return {sublayer.name: curve for sublayer, curve in zip(parts, curves, strict=True)}

    def prune(
        self,
        parts: Sequence[Sublayer],
        statistics: Mapping[str, LayerStatistics],
        removed: Mapping[str, int],
        outputs: Outputs | None = None,
    ) -> list[LayerReport]:
        """Removes structured groups from some sublayers of a block, in place, with statistics of their current inputs.

        Args:
            statistics: of the inputs of the output matrix, by the name of the sublayer.
            removed: number of groups to remove, by the name of the sublayer.
            outputs: runs the block on some inputs: slicing off zeros must not change them.

        Raises:
            UserError: the least-squares problem cannot be solved, or the block has another structure than its shapes
                suggest.
        """
        solved = self.world.divided(
            [_cost(sublayer) for sublayer in parts],
            lambda indices: [self._solve(parts[i], statistics[parts[i].name], removed[parts[i].name]) for i in indices],
            lambda i: _answering(parts[i]),
        )
        for sublayer, (_, remaining) in zip(parts, solved, strict=True):
            masked = outputs() if outputs is not None else None
            keep_groups(sublayer, torch.tensor(remaining))
            if masked is not None and outputs is not None:
                _check_unchanged(sublayer, masked, outputs())
        return [report for report, _ in solved]

    def _solve(self, sublayer: Sublayer, statistics: LayerStatistics, count: int) -> tuple[LayerReport, list[int]]:
        """Writes the V and b that compensate for the removed groups; also returns the groups that remain."""
        began = time.perf_counter()
        output, dense_shape = sublayer.output, sublayer.output.shape
        problem = self.problem(sublayer, statistics, sublayer.count - count)
        try:
            result, columns = selectors.solve(problem, self.selector, self.compensate)
            output.write(result.solution["weight"])
        except (ValueError, LinAlgError) as error:
            raise UserError(f"{output.name}: {error}") from error
        if problem.mean is not None and output.bias is not None:
            output.bias.add_(problem.bias_shift(result.solution).to(output.bias))
        written = Point(weight=output.read().to(problem.weight.dtype))
        report = LayerReport(
            name=output.name,
            shape=dense_shape,
            sparsity=written.sparsity(),
            relative_error=problem.relative_error(written),
            status=result.status.name,
            iterations=result.iterations,
            seconds=time.perf_counter() - began,
            tokens=statistics.tokens,
            ridge=problem.ridge,
            damping=problem.damping,
            notes=result.notes,
        )
        return report, columns.view(-1, sublayer.width)[:, 0].nonzero()[:, 0].tolist()


@torch.no_grad()
def check_slicing(model: nn.Module, blocks: list[Block], offloading: Offloading, losing: Set[str]) -> None:
    """Checks on a copy of every kind of block that removing zero groups does not change its outputs on a few tokens.

    Args:
        losing: the names of the sublayers to be pruned.

    Raises:
        UserError: they change, or the block cannot be called without them; the message names the module.
    """
    device = offloading.device(model)
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers
    batch = Batch((torch.arange(_TRIED) * 7919 % size)[None], torch.tensor([_TRIED]))
    (flow,) = record(
        model,
        blocks,
        [("units", batch)],
        device,
        offloading=offloading,
        wrap=returned_form(model, blocks, device, offloading),
        activation_store=ActivationStore(),
    )
    seen = set()
    for index, block in enumerate(blocks):
        kind = tuple((type(b.module), b.kind, b.queries, b.size) for b in sublayers(block))
        if kind in seen:
            continue
        seen.add(kind)
        with offloading.block(index):
            tried = copy.deepcopy(block)
        for sublayer in sublayers(tried):
            if sublayer.name in losing:
                _try(sublayer, partial(flow.replay, tried, index))


def _try(sublayer: Sublayer, outputs: Outputs) -> None:
    """Removes every other group of a sublayer, including the first."""
    remaining = torch.arange(sublayer.count)[1::2]
    if not len(remaining):
        return
    zero = torch.ones(sublayer.count, dtype=torch.bool).scatter(0, remaining, value=False)
    weight = sublayer.output.read().clone()
    weight[:, zero.repeat_interleave(sublayer.width).to(weight.device)] = 0
    sublayer.output.write(weight)
    masked = outputs()
    keep_groups(sublayer, remaining)
    try:
        sliced = outputs()
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise UserError(
            f"{sublayer.name}: the block cannot be called without some of its structured groups ({first_line(error)}): "
            "use a method that prunes weights"
        ) from error
    _check_unchanged(sublayer, masked, sliced)


def _cost(sublayer: Sublayer) -> float:
    """The relative cost of a solve: a factorization of the Gram of the output matrix."""
    return float(sublayer.output.shape[1]) ** 3


def _answering(sublayer: Sublayer) -> Iterator[Tensor]:
    """The solution that compensates for the removed groups."""
    yield sublayer.output.read()
    if sublayer.output.bias is not None:
        yield sublayer.output.bias.detach()


def report_of(view: WeightView, dense_shape: tuple[int, int]) -> LayerReport:
    """The report of a matrix for which no problem was solved: it lost rows, or nothing."""
    left = int(view.read().count_nonzero())
    return LayerReport(name=view.name, shape=dense_shape, sparsity=1 - left / (dense_shape[0] * dense_shape[1]))


def _check_unchanged(sublayer: Sublayer, masked: Tensor, sliced: Tensor) -> None:
    scale = float(masked.abs().max())
    change = float((masked - sliced).abs().max())
    allowed = max(_CHANGE, 16 * torch.finfo(masked.dtype).eps) * scale
    if change > allowed:
        raise UserError(
            f"{sublayer.name}: without its zero groups the block gives other outputs (by {change / scale:.1e}): "
            "it does not consist of the groups that its matrices suggest"
        )
