"""A learning rate from the model itself: how far along Adam's first step its loss goes on falling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from admm_prune.data.sequences import Batch
from admm_prune.kernels import quantization
from admm_prune.recipes.training import Loss
from admm_prune.solvers.elsa.sharding import local, totals

_SMALLEST, _LARGEST = -14.0, -2.0  # steps tried: powers of two, in units of the root mean square of the weights
_TRIALS, _EXACT = 7, 0.4  # at most so many steps are tried; the power of two is settled to within this
GRADIENTS = 3  # batches that the direction is taken from
_AT_HALF, _POWER = 2.3, 0.75  # the best rates of a grid, on two models at five densities: see `rate`


def passes(judges: float) -> int:
    """What a measurement costs in forward and backward passes over a batch; a forward pass alone is a third of one.

    Args:
        judges: batches that a judgement takes.
    """
    return GRADIENTS + math.ceil((_TRIALS + 1) * judges / 3)


@dataclass(frozen=True)
class MeasuredRate:
    """The step that lowers the loss the most along sign(g).

    Attributes:
        decrease: of the loss by it; not above zero where no step lowers the loss.
    """

    step: float
    decrease: float

    def rate(self, density: float) -> float:
        """A rate for Adam at a density d to come: 2.3 (2 d)^-3/4 times the step.

        The fewer weights are left, the farther each has to go, while single steps allow hardly more.
        """
        return float(_AT_HALF * self.step * (2.0 * max(density, 1e-3)) ** -_POWER)


def measured_rate(model: nn.Module, loss: Loss, gradients: Sequence[Batch], judge: Callable[[], float]) -> MeasuredRate:
    """argmin_eta f(x - eta sign(g)), g the gradient of f at the weights x: Adam's first step is of this kind, however
    the loss is scaled.

    What is zero, as pruned weights are, stays zero. The model is left as it was.

    Args:
        model: its parameters that take a gradient move.
        gradients: batches that g is the mean over.
        judge: f of the model as it is when it is called.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch in gradients:
        loss(model, batch).backward()
    parts = [local(parameter.detach()) for parameter in parameters]  # in this process; moved in place
    moved = [(x, x.clone()) for x in parts]
    directions = [_direction(parameter.grad, x) for parameter, x in zip(parameters, parts, strict=True)]
    for parameter in parameters:
        parameter.grad = None
    counts = [torch.stack([x.float().square().sum().double(), x.count_nonzero().double()]) for x in parts]
    square, entries = totals(parameters, torch.stack(counts)).sum(0).tolist()
    scale = math.sqrt(square / entries)

    def value(step: float) -> float:
        chance = quantization.generator_on(moved[0][0].device).manual_seed(0)
        for (part, x), direction in zip(moved, directions, strict=True):
            part.copy_(_moved(x, direction, step, chance))
        return judge()

    with torch.no_grad():
        start = value(0.0)
        found: Any = minimize_scalar(  # its declared type does not know its own fields
            lambda power: value(scale * 2.0**power),
            bounds=(_SMALLEST, _LARGEST),
            method="bounded",
            options={"maxiter": _TRIALS, "xatol": _EXACT},
        )
        for part, x in moved:
            part.copy_(x)
    return MeasuredRate(step=scale * 2.0 ** float(found.x), decrease=start - float(found.fun))


def _direction(gradient: Tensor | None, x: Tensor) -> Tensor:
    """Of the part in this process."""
    slope = torch.zeros_like(x) if gradient is None else local(gradient)
    return (slope.sign() * (x != 0)).to(torch.int8)


def _moved(x: Tensor, direction: Tensor, step: float, chance: torch.Generator) -> Tensor:
    """x - step * direction; in bfloat16 rounded at random, or small steps would all be lost."""
    if x.dtype != torch.bfloat16:
        return x - step * direction.to(x.dtype)
    return quantization.to_bfloat16(x.float() - step * direction, chance)
