"""Half-precision weights stay what they are: no copy of the whole model in a wider dtype is ever made."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import LoadedModel, save
from admm_prune.models.structure import decoder_blocks
from tests.models.test_family_table import logits, prune
from tests.models.tiny_models import build

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "admm"), ("llama", "sparsellm"), ("llama", "struprune"), ("llama", "elsa"), ("gpt2", "sparsegpt"),
        ("gemma3", "wanda"), ("phi3", "sparsellm"), ("neox", "struprune"), ("mixtral", "admm"), ("mixtral", "gradual"),
    ],
)  # fmt: skip
def test_weights_keep_their_dtype(
    family: str,
    method: str,
    dtype: torch.dtype,
    stories: Sequences,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    build(family, layers=2).save_pretrained(tmp_path / "dense")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).requires_grad_(False)
    outcome = prune(model, method, stories)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert sum(report.sparsity for report in outcome.layers) / len(outcome.layers) >= 0.25
    save(LoadedModel(model, tokenizer, family), tmp_path / "pruned", {})
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=method == "struprune")
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_statistics_are_wide(dtype: torch.dtype, stories: Sequences) -> None:
    """Grams of half-precision inputs are added up in float64: exact to the last bit of float32."""
    model = build("llama", layers=2).to(dtype)
    blocks = decoder_blocks(model)
    seen: list[Tensor] = []
    shared = BlockStream(model, blocks, stories, "cpu").collect(0)[0]
    assert shared.statistics.gram.dtype == torch.float32
    handle = shared.weights[0].module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in stories.rows:
            model(input_ids=row.ids[None])
    handle.remove()
    x = torch.cat([x.reshape(-1, 16) for x in seen]).double()
    assert {x.dtype for x in seen} == {dtype}
    torch.testing.assert_close(shared.statistics.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at once; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                size = x.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(x, self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("method", ["wanda", "struprune", pytest.param("sparsellm", marks=pytest.mark.slow)])
def test_no_second_copy_of_the_model_is_made(method: str, stories: Sequences) -> None:
    """What pruning holds at its peak does not grow with the number of blocks, of which each adds its own bytes."""
    most, own = [], []
    for layers in (2, 6):
        model = build("llama", layers=layers).to(torch.bfloat16)
        gc.freeze()  # what is there already need not be looked through again
        with Peak() as peak:
            prune(model, method, stories, on_progress=lambda *_: gc.collect())
        gc.unfreeze()
        most.append(peak.most)
        own.append(sum(p.numel() * 2 for p in model.parameters()))
    assert most[1] - most[0] < 0.25 * (own[1] - own[0]), (most, own)
