"""Activation functions of feed-forward networks: values, two derivatives, and where they turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """act(s), which falls up to `turn`, to the value `least`, and rises from there on; act(s) -> 0 for s -> -inf.

    For s >= 0 it lies between s + least and s: so far is act^-1(y) from y.

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
