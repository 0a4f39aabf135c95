"""ADMM between two products on the GPU: launches `device_splitting`. The twins are those of `kernels.splitting`."""

from __future__ import annotations

# A launched kernel takes plain numbers for its constants, and options that are none of its parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
import torch
from torch import Tensor

from admm_prune.kernels.triton import device_splitting as device

_WIDEST = 1024  # entries of a row that a program takes


def to_target_(z: Tensor, d: Tensor, offset: Tensor | None, tau: float, relaxation: float) -> None:
    grid, block = _parts(z)
    to_target_kernel[grid](
        z, d, z if offset is None else offset, z.shape[1], tau, relaxation, OFFSET=offset is not None, BLOCK=block
    )


def relax_(z: Tensor, x: Tensor, offset: Tensor | None, root: Tensor | None, score: Tensor, relaxation: float) -> None:
    grid, block = _parts(z)
    relax_kernel[grid](
        z,
        x,
        z if offset is None else offset,
        z if root is None else root,
        score,
        z.shape[0] // _problems(root),
        z.shape[1],
        relaxation,
        OFFSET=offset is not None,
        ROOT=root is not None,
        BLOCK=block,
    )


def settle(z: Tensor, mask: Tensor, before: Tensor | None, d: Tensor, x: Tensor, root: Tensor | None) -> Tensor:
    """Partial sums of the programs are added up in float64, in one order: no atomics, the same bits every time."""
    grid, block = _parts(z)
    parts = torch.zeros((*grid, 4), dtype=torch.float32, device=z.device)
    settle_kernel[grid](
        z,
        mask.view(torch.uint8),
        (mask if before is None else before).view(torch.uint8),
        d,
        x,
        z if root is None else root,
        parts,
        z.shape[0] // _problems(root),
        z.shape[1],
        CHANGES=before is not None,
        ROOT=root is not None,
        BLOCK=block,
    )
    several = root is not None and root.ndim == 2
    sums = parts.view(_problems(root), -1, 4).sum(1, dtype=torch.float64)
    measured = torch.cat([sums[:, :2], sums[:, 2:].sqrt()], dim=1)
    return measured if several else measured[0]


def _problems(root: Tensor | None) -> int:
    """How many problems lie stacked: each has a row of the metric."""
    return len(root) if root is not None and root.ndim == 2 else 1


def _parts(x: Tensor) -> tuple[tuple[int, int], int]:
    rows, width = x.shape
    block = min(_WIDEST, max(16, 1 << (width - 1).bit_length()))
    return (rows, -(-width // block)), block
