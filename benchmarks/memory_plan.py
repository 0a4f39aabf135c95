"""Estimated memory of pruning models of well-known shapes on a GPU: `admm-prune plan` for each model and method.

    python -m benchmarks.memory_plan OUT [--models 1B,8B,70B] [--methods wanda,sparsegpt,...] [--date DATE]

Writes OUT.json and OUT.txt. Nothing is run and nothing is downloaded: the shapes are those of Llama 3.2 1B, Llama 3.1
8B and Llama 3.1 70B, in bfloat16, with 128 sequences of 2048 tokens at 50 %. Blockwise methods are streamed; methods
that train use micro-batches of one sequence and gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from admm_prune.methods.registry import RECIPES
from admm_prune.plan.plan import Plan, make_plan
from benchmarks.machine import machine, write_results

_GB = 1e9
_ALL = 1 << 50  # bytes: all activations are in memory, however much is free on the machine that estimates
# Width, width of the feed-forward network, blocks, heads, heads of keys and values, whether the head is the embedding.
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14336, 32, 32, 8, False),
    "70B": (8192, 28672, 80, 64, 8, False),
}
METHODS = ("wanda", "sparsegpt", "admm", "sparsellm", "struprune", "elsa", "elsa-l")


def config_of(shape: str) -> LlamaConfig:
    width, inner, blocks, heads, shared, tied = SHAPES[shape]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def planned(shape: str, method: str) -> dict[str, Any]:
    """The estimates for one model and method, in GB."""
    how: dict[str, Any] = {"stream": True}
    if RECIPES[method].stages == "training":
        how = {"micro_batch": 1, "gradient_checkpointing": True}
    with tempfile.TemporaryDirectory() as folder:
        config_of(shape).save_pretrained(folder)
        how |= {"sparsity": 0.5, "samples": 128, "length": 2048, "activation_bytes": _ALL}
        plan = make_plan(folder, method=method, gpu="h100", **how)
    return {"model": shape, "method": method, "parameters": plan.parameters, "disk": _disk(plan)} | {
        place: plan.peak(place).bytes / _GB for place in ("device", "host")
    }


def _disk(plan: Plan) -> float:
    return sum(plan.disk.values()) / _GB


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | method | GPU, GB | host, GB | disk, GB |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['model']} | `{row['method']}` | {row['device']:.1f} | {row['host']:.1f} | {row['disk']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--date")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in arguments.models.split(","):
        for method in arguments.methods.split(","):
            rows.append(planned(shape, method))
            print(json.dumps(rows[-1]), flush=True)
            write_results(arguments.out, {"machine": machine(arguments.date), "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
