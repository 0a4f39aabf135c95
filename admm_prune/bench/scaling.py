"""Power laws of time and memory in the size of the model, fitted to measurements of the same run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

import torch

from admm_prune.bench.baselines import Ceilings
from admm_prune.bench.blocks import BEYOND, STRUCTURED, block_work, working_bytes
from admm_prune.bench.rows import Measurement
from admm_prune.bench.training import SHAPES, ModelShape


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """e of y = c x^e, by least squares over the logarithms of at least two points (x, y)."""
    x, y = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return linear_regression(x, y).slope


@dataclass(frozen=True)
class Line:
    """seconds = overhead + floor / reached, by least squares over relative errors."""

    overhead: float
    reached: float
    rows: int
    worst: float  # the largest |fitted / measured - 1|

    def at(self, floor: float) -> float:
        return self.overhead + floor / self.reached


def fitted(rows: Sequence[Measurement]) -> Line | None:
    """The line through measured rows with a floor; None where there are fewer than two."""
    points = [(row.floor_seconds, row.seconds) for row in rows if row.seconds and row.floor_seconds]
    if len(points) < 2:
        return None
    floors = torch.tensor([floor for floor, _ in points], dtype=torch.float64)
    spent = torch.tensor([seconds for _, seconds in points], dtype=torch.float64)
    # Divided by the time, so that small layers count as much as large ones.
    matrix = torch.stack([1.0 / spent, floors / spent], dim=1)
    overhead, slope = (
        torch.linalg.lstsq(matrix, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0].tolist()
    )
    if overhead < 0.0 or slope <= 0.0:  # no measurable overhead: the slope alone
        overhead, slope = 0.0, float((floors / spent).sum() / (floors / spent).square().sum())
    guessed = overhead + slope * floors
    return Line(overhead, 1.0 / slope, len(points), float((guessed / spent - 1.0).abs().max()))


def power_of(rows: Sequence[Measurement]) -> dict[str, Any] | None:
    """The exponent e of peak = c parameters^e over structured pruning's sizes, by least squares over logarithms; None
    where fewer than two peaks were measured."""
    points = [
        (row.more["parameters"], row.more[BEYOND]) for row in rows if row.name == STRUCTURED and BEYOND in row.more
    ]
    if len(points) < 2:
        return None
    return {"exponent": exponent(points), "rows": len(points)}


def model_of(
    rows: Sequence[Measurement],
    shapes: Sequence[ModelShape],
    ceilings: Ceilings,
    *,
    tokens: int,
    methods: Sequence[str],
) -> dict[str, Any]:
    """For every method its fitted line over layers, and predictions for whole models.

    A model's time is its floor (forward passes, Grams, solves) divided by the fraction that the measured blocks
    reached, or, where those were not measured, the layers. Memory is counted, and multiplied by the ratio of measured
    to counted memory of the blocks; the weights of the whole model in bfloat16 are given separately.
    """
    content: dict[str, Any] = {"layers": {}, "models": [], "structured_peak": power_of(rows)}
    for method in methods:
        line = fitted([row for row in rows if row.section == "layers" and row.name == method])
        if line is not None:
            content["layers"][method] = vars(line)
        block = next((r for r in rows if r.section == "models" and r.name.startswith(f"{method} ") and r.reached), None)
        reached = block.reached if block is not None else None if line is None else line.reached
        if not reached:
            continue
        taken = None if block is None else block.more.get(BEYOND)
        share = 1.0
        if block is not None and taken is not None:
            share = taken / working_bytes(SHAPES[block.case.partition(",")[0]], tokens)
        for shape in shapes:
            work = block_work(shape, method, tokens)
            content["models"].append(
                {
                    "method": method,
                    "shape": shape.name,
                    "parameters": shape.parameters,
                    "seconds": shape.blocks * ceilings.floor(work) / reached,
                    "floor_seconds": shape.blocks * ceilings.floor(work),
                    "from": "blocks" if block is not None else "layers",
                    "bound": ceilings.bound(work),
                    "largest_part": largest_part(shape, method, tokens, ceilings),
                    "working_bytes": share * working_bytes(shape, tokens),
                    "working_from": "counted" if taken is None else "blocks",
                    "weights_bytes": 2 * shape.parameters,
                }
            )
    return content


def largest_part(shape: ModelShape, method: str, tokens: int, ceilings: Ceilings) -> str:
    """The precision whose operations take most of a block's floor."""
    work = block_work(shape, method, tokens)
    return max(work.operations, key=lambda name: work.operations[name] / ceilings.operations[name])
