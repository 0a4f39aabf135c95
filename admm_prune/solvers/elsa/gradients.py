"""Gradients before Adam sees them: their norms over all processes, and clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from admm_prune.solvers.elsa.fused import Later
from admm_prune.solvers.elsa.sharding import local, processes_of, totals


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts in this process."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def norms(parameters: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each parameter's gradient (n,), over all processes, in float64."""
    here = torch.stack([torch.linalg.vector_norm(gradient).double() for gradient in gradients(parameters)])
    if all(processes_of(parameter) is None for parameter in parameters):
        return here
    return totals(parameters, here.square_()).sqrt_()


def clip(parameters: Sequence[Tensor], norm: float, limit: float, later: Later | None = None) -> float:
    """Scales all gradients down to the norm `limit`, as `torch.nn.utils.clip_grad_norm_` does; returns the factor.

    Args:
        later: told the factor, where a kernel scales them.
    """
    factor = min(1.0, limit / (norm + 1e-6))
    if later is not None:
        later.factor = factor
    elif factor < 1.0:
        for gradient in gradients(parameters):
            gradient.mul_(factor)
    return factor
