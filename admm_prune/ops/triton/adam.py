"""SparseAdam's step, scores and bit masks in one pass each.

The reference implementations are torch's Adam, the loops of `solvers.elsa` and `ops.bits`. Rounding draws from Philox,
not from torch's generators: different numbers from the reference's, with the same mean. A program takes STEPS x 256
entries of one row: 256 entries share a scale in 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops import quantization
from admm_prune.ops.quantization import Stored
from admm_prune.ops.triton.places import part_of_row, runs_of_row

_RUNS = 4  # of 256 entries, for each program
_BYTES, _BLOCK = 128, 1024


@triton.jit
def _bit(bits_at, row, column, packed, there):
    byte = tl.load(bits_at + row * packed + column // 8, mask=there, other=0).to(tl.int32)
    return ((byte >> (column % 8)) & 1) != 0


@triton.jit
def _anchor(anchor_at, scale_at, place, row, column, scales, there, CODES: tl.constexpr):
    anchor = tl.load(anchor_at + place, mask=there, other=0.0).to(tl.float32)
    if CODES:
        scale = tl.load(scale_at + row * scales + column // 256, mask=there, other=0.0)
        anchor = anchor * (scale / 127.0)
    return anchor


@triton.jit
def _first(codes, scale, STEP: tl.constexpr):
    size = tl.abs(codes.to(tl.float32))
    level = tl.where(size > 0.0, tl.exp((size - 127.0) * STEP), 0.0)
    return tl.where(codes < 0, -level, level) * scale


@triton.jit
def _root(codes, scale, STEP: tl.constexpr):
    size = codes.to(tl.float32)
    return tl.where(size > 0.0, tl.exp((size - 255.0) * STEP), 0.0) * scale


@triton.jit
def _round_half_even(x):
    below = tl.floor(x)
    rest = x - below
    odd = (below - 2.0 * tl.floor(below * 0.5)) != 0.0
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    return tl.where(up, below + 1.0, below)


@triton.jit
def adam_kernel(
    x_at,
    gradient_at,
    first_at,
    second_at,
    first_scale_at,
    second_scale_at,
    anchor_at,
    anchor_scale_at,
    width,
    scales,
    factor,
    rho,
    beta1,
    beta2,
    rest1,
    rest2,
    decay,
    rate,
    root_correction,
    eps,
    seed,
    ANCHOR: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    MOMENT_CODES: tl.constexpr,
    CHANCE: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    SECOND_STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    row, run, column, there, place = runs_of_row(width, STEPS)
    x = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gradient_at + place, mask=there, other=0.0).to(tl.float32) * factor
    if ANCHOR:
        c = _anchor(anchor_at, anchor_scale_at, place, row, column, scales, there, ANCHOR_CODES)
        g += rho * (x - c)
    if MOMENT_CODES:
        scale_place = row * scales + run
        scale_there = run < scales
        m_scale = tl.load(first_scale_at + scale_place, mask=scale_there, other=0.0)
        v_scale = tl.load(second_scale_at + scale_place, mask=scale_there, other=0.0)
        m = _first(tl.load(first_at + place, mask=there, other=0), m_scale[:, None], FIRST_STEP)
        root = _root(tl.load(second_at + place, mask=there, other=0), v_scale[:, None], SECOND_STEP)
        v = root * root
    else:
        m = tl.load(first_at + place, mask=there, other=0.0)
        v = tl.load(second_at + place, mask=there, other=0.0)
    x = x * decay
    m = m + rest1 * (g - m)
    v = v * beta2 + rest2 * g * g
    root = tl.sqrt(v)
    x = x - rate * (m / (root / root_correction + eps))
    if MOMENT_CODES:
        tiny = 1.1754943508222875e-38
        m_scale = tl.max(tl.where(there, tl.abs(m), 0.0), axis=1)
        v_scale = tl.max(tl.where(there, root, 0.0), axis=1)
        m_level = tl.log(tl.abs(m) / tl.maximum(m_scale, tiny)[:, None]) / FIRST_STEP + 127.0
        m_level = tl.where(m == 0.0, 0.0, tl.minimum(tl.maximum(_round_half_even(m_level), 0.0), 127.0))
        v_level = tl.log(root / tl.maximum(v_scale, tiny)[:, None]) / SECOND_STEP + 255.0
        v_level = tl.floor(tl.where(root == 0.0, 0.0, v_level) + tl.rand(seed, 2 * place))
        v_level = tl.where(root == 0.0, 0.0, tl.minimum(tl.maximum(v_level, 1.0), 255.0))
        tl.store(first_at + place, tl.where(m < 0.0, -m_level, m_level).to(tl.int8), mask=there)
        tl.store(second_at + place, v_level.to(tl.uint8), mask=there)
        tl.store(first_scale_at + scale_place, m_scale, mask=scale_there)
        tl.store(second_scale_at + scale_place, v_scale, mask=scale_there)
    else:
        tl.store(first_at + place, m, mask=there)
        tl.store(second_at + place, v, mask=there)
    if CHANCE:
        # Noise below the last kept bit, then a cut: up with the probability of the part cut off.
        noise = tl.randint(seed, 2 * place + 1).to(tl.int32, bitcast=True) & 0xFFFF
        bits = (x.to(tl.int32, bitcast=True) + noise) & -65536
        x = bits.to(tl.float32, bitcast=True)
    tl.store(x_at + place, x.to(x_at.dtype.element_ty), mask=there)


@triton.jit
def score_kernel(
    x_at,
    anchor_at,
    anchor_scale_at,
    bits_at,
    second_at,
    second_scale_at,
    score_at,
    width,
    packed,
    scales,
    lag,
    bonus,
    least,
    ANCHOR: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    FISHER: tl.constexpr,
    SECOND_CODES: tl.constexpr,
    SECOND_STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    """|x + u| sqrt(F), times `bonus` in the support; u is -lag c off it."""
    row, run, column, there, place = runs_of_row(width, STEPS)
    a = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    inside = _bit(bits_at, row, column, packed, there)
    if ANCHOR:
        c = _anchor(anchor_at, anchor_scale_at, place, row, column, scales, there, ANCHOR_CODES)
        a -= tl.where(inside, 0.0, c) * lag
    a = tl.abs(a)
    a = tl.where(inside, a * bonus, a)
    if FISHER:
        if SECOND_CODES:
            scale = tl.load(second_scale_at + row * scales + run, mask=run < scales, other=0.0)
            root = _root(tl.load(second_at + place, mask=there, other=0), scale[:, None], SECOND_STEP)
        else:
            root = tl.sqrt(tl.load(second_at + place, mask=there, other=0.0))
        a = a * tl.maximum(root, least)
    tl.store(score_at + place, a, mask=there)


@triton.jit
def pack_kernel(mask_at, bits_at, rows, width, packed, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    position = tl.arange(0, 8)
    column = byte[:, None] * 8 + position[None, :]
    entry = tl.load(mask_at + row * width + column, mask=column < width, other=0).to(tl.int32)
    whole = tl.sum((entry != 0).to(tl.int32) << position[None, :], axis=1)
    tl.store(bits_at + row * packed + byte, whole.to(tl.uint8), mask=byte < packed)


@triton.jit
def unpack_kernel(bits_at, mask_at, width, packed, BLOCK: tl.constexpr):
    row, column, there, place = part_of_row(width, BLOCK)
    tl.store(mask_at + place, _bit(bits_at, row, column, packed, there).to(tl.uint8), mask=there)


@triton.jit
def restrict_kernel(x_at, bits_at, width, packed, BLOCK: tl.constexpr):
    """x <- M x."""
    row, column, there, place = part_of_row(width, BLOCK)
    x = tl.load(x_at + place, mask=there, other=0.0)
    inside = _bit(bits_at, row, column, packed, there)
    tl.store(x_at + place, x * inside.to(x.dtype), mask=there)


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


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
    """g <- factor g + rho (x - c), then x, m and v as torch's AdamW has them; the gradient is not changed.

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


def pack(mask: Tensor, packed: int) -> Tensor:
    width = mask.shape[-1]
    rows = mask.numel() // max(1, width)
    flat = mask.contiguous()
    bits = torch.empty((*mask.shape[:-1], packed), dtype=torch.uint8, device=mask.device)
    pack_kernel[(rows, -(-packed // _BYTES))](flat.view(torch.uint8), bits, rows, width, packed, BYTES=_BYTES)
    return bits


def unpack(bits: Tensor, width: int) -> Tensor:
    mask = torch.empty((*bits.shape[:-1], width), dtype=torch.bool, device=bits.device)
    unpack_kernel[_grid(mask)](bits, mask.view(torch.uint8), width, bits.shape[-1], BLOCK=_BLOCK)
    return mask


def restrict_(x: Tensor, bits: Tensor) -> None:
    restrict_kernel[_grid(x)](x, bits, x.shape[-1], bits.shape[-1], BLOCK=_BLOCK)


def _grid(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // max(1, width), -(-width // _BLOCK)
