"""Models of every family pruned and judged from disk, one block at a time: what comes of it in memory, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import admm_prune
from admm_prune.errors import UserError
from admm_prune.models.loading import load
from admm_prune.models.streaming import ModelOnDisk
from tests.models.tiny_models import CONTEXT, build

IDS = torch.tensor([[0, 5, 17, 42, 99, 3, 260]])


def tensor_names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


class SharedMatrix(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        first, second = self.model.layers[:2]
        second.mlp.up_proj.weight = first.mlp.up_proj.weight


class SharedModule(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        first, second = self.model.layers[:2]
        second.mlp = first.mlp


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        (SharedMatrix, "model.layers.1.mlp.up_proj.weight", "model.layers.0"),
        (SharedModule, "model.layers.1.mlp.gate_proj.weight", "model.layers.0"),
    ],
)
def test_blocks_that_share_a_parameter_are_not_streamed(
    kind: type[LlamaForCausalLM], name: str, other: str, tmp_path: Path
) -> None:
    """On disk each block is pruned and saved by itself: the copies would differ."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{name} is shared with {other}, and cannot be streamed: use --no-stream"):
        ModelOnDisk(tmp_path, kind, model.config)


@pytest.mark.bitwise
@pytest.mark.sampled(4)
def test_every_family_streams(family: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    """Several shards, blocks that return tuples, biases, untied heads, projections around the blocks."""
    build(family).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    how: dict[str, Any] = {"method": "wanda", "sparsity": 0.3, "data": str(text_file), "samples": 12, "eval_samples": 3}
    how["length"] = CONTEXT  # Bloom knows of no context
    streamed, whole = (
        admm_prune.prune(tmp_path / "dense", out=tmp_path / str(stream), stream=stream, device="cpu", **how)
        for stream in (True, False)
    )
    assert (streamed.dense, streamed.pruned) == (whole.dense, whole.pruned)
    names, others = (tensor_names(tmp_path / str(stream)) for stream in (True, False))
    assert names == others, "the files are those that save_pretrained makes, whatever the model calls its parameters"
    first, second = (load(str(tmp_path / str(stream))).model for stream in (True, False))
    with torch.no_grad():
        assert torch.equal(first(input_ids=IDS).logits, second(input_ids=IDS).logits)
    assert first.config.tie_word_embeddings == second.config.tie_word_embeddings
