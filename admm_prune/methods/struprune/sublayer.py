"""Structured pruning of one branch of a block: its problem, the selection, the compensation, the slicing."""

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
from admm_prune.models.activation_store import Shelf, form_of, record
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import Residence
from admm_prune.models.structure import Block, WeightView
from admm_prune.models.sublayers import Branch, branches, keep_units
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.statistics import LayerStatistics

_TRIED = 8  # tokens
_CHANGE = 1e-3  # tolerated change of a block's outputs by slicing, relative to the largest, in float32

Outputs = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """How branches are pruned; see `StruPrune` for the settings.

    Several processes, with the same statistics, solve one branch each and exchange the results.
    """

    selector: Selector
    compensate: bool
    fold_bias: bool
    ridge: float
    world: World = ALONE

    def problem(self, branch: Branch, statistics: LayerStatistics, keep: int) -> GroupReconstruction:
        """The group problem of a branch with a given number of units to keep.

        Raises:
            UserError: the statistics cannot be used; the message names the weight.
        """
        mean = statistics.mean if self.fold_bias and branch.output.bias is not None else None
        try:
            return GroupReconstruction(
                branch.output.read().clone(),  # `read` returns a view of the parameter
                statistics.gram,
                Groups(1 - keep / branch.count, branch.width, keep),
                mean=mean,
                tokens=statistics.tokens,
                centred_gram=None if mean is None else statistics.centred,
                ridge=self.ridge,
            )
        except ValueError as error:
            raise UserError(f"{branch.output.name}: {error}") from error

    def losses(self, parts: Sequence[Branch], statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
        """The loss of every branch when k = 0..n of its units are removed: (n + 1,), by the branch's name."""

        def of(branch: Branch) -> Tensor:
            problem = self.problem(branch, statistics[branch.name], branch.count)
            try:
                return selectors.losses(problem, branch.width, self.selector, self.compensate)
            except LinAlgError as error:
                raise UserError(f"{branch.output.name}: {error}: give a larger ridge (run --ridge)") from error

        found = self.world.divided([_cost(branch) for branch in parts], lambda own: [of(parts[i]) for i in own])
        return {branch.name: losses for branch, losses in zip(parts, found, strict=True)}

    def prune(
        self,
        parts: Sequence[Branch],
        statistics: Mapping[str, LayerStatistics],
        removed: Mapping[str, int],
        outputs: Outputs | None = None,
    ) -> list[LayerReport]:
        """Removes units from some branches of a block, in place, with statistics of their current inputs.

        Args:
            statistics: of the inputs of the output matrix, by the name of the branch.
            removed: number of units to remove, by the name of the branch.
            outputs: runs the block on some inputs: slicing off zeros must not change them.

        Raises:
            UserError: the least-squares problem cannot be solved, or the block has another structure than its shapes
                suggest.
        """
        solved = self.world.divided(
            [_cost(branch) for branch in parts],
            lambda own: [self._solve(parts[i], statistics[parts[i].name], removed[parts[i].name]) for i in own],
            lambda i: _answering(parts[i]),
        )
        for branch, (_, kept) in zip(parts, solved, strict=True):
            masked = outputs() if outputs is not None else None
            keep_units(branch, torch.tensor(kept))
            if masked is not None and outputs is not None:
                _check_unchanged(branch, masked, outputs())
        return [report for report, _ in solved]

    def _solve(self, branch: Branch, statistics: LayerStatistics, count: int) -> tuple[LayerReport, list[int]]:
        """Writes the weights and the bias that compensate for the removed units; returns the units kept too."""
        began = time.perf_counter()
        output, dense_shape = branch.output, branch.output.shape
        problem = self.problem(branch, statistics, branch.count - count)
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
        return report, columns.view(-1, branch.width)[:, 0].nonzero()[:, 0].tolist()


@torch.no_grad()
def check_units(model: nn.Module, blocks: list[Block], residence: Residence, losing: Set[str]) -> None:
    """Checks on a copy of every kind of block that removing zero units does not change its outputs on a few tokens.

    Args:
        losing: the names of the branches to be pruned.

    Raises:
        UserError: they change, or the block cannot be called without them; the message names the module.
    """
    device = residence.device(model)
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers
    batch = Batch((torch.arange(_TRIED) * 7919 % size)[None], torch.tensor([_TRIED]))
    (flow,) = record(
        model,
        blocks,
        [("units", batch)],
        device,
        residence=residence,
        wrap=form_of(model, blocks, device, residence),
        shelf=Shelf(),
    )
    seen = set()
    for index, block in enumerate(blocks):
        kind = tuple((type(b.module), b.kind, b.queries, b.size) for b in branches(block))
        if kind in seen:
            continue
        seen.add(kind)
        with residence.block(index):
            tried = copy.deepcopy(block)
        for branch in (own for own in branches(tried) if own.name in losing):
            _try(branch, partial(flow.replay, tried, index))


def _try(branch: Branch, outputs: Outputs) -> None:
    """Removes every other unit of a branch, including the first."""
    kept = torch.arange(branch.count)[1::2]
    if not len(kept):
        return
    columns = torch.ones(branch.count, dtype=torch.bool).scatter(0, kept, value=False).repeat_interleave(branch.width)
    weight = branch.output.read().clone()
    weight[:, columns.to(weight.device)] = 0
    branch.output.write(weight)
    masked = outputs()
    keep_units(branch, kept)
    try:
        sliced = outputs()
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise UserError(
            f"{branch.name}: the block cannot be called without some of its units ({first_line(error)}): "
            "use a method that prunes weights"
        ) from error
    _check_unchanged(branch, masked, sliced)


def _cost(branch: Branch) -> float:
    """The relative cost of a solve: a factorization of the Gram of the output matrix."""
    return float(branch.output.shape[1]) ** 3


def _answering(branch: Branch) -> Iterator[Tensor]:
    """The solution that compensates for the removed units."""
    yield branch.output.read()
    if branch.output.bias is not None:
        yield branch.output.bias.detach()


def report_of(view: WeightView, dense_shape: tuple[int, int]) -> LayerReport:
    """The report of a matrix for which no problem was solved: it lost rows, or nothing."""
    left = int(view.read().count_nonzero())
    return LayerReport(name=view.name, shape=dense_shape, sparsity=1 - left / (dense_shape[0] * dense_shape[1]))


def _check_unchanged(branch: Branch, masked: Tensor, sliced: Tensor) -> None:
    scale = float(masked.abs().max())
    change = float((masked - sliced).abs().max())
    allowed = max(_CHANGE, 16 * torch.finfo(masked.dtype).eps) * scale
    if change > allowed:
        raise UserError(
            f"{branch.name}: without its zero units the block gives other outputs (by {change / scale:.1e}): "
            "it is not made of units as its matrices look"
        )
