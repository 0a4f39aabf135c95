"""Decoding with packed weights compared with the same model dense: a Llama with random weights, or a pruned model.

    python -m benchmarks.packed_model OUT.json [--sparsity 0.5,0.7,0.9] [--new-tokens 32] [--batches 1] [--repeats 7]
    python -m benchmarks.packed_model OUT.json --model PRUNED_FOLDER [--dtype float32] [--new-tokens 64]

The default shape has 1.15e9 parameters: 24 blocks of width 2048 and 5632, and tied embeddings of 32000 tokens. One
block is drawn at random, pruned, packed and copied to the others: for the time its values do not matter, only that
every block has its own memory. With `--model` the model is a pruned folder, which is packed while it is loaded, and the
greedy continuations of both models are compared. The models are timed in alternation, in CPU time of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from admm_prune.inference.packed_folder import load_packed
from admm_prune.inference.packed_linear import pack_model
from admm_prune.inference.timing import decode, timed
from admm_prune.models.structure import decoder_blocks
from admm_prune.ops import packed
from admm_prune.prunable import matrices
from benchmarks.machine import machine


def nbytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def repeated(model: Any, blocks: int) -> Any:
    """The model with `blocks` copies of its only block, each in its own memory."""
    model.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[0]) for _ in range(blocks))
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    model.config.num_hidden_layers = blocks
    return model


def models(given: argparse.Namespace, sparsity: float) -> dict[str, Any]:
    config = LlamaConfig(
        hidden_size=given.width,
        intermediate_size=given.intermediate,
        num_hidden_layers=1,
        num_attention_heads=given.width // 64,
        num_key_value_heads=max(1, given.width // 256),
        vocab_size=given.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, given.dtype)).eval().requires_grad_(False)
    for weight in matrices(model.model.layers):
        weight.parameter[torch.rand(weight.parameter.shape) < sparsity] = 0
    dense = copy.deepcopy(model)
    return {"dense": repeated(dense, given.blocks), "packed": repeated(pack_model(model), given.blocks)}


def of_folder(folder: str, dtype: torch.dtype) -> dict[str, Any]:
    """The model in a pruned folder, loaded dense by transformers, and packed."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    return {"dense": dense, "packed": load_packed(folder, dtype=dtype)}


def greedy_texts(pair: dict[str, Any], new_tokens: int) -> dict[str, list[int]]:
    """The greedy continuations of a short prompt, with a fixed number of tokens."""
    ids = torch.arange(1, 17)[None]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return {name: model.generate(ids, **settings, do_sample=False)[0, 16:].tolist() for name, model in pair.items()}


def zeros(module: nn.Module) -> float:
    """The fraction of zeros in its matrices."""
    weights = [weight.parameter for weight in matrices(module)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", help="a pruned folder, in place of random weights")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for level in [None] if given.model else list(map(float, given.sparsity.split(","))):
        pair = models(given, level) if level is not None else of_folder(given.model, getattr(torch, given.dtype))
        stack = decoder_blocks(pair["dense"])[0].name.rpartition(".")[0]
        sparsity = zeros(pair["dense"].get_submodule(stack)) if level is None else level
        sizes = {name: (nbytes(model), nbytes(model.get_submodule(stack))) for name, model in pair.items()}
        for batch in map(int, given.batches.split(",")):
            seconds = timed(partial(decode, batch=batch), pair, given.new_tokens, given.repeats)
            ratios = [a / b for a, b in zip(seconds["dense"], seconds["packed"], strict=True)]
            row = {
                "sparsity": sparsity,
                "batch": batch,
                "parameters": sum(x.numel() for x in pair["dense"].parameters()),
                "tokens_per_second": {
                    name: batch * given.new_tokens / statistics.median(values) for name, values in seconds.items()
                },
                "seconds": seconds,
                "times_as_fast": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "bytes": {name: size[0] for name, size in sizes.items()},
                "of_the_bytes": sizes["packed"][0] / sizes["dense"][0],
                "of_the_bytes_of_blocks": sizes["packed"][1] / sizes["dense"][1],
            }
            if given.model:
                texts = greedy_texts(pair, given.new_tokens)
                row["same_greedy_text"] = texts["dense"] == texts["packed"]
                print(f"the same {given.new_tokens} greedy tokens: {row['same_greedy_text']}")
            rows.append(row)
            print(
                f"{sparsity:.0%} batch {batch}: {row['times_as_fast']:.2f} times as fast ({min(ratios):.2f} to "
                f"{max(ratios):.2f}), {row['of_the_bytes']:.3f} of the bytes, {row['of_the_bytes_of_blocks']:.3f} of "
                "those of the blocks",
                flush=True,
            )
    content = {"command": vars(given) | {"out": str(given.out)}, "kernels": packed.described(), "rows": rows}
    given.out.write_text(json.dumps(content | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
