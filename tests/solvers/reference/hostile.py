"""Proved bounds against the exact optimum of the hostile problems of `benchmarks.exact_bounds`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np

from admm_prune.point import Point
from benchmarks import exact_bounds


def checked(seed: int, number: int, certify: Callable[..., Any], **how: Any) -> tuple[float, float] | None:
    """(bound, optimum) above the floor of a hostile problem; fails where the bound is above the optimum.

    Args:
        certify: gives a certificate of the problem, or None, with `how` as its options.

    Returns:
        None where the problem or the options are refused, nothing is proved, or the optimum is not known.
    """
    try:
        case = exact_bounds.drawn(np.random.default_rng((seed, number)))
        certificate = certify(case.problem, **how)
    except ValueError:
        return None
    least = exact_bounds.optimum(case.problem)
    if certificate is None or least is None:
        return None
    assert mpmath.mpf(certificate.bound.value) <= least, case.label
    floor = case.problem.value(Point(weight=case.problem.minimizer))
    return certificate.bound.value - floor, float(least - floor)
