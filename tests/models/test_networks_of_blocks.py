"""Feed-forward networks found by structure, and the tokens that go in and out of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.feed_forward import FeedForwardViews, feed_forwards
from admm_prune.models.structure import decoder_blocks
from admm_prune.ops.activations import ACTIVATIONS
from tests.models.tiny_models import FAMILIES, build, inputs_of, is_mixture, one_by_one, prune_half

EXPECTED = {
    "llama": ("silu", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "mistral": ("silu", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "qwen3": ("silu", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "opt": ("relu", "fc1", None, "fc2"),
    "gpt2": ("gelu-tanh", "mlp.c_fc", None, "mlp.c_proj"),
    "qwen2": ("silu", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gemma2": ("gelu-tanh", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gemma3": ("gelu-tanh", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "phi3": ("silu", "mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "stablelm": ("silu", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "olmo2": ("silu", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "neox": ("gelu", "mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h"),
    "bloom": ("gelu-tanh", "mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h"),
    "falcon": ("gelu", "mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h"),
}


def found_in(model: PreTrainedModel) -> list[FeedForwardViews]:
    return feed_forwards(model, decoder_blocks(model))


@pytest.mark.parametrize("family", [family for family in FAMILIES if not is_mixture(family)])
def test_every_family_is_read(family: str) -> None:
    model = build(family)
    activation, up, gate, down = EXPECTED[family.split("-", maxsplit=1)[0]]
    for block, views in zip(decoder_blocks(model), found_in(model), strict=True):
        assert views.activation.name == activation
        assert views.up.name == f"{block.name}.{up}.weight"
        assert views.down.name == f"{block.name}.{down}.weight"
        assert (None if views.gate is None else views.gate.name) == (gate and f"{block.name}.{gate}.weight")


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_activation_is_told_from_the_others(name: str, dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    for block in decoder_blocks(model):
        block.module.mlp.act_fn = Called(ACTIVATIONS[name].value)
    assert [views.activation.name for views in found_in(model)] == [name] * 3 or (
        dtype is torch.bfloat16 and name.startswith("gelu")  # its two forms differ by less than bfloat16 shows
    )


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_another_activation_is_refused_with_the_name_of_the_block() -> None:
    model = build("opt")
    decoder_blocks(model)[1].module.activation_fn = Called(torch.tanh)
    with pytest.raises(
        UserError, match=r"feed-forward network of model\.decoder\.layers\.1: 0 of its weights read .*relu"
    ):
        found_in(model)


def test_a_fused_gate_is_two_halves_of_one_weight() -> None:
    model = build("phi3")
    for block, views in zip(decoder_blocks(model), found_in(model), strict=True):
        fused = block.module.mlp.gate_up_proj.weight
        assert views.gate is not None
        assert torch.equal(views.gate.read(), fused[:24])
        assert torch.equal(views.up.read(), fused[24:])
        assert [view.name for view in views.weights] == [
            f"{block.name}.mlp.{own}.weight" for own in ("gate_up_proj", "down_proj")
        ]


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.layers\.0 is a mixture of experts, .* layer-wise method"):
        found_in(build("mixtral"))


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "phi3", "neox", "falcon"])
def test_pairs_are_what_the_model_computes(family: str, stories: Sequences) -> None:
    model = build(family)
    blocks, networks = decoder_blocks(model), found_in(model)
    stream = BlockStream(model, blocks, stories, "cpu", validation_fraction=0.3)
    stream.advance(0)
    parts = dict(zip(("calibration", "validation"), stories.split(0.3), strict=True))
    pairs = stream.pairs(1, networks[1].weights)
    for part, sequences in parts.items():
        expected = inputs_of(model, networks[1].up.module, one_by_one(sequences))
        assert torch.allclose(pairs[part][0], expected, atol=1e-5)
        assert pairs[part][1].shape == expected.shape


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "phi3", "neox", "falcon"])
def test_the_wanted_output_makes_up_for_what_attention_lost(family: str, stories: Sequences) -> None:
    """With the target of the pruned block's network as its output, the block puts out what the dense block did."""
    model = build(family)
    blocks, networks = decoder_blocks(model), found_in(model)
    stream = BlockStream(model, blocks, stories, "cpu", validation_fraction=0.3)
    assert stream.adds(0, networks[0].down)
    dense: dict[str, Tensor] = {}
    stream.collect(0, outputs=dense)
    for view in blocks[0].weights:
        if view not in networks[0].views.values():
            view.write(prune_half(view.read()))
    pruned: dict[str, Tensor] = {}
    stream.collect(0, outputs=pruned)
    inputs, targets = stream.pairs(0, networks[0].weights, dense)["calibration"]
    own = stream.pairs(0, networks[0].weights)["calibration"]
    assert torch.equal(inputs, own[0])
    assert not torch.allclose(pruned["calibration"], dense["calibration"], atol=1e-2)
    assert torch.allclose(pruned["calibration"] - own[1] + targets, dense["calibration"], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_are_differences_in_float32(dtype: torch.dtype, stories: Sequences) -> None:
    """The dense output less such a target is the residual stream, to the bit."""
    model = build("llama").to(dtype)
    blocks, networks = decoder_blocks(model), found_in(model)
    stream = BlockStream(model, blocks, stories, "cpu", validation_fraction=0.3)
    dense: dict[str, Tensor] = {}
    stream.collect(0, outputs=dense)
    _, targets = stream.pairs(0, networks[0].weights, dense)["calibration"]
    residual = dense["calibration"].float() - targets
    assert torch.equal(residual, residual.to(dtype).float())


def test_a_norm_after_the_sum_is_noticed(stories: Sequences) -> None:
    model = build("opt-post-norm-untied")
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, stories, "cpu")
    assert not stream.adds(0, found_in(model)[0].down)


def test_some_weights_of_a_block_are_collected_as_all_are(stories: Sequences) -> None:
    model = build("llama")
    blocks = decoder_blocks(copy.deepcopy(model))
    everything = BlockStream(model, decoder_blocks(model), stories, "cpu").collect(0)
    names = {view.name for view in decoder_blocks(model)[0].weights[:4]}
    some = BlockStream(model, decoder_blocks(model), stories, "cpu").collect(0, names)
    assert [[view.name for view in shared.weights] for shared in some] == [
        [view.name for view in shared.weights] for shared in everything[:2]
    ]
    assert all(torch.equal(a.statistics.gram, b.statistics.gram) for a, b in zip(some, everything, strict=False))
    assert len(blocks) == 3
