"""How a measured figure grows with a size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import linear_regression


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """e of y = c x^e, by least squares over logarithms of (x, y), of two x at least."""
    x, y = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return linear_regression(x, y).slope
