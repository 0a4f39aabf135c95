"""Structured pruning of one sublayer of a block: selection of its groups, compensation, and slicing of its matrices."""

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
from admm_prune.models.structure import Block
from admm_prune.models.sublayers import Sublayer, keep_groups, sublayers
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.statistics import LayerStatistics

_TRIAL_TOKENS = 8
_CHANGE = 1e-3  # tolerated change of a block's outputs by slicing in float32, relative to the largest output

Outputs = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Prunes sublayers with given statistics; see `StruPrune` for the settings.

    Several processes have the same statistics, share the sublayers, and exchange the results.
    """

    selector: Selector
    compensate: bool
    fold_bias: bool
    ridge: float
    world: World = ALONE

    def problem(self, sublayer: Sublayer, statistics: LayerStatistics, keep: int) -> GroupReconstruction:
        """The group problem of a sublayer, with `keep` groups to keep.

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
        """E(k), the loss without k = 0, ..., n groups, for each sublayer, by its name: see `selectors.losses`."""

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
            removed: the number of groups to remove, by the name of the sublayer.
            outputs: runs the block on some inputs, to check that slicing off zeros does not change its outputs.

        Raises:
            UserError: the least-squares problem cannot be solved, or slicing changes the outputs because the block is
                not structured as its shapes suggest.
        """
        solved = self.world.divided(
            [_cost(sublayer) for sublayer in parts],
            lambda indices: [self._solve(parts[i], statistics[parts[i].name], removed[parts[i].name]) for i in indices],
            lambda i: _solution(parts[i]),
        )
        for sublayer, (_, remaining) in zip(parts, solved, strict=True):
            masked = outputs() if outputs is not None else None
            keep_groups(sublayer, torch.tensor(remaining))
            if masked is not None and outputs is not None:
                _check_unchanged(sublayer, masked, outputs())
        return [report for report, _ in solved]

    def _solve(self, sublayer: Sublayer, statistics: LayerStatistics, count: int) -> tuple[LayerReport, list[int]]:
        """Writes V and b, which compensate for `count` removed groups.

        Returns:
            The report of V, and the indices of the remaining groups.
        """
        began = time.perf_counter()
        output, dense_shape = sublayer.output, sublayer.output.shape
        problem = self.problem(sublayer, statistics, sublayer.count - count)
        try:
            result, columns = selectors.solve(problem, self.selector, self.compensate)
            output.write(result.solution["weight"])
            if problem.mean is not None and output.bias is not None:
                output.write_bias(output.bias + problem.bias_shift(result.solution).to(output.bias))
        except (ValueError, LinAlgError) as error:
            raise UserError(f"{output.name}: {error}") from error
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
    """Checks, on a copy of each kind of block, that removing groups of zeros does not change its outputs.

    Args:
        losing: the names of the sublayers that will be pruned.

    Raises:
        UserError: the outputs change, or the block cannot be called without the groups; the message names the module.
    """
    device = offloading.device(model)
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers
    batch = Batch((torch.arange(_TRIAL_TOKENS) * 7919 % size)[None], torch.tensor([_TRIAL_TOKENS]))
    (flow,) = record(
        model,
        blocks,
        [("groups", batch)],
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
                _check_sublayer(sublayer, partial(flow.replay, tried, index))


def _check_sublayer(sublayer: Sublayer, outputs: Outputs) -> None:
    """Zeroes every other group of a sublayer, including the first, then removes them and compares the outputs."""
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
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the block
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise UserError(
            f"{sublayer.name}: the block cannot be called without some of its structured groups ({first_line(error)}): "
            "use a method that prunes weights"
        ) from error
    _check_unchanged(sublayer, masked, sliced)


def _cost(sublayer: Sublayer) -> float:
    """The relative cost of a solve: a factorization of the Gram of the output matrix."""
    return float(sublayer.output.shape[1]) ** 3


def _solution(sublayer: Sublayer) -> Iterator[Tensor]:
    """The tensors that `Pruner` writes, for the exchange between processes: V, and b if there is a bias."""
    yield sublayer.output.read()
    if sublayer.output.bias is not None:
        yield sublayer.output.bias.detach()


def _check_unchanged(sublayer: Sublayer, masked: Tensor, sliced: Tensor) -> None:
    """Raises UserError if the outputs with zeroed groups differ from those without the groups beyond rounding."""
    scale = float(masked.abs().max())
    change = float((masked - sliced).abs().max())
    allowed = max(_CHANGE, 16 * torch.finfo(masked.dtype).eps) * scale
    if change > allowed:
        raise UserError(
            f"{sublayer.name}: without its zero groups the block gives other outputs (by {change / scale:.1e}): "
            "it does not consist of the groups that its matrices suggest"
        )
