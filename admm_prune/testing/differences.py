"""Slopes from values alone, with an honest estimate of their rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from admm_prune.point import Point

_SCALES = (1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Slope:
    """(f(x + t d) - f(x - t d)) / 2t, and what rounding may have added to it."""

    value: float
    rounding: float


def precision(point: Point) -> float:
    """eps of the coarsest dtype of a point."""
    return max(torch.finfo(x.dtype).eps for x in point.values())


def rms(point: Point) -> float:
    """The root mean square of the entries; 1 for the zero point."""
    return float(point.norm() / point.numel() ** 0.5) or 1.0


def random_like(point: Point, seed: int, scale: float = 1.0) -> Point:
    """Normal entries, in the form of a point."""
    g = torch.Generator().manual_seed(seed)
    return point.map(lambda x: (scale * torch.randn(x.shape, generator=g, dtype=torch.float64)).to(x))


def slope(value: Callable[[Point], float], x: Point, direction: Point) -> Slope:
    """The central difference along d, with t = eps^(1/3) times the size of x over the size of d."""
    eps = precision(x)
    t = eps ** (1 / 3) * max(rms(x), 1e-3) / rms(direction)
    above, below = value(x + t * direction), value(x - t * direction)
    # Entries of x +- t d are rounded too: the true difference may be off by eps |x| against a step of t |d|.
    return Slope((above - below) / (2 * t), 100 * eps * max(abs(above), abs(below)) / t)


def lower_neighbour(
    value: Callable[[Point], float], x: Point, directions: list[Point], *, smooth: bool, strength: float
) -> str | None:
    """Looks for a point near x, along some directions, where a function is lower than at x.

    Args:
        smooth: the function has a gradient: where its slope is not zero at x, a lower point is near.
        strength: the size of a slope that an error of the size of x would leave; 1.5e-7 of it (in float64) is let pass.

    Returns:
        What was found, in words; None where x stands the test.
    """
    eps = precision(x)
    here = value(x)
    for d in directions:
        for scale in _SCALES:
            step = scale * rms(x) / rms(d)
            for side in (x + step * d, x - step * d):
                there = value(side)
                if there < here - 1000 * eps * max(abs(here), abs(there)):
                    return f"{there} is reached near by, {here} was returned"
        if smooth:
            found = slope(value, x, d)
            allowed = found.rounding + 10 * eps**0.5 * strength * float(d.norm())
            if abs(found.value) > allowed:
                return f"the slope along a direction is {found.value}, beyond rounding ({allowed})"
    return None
