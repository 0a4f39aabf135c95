"""Layer-wise pruning: every weight by its own local problem, block after block, on the inputs of the pruned prefix."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.kernels import quadratic
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import StackedRows
from admm_prune.problems.gram import LayerStatistics
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.block_walk import Visit, walk
from admm_prune.recipes.branch_pruning import report_of
from admm_prune.recipes.convergence import Convergence
from admm_prune.recipes.local_methods import Method
from admm_prune.recipes.recipe import LayerReport, Outcome, Request
from admm_prune.recipes.ridge import settle_ridge
from admm_prune.recipes.targets import Target
from admm_prune.solvers.doctor import diagnose
from admm_prune.solvers.reference import lower_bound


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
            chosen = {view.name for view in block.weights if request.target.at(view.name) is not None}
            inputs = stream.collect(index, chosen, weigh=self.method.problem.token_weights) if chosen else []
            return Visit(layers=[*prune_all(inputs, self.method, request), *untouched(block, chosen)])

        visits = walk(model, request, visit)
        request.tell(len(visits), len(visits))
        return Outcome(layers=[report for found in visits for report in found.layers])


def prune_all(inputs: list[SharedInput], method: Method, request: Request) -> list[LayerReport]:
    """Prunes the weights of a block: several processes deal out what is solved as one, and hand on what comes of it."""
    pieces = inputs if method.stacks else [SharedInput((v,), one.statistics) for one in inputs for v in one.weights]
    reports = request.world.divided(
        [_cost(piece) for piece in pieces],
        lambda i: prune_shared(pieces[i], method, request),
        lambda i: [view.read() for view in pieces[i].weights],
    )
    return [report for found in reports for report in found]


def _cost(piece: SharedInput) -> float:
    """Of a solve, to compare with others: a factorization, and products with its inverse."""
    width = float(piece.weights[0].shape[1])
    return width**3 + width**2 * sum(view.shape[0] for view in piece.weights)


def check_target(blocks: Iterable[Block], method: Method, target: Target) -> None:
    """Refuses a target before any weight is touched.

    Raises:
        UserError: a weight does not admit it; the message names the weight.
    """
    for view in (view for block in blocks for view in block.weights):
        own = target.at(view.name)
        try:
            if own is not None:
                _try(method.constraint(own), view.shape)
        except ValueError as error:
            raise UserError(f"{view.name}: {error}") from error


def _try(constraint: Constraint, shape: tuple[int, int]) -> None:
    """Raises ValueError where matrices of this shape do not admit the set; one row tells it of all but tiles."""
    try:
        constraint.contains(Point(weight=torch.zeros(1, shape[1])))
    except ValueError:
        constraint.contains(Point(weight=torch.zeros(()).expand(shape)))


def untouched(block: Block, pruned: Collection[str]) -> list[LayerReport]:
    """Reports of the weights of a block that were not among those to prune."""
    left = [view for view in block.weights if view.name not in pruned]
    return [replace(report_of(view, view.shape), notes=("not to be pruned: left as it was",)) for view in left]


def prune_shared(shared: SharedInput, method: Method, request: Request) -> list[LayerReport]:
    """Prunes the weights that read one input, in place.

    A method that gains by it solves them stacked, each within its own budget: one Gram is factored once for q, k and v.
    Status, iterations, notes and diagnosis are then those of the one solve, and its seconds are shared out by the
    number of entries, so that the seconds of all weights still add up to the whole.

    Raises:
        UserError: a weight cannot be pruned; the message names it.
    """
    groups: dict[object, tuple[WeightView, ...]] = {}
    for view in shared.weights:
        alike = None if method.stacks_targets else request.target.at(view.name)
        key: object = alike if method.stacks else view.name
        groups[key] = (*groups.get(key, ()), view)
    return [report for views in groups.values() for report in _prune(views, shared.statistics, method, request)]


def _prune(
    views: tuple[WeightView, ...], statistics: LayerStatistics, method: Method, request: Request
) -> list[LayerReport]:
    """Prunes some weights by one solve."""
    began = time.perf_counter()
    constraints = [method.constraint(target_of(request, view)) for view in views]
    # A copy: what is read shares memory with the parameter, which is about to be overwritten.
    stacked = torch.cat([view.read() for view in views])
    sizes = [view.shape[0] for view in views]
    try:
        asked = settle_ridge(request.ridge, method, stacked, statistics.gram, statistics.validation, constraints[0])
        problem = method.problem.build(
            stacked,
            statistics.gram,
            constraints[0] if len(views) == 1 else StackedRows(tuple(zip(sizes, constraints, strict=True))),
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
    reports: list[LayerReport] = []
    for view, weight, constraint in zip(views, stacked.split(sizes), constraints, strict=True):
        own = method.problem.build(weight, statistics.gram, constraint, ridge=problem.ridge, damping=problem.damping)
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
                diagnosis=diagnosis,
                convergence=None if reports else Convergence.of(result.history),
                **(_bound(own, written) if request.bounds else {}),
            )
        )
    return reports


def target_of(request: Request, view: WeightView) -> Target:
    """The target of a weight that is to be pruned."""
    target = request.target.at(view.name)
    assert target is not None, f"{view.name} is to stay as it is"
    return target


def _bound(problem: LayerReconstruction, written: Point) -> dict[str, float]:
    """The objective reached and a lower bound of all that can be, both relative to tr(W H W^T).

    Empty where nothing is proven: the layer is never used, or the sparse set is of another kind than the bound knows.
    """
    energy = quadratic.energy(problem.weight, problem.gram)
    try:
        return {"objective": problem.value(written) / energy, "bound": lower_bound(problem).value / energy}
    except (ZeroDivisionError, TypeError, ValueError):
        return {}
