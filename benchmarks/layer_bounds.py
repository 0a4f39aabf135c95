"""The proved gap of whole layers: the objective that ADMM reaches and the dual bound, at 50, 70, 90 % and 2:4.

    admm-prune capture --weight NAME --out layer.safetensors
    python -m benchmarks.layer_bounds OUT layer.safetensors ... [--rows 64] [--ridge 0.03] [--method admm]

Rows are independent under row-wise and N:M targets, so that the first `--rows` rows of a layer are representative, at a
fraction of the time. Bound and objective refer to the Hessian A with the ridge. If a bound is below half of the
objective, the fraction of the trace of A in a diagonal D with A - D semidefinite explains it: the bound treats the rest
of the Hessian as if no weight were removed.

OUT receives layer_bounds.txt and layer_bounds.json. Times are CPU times.
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
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.point import Point
from admm_prune.problems.constraints import NofM, RowWise, SparseSet
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.reference import dual_bound, lower_bound
from benchmarks.machine import headline, machine

TARGETS: dict[str, SparseSet] = {"50 %": RowWise(0.5), "70 %": RowWise(0.7), "90 %": RowWise(0.9), "2:4": NofM(2, 4)}


@dataclass(frozen=True)
class Bounded:
    """One layer at one target; losses are relative to that of removing everything.

    Attributes:
        ratio: bound / value.
        plain: the same of `lower_bound`.
        trace: the part of the trace of A, with a unit diagonal, that D takes.
        seconds: of the bound.
    """

    layer: str
    rows: int
    width: int
    target: str
    value: float
    ratio: float
    plain: float
    trace: float
    seconds: float


def bounded(path: Path, rows: int, ridge: float, method: str) -> list[Bounded]:
    layer = load_layer_file(path)
    weight = layer.weight[:rows]
    lines = []
    for name, constraint in TARGETS.items():
        problem = LayerReconstruction(weight, layer.gram, constraint, ridge=ridge)
        value = LOCAL_METHODS[method].make().solve(problem).objective
        began = time.process_time()
        certificate = dual_bound(problem, value)
        seconds = time.process_time() - began
        plain = lower_bound(problem, value)
        if certificate is None or plain is None:
            raise SystemExit(f"{path}: no bound is proved: raise the ridge")
        whole = problem.value(Point(weight=torch.zeros_like(problem.weight)))
        diagonal = torch.from_numpy(certificate.diagonal) / problem.hessian.diagonal().double()
        lines.append(
            Bounded(
                layer.metadata.get("weight", path.stem),
                *weight.shape,
                name,
                value / whole,
                certificate.bound.ratio or 0.0,
                plain.ratio or 0.0,
                float(diagonal.mean()),
                seconds,
            )
        )
    return lines


def table(lines: list[Bounded]) -> str:
    title = f"{'layer':38}{'shape':>12}{'target':>8}{'value':>10}{'bound':>8}{'plain':>8}{'trace':>8}{'s':>7}"
    rows = [
        f"{line.layer:38}{f'{line.rows} x {line.width}':>12}{line.target:>8}{line.value:>10.3g}{line.ratio:>8.1%}"
        f"{line.plain:>8.1%}{line.trace:>8.1%}{line.seconds:>7.1f}"
        for line in lines
    ]
    return "\n".join([title, *rows]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("layers", type=Path, nargs="+", help="of 'admm-prune capture'")
    parser.add_argument("--rows", type=int, default=64, help="of each layer, from the first")
    parser.add_argument("--ridge", type=float, default=0.03)
    parser.add_argument("--method", default="admm", choices=sorted(LOCAL_METHODS), help="that reaches the value")
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines: list[Bounded] = []
    for path in chosen.layers:
        lines += bounded(path, chosen.rows, chosen.ridge, chosen.method)
        print(table(lines[-len(TARGETS) :]), end="", flush=True)
    facts: dict[str, Any] = machine(chosen.date)
    facts["command"] = (
        f"python -m benchmarks.layer_bounds OUT LAYERS --rows {chosen.rows} --ridge {chosen.ridge:g} "
        f"--method {chosen.method}"
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "layers": [asdict(line) for line in lines]}
    (chosen.out / "layer_bounds.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"{headline(facts)}\nvalue relative to removing everything; bounds relative to the value\n\n{table(lines)}"
    (chosen.out / "layer_bounds.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
