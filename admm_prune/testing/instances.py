"""Instances of layer problems and quadratics with known properties, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Quadratic
from admm_prune.problems.constraints import Blocks, Groups, NofM, Product, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.testing.results import Case, named, precision, random_like, rms, slope
from admm_prune.testing.supports import (
    Bare,
    OnlyBlockwise,
    OnlyDifferentiable,
    OnlyProximable,
    OnlyRefittable,
    OnlyStochastic,
    all_masks,
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
    """A layer problem in float32, without a ridge, with a defect."""
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

# The same layer with fewer and fewer capabilities: a solver must use those available, or refuse.
VIEWS: dict[str, Maker] = {
    "a layer that shows only its value": lambda c: Bare(layer(c)),
    "a layer that shows only its prox": lambda c: OnlyProximable(layer(c)),
    "a layer that shows only its gradient": lambda c: OnlyDifferentiable(layer(c)),
    "a layer that shows only its refit": lambda c: OnlyRefittable(layer(c)),
    "a layer that shows only sampled gradients": lambda c: OnlyStochastic(layer(c)),
    "a layer that shows only its blocks": lambda c: OnlyBlockwise(layer(c)),
}


def check_quadratic(case: Case, problem: Quadratic, seed: int) -> None:
    """Checks A, G, the minimizer and the curvature against values."""
    dense = problem.initial()
    case.require(list(dense) == ["weight"] and dense["weight"].ndim == 2, "hold one matrix, named weight")
    rows, width = dense["weight"].shape
    a, g, w = problem.hessian, problem.linear, problem.minimizer
    case.require(tuple(a.shape) == (width, width), "have a hessian (in, in)", f"it is {tuple(a.shape)}")
    shapes = tuple(g.shape) == tuple(w.shape) == (rows, width)
    case.require(shapes, "have linear and minimizer (out, in)", f"they are {tuple(g.shape)} and {tuple(w.shape)}")
    eps = precision(dense)
    scale = a.diagonal().double().sqrt()
    skew = float(((a - a.T).double() / scale / scale[:, None]).abs().max())
    case.require(skew <= 100 * eps, "have a symmetric hessian", f"it is off by {skew} of sqrt(A_ii A_jj)")
    scaled = a.double() / scale / scale[:, None]
    least = float(torch.linalg.eigvalsh((scaled + scaled.T) / 2)[0])
    case.require(least > 0, "have a positive definite hessian", f"its least eigenvalue, Jacobi-scaled, is {least}")
    _agrees_with_values(case, problem, dense, seed)
    best = Point(weight=w.to(dense["weight"].dtype))
    at_best = problem.value(best)
    for k in range(4):
        d = random_like(dense, seed + 50 + k)
        derivative = slope(problem.value, best, d)
        allowed = derivative.rounding + 10 * eps**0.5 * problem.curvature * float((best.norm() or 1.0) * d.norm())
        case.require(abs(derivative.value) <= allowed, "have no slope at its minimizer", f"it is {derivative.value}")
        there = problem.value(best + d)
        case.require(there >= at_best - 1000 * eps * abs(there), "be least at its minimizer", f"{there} < {at_best}")
    _mean_curvature(case, problem, dense)


def _agrees_with_values(case: Case, problem: Quadratic, dense: Point, seed: int) -> None:
    a, g = problem.hessian.double(), problem.linear.double()
    constant = problem.value(dense.zeros_like())
    for k in range(3):
        x = random_like(dense, seed + 10 + k, rms(dense))
        v = x["weight"].double()
        square, product = float(((v @ a) * v).sum()), float((v * g).sum())
        value = problem.value(x)
        size = abs(square) + 2 * abs(product) + abs(constant)
        case.require(
            abs(value - (square - 2 * product + constant)) <= 1000 * precision(dense) * size,
            "have the value tr(V A V^T) - 2 tr(V G^T) + c",
            f"at a random V the value is {value}, hessian and linear say {square - 2 * product + constant}",
        )


def _mean_curvature(case: Case, problem: Quadratic, dense: Point) -> None:
    """curvature = mean_j (f(h e_j) - 2 f(0) + f(-h e_j)) / 2 h^2, along the entries of the first row."""
    zero = dense.zeros_like()
    h = 2.0 ** round(torch.log2(torch.tensor(rms(dense))).item())
    at_zero = problem.value(zero)
    total, rounding = 0.0, 0.0
    width = dense["weight"].shape[1]
    for j in range(width):
        e = zero.clone()
        e["weight"][0, j] = h
        above, below = problem.value(e), problem.value(-e)
        total += (above - 2 * at_zero + below) / (2 * h * h * width)
        rounding += 100 * precision(dense) * (abs(above) + abs(at_zero) + abs(below)) / (2 * h * h * width)
    case.require(
        abs(problem.curvature - total) <= rounding + 1e-6 * total,
        "have as curvature the mean diagonal of A, half the second derivatives of its value",
        f"it is {problem.curvature}, second differences say {total}",
    )


def optimum(problem: Quadratic) -> Point:
    """argmin of f over the constraint, by solving the least squares of every row on every subset of its entries.

    Only `contains` decides which subsets are admissible together. At most 12 entries in all.
    """
    a, w = problem.hessian.double(), problem.minimizer.double()
    rows, width = w.shape
    subsets = all_masks(width)  # (2^in, in)
    masks = subsets.double()
    both = masks[:, :, None] * masks[:, None, :]
    systems = a * both + torch.diag_embed(1 - masks)
    right = masks[:, :, None] * problem.linear.double().T  # (2^in, in, out)
    fitted = torch.linalg.solve(systems, right).mT * masks[:, None, :]  # (2^in, out, in)
    away = fitted - w
    losses = ((away @ a) * away).sum(-1)  # (2^in, out)
    supports = all_masks(rows * width).view(-1, rows, width)
    codes = (supports * 2 ** torch.arange(width)).sum(-1)  # (2^n, out)
    totals = losses[codes, torch.arange(rows)].sum(1)
    for i in totals.argsort().tolist():
        weight = fitted[codes[i], torch.arange(rows)].to(problem.minimizer.dtype)
        if problem.constraint.contains(Point(weight=weight)):
            return Point(weight=weight)
    raise AssertionError(f"{named(problem.constraint)} contains no point, not even zero")
