"""SparseGPT's elimination inside one block on the GPU: launches `device_sweep`. Its twin is in `solvers.obs`."""

from __future__ import annotations

# A launched kernel takes plain numbers for its constants, and options that are none of its parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
import torch
from torch import Tensor

from admm_prune.kernels.triton import device_sweep as device

_OUTPUTS = 32  # for each program


def eliminate_(
    columns: Tensor, factor: Tensor, start: int, stop: int, keep: Tensor | None, pattern: tuple[int, int]
) -> Tensor:
    """Settles the columns start..stop, rows of `columns` (in, out), in place.

    Args:
        factor: U (in, in), upper triangular.
        keep: (stop - start, out), boolean; None to keep n of every m consecutive columns, chosen as they are reached.
        pattern: (n, m).

    Returns:
        The errors e_j (stop - start, out) that the columns to the right are to take up.
    """
    count, outputs = stop - start, columns.shape[1]
    errors = torch.empty(count, outputs, dtype=columns.dtype, device=columns.device)
    sweep_kernel[(-(-outputs // _OUTPUTS),)](
        columns,
        factor,
        columns if keep is None else keep.contiguous().view(torch.uint8),
        errors,
        start,
        count,
        outputs,
        factor.stride(0),
        CHOOSE=keep is None,
        N=pattern[0],
        M=pattern[1],
        ROWS=max(16, 1 << (count - 1).bit_length()),
        OUTPUTS=_OUTPUTS,
        num_warps=4,
    )
    return errors
