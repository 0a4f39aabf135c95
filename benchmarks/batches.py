"""The time of ADMM on a batch of problems of equal shape, relative to solving them one after the other, by size.

    python -m benchmarks.batches OUT [--count 16] [--repeats 5] [--shapes 16x32,64x64]

Every problem has its own Gram matrix, as for the experts of a mixture. The two ways are timed in alternation, in CPU
time of the process; a ratio is the median over the repeats. The run also checks that every result is bitwise equal to
that of a separate solve. `chosen` tells whether `solvers.together` would use a batch. Writes OUT.json and OUT.txt.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from admm_prune.problems.constraints import NofM, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.together import Shape
from benchmarks.instances import instance
from benchmarks.machine import headline, machine, write_results

SHAPES = "16x32,32x64,64x64,128x64,128x128,256x128,256x256,512x512"
SETS: dict[str, SparseSet] = {"70%": Unstructured(0.7), "2:4": NofM(2, 4)}


def problems(rows: int, width: int, constraint: SparseSet, count: int) -> list[LayerReconstruction]:
    layers = [instance(rows, width, seed=seed, tokens=4 * width) for seed in range(count)]
    return [LayerReconstruction(layer.weight, layer.gram, constraint) for layer in layers]


def measure(rows: int, width: int, target: str, count: int, repeats: int) -> dict[str, Any]:
    """Times both ways on the same problems, in alternation."""
    solver, drawn = ADMM(), problems(rows, width, SETS[target], count)
    laps: list[tuple[float, float]] = []
    same = True
    for turn in range(repeats + 1):
        began = time.process_time()
        alone = [solver.solve(problem) for problem in drawn]
        middle = time.process_time()
        batch = solver.solve_all(drawn)
        if turn:  # the first one warms up
            laps.append((middle - began, time.process_time() - middle))
        pairs = zip(alone, batch, strict=True)
        same &= all(torch.equal(a.solution["weight"], b.solution["weight"]) for a, b in pairs)
    return {
        "shape": f"{rows}x{width}",
        "target": target,
        "problems": count,
        "ratio": median(one / other for one, other in laps),
        "ms_alone": 1e3 * median(one for one, _ in laps) / count,
        "same_bits": same,
        "chosen": Shape.of(drawn[0]).most > 1,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="without suffix")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", default=SHAPES)
    chosen = parser.parse_args(arguments)
    shapes = [tuple(map(int, shape.split("x"))) for shape in chosen.shapes.split(",")]
    rows = [measure(height, width, target, chosen.count, chosen.repeats) for height, width in shapes for target in SETS]
    content = {
        "command": "python -m benchmarks.batches " + " ".join(arguments or sys.argv[1:]),
        "machine": machine(),
        "rows": rows,
    }
    write_results(chosen.out, content, table(content))


def table(content: dict[str, Any]) -> str:
    lines = [
        headline(content["machine"]),
        content["command"],
        "Times as fast in a batch as one after the other, in CPU time; bits: every result has those that it has alone.",
        "",
        f"{'out x in':12}{'':6}{'problems':>9}{'alone, ms each':>16}{'ratio':>8}{'bits':>8}  in a batch by itself",
    ]
    lines += [
        f"{row['shape']:12}{row['target']:6}"
        f"{row['problems']:>9}{row['ms_alone']:>16.1f}{row['ratio']:>8.2f}{'same' if row['same_bits'] else 'other':>8}"
        f"  {'yes' if row['chosen'] else 'no'}"
        for row in content["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
