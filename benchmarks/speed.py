"""The speed-up of a structurally pruned model in prefill and decoding, compared with the dense model in the same run.

    python -m benchmarks.speed OUT [--width 1024 --blocks 8] [--sparsity 0.3,0.5] [--tokens 256] [--decode 16]

A Llama with random weights (97 M parameters by default) is pruned to widths that are multiples of 64, and timed in
alternation with the dense model. The ideal ratio is that of their operations in matrices, attention and head. Times are
CPU times of one thread, the minimum over the repeats, so that other work on the machine hardly affects them.

OUT receives speed.json and speed.txt.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from admm_prune.bench.memory import LlamaShape, random_tokens
from admm_prune.inference.timing import decode, prefill, timed
from admm_prune.methods.base import Task
from admm_prune.methods.struprune.struprune import StruPrune
from admm_prune.methods.target import Target
from admm_prune.models.structure import decoder_blocks
from admm_prune.models.sublayers import savings, sublayers
from benchmarks.machine import headline, machine

RECIPE = StruPrune(multiple=64)


def operations(model: Any, tokens: int) -> float:
    """Operations per token, averaged over a context of this many tokens, in which half of it is visible on average."""
    parts = [sublayer for block in decoder_blocks(model) for sublayer in sublayers(block)]
    head = 2 * model.get_output_embeddings().weight.numel()
    return head + sum(float(savings(sublayer, "flops", tokens=tokens)[-1]) for sublayer in parts)


def pruned_models(shape: LlamaShape, sparsities: Sequence[str]) -> dict[str, Any]:
    """A random model, "dense", and copies of it pruned to each sparsity, by that."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(shape.config()).eval().requires_grad_(False)
    models: dict[str, Any] = {"dense": dense}
    for sparsity in sparsities:
        task = Task(target=Target(float(sparsity)), calibration=random_tokens(256))
        copied = copy.deepcopy(dense)
        models[sparsity] = RECIPE.prune(copied, task).model or copied
    return models


def measured(
    name: str, run: Callable[..., Any], models: dict[str, Any], tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row for each pruned model: its time for a task, compared with that of the dense model."""
    times = {model: min(seconds) for model, seconds in timed(run, models, tokens, repeats).items()}
    for sparsity in (model for model in models if model != "dense"):
        ideal = operations(models["dense"], tokens) / operations(models[sparsity], tokens)
        faster = times["dense"] / times[sparsity]
        yield {
            "task": name,
            "tokens": tokens,
            "pruned": float(sparsity),
            "parameters": sum(p.numel() for p in models[sparsity].parameters()),
            "dense_seconds": times["dense"],
            "pruned_seconds": times[sparsity],
            "speedup": faster,
            "ideal": ideal,
            "of_ideal": faster / ideal,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--sparsity", default="0.3,0.5")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = LlamaShape(given.width, given.blocks)
    models = pruned_models(shape, given.sparsity.split(","))
    rows = [
        *measured("prefill", prefill, models, given.tokens, given.repeats),
        *measured("decoding", decode, models, given.decode, given.repeats),
    ]
    content = {
        "machine": machine(),
        "command": f"python -m benchmarks.speed {' '.join(sys.argv[1:])}",
        "parameters": shape.parameters,
        "rows": rows,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speed.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = [
        headline(content["machine"]),
        content["command"],
        f"A random Llama of {shape.parameters / 1e6:.0f} M parameters, float32; CPU seconds of one thread",
        f"{'':10}{'tokens':>8}{'pruned':>8}{'dense s':>10}{'pruned s':>10}{'faster':>9}{'ideal':>8}{'of ideal':>10}",
    ]
    lines += [
        f"{r['task']:10}{r['tokens']:>8}{r['pruned']:>8.0%}{r['dense_seconds']:>10.3f}{r['pruned_seconds']:>10.3f}"
        f"{r['speedup']:>9.2f}{r['ideal']:>8.2f}{r['of_ideal']:>10.2f}"
        for r in rows
    ]
    (given.out / "speed.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
