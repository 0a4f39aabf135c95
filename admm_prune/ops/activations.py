"""Activation functions of feed-forward networks: values, two derivatives, and their minimum.

The pre-activation of a split network, entry by entry: argmin_s (s - m)^2 + w (p - g act(s))^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

_PIECE = 1 << 16  # entries processed at once, so that they stay in the cache
_NEWTON = {torch.float64: 12}  # steps that end at rounding
_NEWTON_SINGLE = 3
_TABLE = 4096
_FLAT = -16.0  # left of it every activation is numerically zero
_LINEAR = 12.0  # right of it every activation is numerically s


@dataclass(frozen=True)
class Activation:
    """act(s), which falls up to `turn`, to the value `least`, and rises from there on; act(s) -> 0 for s -> -inf.

    For s >= 0 it lies between s + least and s, which bounds the distance of act^-1(y) from y.

    Attributes:
        value: act, of any float dtype, as models compute it.
        derivatives: (act, act', act'') at once.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    turn: float
    least: float


def _relu(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return s.relu(), (s > 0).to(s.dtype), torch.zeros_like(s)


def _silu(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigmoid = s.sigmoid()
    falling = sigmoid * (1 - sigmoid)
    return s * sigmoid, sigmoid + s * falling, falling * (2 + s * (1 - 2 * sigmoid))


def _gelu(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = torch.special.ndtr(s)
    density = torch.exp(-s * s / 2) / math.sqrt(2 * math.pi)
    return s * below, below + s * density, density * (2 - s * s)


def _gelu_tanh(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (s + cubic * s**3))
    slope = (1 - t * t) * scale * (1 + 3 * cubic * s * s)  # of t
    bend = (1 - t * t) * scale * 6 * cubic * s - 2 * t * slope * scale * (1 + 3 * cubic * s * s)
    return 0.5 * s * (1 + t), 0.5 * (1 + t + s * slope), slope + 0.5 * s * bend


RELU = Activation("relu", nn.functional.relu, _relu, 0.0, 0.0)

ACTIVATIONS: Mapping[str, Activation] = {
    activation.name: activation
    for activation in (
        RELU,
        Activation("silu", nn.functional.silu, _silu, -1.2784645427610741, -0.27846454276107374),
        Activation("gelu", nn.functional.gelu, _gelu, -0.7517915246935645, -0.16997120747990363),
        Activation(
            "gelu-tanh",
            lambda s: nn.functional.gelu(s, approximate="tanh"),
            _gelu_tanh,
            -0.7524614220710163,
            -0.1700407505712541,
        ),
    )
}


def pre_activation(
    m: Tensor, p: Tensor, gain: Tensor | None, w: float, activation: Activation, start: Tensor | None = None
) -> Tensor:
    """argmin_s (s - m)^2 + w (p - g act(s))^2, entry by entry, and never worse than m or the start.

    For ReLU the exact global minimum. Other losses have up to three local minima: at m, and about the points of the
    rising and the falling branch where g act(s) = p. The best of these, read from a table, is where Newton begins.

    Args:
        m: output of the linear map, (tokens, D).
        p: target of the activation, (tokens, D).
        gain: g, the value that the activation is multiplied by, (tokens, D); None for 1, where there is no gate.
        w: weight of the activation over that of the linear map, > 0.
        start: a further candidate; m alone by default.

    Source: Bai et al., SparseLLM, 2024, eq. 9 (ReLU, g = 1); the rule for any g and the valleys are ours.
    """
    solution = torch.empty_like(m, memory_format=torch.contiguous_format)
    g = torch.ones((), dtype=m.dtype, device=m.device).expand_as(m) if gain is None else gain
    parts = (x.reshape(-1).split(_PIECE) for x in (solution, m, p, g, m if start is None else start))
    for out, some_m, some_p, some_g, begin in zip(*parts, strict=True):
        if activation is RELU:
            out.copy_(_relu_minimizer(some_m, some_p, some_g, w))
        else:
            out.copy_(_smooth(some_m, some_p, some_g, w, activation, begin))
    return solution


def _relu_minimizer(m: Tensor, p: Tensor, g: Tensor, w: float) -> Tensor:
    """(m + w g p) / (1 + w g^2) where that is positive and no worse than min(m, 0).

    The branch s > 0 costs w (p - g m)^2 / (1 + w g^2) at its best, the other w p^2 where m < 0.
    """
    above = 1 + w * g * g
    rising = (m + w * g * p) / above
    rises = (rising > 0) & ((m > 0) | ((p - g * m).square() <= above * p.square()))
    return torch.where(rises, rising, m.clamp_max(0))


def _smooth(m: Tensor, p: Tensor, g: Tensor, w: float, activation: Activation, start: Tensor) -> Tensor:
    """Newton from the best of m, the two inverses, the minimum if act(s) were s, and a step from m to either side.

    Gauss-Newton steps where the loss is not convex; a step that does not lower the loss is divided by four.
    """

    def loss(s: Tensor, value: Tensor) -> Tensor:
        return (s - m).square_().add_((p - g * value).square_(), alpha=w)

    s, lowest = m, loss(m, activation.value(m))
    target = torch.where(g == 0, 0, p / g)
    linear = (m + w * g * p) / (1 + w * g * g)
    for trial in (start, linear, *_inverses(target, activation), m - 1, m + 1):
        there = loss(trial, activation.value(trial))
        lower = there < lowest
        s, lowest = torch.where(lower, trial, s), torch.where(lower, there, lowest)
    size = torch.ones_like(s)
    value, slope, bend = activation.derivatives(s)
    for _ in range(_NEWTON.get(m.dtype, _NEWTON_SINGLE)):
        steep, miss = g * slope, p - g * value
        gauss = (steep * steep).mul_(w).add_(1)
        newton = torch.addcmul(gauss, g * bend, miss, value=-w)
        gradient = torch.addcmul(s - m, steep, miss, value=-w)
        trial = torch.addcmul(s, size, gradient / torch.where(newton > 0.1 * gauss, newton, gauss), value=-1)
        new = activation.derivatives(trial)
        there = loss(trial, new[0])
        lower = there < lowest
        s, lowest = torch.where(lower, trial, s), torch.where(lower, there, lowest)
        value, slope, bend = (torch.where(lower, a, b) for a, b in zip(new, (value, slope, bend), strict=True))
        size = torch.where(lower, 1.0, size / 4)
    return s


def _inverses(y: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The points of the rising and of the falling branch where act(s) = y, or is next to y."""
    rising, falling = _tables(activation.name, y.dtype, y.device)
    above = (y - activation.least).clamp_min_(0).sqrt_()  # in which the inverse is smooth at the turn
    edge = (_LINEAR - activation.least) ** 0.5
    right = torch.where(y > _LINEAR, y, _read(rising, above.clamp_max(edge) / edge))
    below = (y.clamp(activation.least, -1e-30) / activation.least).log_().neg_().sqrt_()
    edge = (-_FLAT) ** 0.5
    return right, _read(falling, below.clamp_max_(edge) / edge)


def _read(table: Tensor, place: Tensor) -> Tensor:
    """The table at places from 0 to 1, linear in between."""
    position = place * (len(table) - 1)
    index = position.long().clamp_max_(len(table) - 2)
    return torch.lerp(table[index], table[index + 1], position - index)


@cache
def _tables(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """act^-1 at even distances of sqrt(y - least), and of sqrt(log(least / y)) on the falling branch, by bisection."""
    activation = ACTIVATIONS[name]
    even = torch.linspace(0, 1, _TABLE, dtype=torch.float64)
    height = activation.least + even.square() * (_LINEAR - activation.least)
    depth = activation.least * torch.exp(even.square() * _FLAT)
    tables = []
    for y, ends in ((height, (activation.turn, _LINEAR + 1)), (depth, (activation.turn, 2 * _FLAT))):
        low, high = (torch.full_like(y, end) for end in ends)  # act(low) <= y <= act(high)
        for _ in range(80):
            middle = (low + high) / 2
            short = activation.value(middle) < y
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        tables.append(low.to(dtype=dtype, device=device))
    return tables[0], tables[1]
