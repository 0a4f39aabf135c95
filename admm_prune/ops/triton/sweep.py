"""SparseGPT's column by column elimination inside one block; the reference is in `solvers.obs`.

A program takes all columns of the block for some outputs: outputs are independent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 32  # for each program


@triton.jit
def sweep_kernel(
    columns_at,
    factor_at,
    keep_at,
    errors_at,
    start,
    count,
    outputs,
    stride,
    CHOOSE: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    there = (row[:, None] < count) & (out[None, :] < outputs)
    first = start.to(tl.int64)
    place = (first + row)[:, None] * outputs + out[None, :]
    w = tl.load(columns_at + place, mask=there, other=0.0)
    factor = factor_at + first * stride + first
    diagonal = tl.load(factor + row * (stride + 1), mask=row < count, other=1.0)
    if CHOOSE:
        selected = tl.zeros((ROWS, OUTPUTS), tl.float32)
    else:
        selected = tl.load(keep_at + row[:, None] * outputs + out[None, :], mask=there, other=1).to(tl.float32)
    for j in range(ROWS):
        if j < count:
            if CHOOSE:
                if j % M == 0:
                    # Kept is what fewer than N of its group beat: larger scores, and equal ones before it.
                    score = tl.abs(w) / diagonal[:, None]
                    beaten = tl.zeros((ROWS, OUTPUTS), tl.int32)
                    for i in range(M):
                        other = tl.sum(tl.where(row[:, None] == j + i, score, 0.0), axis=0)[None, :]
                        beaten += ((other > score) | ((other == score) & (row[:, None] > j + i))).to(tl.int32)
                    group = (row[:, None] >= j) & (row[:, None] < j + M)
                    selected = tl.where(group, (beaten < N).to(tl.float32), selected)
            mine = row[:, None] == j
            scale = 1.0 / tl.load(factor + j * (stride + 1))
            error = tl.sum(tl.where(mine, w * (1.0 - selected), 0.0), axis=0) * scale
            right = tl.load(factor + j * stride + row, mask=(row > j) & (row < count), other=0.0)
            w -= right[:, None] * error[None, :]
            tl.store(errors_at + j * outputs + out, error, mask=out < outputs)
    tl.store(columns_at + place, w * selected, mask=there)


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def eliminate_(
    columns: Tensor, factor: Tensor, start: int, stop: int, keep: Tensor | None, pattern: tuple[int, int]
) -> Tensor:
    """Prunes the columns start..stop, rows of `columns` (in, out), in place.

    Args:
        factor: U (in, in), upper triangular.
        keep: (stop - start, out), boolean; None to keep n of every m consecutive columns, chosen as they are reached.
        pattern: (n, m).

    Returns:
        The errors e_j (stop - start, out) that the columns to the right compensate.
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
