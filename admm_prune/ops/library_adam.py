"""Adam's step on moments that bitsandbytes keeps in 8 bits: its dynamic levels, with a scale for every 256 entries.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022 (arXiv 2110.02861).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # entries in the order of memory, across rows

ZERO_FIRST = 127  # the code of zero among the levels of both signs


def installed() -> str | None:
    """The version of the library; None where there is none."""
    return version("bitsandbytes") if find_spec("bitsandbytes") else None


def blocks(entries: int) -> int:
    return -(-entries // BLOCK)


def step(
    x: Tensor,
    gradient: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    count: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """x <- (1 - lr decay) x - lr (m / c1) / (sqrt(v / c2) + eps), and m and v, in place.

    Args:
        x, gradient: (n,) float32.
        first, second: of m and v: codes (n,) uint8, scales (ceil(n / 256),) float32; all zero before the first step.
        count: of this step, from 1.
    """
    levels = _levels(x.device)
    _library().optimizer_update_8bit_blockwise(
        "adam", gradient, x, first[0], second[0], *betas, 0.0, 0.0, eps, count, lr, *levels, first[1], second[1],
        weight_decay,
    )  # fmt: skip


def second_moment(codes: Tensor, scales: Tensor) -> Tensor:
    """v in float32, of the shape of its codes."""
    values: Tensor = _library().dequantize_blockwise(
        codes, absmax=scales, code=_levels(codes.device)[1], blocksize=BLOCK
    )
    return values


@lru_cache
def _library() -> Any:
    """Imported on first use: it takes a second, and warns about kernels that are not needed."""
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    finally:
        log.setLevel(before)
    return bitsandbytes.functional


@lru_cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """256 each: of both signs, and of none."""
    create = _library().create_dynamic_map
    return create(signed=True).to(device), create(signed=False).to(device)
