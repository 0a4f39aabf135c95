"""SparseGPT's column by column elimination inside one block; the reference is in `solvers.obs`.

A program takes all columns of the block for some outputs: outputs are independent. It goes through them in panels that
stay in its registers. A panel first catches up with the errors of the panels before it, which the program reads again,
so that neither a weight nor an error is written twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 32  # for each program, one for each thread of its only warp: no step waits for another warp
_PANEL = 32  # columns in registers at once


@triton.jit
def sweep_kernel(
    columns_at,
    factor_at,
    keep_at,
    errors_at,
    count,
    outputs,
    stride,
    keep_column,
    keep_output,
    CHOOSE: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    out = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    row = tl.arange(0, ROWS)
    for left in range(0, count, PANEL):
        in_panel = (row < PANEL) & (left + row < count)
        there = in_panel[:, None] & (out[None, :] < outputs)
        place = (left + row)[:, None] * outputs + out[None, :]
        w = tl.load(columns_at + place, mask=there, other=0.0)
        for i in range(left):
            error = tl.load(errors_at + i * outputs + out, mask=out < outputs, other=0.0)
            right = tl.load(factor_at + i * stride + left + row, mask=in_panel, other=0.0)
            w -= right[:, None] * error[None, :]
        diagonal = tl.load(factor_at + (left + row) * (stride + 1), mask=in_panel, other=1.0)
        if CHOOSE:
            selected = tl.zeros((ROWS, OUTPUTS), tl.float32)
        else:
            keep_place = keep_at + (left + row)[:, None] * keep_column + out[None, :] * keep_output
            selected = tl.load(keep_place, mask=there, other=1).to(tl.float32)
        for j in range(PANEL):
            if left + j < count:
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
                scale = 1.0 / tl.load(factor_at + (left + j) * (stride + 1))
                error = tl.sum(tl.where(mine, w * (1.0 - selected), 0.0), axis=0) * scale
                right = tl.load(factor_at + (left + j) * stride + left + row, mask=in_panel & (row > j), other=0.0)
                w -= right[:, None] * error[None, :]
                tl.store(errors_at + (left + j) * outputs + out, error, mask=out < outputs)
        tl.store(columns_at + place, w * selected, mask=there)
        tl.debug_barrier()  # other threads of the program read these errors


@triton.jit
def column_score_kernel(columns_at, factor_at, score_at, count, outputs, stride, BLOCK: tl.constexpr):
    """|w_ij| / U_jj of the columns of a block, which lie in rows of `columns`, as rows of outputs."""
    out = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = (column[:, None] < count) & (out[None, :] < outputs)
    w = tl.load(columns_at + column[:, None] * outputs + out[None, :], mask=there, other=0.0)
    diagonal = tl.load(factor_at + column * (stride + 1), mask=column < count, other=1.0)
    score = tl.trans(tl.abs(w) / diagonal[:, None])
    tl.store(score_at + out[:, None] * count + column[None, :], score, mask=tl.trans(there))


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


def scores(columns: Tensor, factor: Tensor, start: int, stop: int) -> Tensor:
    """|w_ij| / U_jj (out, stop - start) of rows of `columns` (in, out)."""
    count, outputs = stop - start, columns.shape[1]
    result = torch.empty(outputs, count, dtype=columns.dtype, device=columns.device)
    column_score_kernel[(-(-outputs // 32), -(-count // 32))](
        columns[start:], factor[start:, start:], result, count, outputs, factor.stride(0), BLOCK=32, num_warps=4
    )
    return result


def eliminate_(
    columns: Tensor, factor: Tensor, start: int, stop: int, keep: Tensor | None, pattern: tuple[int, int]
) -> Tensor:
    """Prunes the columns start..stop, rows of `columns` (in, out), in place.

    Args:
        factor: U (in, in), upper triangular.
        keep: (stop - start, out), boolean, of any strides; None to keep n of every m consecutive columns, chosen as
            they are reached.
        pattern: (n, m), m at most 32.

    Returns:
        The errors e_j (stop - start, out) that the columns to the right compensate.
    """
    count, outputs = stop - start, columns.shape[1]
    errors = torch.empty(count, outputs, dtype=columns.dtype, device=columns.device)
    mask = columns if keep is None else keep.view(torch.uint8)
    sweep_kernel[(-(-outputs // _OUTPUTS),)](
        columns[start:],
        factor[start:, start:],
        mask,
        errors,
        count,
        outputs,
        factor.stride(0),
        mask.stride(0),
        mask.stride(1),
        CHOOSE=keep is None,
        N=pattern[0],
        M=pattern[1],
        PANEL=pattern[1] * (_PANEL // pattern[1]),
        ROWS=_PANEL,
        OUTPUTS=_OUTPUTS,
        num_warps=1,
    )
    return errors
