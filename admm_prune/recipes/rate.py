"""A learning rate from the model itself: how far along Adam's first step its loss goes on falling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from admm_prune.data.sequences import Batch
from admm_prune.kernels import quantization
from admm_prune.recipes.training import Loss

_GRADIENTS, _JUDGES = 4, 2  # batches that give the gradient, and others that judge the steps along it
_SMALLEST, _LARGEST = -14.0, -2.0  # steps tried: powers of two, in units of the root mean square of the weights
_TRIALS, _EXACT = 9, 0.25  # at most so many steps are tried; the power of two is settled to within this
BATCHES = _GRADIENTS + _JUDGES
PASSES = _GRADIENTS + -(-(_TRIALS + 1) * _JUDGES // 3)  # forward and backward; a forward pass alone is a third of one


@dataclass(frozen=True)
class MeasuredRate:
    """The step that lowers the loss the most along sign(g).

    Attributes:
        decrease: of the loss at that step; not above zero where no step lowers it.
    """

    step: float
    decrease: float


def measured_rate(model: nn.Module, loss: Loss, batches: Sequence[Batch]) -> MeasuredRate:
    """argmin_eta f(x - eta sign(g)), g the gradient of f at the weights x: Adam's first step is of this kind, however
    the loss is scaled.

    g is the mean over the first few batches, f the mean over the others. What is zero, as pruned weights are, stays
    zero. The model is left as it was.

    Args:
        model: its parameters that take a gradient move.
        batches: `BATCHES` of them.
    """
    gradients, judges = batches[:_GRADIENTS], batches[_GRADIENTS:]
    moved = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    for batch in gradients:
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
    directions = [_direction(parameter, x) for parameter, x in moved]
    for parameter, _ in moved:
        parameter.grad = None
    entries = sum(int(x.count_nonzero()) for _, x in moved)
    scale = math.sqrt(sum(float(x.float().square().sum()) for _, x in moved) / entries)

    def value(step: float) -> float:
        chance = torch.Generator(moved[0][0].device).manual_seed(0)
        for (parameter, x), direction in zip(moved, directions, strict=True):
            parameter.copy_(_moved(x, direction, step, chance))
        mean = sum(float(loss(model, batch)) for batch in judges) / len(judges)
        return mean if math.isfinite(mean) else math.inf

    with torch.no_grad():
        here = value(0.0)
        found = minimize_scalar(
            lambda power: value(scale * 2.0**power),
            bounds=(_SMALLEST, _LARGEST),
            method="bounded",
            options={"maxiter": _TRIALS, "xatol": _EXACT},
        )
        for parameter, x in moved:
            parameter.copy_(x)
    return MeasuredRate(step=scale * 2.0 ** float(found.x), decrease=here - float(found.fun))


def _direction(parameter: Tensor, x: Tensor) -> Tensor:
    gradient = torch.zeros_like(x) if parameter.grad is None else parameter.grad
    return (gradient.sign() * (x != 0)).to(torch.int8)


def _moved(x: Tensor, direction: Tensor, step: float, chance: torch.Generator) -> Tensor:
    """x - step * direction; in bfloat16 rounded at random, or small steps would all be lost."""
    if x.dtype != torch.bfloat16:
        return x - step * direction.to(x.dtype)
    return quantization.to_bfloat16(x.float() - step * direction, chance)
