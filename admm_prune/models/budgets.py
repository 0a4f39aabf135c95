"""What the units of a branch weigh, in the terms in which a budget may be given."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.models.parallel import World
from admm_prune.models.sublayers import Branch

Unit = Literal["parameters", "bytes", "kv-cache", "flops", "latency"]
UNITS: tuple[Unit, ...] = get_args(Unit)
_WIDTHS, _REPEATS = 9, 5  # of which the time is measured; in between it is interpolated


def savings(branch: Branch, unit: Unit, *, tokens: int = 2048) -> Tensor:
    """What the branch saves when it loses k = 0..n units: (n + 1,), float64, never falling.

    Args:
        unit: "parameters", entries of the matrices; "bytes", of these; "kv-cache", bytes a token of keys and values;
            "flops", a token, of the matrices and of attention over half of the context; "latency", seconds that the
            products of the matrices with `tokens` inputs take less on this machine, measured: where the weights are, or
            on the GPU if there is one and they are on disk; of several processes, by the first one, so that all of them
            decide alike.
        tokens: of the context.

    Raises:
        UserError: no such unit.
    """
    k = torch.arange(branch.count + 1, dtype=torch.float64)
    element = branch.output.parameter.element_size()
    if unit == "parameters":
        return k * branch.unit_weights
    if unit == "bytes":
        return k * branch.unit_weights * element
    if unit == "kv-cache":
        return k * (2 * branch.size * element if branch.kind == "heads" else 0)
    if unit == "flops":
        attention = 4 * branch.width * tokens / 2 if branch.kind == "heads" else 0
        return k * (2 * branch.unit_weights + attention)
    if unit == "latency":
        shapes = tuple((view.shape[0] // branch.count, view.shape[1]) for view in branch.inner)
        weight = branch.output.parameter
        device = _computing() if weight.is_meta else str(weight.device)
        return _seconds_saved(branch.count, shapes, branch.width, tokens, weight.dtype, device)
    raise UserError(f"a budget is in {', '.join(UNITS[:-1])} or {UNITS[-1]}, not in '{unit}'")


def _computing() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=64)  # blocks are alike
def _seconds_saved(
    count: int, inner: tuple[tuple[int, int], ...], width: int, tokens: int, dtype: torch.dtype, device: str
) -> Tensor:
    points = sorted({round(count * i / (_WIDTHS - 1)) for i in range(_WIDTHS)})
    times = World.here().from_first(lambda: [_seconds(units, inner, width, tokens, dtype, device) for units in points])
    # Fewer units take no longer: what a measurement says against it is noise.
    times = torch.tensor(times, dtype=torch.float64).cummax(0).values.tolist()
    kept = torch.arange(count, -1, -1, dtype=torch.float64)
    at = torch.tensor(points, dtype=torch.float64)
    right = torch.searchsorted(at, kept).clamp(1, len(points) - 1)
    share = (kept - at[right - 1]) / (at[right] - at[right - 1])
    t = torch.tensor(times, dtype=torch.float64)
    taken = t[right - 1] + share * (t[right] - t[right - 1])
    return (taken[0] - taken).clamp_min(0).cummax(0).values


def _seconds(
    units: int, inner: tuple[tuple[int, int], ...], width: int, tokens: int, dtype: torch.dtype, device: str
) -> float:
    """The least time of the products of a branch with so many units."""
    if units == 0:
        return 0.0
    residual = inner[0][1]
    x = torch.randn(tokens, residual, dtype=dtype, device=device)
    weights = [torch.randn(units * rows, columns, dtype=dtype, device=device) for rows, columns in inner]
    output = torch.randn(residual, units * width, dtype=dtype, device=device)
    a = torch.randn(tokens, units * width, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(a, output)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
