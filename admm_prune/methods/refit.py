"""The blockwise refit: fits all pruned matrices of a block jointly to its dense output, on their supports."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.coordination import renewed
from admm_prune.methods.local import Method
from admm_prune.models.activation_store import BatchState, in_dtype
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block, WeightView
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import Product
from admm_prune.result import Status
from admm_prune.solvers.support_descent import SupportDescent

TOKENS = 1024  # in a batch that is backpropagated through a block: bounds the memory of its activations
# As good as a hundred steps with the default betas and warm-up: `benchmarks/refit_variants.py`.
DESCENT = replace(SupportDescent.of(70), warm_up=10, betas=(0.9, 0.9))
_LEAST_ENERGY = 1e-6  # lower bound of |y_t|^2 in the weight of a token, relative to the median


@dataclass(frozen=True)
class BlockTokens:
    """The batches that enter a block, and the targets (n, d) of their tokens without padding, in order."""

    states: Sequence[BatchState]
    targets: Tensor

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((int(state.mask.sum()) for state in self.states), initial=0))

    @cached_property
    def weights(self) -> Tensor:
        """1 / |y_t|^2 (n,), bounded because y_t may be zero: a zero embedding stays zero in blocks without biases."""
        energies = torch.cat([part.float().square().sum(1) for part in self.targets.split(TOKENS)])
        least = _LEAST_ENERGY * energies[energies > 0].median() if bool((energies > 0).any()) else energies.new_ones(())
        return energies.clamp_min(max(float(least), torch.finfo(energies.dtype).tiny)).reciprocal()

    def of_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The targets of the tokens of a batch, and their weights."""
        tokens = slice(*self._starts[number : number + 2])
        return self.targets[tokens], self.weights[tokens]


class BlockOutput:
    """min sum_t |f(h_t; x) - y_t|^2 / |y_t|^2 over the pruned matrices x of a block f in their sets; `Stochastic`.

    Errors are relative for every token, because the normalization at the start of the next block rescales every token;
    otherwise a few tokens with massive activations would dominate the sum. |y_t|^2 is at least 1e-6 of its median.

    A point has the pruned matrices (out, in) by name, in at least float32, the dtype in which the block is computed.

    Args:
        block: the pruned block; its current matrices are the start.
        views: its pruned matrices.
        constraint: their sparse sets.
        index: of the block in the model.
        tokens: the calibration tokens; each of their batches is a sample for `sample_gradient`.
        validation: the tokens for `value`.
    """

    curvature = 1.0  # unknown; no solver of stochastic problems on a fixed support reads it

    def __init__(
        self,
        block: Block,
        views: Sequence[WeightView],
        constraint: Constraint,
        index: int,
        tokens: BlockTokens,
        validation: BlockTokens,
    ) -> None:
        self.constraint, self.validation = constraint, validation
        self._block, self._views, self._index, self._tokens = block, views, index, tokens
        self._dtype = torch.promote_types(views[0].parameter.dtype, torch.float32)
        self._order = torch.randperm(len(tokens.states), generator=torch.Generator().manual_seed(0)).tolist()

    def initial(self) -> Point:
        return Point({view.name: view.read().to(self._dtype, copy=True) for view in self._views})

    @torch.no_grad()
    def value(self, x: Point) -> float:
        """The mean loss per validation token."""
        with self._holding(x):
            losses = [float(self._loss(self.validation, number)) for number in range(len(self.validation.states))]
        return sum(losses) / len(self.validation.targets)

    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """Loss and gradient on the draw-th batch of a fixed shuffle."""
        loss, gradient = self.differentiated(x, self._order[draw % len(self._order)])
        return float(loss), gradient

    def differentiated(self, x: Point, number: int) -> tuple[Tensor, Point]:
        """Loss, as a tensor that stays on its device, and gradient on batch `number`."""
        with self._holding(x) as parameters, torch.enable_grad():
            loss = self._loss(self._tokens, number)
            gradients = torch.autograd.grad(loss, parameters)
        stored = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
        return loss.detach(), Point({v.name: v.within(stored[id(v.parameter)]).contiguous() for v in self._views})

    @contextmanager
    def _holding(self, x: Point) -> Generator[list[Tensor]]:
        """Context in which the block computes with x and its parameters require gradients; restores both afterwards."""
        parameters = list({id(view.parameter): view.parameter for view in self._views}.values())
        before = [(parameter.data, parameter.requires_grad) for parameter in parameters]
        with in_dtype(self._block.module, self._dtype):
            try:
                for parameter in parameters:
                    parameter.data = parameter.data.to(self._dtype, copy=True)
                for view in self._views:
                    view.read().copy_(x[view.name])
                for parameter in parameters:
                    parameter.requires_grad_(True)
                yield [*parameters]
            finally:
                for parameter, (data, required) in zip(parameters, before, strict=True):
                    parameter.data = data
                    parameter.requires_grad_(required)

    def _loss(self, tokens: BlockTokens, number: int) -> Tensor:
        state = tokens.states[number]
        outputs = state.replay(self._block, self._index, finite=False, dtype=self._dtype)[state.mask]
        targets, weights = (x.to(outputs) for x in tokens.of_batch(number))
        return ((outputs - targets).square().sum(1) * weights).sum()


def refit_block(
    stream: BlockStream,
    index: int,
    block: Block,
    outputs: Mapping[str, Tensor],
    reports: Sequence[LayerReport],
    method: Method,
    task: Task,
) -> tuple[list[LayerReport], dict[str, Any]]:
    """Fits all pruned matrices of a block jointly to its dense outputs, in place and on their supports.

    The fit is kept only if it lowers the error on validation tokens, and is finite in the dtype of the model.

    Args:
        outputs: the outputs (n, d) of the dense block, for every part of the text.
        reports: of the pruned matrices.

    Returns:
        The updated reports, and the errors before and after as JSON values.

    Raises:
        UserError: the outputs of the pruned block, or its gradients, are not finite.
    """
    pruned = {report.name for report in reports}
    views = [view for view in block.weights if view.name in pruned]
    sets = {view.name: method.constraint(task.target.of_pruned(view.name)) for view in views}
    states = stream.states(index)
    parts = {part: BlockTokens(states[part], outputs[part]) for part in outputs if part != "holdout"}
    problem = BlockOutput(
        block, views, Product(sets), index, parts["calibration"], parts.get("validation", parts["calibration"])
    )
    start = problem.initial()
    try:
        result = DESCENT.solve(problem, start=start)
    except ArithmeticError as error:
        raise UserError(f"the refit of {block.name}: {error}") from error
    before, after = result.start_objective, result.objective
    assert before is not None, "an iterative solver has a start"
    if not all(view.fits(result.solution[view.name]) for view in views):
        overflow = {"before": before, "after": before, "accepted": False, "status": Status.NONFINITE.name}
        return list(reports), overflow
    for view in views:
        view.write(result.solution[view.name])
    if any(view.parameter.dtype != start[view.name].dtype for view in views):
        after = problem.value(problem.initial())  # the weights were rounded to the dtype of the model
    figures: dict[str, Any] = {"before": before, "after": after, "accepted": after < before}
    if not result.status.ok:
        figures["status"] = result.status.name
    if not after < before:
        for view in views:
            view.write(start[view.name])
        return list(reports), figures
    named = {view.name: view for view in views}
    return [renewed(report, named[report.name], "all matrices of the block together") for report in reports], figures
