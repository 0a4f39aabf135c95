"""A learning rate from the model itself: how far along Adam's first step its loss goes on falling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from admm_prune.data.sequences import Batch
from admm_prune.kernels import quantization
from admm_prune.recipes.training import Loss

_SMALLEST, _LARGEST = -14.0, -2.0  # steps tried: powers of two, in units of the root mean square of the weights
_TRIALS, _EXACT = 9, 0.25  # at most so many steps are tried; the power of two is settled to within this
GRADIENTS = 4  # batches that the direction is taken from
# Of the steps that would take the loss back to the dense model's, at the rate of the best first one: so many at once.
_BOLDNESS, _LEAST, _MOST = 0.6, 2.0, 5.0


def passes(judges: int) -> int:
    """What a measurement costs in forward and backward passes; a forward pass alone is a third of one."""
    return GRADIENTS + math.ceil((_TRIALS + 1) * judges / 3)


@dataclass(frozen=True)
class MeasuredRate:
    """The step that lowers the loss the most along sign(g).

    Attributes:
        value: the loss before it.
        decrease: of the loss by it; not above zero where no step lowers the loss.
    """

    step: float
    value: float
    decrease: float

    def rate(self, goal: float) -> float:
        """A rate for Adam: the step, times 0.6 of the number of such steps that lead from the loss to `goal`, the dense
        model's loss; from 2 to 5 times the step.

        A model that lost much has a long way to go and takes it in longer steps: the best rates of a grid were 2 times
        the step at 50 % and 4 times at 90 % on the same model. In the manner of Polyak's step, (f - f*) / |g|.
        """
        steps = (self.value - goal) / self.decrease if self.decrease > 0 else 0.0
        return self.step * min(_MOST, max(_LEAST, _BOLDNESS * steps))


def measured_rate(model: nn.Module, loss: Loss, gradients: Sequence[Batch], judge: Callable[[], float]) -> MeasuredRate:
    """argmin_eta f(x - eta sign(g)), g the gradient of f at the weights x: Adam's first step is of this kind, however
    the loss is scaled.

    What is zero, as pruned weights are, stays zero. The model is left as it was.

    Args:
        model: its parameters that take a gradient move.
        gradients: batches that g is the mean over.
        judge: f of the model as it is when it is called.
    """
    moved = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    for batch in gradients:
        loss(model, batch).backward()
    directions = [_direction(parameter, x) for parameter, x in moved]
    for parameter, _ in moved:
        parameter.grad = None
    entries = sum(int(x.count_nonzero()) for _, x in moved)
    scale = math.sqrt(sum(float(x.float().square().sum()) for _, x in moved) / entries)

    def value(step: float) -> float:
        chance = torch.Generator(moved[0][0].device).manual_seed(0)
        for (parameter, x), direction in zip(moved, directions, strict=True):
            parameter.copy_(_moved(x, direction, step, chance))
        return judge()

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
    return MeasuredRate(step=scale * 2.0 ** float(found.x), value=here, decrease=here - float(found.fun))


def _direction(parameter: Tensor, x: Tensor) -> Tensor:
    gradient = torch.zeros_like(x) if parameter.grad is None else parameter.grad
    return (gradient.sign() * (x != 0)).to(torch.int8)


def _moved(x: Tensor, direction: Tensor, step: float, chance: torch.Generator) -> Tensor:
    """x - step * direction; in bfloat16 rounded at random, or small steps would all be lost."""
    if x.dtype != torch.bfloat16:
        return x - step * direction.to(x.dtype)
    return quantization.to_bfloat16(x.float() - step * direction, chance)
