"""The exact refit of a model's matrices for a given mask: time, residual, and the ratio to a one-shot solve.

    admm-prune capture --model DIR --weight NAME --out layer.safetensors
    python -m benchmarks.refit OUT layer.safetensors:60 ... [--rows 128] [--sparsity 0.5] [--ridge 0.03]

One layer file of each shape with the number of matrices like it. The first `--rows` rows are refitted for Wanda's
row-wise mask, and their time is scaled to all rows of all such matrices: an extrapolation, which the report states.
The one-shot solve is SparseGPT on the whole matrix. Times are of the processor, on one thread. The floor is the
operations of the factorizations alone, sum |S|^3 / 3, at the speed of a product of two float32 matrices of 1024.

OUT receives refit.txt and refit.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from admm_prune.data.layer_file import load_layer_file
from admm_prune.ops.exact_refit import TOLERANCE, exact_refit, kkt_residual
from admm_prune.problems.constraints import RowWise
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.support_descent import Wanda
from benchmarks.machine import headline, machine


@dataclass(frozen=True)
class Refitted:
    """One shape.

    Attributes:
        matrices: of this shape in the model.
        rows: that were refitted and timed.
        seconds, one_shot, floor: of all matrices of the shape; the first and the last scaled from the rows.
        residual: the largest of a row, in float64, and as stored in float32.
    """

    layer: str
    out: int
    width: int
    matrices: int
    rows: int
    seconds: float
    one_shot: float
    floor: float
    residual: float
    residual_stored: float
    above: int
    minimum_norm: int


def refitted(path: Path, matrices: int, rows: int, sparsity: float, ridge: float, speed: float) -> Refitted:
    layer = load_layer_file(path)
    problem = LayerReconstruction(layer.weight, layer.gram, RowWise(sparsity), ridge=ridge)
    began = time.process_time()
    SparseGPT().solve(problem)
    one_shot = time.process_time() - began
    mask = Wanda().solve(problem).solution["weight"][:rows] != 0
    hessian, minimizer = problem.hessian, problem.minimizer[:rows]
    began = time.process_time()
    solved = exact_refit(hessian, minimizer, mask)
    seconds = time.process_time() - began
    stored = kkt_residual(hessian, minimizer, solved.weight.float(), mask)
    out, width = layer.weight.shape
    factor = matrices * out / len(mask)
    return Refitted(
        layer.metadata.get("weight", path.stem),
        out,
        width,
        matrices,
        len(mask),
        seconds * factor,
        one_shot * matrices,
        float((mask.sum(1).double() ** 3 / 3).sum()) / speed * factor,
        float(solved.residual.max()),
        float(stored.max()),
        int((solved.residual > TOLERANCE).sum()),
        solved.minimum_norm,
    )


def product_speed() -> float:
    """Operations a second of a product of two float32 matrices of 1024, 2 n^3 of them."""
    a = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    a @ a
    began = time.process_time()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.process_time() - began)


def table(lines: list[Refitted]) -> str:
    title = f"{'layer':38}{'shape':>13}{'matrices':>9}{'refit s':>9}{'one-shot s':>11}{'floor s':>9}"
    title += f"{'residual':>10}{'stored':>9}"
    rows = [
        f"{line.layer:38}{f'{line.out} x {line.width}':>13}{line.matrices:>9}{line.seconds:>9.1f}{line.one_shot:>11.1f}"
        f"{line.floor:>9.1f}{line.residual:>10.1e}{line.residual_stored:>9.1e}"
        for line in lines
    ]
    whole, shot = sum(line.seconds for line in lines), sum(line.one_shot for line in lines)
    total = (
        f"all {sum(line.matrices for line in lines)} matrices: {whole:.0f} s, {whole / shot:.2f} times the one-shot "
        f"solve; {sum(line.above for line in lines)} of {sum(line.rows for line in lines)} rows refitted are above "
        f"{TOLERANCE:g}, {sum(line.minimum_norm for line in lines)} singular"
    )
    return "\n".join([title, *rows, total]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("layers", nargs="+", metavar="LAYER:MATRICES")
    parser.add_argument("--rows", type=int, default=128, help="of each layer, from the first")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--ridge", type=float, default=0.03)
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    speed = product_speed()
    lines = []
    for text in chosen.layers:
        path, _, matrices = text.rpartition(":")
        lines.append(refitted(Path(path), int(matrices), chosen.rows, chosen.sparsity, chosen.ridge, speed))
    facts: dict[str, Any] = machine(chosen.date)
    facts["command"] = (
        f"python -m benchmarks.refit OUT LAYER:MATRICES --rows {chosen.rows} --sparsity {chosen.sparsity:g}"
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "layers": [asdict(line) for line in lines]}
    (chosen.out / "refit.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scaled = f"{chosen.sparsity:.0%} of every row pruned; times scaled from {chosen.rows} rows of a matrix"
    head = f"{headline(facts)}\n{scaled}"
    report = f"{head}\n\n{table(lines)}"
    (chosen.out / "refit.txt").write_text(report, encoding="utf-8")
    print(report, end="")


if __name__ == "__main__":
    main()
