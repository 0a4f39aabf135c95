"""SparseAdam on the GPU: launches `device_adam`. The twins are torch's Adam and the chunks of `solvers.elsa`.

Rounding at random draws from Philox, not from torch's generators: other numbers than the twin's, with the same mean.
"""

from __future__ import annotations

# A launched kernel takes plain numbers for its constants, and options that are none of its parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
from typing import Any

import torch
from torch import Tensor

from admm_prune.kernels import quantization
from admm_prune.kernels.quantization import Stored
from admm_prune.kernels.triton import device_adam as device

_RUNS = 4  # of 256 entries, for each program


def step_(
    x: Tensor,
    gradient: Tensor,
    first: Stored,
    second: Stored,
    *,
    steps: int,
    factor: float,
    pull: tuple[float, Stored] | None,
    seed: int,
    settings: dict[str, Any],
) -> None:
    """g <- factor g + rho (x - c), then x, m and v as torch's AdamW has them; the gradient stays as it is.

    Args:
        x: float32, bfloat16 (rounded at random) or float16.
        steps: done, this one included.
        pull: rho and c.
        settings: lr, betas, eps and weight_decay.
    """
    beta1, beta2 = settings["betas"]
    lr = float(settings["lr"])
    anchor = None if pull is None else pull[1]
    grid, runs, width, scales = _parts(x)
    adam_kernel[grid](
        x,
        gradient,
        first.values,
        second.values,
        _or(first.scales, x),
        _or(second.scales, x),
        x if anchor is None else anchor.values,
        x if anchor is None else _or(anchor.scales, x),
        width,
        scales,
        factor,
        0.0 if pull is None else pull[0],
        beta1,
        beta2,
        1.0 - beta1,
        1.0 - beta2,
        1.0 - lr * settings["weight_decay"],
        lr / (1.0 - beta1**steps),
        (1.0 - beta2**steps) ** 0.5,
        settings["eps"],
        seed,
        ANCHOR=anchor is not None,
        ANCHOR_CODES=anchor is not None and anchor.scales is not None,
        MOMENT_CODES=first.scales is not None,
        CHANCE=x.dtype is torch.bfloat16,
        FIRST_STEP=quantization.SIGNED_STEP,
        SECOND_STEP=quantization.UNSIGNED_STEP,
        STEPS=runs,
    )


def scores(
    x: Tensor,
    anchor: Stored | None,
    bits: Tensor,
    second: Stored | None,
    *,
    lag: float,
    bonus: float,
    least: float,
) -> Tensor:
    """|x + u| max(sqrt(F), least), float32, times `bonus` in the support; u = -lag c off it.

    Args:
        bits: the support, packed.
        second: F, or in 8 bits its root; None for F = 1.
    """
    grid, runs, width, scales = _parts(x)
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    score_kernel[grid](
        x,
        x if anchor is None else anchor.values,
        x if anchor is None else _or(anchor.scales, x),
        bits,
        x if second is None else second.values,
        x if second is None else _or(second.scales, x),
        result,
        width,
        bits.shape[-1],
        scales,
        lag,
        bonus,
        least,
        ANCHOR=anchor is not None,
        ANCHOR_CODES=anchor is not None and anchor.scales is not None,
        FISHER=second is not None,
        SECOND_CODES=second is not None and second.scales is not None,
        SECOND_STEP=quantization.UNSIGNED_STEP,
        STEPS=runs,
    )
    return result


def _parts(x: Tensor) -> tuple[tuple[int, int], int, int, int]:
    """The grid, runs for each program, the width of a row, and its number of runs."""
    width = x.shape[-1] if x.ndim else 1
    scales = -(-width // quantization.BLOCK)
    runs = min(_RUNS, 1 << (scales - 1).bit_length())
    return (x.numel() // max(1, width), -(-scales // runs)), runs, width, scales


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
