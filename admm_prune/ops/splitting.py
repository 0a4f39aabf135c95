"""The elementwise steps of ADMM between two products: the target of the dense step, the relaxed sum, the split.

State of one tensor: z and d = M z, with M the support; u = tau (z - d) is the scaled dual. On CUDA tensors Triton takes
each function in one pass over memory.

Several problems of one shape may lie stacked, z (problems * out, in): their metrics then have a row each, (problems,
in), and the measures have a row for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from admm_prune.ops import backend
from admm_prune.ops.precision import Precision

_TRITON = (torch.float32,)


def to_target_(
    z: Tensor,
    d: Tensor,
    scratch: Tensor,
    offset: Tensor | None,
    tau: float | Tensor,
    relaxation: float,
    form: Precision = "exact",
) -> Tensor:
    """With u = tau (z - d): the target d - u - offset, and z <- (1 - a) d + u, to which the relaxed step adds a x.

    Args:
        d: overwritten, unless the target is returned in another form.
        scratch: of the same shape, overwritten.
        offset: subtracted from the target; None for nothing.
        tau: or a tensor of no dimensions, of the dtype of z, which a recording reads anew.
        relaxation: a.
        form: of the target as a factor of `precision.multiply`, which Triton writes at once.

    Returns:
        The target, in that form or in the memory of d.
    """
    if _fused(z, d, scratch, offset):
        from admm_prune.ops.triton import splitting as fused

        return fused.to_target_(z, d, offset, tau, relaxation, form)
    torch.mul(z, tau, out=scratch)
    if isinstance(tau, Tensor):
        torch.addcmul(scratch, d, 1.0 - relaxation - tau, out=z)
    else:
        torch.add(scratch, d, alpha=1.0 - relaxation - tau, out=z)
    d.mul_(1.0 + tau).sub_(scratch)
    return d if offset is None else d.sub_(offset)


def relax_(z: Tensor, x: Tensor, offset: Tensor | None, root: Tensor | None, score: Tensor, relaxation: float) -> None:
    """x <- x + offset,    z <- z + a x,    score <- |z root|.

    Args:
        root: (in,) or (problems, in), of the metric; None for ones.
        score: overwritten.
    """
    if _fused(z, x, offset, root, score):
        from admm_prune.ops.triton import splitting as fused

        return fused.relax_(z, x, offset, root, score, relaxation)
    if offset is not None:
        x.add_(offset)
    z.add_(x, alpha=relaxation)
    if root is None:
        score.copy_(z)
    else:
        torch.mul(_apart(z, root), _across(root), out=_apart(score, root))
    score.abs_()
    return None


def settle_(z: Tensor, mask: Tensor, before: Tensor | None, d: Tensor, x: Tensor, root: Tensor | None) -> Tensor:
    """d <- M z; x is used up.

    Args:
        mask, before: M, and the previous M; None if it is unchanged.

    Returns:
        (4,) or (problems, 4) float64, on the device: entries that entered the support, its size, |(x - d) root|,
        |d root|; norms in the tensors' own precision. The size is 0 where `before` is None.
    """
    if _fused(z, mask, before, d, x, root):
        from admm_prune.ops.triton import splitting as fused

        return fused.settle(z, mask, before, d, x, root)
    over = None if root is None or root.ndim == 1 else (-2, -1)  # the entries of each problem
    entered: Tensor | int = 0
    support_size: Tensor | int = 0
    if before is not None:
        entered = torch.count_nonzero(_apart(mask > before, root), dim=over)
        support_size = torch.count_nonzero(_apart(mask, root), dim=over)
    torch.mul(z, mask.view(torch.uint8), out=d)  # a product with bytes is half the time of one with booleans
    x.add_(d, alpha=-1.0)
    norms = []
    for part in (x, d):
        if root is not None:
            part = torch.mul(_apart(part, root), _across(root), out=_apart(x, root))
        norms.append(torch.linalg.vector_norm(part, dim=over))
    measured: tuple[Tensor | int, ...] = (entered, support_size, *norms)
    if over is None and not backend.on_device(z):
        return torch.tensor([float(one) for one in measured], dtype=torch.float64)
    # Filled in place: no synchronization and no transfer.
    return torch.stack([torch.zeros_like(norms[0]).add_(one).double() for one in measured], dim=-1)


def choose_(
    z: Tensor,
    x: Tensor,
    offset: Tensor | None,
    root: Tensor | None,
    mask: Tensor,
    d: Tensor,
    runs: tuple[int, int],
    relaxation: float,
) -> Tensor | None:
    """`relax_`, then M <- the k largest scores of every r consecutive ones, then `settle_`, in one launch by Triton.

    Args:
        mask: M, overwritten.
        runs: (k, r). Every problem consists of whole runs.

    Returns:
        The measures, as `settle_`; None where there is no kernel, and nothing was done.
    """
    if not _fused(z, x, offset, root, mask, d):
        return None
    from admm_prune.ops.triton import splitting as fused

    problems = len(root) if root is not None and root.ndim == 2 else 1
    if not fused.chooses(runs, z.numel() // problems):
        return None
    return fused.choose_(z, x, offset, root, mask, d, runs, relaxation)


def _apart(x: Tensor, root: Tensor | None) -> Tensor:
    """x (problems * out, in) as (problems, out, in), where the metric says that there are several."""
    return x if root is None or root.ndim == 1 else x.view(len(root), -1, x.shape[1])


def _across(root: Tensor) -> Tensor:
    """The metric as it meets the rows of each problem."""
    return root if root.ndim == 1 else root[:, None]


def _fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton is used: for contiguous matrices."""
    if first.ndim != 2 or not backend.uses_triton(first, *_TRITON):
        return False
    return all(x is None or x.is_contiguous() for x in (first, *others))
