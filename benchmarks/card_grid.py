"""Methods and targets on one model in a single process, for a few minutes on a GPU; rows are written one by one.

    python -m benchmarks.card_grid OUT.jsonl --model DIR --data FILE --eval-data FILE --methods admm --sparsity 0.5,0.7
    python -m benchmarks.card_grid OUT.jsonl --methods elsa,admm-finetuned --sparsity 0.9 --steps 256

Pruned models are not kept. If a run fails, its row has the error, the next one is run, and the exit status is 1. The
first line has the versions, the device and the settings. `benchmarks.real_model` and `benchmarks.surrogate_free` do
the same with several samples of text, and can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import admm_prune
from admm_prune.bench.suite import environment


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each target and method, in this order: all methods of the first target first."""
    targets: list[dict[str, Any]] = [{"sparsity": float(text)} for text in arguments.sparsity.split(",") if text]
    targets += [{"pattern": text} for text in arguments.pattern.split(",") if text]
    for target in targets:
        for method in arguments.methods.split(","):
            yield {"method": method, **target, **_measured(arguments, method, target)}


def _measured(arguments: argparse.Namespace, method: str, target: dict[str, Any]) -> dict[str, Any]:
    trained = {} if arguments.steps is None else {"steps": arguments.steps}
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        report = admm_prune.prune(
            model=arguments.model,
            method=method,
            **target,
            **trained,
            data=arguments.data,
            eval_data=arguments.eval_data,
            samples=arguments.samples,
            eval_samples=arguments.eval_samples,
            length=arguments.length,
            device=arguments.device,
            dtype=arguments.dtype,
            stream=False,
        )
    except Exception as error:  # the other rows are worth more than this one's traceback
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}", "seconds": time.perf_counter() - began}
    content = report.as_json()
    return {
        "dense": content["dense"]["perplexity"],
        "perplexity": content["pruned"]["perplexity"],
        "achieved": report.sparsity,
        "pruning_seconds": report.seconds,
        "seconds": time.perf_counter() - began,
        "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
        "notes": list(report.notes),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--methods", required=True)
    parser.add_argument("--sparsity", default="")
    parser.add_argument("--pattern", default="")
    parser.add_argument("--steps", type=int, help="of methods that train")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--length", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default that of the model")
    arguments = parser.parse_args(words)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    for place in ("out", "model", "data", "eval_data"):  # names, so that a committed file has no paths of a machine
        settings[place] = settings[place] and Path(settings[place]).name
    failed = False
    with arguments.out.open("w", encoding="utf-8") as file:
        first = {"settings": settings, "environment": environment(torch.device(arguments.device))}
        for row in chain([first], rows(arguments)):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row, flush=True)
            failed |= "error" in row
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
