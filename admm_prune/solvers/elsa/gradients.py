"""Gradients before Adam sees them: their norms over all processes, and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.solvers.elsa.anchors import local, processes_of, totals
from admm_prune.solvers.elsa.moments import Later


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts in this process."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def refuse_sparse(parameters: Sequence[Tensor]) -> None:
    """Raises UserError where a gradient is not a dense tensor, as that of `nn.Embedding(sparse=True)` is not."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which SparseAdam does not "
                "support: construct the embedding with sparse=False"
            )


def total_norm(parameters: Sequence[Tensor]) -> tuple[Tensor, float]:
    """`norms`, and the norm of all gradients together.

    Where that overflows in the gradients' own dtype (65504 in float16), it is computed again in float64, so that it is
    finite whenever all gradients are.
    """
    each = norms(parameters)
    norm = float(torch.linalg.vector_norm(each))
    if math.isfinite(norm):
        return each, norm
    each = norms(parameters, wide=True)
    return each, float(torch.linalg.vector_norm(each))


def norms(parameters: Sequence[Tensor], *, wide: bool = False) -> Tensor:
    """The Euclidean norm of each parameter's gradient (n,), over all processes, in float64.

    Args:
        wide: squares and sums in float64, in place of the dtype of the gradient.
    """
    here = torch.stack([_norm(gradient, wide=wide) for gradient in gradients(parameters)])
    if all(processes_of(parameter) is None for parameter in parameters):
        return here
    return totals(parameters, here.square_()).sqrt_()


def _norm(x: Tensor, *, wide: bool) -> Tensor:
    double = torch.complex128 if x.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(x, dtype=double if wide else None)
    return norm.double()


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
