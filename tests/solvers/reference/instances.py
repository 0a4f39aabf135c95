"""A Quadratic problem of these tests' own, and random rows to put into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import RowWise


@dataclass(frozen=True)
class Toy:
    """f(V) = tr((V - W) A (V - W)^T) + offset."""

    weight: Tensor
    hessian: Tensor
    constraint: Constraint
    offset: float = 0.0

    @property
    def minimizer(self) -> Tensor:
        return self.weight

    @property
    def linear(self) -> Tensor:
        return self.weight @ self.hessian

    @property
    def curvature(self) -> float:
        return float(self.hessian.diagonal().mean())

    def initial(self) -> Point:
        return Point(weight=self.weight)

    def value(self, x: Point) -> float:
        away = x["weight"] - self.weight
        return float((away @ self.hessian * away).sum()) + self.offset


def keeping(keep: int, width: int) -> RowWise:
    """Keeps `keep` of `width` in every row."""
    return RowWise(1 - keep / width)


def spectral(width: int, seed: int, condition: float = 1e6) -> Tensor:
    """Q diag(1 ... 1 / condition) Q^T, log-spaced, Q random orthogonal."""
    generator = np.random.default_rng(seed)
    q, _ = np.linalg.qr(generator.standard_normal((width, width)))
    hessian = (q * np.logspace(0, -np.log10(condition), width)) @ q.T
    return torch.from_numpy((hessian + hessian.T) / 2)


def correlated(width: int, seed: int, ridge: float = 0.01) -> Tensor:
    """X^T X (1 + ridge on the diagonal), with a falling spectrum and uneven channels, as a layer's inputs have."""
    generator = np.random.default_rng(seed)
    q, _ = np.linalg.qr(generator.standard_normal((width, width)))
    spectrum = np.arange(1, width + 1) ** -1.1
    mixing = q * np.sqrt(spectrum / spectrum.mean() * 0.98 + 0.02)
    gain = np.exp(0.35 * generator.standard_normal(width))
    x = generator.standard_normal((8 * width, width)) @ mixing.T * gain
    gram = x.T @ x
    return torch.from_numpy(gram + ridge * np.diag(gram.diagonal()))


def normal(rows: int, width: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 1000).standard_normal((rows, width)))


@st.composite
def toys(draw: st.DrawFn, max_width: int, min_width: int = 1, rows: int = 1) -> Toy:
    """Rows of both families and of the awkward kinds: duplicate and dead-like channels, zero weights, ties."""
    width = draw(st.integers(min_width, max_width))
    keep = draw(st.integers(0, width))
    seed = draw(st.integers(0, 10**6))
    weight = normal(rows, width, seed)
    kind = draw(st.sampled_from(["spectral", "correlated", "duplicates", "dead", "ties", "zeros"]))
    hessian = spectral(width, seed) if kind == "spectral" else correlated(width, seed)
    if kind == "duplicates":
        twin = torch.arange(width) // 2
        hessian = hessian[twin][:, twin] + 1e-4 * torch.diag(hessian.diagonal()[twin])
        weight = weight[:, twin]
    elif kind == "dead":
        scale = torch.where(torch.arange(width) % 3 == 0, 1e-8, 1.0).double()
        hessian = scale[:, None] * hessian * scale
    elif kind == "ties":
        hessian, weight = torch.eye(width, dtype=torch.float64), weight.round()
    elif kind == "zeros":
        weight = weight * (weight.abs() > 0.7)
    return Toy(weight, hessian, keeping(keep, width))
