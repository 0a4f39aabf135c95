"""What the joint steps of a block give: coordinated attention and the blockwise refit, each on and off.

    python -m benchmarks.joint OUT --model embedded --data embedded [--methods admm,sparsellm] [--sparsities 0.5,0.6]

Every row is a run of `admm_prune.prune` on the same tokens: perplexity, sparsity counted in the pruned model, CPU
seconds, and the figures of both steps, averaged over the blocks: errors on validation tokens, which no fit reads.
`alone` is the relative error of the attention's output with value and output projections pruned alone on the tokens of
the fit, `together` that of their common solution; `before` and `after` are the errors of the block's output that the
refit lowers. Rows are appended to OUT/rows.jsonl as they are measured; the same command continues where it stopped,
and writes OUT/joint.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from admm_prune.runs.prune import prune
from benchmarks.machine import headline, machine

STEPS: tuple[dict[str, str], ...] = (
    {},
    {"coordinate": "attention"},
    {"refit": "block"},
    {"coordinate": "attention", "refit": "block"},
)
FIGURES = (("attention", "alone"), ("attention", "together"), ("refit", "before"), ("refit", "after"))


def label(steps: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in steps.items()) or "-"


def measured(arguments: argparse.Namespace, method: str, sparsity: float, steps: dict[str, str]) -> dict[str, Any]:
    began = time.process_time()
    report = prune(
        arguments.model,
        data=arguments.data,
        eval_data=arguments.eval_data,
        method=method,
        sparsity=sparsity,
        samples=arguments.samples,
        length=arguments.length,
        eval_samples=arguments.eval_samples,
        dtype="float32",
        seed=arguments.seed,
        **steps,  # type: ignore[arg-type]
    )
    blocks = report.details.get("joint") or report.details.get("feed_forward") or []
    figures = {}
    for step, name in FIGURES:
        values = [block[step][name] for block in blocks if step in block]
        if values:
            figures[f"{step} {name}"] = sum(values) / len(values)
    return {
        "dense": report.dense.perplexity,
        "perplexity": report.pruned.perplexity,
        "counted sparsity": report.sparsity,
        "seconds": time.process_time() - began,
        **figures,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'method':10} {'sparsity':8} {'steps':40} {'perplexity':>10} {'relative':>8} {'CPU s':>6}  errors"]
    base = {(row["method"], row["sparsity"]): row["perplexity"] for row in rows if row["steps"] == "-"}
    for row in sorted(rows, key=lambda row: (row["method"], row["sparsity"], len(row["steps"]))):
        relative = row["perplexity"] / base.get((row["method"], row["sparsity"]), float("nan"))
        errors = ", ".join(f"{name} {row[name]:.5f}" for name in map(" ".join, FIGURES) if name in row)
        lines.append(
            f"{row['method']:10} {row['sparsity']:<8} {row['steps']:40} {row['perplexity']:10.3f} {relative:8.3f} "
            f"{row['seconds']:6.0f}  {errors}"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--eval-data")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["admm", "sparsellm"])
    parser.add_argument("--sparsities", type=lambda text: [*map(float, text.split(","))], default=[0.5, 0.6, 0.7])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    place = arguments.out / "rows.jsonl"
    protocol = {name: getattr(arguments, name) for name in ("samples", "length", "eval_samples", "seed")}
    protocol["model"] = Path(arguments.model).name
    for sparsity, method, steps in product(arguments.sparsities, arguments.methods, STEPS):
        key = {**protocol, "method": method, "sparsity": sparsity, "steps": label(steps)}
        if any(all(row[name] == value for name, value in key.items()) for row in read(place)):
            continue
        row = {**key, **measured(arguments, method, sparsity, steps)}
        with place.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        (arguments.out / "joint.txt").write_text(f"{headline(machine())}\n\n{table(read(place))}", encoding="utf-8")
    sys.stdout.write(table(read(place)))


def read(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()] if place.is_file() else []


if __name__ == "__main__":
    main()
