"""What ADMM does between two products, entry by entry: the target of the dense step, the relaxed sum, the split.

State of one tensor: z and d = M z, with M the support; u = tau (z - d) is the scaled dual. On CUDA tensors Triton takes
each function in one pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from admm_prune.kernels import backend

_TRITON = (torch.float32,)


def to_target_(z: Tensor, d: Tensor, scratch: Tensor, offset: Tensor | None, tau: float, relaxation: float) -> None:
    """With u = tau (z - d): d <- d - u - offset, and z <- (1 - a) d + u, what the relaxed step adds a x to.

    Args:
        scratch: of the same shape, overwritten.
        offset: taken off the target; None for nothing.
        relaxation: a.
    """
    if _fused(z, d, scratch, offset):
        from admm_prune.kernels.triton import splitting as fused

        return fused.to_target_(z, d, offset, tau, relaxation)
    torch.mul(z, tau, out=scratch)
    torch.add(scratch, d, alpha=1.0 - relaxation - tau, out=z)
    d.mul_(1.0 + tau).sub_(scratch)
    if offset is not None:
        d.sub_(offset)
    return None


def relax_(z: Tensor, x: Tensor, offset: Tensor | None, root: Tensor | None, score: Tensor, relaxation: float) -> None:
    """x <- x + offset,    z <- z + a x,    score <- |z root|.

    Args:
        root: (in,), of the metric; None for ones.
        score: overwritten.
    """
    if _fused(z, x, offset, root, score):
        from admm_prune.kernels.triton import splitting as fused

        return fused.relax_(z, x, offset, root, score, relaxation)
    if offset is not None:
        x.add_(offset)
    z.add_(x, alpha=relaxation)
    if root is None:
        score.copy_(z)
    else:
        torch.mul(z, root, out=score)
    score.abs_()
    return None


def settle_(z: Tensor, mask: Tensor, before: Tensor | None, d: Tensor, x: Tensor, root: Tensor | None) -> Tensor:
    """d <- M z; x is used up.

    Args:
        mask, before: M, and what it was; None where it was the same.

    Returns:
        (4,) float64, on the device: entries that entered the support, its size, |(x - d) root|, |d root|; norms in the
        tensors' own precision. The size is 0 where `before` is None.
    """
    if _fused(z, mask, before, d, x, root):
        from admm_prune.kernels.triton import splitting as fused

        return fused.settle(z, mask, before, d, x, root)
    entered: Tensor | int = 0
    kept: Tensor | int = 0
    if before is not None:
        entered, kept = torch.count_nonzero(mask > before), torch.count_nonzero(mask)
    torch.mul(z, mask.view(torch.uint8), out=d)  # a product with bytes is half the time of one with booleans
    x.add_(d, alpha=-1.0)
    norms = []
    for part in (x, d):
        weighed = part if root is None else torch.mul(part, root, out=x)
        norms.append(torch.linalg.vector_norm(weighed))
    measured: tuple[Tensor | int, ...] = (entered, kept, *norms)
    if z.is_cuda:
        return torch.stack([torch.as_tensor(one, dtype=torch.float64, device=z.device) for one in measured])
    return torch.tensor([float(one) for one in measured], dtype=torch.float64)


def _fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton serves: matrices as they lie in memory."""
    if first.ndim != 2 or not backend.uses_triton(first, *_TRITON):
        return False
    return all(x is None or x.is_contiguous() for x in (first, *others))
