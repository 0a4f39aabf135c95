"""The lists that the product tests run over: add a line here, and everything is tested against everything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from admm_prune.problems.constraints import Blocks, NofM, Product, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.closed_form import Magnitude, Wanda
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.polish import Polish
from admm_prune.solvers.schedules import Constant

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
    "product": Product({"weight": RowWise(0.5)}),
    "stacked": StackedRows(((2, NofM(1, 4)), (4, Unstructured(0.7)))),
}

SOLVERS: dict[str, Callable[[], Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "sparsegpt, one mask": lambda: SparseGPT(mask_scope="layer"),
    "sparsegpt, small blocks": lambda: SparseGPT(block=4),
    "admm": ADMM,
    "admm fast": ADMM.fast,
    "admm best": ADMM.best,
    "admm alps": ADMM.alps,
    "admm gradual": ADMM.gradual,
    "admm watched": lambda: ADMM(objective_every=1, penalty=Constant(0.5)),
    "magnitude, polished": lambda: Polish(Magnitude()),
    "wanda, polished": lambda: Polish(Wanda()),
}


def correlated_inputs(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """X (tokens, width) with a decaying spectrum in a random basis and channels of unlike size."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    spectrum = torch.arange(1, width + 1, dtype=torch.float64).pow(-0.7)
    gains = torch.exp(0.7 * torch.randn(width, generator=g, dtype=torch.float64))
    return ((torch.randn(tokens, width, generator=g, dtype=torch.float64) * spectrum) @ basis.T * gains).to(dtype)


def random_weight(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + 10_000)
    return torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)


def layer(
    constraint: SparseSet, *, rows: int = ROWS, width: int = WIDTH, tokens: int = 64, seed: int = 0,
    dtype: torch.dtype = torch.float64, ridge: float = 0.01,
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
        weight, x.T @ x, constraint, ridge=0.01, cross_gram=dense.T @ x,
        target_energy=float((dense @ weight.T).square().sum()),
    )


PROBLEMS: dict[str, Callable[[SparseSet], LayerReconstruction]] = {
    "layer": layer,
    "layer, float32": lambda c: layer(c, dtype=torch.float32),
    "layer, other target": retargeted,
    "layer, few tokens": lambda c: layer(c, tokens=5),
}
