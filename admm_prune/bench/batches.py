"""Many small layers: one after the other or in one batch, step by step or replayed as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from admm_prune.bench.baselines import synchronize
from admm_prune.bench.layers import Layer, drawn, solver_work
from admm_prune.bench.rows import Case, Figures, SharedData
from admm_prune.ops import backend
from admm_prune.problems.constraints import Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Result
from admm_prune.solvers.admm import ADMM

SECTION = "batches"
_SPARSITY = 0.7
WAYS = {
    "admm, one after the other": (False, False),
    "admm, one after the other, graphs": (False, True),
    "admm, one batch": (True, False),
    "admm, one batch, graphs": (True, True),
}  # (in a batch, graphs)


def cases(shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> Iterator[Case]:
    """All four ways, for (out, in, count) of each shape; every layer has its own Gram."""
    for rows, width, count in shapes:

        def draw(height: int, columns: int, where: torch.device, number: int = count) -> list[Layer]:
            return [drawn(height, columns, where, seed) for seed in range(number)]

        layers = SharedData(draw, rows, width, device)
        for name in WAYS:
            yield _case(name, layers, count, device)
        layers.release()


def _case(name: str, layers: SharedData[list[Layer]], count: int, device: torch.device) -> Case:
    together, graphs = WAYS[name]
    solver = replace(ADMM(), graphs=graphs)
    rows, width = layers.rows, layers.width

    def solved() -> list[Result]:
        problems = [LayerReconstruction(x.weight, x.gram, Unstructured(_SPARSITY)) for x in layers()]
        return solver.solve_all(problems) if together else [solver.solve(problem) for problem in problems]

    def run() -> Figures:
        solved()  # may load libraries and compile kernels
        synchronize(device)
        began = time.perf_counter()
        results = solved()
        synchronize(device)
        spent = time.perf_counter() - began
        first = layers()[0]
        problem = LayerReconstruction(first.weight, first.gram, Unstructured(_SPARSITY))
        return Figures(
            seconds=spent,
            work=solver_work("admm", solver, rows, width, results[0].iterations) * count,
            error=problem.relative_error(results[0].solution),
            more={"ms each": 1e3 * spent / count, "kernels": backend.described(device)},
            note="; ".join(dict.fromkeys(note for result in results for note in result.notes)),
        )

    size = 4.0 * count
    return Case(
        section=SECTION,
        name=name,
        case=f"{count} of {rows}x{width} {_SPARSITY:.0%}",
        run=run,
        needs=size * (10 * rows * width + 8 * width**2),
        limit=25.0,
    )
