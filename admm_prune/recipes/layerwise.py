"""Layer-wise pruning: every weight by its own local problem, block after block, on the inputs of the pruned prefix."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.point import Point
from admm_prune.problems.constraints import StackedRows
from admm_prune.problems.gram import LayerStatistics
from admm_prune.recipes.block_walk import Visit, walk
from admm_prune.recipes.local_methods import Method
from admm_prune.recipes.recipe import LayerReport, Outcome, Request
from admm_prune.recipes.ridge import settle_ridge
from admm_prune.recipes.targets import Target
from admm_prune.solvers.doctor import diagnose


@dataclass(frozen=True)
class Layerwise:
    """A recipe that solves the layer problem of every matrix in the decoder blocks by one method.

    For each block: replay it on what the pruned blocks before it put out, take one Gram for each shared input, solve
    the layer problems, write back, replay the pruned block to get the next block's inputs.
    """

    method: Method
    samples: int = 128

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def summary(self) -> str:
        return self.method.summary

    @property
    def budget(self) -> Literal["matrix", "model"]:
        return "matrix"

    def check(self, model: nn.Module, target: Target) -> None:
        check_target(decoder_blocks(model), self.method, target)

    def prune(self, model: nn.Module, request: Request) -> Outcome:
        self.check(model, request.target)

        def visit(stream: BlockStream, index: int, block: Block) -> Visit:
            shared = stream.collect(index, weigh=self.method.objective.token_weights)
            return Visit(layers=[report for one in shared for report in prune_shared(one, self.method, request)])

        visits = walk(model, request, visit)
        request.tell(len(visits), len(visits))
        return Outcome(layers=[report for found in visits for report in found.layers])


def check_target(blocks: Iterable[Block], method: Method, target: Target) -> None:
    """Refuses a target before any weight is touched.

    Raises:
        UserError: a weight does not admit it; the message names the weight.
    """
    constraint = method.constraint(target)
    for view in (view for block in blocks for view in block.weights):
        try:
            constraint.contains(Point(weight=torch.zeros(1, view.shape[1])))
        except ValueError as error:
            raise UserError(f"{view.name}: {error}") from error


def prune_shared(shared: SharedInput, method: Method, request: Request) -> list[LayerReport]:
    """Prunes the weights that read one input, in place.

    A method that gains by it solves them stacked, each within its own budget: one Gram is factored once for q, k and v.
    Status, iterations, notes and diagnosis are then those of the one solve, and its seconds are shared out by the
    number of entries, so that the seconds of all weights still add up to the whole.

    Raises:
        UserError: a weight cannot be pruned; the message names it.
    """
    if not method.stacks:
        return [report for view in shared.weights for report in _prune((view,), shared.statistics, method, request)]
    return _prune(shared.weights, shared.statistics, method, request)


def _prune(
    views: tuple[WeightView, ...], statistics: LayerStatistics, method: Method, request: Request
) -> list[LayerReport]:
    """Prunes some weights by one solve."""
    began = time.perf_counter()
    constraint = method.constraint(request.target)
    # A copy: what is read shares memory with the parameter, which is about to be overwritten.
    stacked = torch.cat([view.read() for view in views])
    sizes = [view.shape[0] for view in views]
    try:
        asked = settle_ridge(request.ridge, method, stacked, statistics.gram, statistics.validation, constraint)
        problem = method.objective(
            stacked,
            statistics.gram,
            constraint if len(views) == 1 else StackedRows(tuple((rows, constraint) for rows in sizes)),
            ridge=asked.ridge,
            damping=asked.damping,
        )
        result = method.make().solve(problem)
        for view, weight in zip(views, result.solution["weight"].split(sizes), strict=True):
            view.write(weight)
    except (ValueError, LinAlgError) as error:
        raise UserError(f"{', '.join(view.name for view in views)}: {error}") from error
    diagnosis = diagnose(
        result,
        width=stacked.shape[1],
        tokens=statistics.tokens,
        dead=int(problem.dead.sum()),
        ridge_asked=asked.ridge,
        ridge_used=problem.ridge,
    )
    seconds = time.perf_counter() - began
    reports = []
    for view, weight in zip(views, stacked.split(sizes), strict=True):
        own = method.objective(weight, statistics.gram, constraint, ridge=problem.ridge, damping=problem.damping)
        written = Point(weight=view.read().to(own.weight.dtype))
        validation = statistics.validation
        reports.append(
            LayerReport(
                name=view.name,
                shape=view.shape,
                sparsity=written.sparsity(),
                relative_error=own.relative_error(written),
                relative_error_validation=None if validation is None else own.relative_error(written, validation),
                status=result.status.name,
                iterations=result.iterations,
                seconds=seconds * weight.numel() / stacked.numel(),
                tokens=statistics.tokens,
                ridge=problem.ridge,
                damping=problem.damping,
                ridge_trials=asked.trials,
                notes=(*statistics.notes, *result.notes),
                diagnosis=tuple(finding.code for finding in diagnosis),
            )
        )
    return reports
