"""Small feed-forward networks with correlated inputs, for the tests of what is split and alternated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from admm_prune.ops.activations import ACTIVATIONS
from admm_prune.point import Point
from admm_prune.problems.constraints import SparseSet, Unstructured
from admm_prune.problems.feed_forward import FeedForward, GatedFeedForward, Network
from admm_prune.problems.network_output import NetworkOutput
from tests.catalogue import correlated_inputs

WIDTH, HIDDEN, OUTPUTS = 8, 20, 6
HALF = Unstructured(0.5)


def network(
    activation: str, *, gated: bool, biases: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Network:
    g = torch.Generator().manual_seed(seed)
    shapes = {"up": (HIDDEN, WIDTH), "down": (OUTPUTS, HIDDEN)}
    if gated:
        shapes["gate"] = (HIDDEN, WIDTH)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    weights = Point({name: draw(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()})
    added = {name: 0.3 * draw(len(w)) for name, w in weights.items()} if biases else {}
    return Network(ACTIVATIONS[activation], weights, added)


def tokens(net: Network, count: int = 200, seed: int = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Inputs, and what the dense network makes of them, with noise that no network follows."""
    inputs = correlated_inputs(count, WIDTH, seed, net.weights["up"].dtype)
    outputs = net.linear("down", net.weights, net.hidden(net.weights, inputs))
    g = torch.Generator().manual_seed(seed + 1)
    return inputs, outputs + noise * torch.randn(outputs.shape, generator=g, dtype=torch.float64).to(outputs)


def sets(net: Network, constraint: SparseSet = HALF) -> dict[str, SparseSet]:
    return dict.fromkeys(net.weights, constraint)


def damped(net: Network, ridge: float) -> Mapping[str, tuple[float, float]]:
    return dict.fromkeys(net.weights, (ridge, 0.0))


def split(
    net: Network,
    *,
    count: int = 200,
    seed: int = 0,
    noise: float = 0.1,
    constraint: SparseSet = HALF,
    **how: Any,
) -> FeedForward:
    kind = GatedFeedForward if net.gated else FeedForward
    return kind(net, *tokens(net, count, seed, noise), sets(net, constraint), **how)


def whole(
    net: Network,
    *,
    count: int = 200,
    noise: float = 0.1,
    constraint: SparseSet = HALF,
    held_out: int = 100,
    **how: Any,
) -> NetworkOutput:
    """With held-out tokens of the seed `held_out`."""
    validation = tokens(net, 200, held_out, noise)
    return NetworkOutput(net, tokens(net, count, 0, noise), sets(net, constraint), validation=validation, **how)
