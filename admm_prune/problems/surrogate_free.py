"""Surrogate-free pruning: a model's own loss over batches of data, as a function of its linear weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import Product, SparseSet
from admm_prune.prunable import HEADS, linear_weights

Loss = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> scalar

_PROBES = 4  # random directions that the curvature is estimated from


class SurrogateFree:
    """f(x) = the mean loss of a model whose linear weights are x, over batches; a `Stochastic` problem.

    `sample_gradient` takes one training batch a draw: the draws of an epoch pass through all of them once, in an order
    drawn anew for every epoch. `value` is the mean over the validation batches, so that the best point of a solver is
    the best on held-out text. The rest of the model is fixed. The model is the problem's work space: every call writes
    its point into it, and `write` stores a solution there.

    Points hold the pruned weights under their names, each (out, in), whatever way the model stores them.

    Args:
        model: in the state in which its loss is to be taken (`eval()`, where it would drop activations at random).
        loss: of the model on a batch, a scalar to be differentiated; `models.losses` has those of language models.
        training: batches, anything that `loss` understands.
        validation: the same, for `value`.
        constraint: of the whole point (`Product` where the weights have sets of their own), or, with `each`, of every
            single weight.
        each: take the constraint for every weight by itself.
        targets: shell patterns of the names of weights to prune.
        ignore: shell patterns of the names of weights to leave dense.
        seed: of the order of the batches.

    Raises:
        UserError: there is no weight to prune, or no batch.

    Source: Lee et al., The unseen frontier: pushing the limits of LLM sparsity with surrogate-free ADMM, 2026
    (arXiv 2510.01650).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        training: Sequence[Any],
        validation: Sequence[Any],
        constraint: SparseSet,
        *,
        each: bool = True,
        targets: Sequence[str] = ("*",),
        ignore: Sequence[str] = HEADS,
        seed: int = 0,
    ) -> None:
        if not training or not validation:
            raise UserError("a loss over batches needs at least one to train on and one to validate on")
        self._model, self._loss, self._seed = model, loss, seed
        self._training, self._validation = training, validation
        self._weights = {weight.name: weight for weight in linear_weights(model, targets=targets, ignore=ignore)}
        self.constraint: Constraint = Product(dict.fromkeys(self._weights, constraint)) if each else constraint
        self._dense = self.read()
        self.notes: tuple[str, ...] = ()

    def initial(self) -> Point:
        return self._dense.clone()

    @torch.no_grad()
    def value(self, x: Point) -> float:
        """The mean loss over the validation batches, summed in float64."""
        self.write(x)
        return math.fsum(float(self._loss(self._model, batch)) for batch in self._validation) / len(self._validation)

    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """Loss and gradient on training batch `draw`."""
        epoch, place = divmod(draw, len(self._training))
        batch = self._training[epoch_order(len(self._training), self._seed, epoch)[place]]
        self.write(x)
        parameters = [weight.parameter for weight in self._weights.values()]
        before = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss = self._loss(self._model, batch)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        finally:
            for parameter, required in zip(parameters, before, strict=True):
                parameter.requires_grad_(required)
        named = zip(self._weights.values(), gradients, strict=True)
        return float(loss.detach()), Point({w.name: (g.mT if w.transposed else g).contiguous() for w, g in named})

    @cached_property
    def curvature(self) -> float:
        """Half the mean diagonal of the Hessian on the first batch: mean of v . H v over random signs v, by differences
        of gradients. Where the loss curves downwards on the whole, its absolute value; 1, with a note, where that is
        zero or not finite.

        Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
        """
        generator = torch.Generator().manual_seed(self._seed)
        scale = self._dense.norm() / math.sqrt(self._dense.numel())
        finest = min(torch.finfo(x.dtype).eps for x in self._dense.values())
        step = (scale or 1.0) * finest ** (1 / 3)
        traces = []
        for _ in range(_PROBES):
            signs = self._dense.map(lambda x: (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x))
            slopes = [self.sample_gradient(self._dense + sign * step * signs, 0)[1].dot(signs) for sign in (1.0, -1.0)]
            traces.append((slopes[0] - slopes[1]) / (2 * step))
        mean: float = abs(sum(traces)) / _PROBES / self._dense.numel() / 2
        if math.isfinite(mean) and mean > 0:
            return mean
        self.notes += (f"the curvature of the loss is estimated as {mean:g}: 1 is used as the unit of the penalty",)
        return 1.0

    @torch.no_grad()
    def read(self) -> Point:
        """The weights as they are in the model, copied."""
        return Point({w.name: _oriented(w.parameter.detach(), w.transposed).clone() for w in self._weights.values()})

    @torch.no_grad()
    def write(self, x: Point) -> None:
        """Writes a point to the model."""
        for name, weight in self._weights.items():
            _oriented(weight.parameter.detach(), weight.transposed).copy_(x[name])


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` items in this epoch: a permutation, drawn anew for every epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _oriented(parameter: Tensor, transposed: bool) -> Tensor:
    return parameter.mT if transposed else parameter
