"""Small problems and sets of every kind: what the kit tries a solver on, and this project's tests too.

Add a set to `CONSTRAINTS` or a problem to `PROBLEMS`, and every solver is tested on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from admm_prune.problems.constraints import Blocks, Groups, NofM, Product, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.testing.views import (
    Bare,
    OnlyBlockwise,
    OnlyDifferentiable,
    OnlyProximable,
    OnlyRefittable,
    OnlyStochastic,
)

ROWS, WIDTH = 6, 16

CONSTRAINTS: dict[str, SparseSet] = {
    "half": Unstructured(0.5),
    "most": Unstructured(0.83),
    "nothing": Unstructured(0.0),
    "everything": Unstructured(1.0),
    "rows": RowWise(0.6),
    "2:4": NofM(2, 4),
    "3:8": NofM(3, 8),
    "tiles": Blocks(0.5, 2, 4),
    "columns": Groups(0.6),
    "heads": Groups(0.5, 4),
    "product": Product({"weight": RowWise(0.5)}),
    "stacked": StackedRows(((2, NofM(1, 4)), (4, Unstructured(0.7)))),
}

# Makes a Problem. Some type checkers take a cached_property for no member of a protocol: hence Any.
Maker = Callable[[SparseSet], Any]

Trouble = Literal["dead channels", "rank one", "huge channel", "half precision", "zero weight"]
TROUBLES: tuple[Trouble, ...] = get_args(Trouble)


def correlated_inputs(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """X (tokens, width) with a decaying spectrum in a random basis and channels of unlike size."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    spectrum = torch.arange(1, width + 1, dtype=torch.float64).pow(-0.7)
    gains = torch.exp(0.7 * torch.randn(width, generator=g, dtype=torch.float64))
    inputs: Tensor = (torch.randn(tokens, width, generator=g, dtype=torch.float64) * spectrum) @ basis.T * gains
    return inputs.to(dtype)


def random_weight(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + 10_000)
    return torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)


def layer(
    constraint: SparseSet,
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    tokens: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    ridge: float = 0.01,
) -> LayerReconstruction:
    """A small layer problem with correlated inputs."""
    x = correlated_inputs(tokens, width, seed)
    return LayerReconstruction(random_weight(rows, width, seed, dtype), (x.T @ x).to(dtype), constraint, ridge=ridge)


def retargeted(constraint: SparseSet, *, seed: int = 0) -> LayerReconstruction:
    """A small layer problem whose target came from other inputs."""
    x = correlated_inputs(64, WIDTH, seed)
    g = torch.Generator().manual_seed(seed + 20_000)
    dense = x + 0.2 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    weight = random_weight(ROWS, WIDTH, seed)
    return LayerReconstruction(
        weight,
        x.T @ x,
        constraint,
        ridge=0.01,
        cross_gram=dense.T @ x,
        target_energy=float((dense @ weight.T).square().sum()),
    )


def ill_posed(constraint: SparseSet, trouble: Trouble) -> LayerReconstruction:
    """A layer problem in float32, without a ridge, that something is the matter with."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, WIDTH, generator=g), torch.randn(ROWS, WIDTH, generator=g)
    if trouble == "rank one":
        x = x[:1]
    elif trouble == "dead channels":
        x[:, ::3] = 0
    elif trouble == "huge channel":
        x[:, 5] *= 1e4
    elif trouble == "half precision":
        weight = (weight * 2e4).half()
    else:
        weight.zero_()
    return LayerReconstruction(weight, x.T @ x, constraint, ridge=0.0)


PROBLEMS: dict[str, Maker] = {
    "layer": layer,
    "layer, float32": lambda c: layer(c, dtype=torch.float32),
    "layer, other target": retargeted,
    "layer, few tokens": lambda c: layer(c, tokens=5),
}

# The same layer through ever narrower windows: a solver must take what it is shown, or refuse.
VIEWS: dict[str, Maker] = {
    "a layer that shows only its value": lambda c: Bare(layer(c)),
    "a layer that shows only its prox": lambda c: OnlyProximable(layer(c)),
    "a layer that shows only its gradient": lambda c: OnlyDifferentiable(layer(c)),
    "a layer that shows only its refit": lambda c: OnlyRefittable(layer(c)),
    "a layer that shows only sampled gradients": lambda c: OnlyStochastic(layer(c)),
    "a layer that shows only its blocks": lambda c: OnlyBlockwise(layer(c)),
}
