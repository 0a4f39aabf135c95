"""The options, rows and loop of benchmarks that compare variants of a pruning step on the same text."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from admm_prune.runs.prune import prune
from admm_prune.runs.results import Report
from benchmarks.journal import Journal, Record

KEY = ("model", "method", "target", "variant", "settings")
COLUMNS = ("perplexity", "seconds", "before", "after")
Losses = tuple[float | None, float | None]  # before and after the step
Measure = Callable[[Callable[..., Report], str], tuple[Report, Losses]]


def parser_of(description: str | None, variants: Sequence[str]) -> argparse.ArgumentParser:
    """The common options. Variants that are not in `variants` are left to the benchmark to validate."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--eval-data")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--targets", type=_names, default=["0.7"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--variants", type=_names, default=list(variants))
    return parser


def rows(a: argparse.Namespace, measure: Measure, steps: dict[str, Any] | None = None) -> list[Record]:
    """All rows of OUT/runs.csv, after those that were missing are measured.

    Args:
        a: the parsed options.
        measure: from a run that takes further keywords of `prune`, and the name of a variant: its report, and its
            losses. `seconds` is the CPU time of the call.
        steps: keywords of `prune` for every row, which are named in its settings.
    """
    a.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(a.out / "runs.csv", COLUMNS, KEY)
    words = " ".join(f"--{name} {value}" for name, value in (steps or {}).items() if value)
    text = f"{a.samples} sequences of {a.length} tokens, {a.eval_samples} to evaluate"
    for target in a.targets:
        for variant in a.variants:
            key = {"model": Path(a.model).name, "method": a.method, "target": target, "variant": variant}
            key["settings"] = ", ".join(filter(None, [words, text]))
            if journal.find(key):
                continue

            def run(target: str = target, **how: Any) -> Report:
                return prune(
                    a.model, data=a.data, eval_data=a.eval_data, method=a.method, sparsity=float(target),
                    samples=a.samples, length=a.length, eval_samples=a.eval_samples, dtype="float32",
                    **{**(steps or {}), **how},
                )  # fmt: skip

            began = time.process_time()
            report, (before, after) = measure(run, variant)
            row = {"perplexity": report.pruned.perplexity, "seconds": time.process_time() - began}
            journal.add(key, [{**row, "before": before, "after": after}])
    return journal.records


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
