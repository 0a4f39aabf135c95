"""What rounding changes of a perplexity: the same weights with the instructions of this processor, and of an older one.

    python -m benchmarks.rounding OUT --model DIR --data FILE [--dtypes bfloat16,float32] [--sequences 16] [--length 64]

Every data type is evaluated in two processes, one of them with `ATEN_CPU_CAPABILITY=default` and
`ONEDNN_MAX_CPU_ISA=SSE41`. Columns: the perplexity in both, the relative difference between them, and what `verify`
accepts in each between a claimed perplexity and that of the next wider type. Without vector instructions a token of a
model of 135 M parameters takes up to a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
from admm_prune.runs.texts import validation_text
from admm_prune.settings import TextSettings
from admm_prune.verify.figures import Rounding, measured
from benchmarks.machine import headline, machine, write_results

OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def evaluated(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The perplexity in this process, and the tolerance that follows from it, relative to the perplexity."""
    loaded = load(given.model, dtype=dtype)
    text, _ = validation_text(
        TextSettings(data=given.data, length=given.length, eval_samples=given.sequences, packing="windows"), loaded
    )
    perplexity = evaluate(loaded.model, text).perplexity
    rounding = measured(loaded.model, text)
    if not isinstance(rounding, Rounding):
        raise SystemExit(rounding)
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "tokens": text.scored_tokens,
        "perplexity": perplexity,
        "bias": rounding.bias / text.scored_tokens,
        "deviation": rounding.deviation / text.scored_tokens,
        "allowed": math.expm1(rounding.allowed / text.scored_tokens),
    }


def in_child(words: Sequence[str], dtype: str, environment: dict[str, str]) -> dict[str, Any]:
    """`evaluated` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rounding", *words, "--child", dtype]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'dtype':<10}{'tokens':>8}{'perplexity':>12}{'older':>12}{'difference':>12}{'allowed':>10}{'older':>10}"]
    for row in rows:
        here, older = row["here"], row["older"]
        lines.append(
            f"{row['dtype']:<10}{here['tokens']:>8}{here['perplexity']:>12.6g}{older['perplexity']:>12.6g}"
            f"{row['difference']:>12.2g}{here['allowed']:>10.2g}{older['allowed']:>10.2g}"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    words = sys.argv[1:] if words is None else list(words)
    given = parser.parse_args(words)
    if given.child is not None:
        print(json.dumps(evaluated(given, given.child)))
        return
    rows = []
    for dtype in given.dtypes.split(","):
        here, older = in_child(words, dtype, {}), in_child(words, dtype, OLDER)
        difference = older["perplexity"] / here["perplexity"] - 1
        rows.append({"dtype": dtype, "difference": difference, "here": here, "older": older})
    about = machine()
    command = f"python -m benchmarks.rounding OUT --sequences {given.sequences} --length {given.length}"
    text = f"{headline(about)}\n{command}\n{Path(given.model).name}, {Path(given.data).name}\n\n{table(rows)}"
    write_results(given.out, {"machine": about, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
