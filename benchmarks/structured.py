"""Perplexity of structured methods: selection of groups, compensation, and allocation of the budget.

    python -m benchmarks.structured OUT --model DIR [--data FILE --eval-data FILE] [--sparsity 0.2,0.3,0.5]

Every row is one configuration of `StruPrune`, on the same calibration and evaluation text. "saved" is the fraction of
the parameters of the blocks that was removed; because groups are removed as a whole, it may exceed the target by less
than one group.

OUT receives structured.json and structured.txt; a second model is added to what is there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from admm_prune.methods.base import Task
from admm_prune.methods.struprune.struprune import STRUCTURED, StruPrune
from admm_prune.methods.target import Target, parse_targets
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
from admm_prune.problems.allocation import Binomial, CappedSoftmax, Curve, EqualSlope, Owl, Uniform
from admm_prune.problems.allocation_knapsack import Knapsack
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from benchmarks.machine import headline, machine

NAMED = {recipe.name: recipe for recipe in STRUCTURED}
OURS = NAMED["struprune"]
BASELINE = "structured-global"
GREEDY = replace(OURS, selector="obs")
ROWS: Mapping[str, StruPrune] = {
    "struprune": OURS,
    "selection by greedy OBS": GREEDY,
    "selection by ADMM": replace(OURS, selector="admm"),
    "selection by Wanda's score": replace(OURS, selector="mask"),
    "no compensation": replace(OURS, selector="mask-interactions", compensate=False, fold_bias=False),
    "uniform": replace(OURS, allocator=Uniform()),
    "greedy OBS; uniform": replace(GREEDY, allocator=Uniform()),
    "greedy OBS; equal slope T = 0": replace(GREEDY, allocator=EqualSlope()),
    "greedy OBS; binomial T = 2": replace(GREEDY, allocator=Binomial(2.0)),
    "greedy OBS; capped softmax T = 2": replace(GREEDY, allocator=CappedSoftmax(2.0, most=0.9)),
    "greedy OBS; owl": replace(GREEDY, allocator=Owl()),
    "greedy OBS; knapsack": replace(GREEDY, allocator=Knapsack()),
    "greedy OBS; equal blocks": replace(GREEDY, uniform=True),
    BASELINE: NAMED["structured-global"],
    "greedy OBS; structured-global": replace(NAMED["structured-global"], selector="obs"),
    "greedy OBS; structured-global; losses not relative": replace(
        NAMED["structured-global"], selector="obs", relative=False
    ),
    "structured-wanda": NAMED["structured-wanda"],
}


def measure(model: str, settings: TextSettings, targets: list[Target], names: list[str]) -> dict[str, Any]:
    """Perplexity and the fraction saved, by row and target, of the rows that are named."""
    loaded = load(model)
    texts = Texts(settings, loaded)
    calibration = texts.calibration(OURS.samples)
    dense = evaluate(loaded.model, texts.evaluation)
    curves: dict[tuple[Any, ...], dict[str, Curve]] = {}
    rows = []
    for name, recipe in ((name, ROWS[name]) for name in names):
        for target in targets:
            task = Task(target=target, calibration=calibration)
            began = time.process_time()
            fresh = load(model).model
            key = (recipe.selector == "obs-one-shot", recipe.compensate, recipe.relative, recipe.uniform)
            if key not in curves:
                curves[key] = recipe.measure(fresh, task)
            outcome = recipe.prune(fresh, task, curves=curves[key])
            pruned = fresh if outcome.model is None else outcome.model
            figures = evaluate(pruned, texts.evaluation)
            rows.append(
                {
                    "row": name,
                    "target": target.label,
                    "target_fraction": target.fraction,
                    "perplexity": figures.perplexity,
                    "saved": outcome.details["saved"],
                    "temperature": outcome.details.get("temperature"),
                    "units": outcome.details["units"],
                    "cpu_seconds": round(time.process_time() - began, 2),
                }
            )
            print(f"{name:40} {target.label:>5} {figures.perplexity:10.3f} {outcome.details['saved']:.4f}", flush=True)
    return {
        "dense": dense.perplexity,
        "calibration_tokens": calibration.tokens,
        "evaluation_tokens": dense.tokens,
        "rows": rows,
    }


def table(content: dict[str, Any]) -> str:
    """One block a model: perplexity, and in parentheses the ratio to structured-global at the same target."""
    lines = [
        headline(content["machine"]),
        "Perplexity (relative to structured-global); [%] removed in addition to the target",
    ]
    for model, results in content["models"].items():
        cells = {(row["row"], row["target"]): row for row in results["rows"]}
        targets = list(dict.fromkeys(row["target"] for row in results["rows"]))
        lines += ["", results["command"]]
        lines.append(
            f"{model}: dense {results['dense']:.3f}; {results['calibration_tokens']} tokens to calibrate, "
            f"{results['evaluation_tokens']} to evaluate"
        )
        lines.append(f"{'':40}" + "".join(f"{target:>18}{'':8}" for target in targets))
        for name in dict.fromkeys(row["row"] for row in results["rows"]):
            parts = []
            for target in targets:
                cell, base = cells[name, target], cells[BASELINE, target]
                ratio = cell["perplexity"] / base["perplexity"]
                more = 100 * (cell["saved"] - base["target_fraction"])
                parts.append(
                    f"{cell['perplexity']:10.3f} ({ratio:6.3f})" + (f" [+{more:.2f}]" if more >= 0.05 else " " * 8)
                )
            lines.append(f"{name:40}" + "".join(parts))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--eval-data")
    parser.add_argument("--sparsity", default="0.2,0.3,0.5")
    parser.add_argument("--rows", help="comma-separated; measured again, the others stay")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = TextSettings(
        data=given.data,
        eval_data=given.eval_data,
        samples=given.samples,
        eval_samples=given.eval_samples,
        length=given.length,
    )
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "structured.json"
    content = json.loads(path.read_text()) if path.is_file() else {"models": {}}
    names = given.rows.split(",") if given.rows else list(ROWS)
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    results = measure(given.model, settings, parse_targets(given.sparsity, None), names)
    before = content["models"].get(Path(given.model).name, {"rows": []})
    rows = [row for row in before["rows"] if row["row"] not in names] + results["rows"]
    rows.sort(key=lambda row: (list(ROWS).index(row["row"]), row["target_fraction"]))
    command = f"python -m benchmarks.structured {shlex.join(shown)}"
    content["machine"] = machine()
    content["models"][Path(given.model).name] = {**results, "command": command, "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
    (given.out / "structured.txt").write_text(table(content))


if __name__ == "__main__":
    main()
