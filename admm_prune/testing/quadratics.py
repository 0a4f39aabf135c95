"""What a Quadratic problem promises, and the optimum of a tiny one over every support."""

from __future__ import annotations

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Quadratic
from admm_prune.testing.results import Case, named, precision, random_like, rms, slope


def check_quadratic(case: Case, problem: Quadratic, seed: int) -> None:
    """Checks A, G, the minimizer and the curvature against values."""
    dense = problem.initial()
    case.promise(list(dense) == ["weight"] and dense["weight"].ndim == 2, "hold one matrix, named weight")
    rows, width = dense["weight"].shape
    a, g, w = problem.hessian, problem.linear, problem.minimizer
    case.promise(tuple(a.shape) == (width, width), "have a hessian (in, in)", f"it is {tuple(a.shape)}")
    shapes = tuple(g.shape) == tuple(w.shape) == (rows, width)
    case.promise(shapes, "have linear and minimizer (out, in)", f"they are {tuple(g.shape)} and {tuple(w.shape)}")
    eps = precision(dense)
    scale = a.diagonal().double().sqrt()
    skew = float(((a - a.T).double() / scale / scale[:, None]).abs().max())
    case.promise(skew <= 100 * eps, "have a symmetric hessian", f"it is off by {skew} of sqrt(A_ii A_jj)")
    scaled = a.double() / scale / scale[:, None]
    least = float(torch.linalg.eigvalsh((scaled + scaled.T) / 2)[0])
    case.promise(least > 0, "have a positive definite hessian", f"its least eigenvalue, Jacobi-scaled, is {least}")
    _agrees_with_values(case, problem, dense, seed)
    best = Point(weight=w.to(dense["weight"].dtype))
    at_best = problem.value(best)
    for k in range(4):
        d = random_like(dense, seed + 50 + k)
        found = slope(problem.value, best, d)
        allowed = found.rounding + 10 * eps**0.5 * problem.curvature * float((best.norm() or 1.0) * d.norm())
        case.promise(abs(found.value) <= allowed, "have no slope at its minimizer", f"it is {found.value}")
        there = problem.value(best + d)
        case.promise(there >= at_best - 1000 * eps * abs(there), "be least at its minimizer", f"{there} < {at_best}")
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
        case.promise(
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
    case.promise(
        abs(problem.curvature - total) <= rounding + 1e-6 * total,
        "have as curvature the mean diagonal of A, half the second derivatives of its value",
        f"it is {problem.curvature}, second differences say {total}",
    )


def optimum(problem: Quadratic) -> Point:
    """argmin of f over the constraint, by solving the least squares of every row on every subset of its entries.

    Only `contains` is asked which subsets go together. At most 12 entries in all.
    """
    a, w = problem.hessian.double(), problem.minimizer.double()
    rows, width = w.shape
    subsets = _bits(width)  # (2^in, in)
    kept = subsets.double()
    both = kept[:, :, None] * kept[:, None, :]
    systems = a * both + torch.diag_embed(1 - kept)
    right = kept[:, :, None] * problem.linear.double().T  # (2^in, in, out)
    fitted = torch.linalg.solve(systems, right).mT * kept[:, None, :]  # (2^in, out, in)
    away = fitted - w
    losses = ((away @ a) * away).sum(-1)  # (2^in, out)
    supports = _bits(rows * width).view(-1, rows, width)
    codes = (supports * 2 ** torch.arange(width)).sum(-1)  # (2^n, out)
    totals = losses[codes, torch.arange(rows)].sum(1)
    for i in totals.argsort().tolist():
        weight = fitted[codes[i], torch.arange(rows)].to(problem.minimizer.dtype)
        if problem.constraint.contains(Point(weight=weight)):
            return Point(weight=weight)
    raise AssertionError(f"{named(problem.constraint)} contains no point, not even zero")


def _bits(count: int) -> Tensor:
    """Every row of `count` zeros and ones, as booleans."""
    return (torch.arange(2**count)[:, None] >> torch.arange(count)) & 1 == 1
