"""Checks that average over random directions or over draws: the curvature of a problem and its sampled losses."""

from __future__ import annotations

import torch

from admm_prune.point import Point
from admm_prune.problem import Problem, Stochastic
from admm_prune.testing.results import Case, precision, rms

_PROBES = 6  # sign directions for each tensor
_FACTOR = 10.0  # by how much a curvature may be outside the range over the tensors
_DRAWS = 48
_STANDARD_ERRORS = 5.0
_RELATIVE = 0.02


def check_curvature(case: Case, problem: Problem, seed: int) -> None:
    """Checks the curvature against half the mean diagonal of the Hessian of each tensor of the initial point.

    The mean diagonal is estimated by s^T H s / n over random signs s in the n entries of one tensor, and s^T H s by
    second differences (f(x + h s) - 2 f(x) + f(x - h s)) / h^2. The curvature must be within a factor 10 of the range
    from the least to the largest absolute value over the tensors. Nothing is checked where the rounding of f, or the
    spread over the signs, is as large as the estimates.

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
    """
    x = problem.initial()
    means, errors = [], []
    for k, name in enumerate(x):
        mean, error = _half_mean_diagonal(problem, x, name, seed + 1000 * k)
        means.append(abs(mean))
        errors.append(error)
    low = max(0.0, min(mean - error for mean, error in zip(means, errors, strict=True)))
    high = max(mean + error for mean, error in zip(means, errors, strict=True))
    if max(errors) >= 0.5 * max(means):
        return
    case.require(
        low / _FACTOR <= problem.curvature <= high * _FACTOR,
        "have as curvature half the mean diagonal of the Hessian of its value, within a factor of 10",
        f"it is {problem.curvature}, second differences say {min(means)} to {max(means)} over its tensors",
    )


def _half_mean_diagonal(problem: Problem, x: Point, name: str, seed: int) -> tuple[float, float]:
    """The estimate for one tensor, and its error: rounding and three standard errors."""
    generator = torch.Generator().manual_seed(seed)
    eps = precision(x)
    h = eps**0.25 * max(rms(x), 1e-3)
    center, rounding = problem.value(x), 0.0
    curvatures = []
    for _ in range(_PROBES):
        signs = torch.randint(0, 2, x[name].shape, generator=generator).to(x[name]) * 2 - 1
        above, below = (problem.value(Point({**x, name: x[name] + side * h * signs})) for side in (1, -1))
        scale = 2 * h * h * max(1, signs.numel())
        curvatures.append((above - 2 * center + below) / scale)
        rounding = max(rounding, 100 * eps * (abs(above) + 2 * abs(center) + abs(below)) / scale)
    estimates = torch.tensor(curvatures, dtype=torch.float64)
    return float(estimates.mean()), rounding + 3 * float(estimates.std()) / _PROBES**0.5


def check_sampled_losses(case: Case, problem: Stochastic, points: list[Point]) -> None:
    """Checks the mean over 48 draws of loss(x) - loss(y) against value(x) - value(y), for the points against the first.

    Differences, because a sampled loss may be off by a constant. They may be apart by five standard errors and by 2 %
    of the larger one.
    """
    values = [problem.value(x) for x in points]
    losses = torch.tensor(
        [[problem.sample_gradient(x, draw)[0] for draw in range(_DRAWS)] for x in points], dtype=torch.float64
    )
    for x, value, sampled in zip(points[1:], values[1:], losses[1:], strict=True):
        differences = sampled - losses[0]
        mean, error = float(differences.mean()), float(differences.std()) / _DRAWS**0.5
        expected = value - values[0]
        rounding = 1000 * precision(x) * max(abs(value), abs(values[0]), float(sampled.abs().max()))
        allowed = _STANDARD_ERRORS * error + _RELATIVE * max(abs(mean), abs(expected)) + rounding
        case.require(
            abs(mean - expected) <= allowed,
            "sample losses whose mean over the draws differs between two points as its value does",
            f"the mean over {_DRAWS} draws differs by {mean} (standard error {error}), the value by {expected}",
        )
