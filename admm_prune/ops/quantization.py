"""Tensors in 16 and 8 bits: stochastic rounding to 16 bits, and blocks of 256 entries that share a float32 scale.

A block is a run of entries of one row, so that a quantized tensor may be cut or sharded between its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256

_LINEAR = 127  # levels of either sign
_SIGNED, _UNSIGNED = 127, 255  # levels above zero
_SIGNED_DECADES, _UNSIGNED_DECADES = 5.0, 6.0  # from the smallest level to the largest
_TINY = torch.finfo(torch.float32).tiny
_HALF_DIGITS, _HALF_LEAST = 11, -24  # binary digits of a float16 number, and the exponent of the least above zero


def generator_on(device: torch.device) -> torch.Generator:
    """A generator for what is drawn on a device; on the meta device, where nothing is drawn, that of the host."""
    return torch.Generator("cpu" if device.type == "meta" else device)


def _log_step(levels: int, decades: float) -> float:
    """Natural logarithm of the ratio of two levels."""
    return decades * math.log(10.0) / (levels - 1)


SIGNED_STEP = _log_step(_SIGNED, _SIGNED_DECADES)
UNSIGNED_STEP = _log_step(_UNSIGNED, _UNSIGNED_DECADES)


@dataclass(frozen=True)
class Stored:
    """A stored tensor: floats, or 8-bit codes with a scale per 256 entries of a row."""

    values: Tensor
    scales: Tensor | None = None


def to_bfloat16(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x (float32) in bfloat16: to the nearest, or, with a generator, up or down at random so that the mean is x."""
    if generator is None:
        return x.to(torch.bfloat16)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, generator=generator, device=x.device)
    # Adding noise below the last kept bit and cutting there rounds up with the probability of the part cut off. Of a
    # NaN, in which GPUs set all bits but the sign, it would make -0.
    cut = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return cut.masked_fill_(x.isnan(), torch.nan).to(torch.bfloat16)


def to_float16(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (float32) in float16, up or down at random so that the mean is x; to the nearest where x is not finite, or too
    large for float16."""
    exponents = torch.frexp(x).exponent.sub_(_HALF_DIGITS).clamp_(min=_HALF_LEAST)
    spacing = torch.ldexp(torch.ones_like(x), exponents)  # of the numbers around x
    levels = x / spacing
    below = levels.floor()
    up = torch.rand(x.shape, generator=generator, device=x.device) < levels.sub_(below)
    rounded = below.add_(up).mul_(spacing)
    return torch.where(x.abs() <= torch.finfo(torch.float16).max, rounded, x).to(torch.float16)


AT_RANDOM = {torch.bfloat16: to_bfloat16, torch.float16: to_float16}  # by the dtype of the result


def scales_shape(shape: torch.Size) -> torch.Size:
    """(..., n) -> (..., ceil(n / 256))."""
    return torch.Size((*shape[:-1], -(-shape[-1] // BLOCK)))


def to_int8(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Evenly spaced levels: code = round(127 x / m), m the largest |x| of the block.

    Args:
        x: (..., n) float32, finite.
        generator: rounds up or down at random so that the mean is x; to the nearest without one.

    Returns:
        codes (..., n) int8 and scales m (..., ceil(n / 256)). The error is at most m / 254, at random m / 127.
    """
    scales = _block_maxima(x)
    levels = x * (_LINEAR / _spread(scales, x.shape[-1]).clamp_min(_TINY))
    return _rounded(levels, generator).clamp_(-_LINEAR, _LINEAR).to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `to_int8`, float32."""
    return codes * (_spread(scales, codes.shape[-1]) / _LINEAR)


def to_signed_log(x: Tensor) -> tuple[Tensor, Tensor]:
    """Levels in constant ratio, of both signs: for a mean of gradients, whose small entries count too.

    Returns:
        codes (..., n) int8 and scales m, the largest |x| of the block. |code| = 127 stands for m and 1 for 1e-5 m; the
        relative error is at most 5 %; what is below the smallest level becomes 0.
    """
    scales = _block_maxima(x)
    magnitude = _log_levels(x.abs(), scales, _SIGNED, _SIGNED_DECADES).round_().clamp_(0, _SIGNED)
    return magnitude.mul_(x.sign()).to(torch.int8), scales


def from_signed_log(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `to_signed_log`, float32."""
    table = _log_table(_SIGNED, _SIGNED_DECADES, codes.device)
    table = torch.cat([table, -table[1:].flip(0)])  # a negative code counts from the end
    return table[codes.long()] * _spread(scales, codes.shape[-1])


def to_unsigned_log(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Levels in constant ratio for x >= 0: for a root mean square, which is divided by.

    Args:
        generator: rounds up or down at random, so that a slow average moves although its steps are below a level.

    Returns:
        codes (..., n) uint8 and scales m, the largest x of the block. 255 stands for m, 1 for 1e-6 m and less, 0 for
        exact zero only; the relative error is at most 2.8 %, at random 5.6 %, above 1e-6 m.
    """
    scales = _block_maxima(x)
    levels = _rounded(_log_levels(x, scales, _UNSIGNED, _UNSIGNED_DECADES), generator).clamp_(1, _UNSIGNED)
    return levels.mul_(x > 0).to(torch.uint8), scales


def from_unsigned_log(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `to_unsigned_log`, float32."""
    table = _log_table(_UNSIGNED, _UNSIGNED_DECADES, codes.device)
    return table[codes.long()] * _spread(scales, codes.shape[-1])


def _block_maxima(x: Tensor) -> Tensor:
    short = -x.shape[-1] % BLOCK
    magnitudes = torch.nn.functional.pad(x.abs(), (0, short)) if short else x.abs()
    maxima: Tensor = magnitudes.unflatten(-1, (-1, BLOCK)).amax(-1)
    return maxima


def _spread(scales: Tensor, width: int) -> Tensor:
    """(..., ceil(n / 256)) -> (..., n): each entry's scale."""
    return scales if scales.shape[-1] == 1 else scales.repeat_interleave(BLOCK, dim=-1)[..., :width]


def _rounded(levels: Tensor, generator: torch.Generator | None) -> Tensor:
    """In place."""
    if generator is None:
        return levels.round_()
    return levels.add_(torch.rand(levels.shape, generator=generator, device=levels.device)).floor_()


def _log_levels(x: Tensor, scales: Tensor, levels: int, decades: float) -> Tensor:
    """levels + log(x / m) / step: -inf at 0, `levels` at m."""
    relative = x / _spread(scales, x.shape[-1]).clamp_min(_TINY)
    return relative.log_().div_(_log_step(levels, decades)).add_(levels)


def _log_table(levels: int, decades: float, device: torch.device) -> Tensor:
    """(levels + 1,): 0, then exp((i - levels) step)."""
    table = torch.arange(levels + 1, dtype=torch.float32, device=device).sub_(levels)
    table = table.mul_(_log_step(levels, decades)).exp_()
    table[0] = 0.0
    return table
