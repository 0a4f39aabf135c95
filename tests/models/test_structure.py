from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from admm_prune.errors import UserError
from admm_prune.models.structure import WeightView, decoder_blocks, notes_on
from admm_prune.prunable import linear_weights
from tests.models.tiny_models import build, is_mixture

LLAMA = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
OPT = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
FUSED = ["query_key_value", "dense"]
MLP = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "opt": ("model.decoder.layers", OPT),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "qwen2": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
    "gemma3": ("model.layers", LLAMA),
    "stablelm": ("model.layers", LLAMA),
    "olmo2": ("model.layers", LLAMA),
    "phi3": ("model.layers", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "neox": ("gpt_neox.layers", [f"attention.{name}" for name in FUSED] + MLP),
    "bloom": ("transformer.h", [f"self_attention.{name}" for name in FUSED] + MLP),
    "falcon": ("transformer.h", [f"self_attention.{name}" for name in FUSED] + MLP),
    "mixtral": ("model.layers", LLAMA[:4]),
    "qwen3-moe": ("model.layers", LLAMA[:4]),
}
EXPERTS = [f"mlp.experts.{own}.{expert}" for own in ("gate_up_proj", "down_proj") for expert in range(4)]


def test_blocks_and_weights_of_every_family(model: PreTrainedModel, family: str) -> None:
    path, names = EXPECTED.get(family) or EXPECTED[family.partition("-")[0]]
    experts = EXPERTS if is_mixture(family) else []
    blocks = decoder_blocks(model)
    assert [block.name for block in blocks] == [f"{path}.{i}" for i in range(3)]
    for block in blocks:
        expected = [*(f"{name}.weight" for name in names), *experts]
        assert sorted(view.name for view in block.weights) == sorted(f"{block.name}.{name}" for name in expected)
        for view in block.weights:
            assert model.get_parameter(view.parameter_name) is view.parameter
    entries = sum(view.read().numel() for block in blocks for view in block.weights)
    assert entries == sum(parameter.numel() for parameter in {view.parameter for b in blocks for view in b.weights})


def test_a_view_is_the_matrix_of_y_equals_w_x_plus_b(model: PreTrainedModel) -> None:
    for view in (view for view in decoder_blocks(model)[0].weights if view.expert is None):
        weight, x = view.read(), torch.randn(5, view.shape[1])
        assert weight.shape == view.shape
        expected = x @ weight.T if view.bias is None else x @ weight.T + view.bias
        torch.testing.assert_close(view.module(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_what_is_written_is_read_in_the_dtype_of_the_parameter(module: nn.Module, dtype: torch.dtype) -> None:
    view = WeightView("w", module.to(dtype), transposed=isinstance(module, Conv1D))
    weight = torch.randn(4, 6, dtype=torch.float64)
    weight[weight.abs() < 0.5] = 0.0
    parameter = view.parameter
    view.write(weight)
    assert view.parameter is parameter
    assert view.parameter.dtype == dtype
    assert torch.equal(view.read(), weight.to(dtype))
    assert torch.equal(view.read() == 0, weight == 0)


def test_write_refuses_other_shapes_and_numbers_that_overflow() -> None:
    view = WeightView("w", nn.Linear(6, 4).half())
    before = view.read().clone()
    with pytest.raises(ValueError, match=r"w has shape \(4, 6\), not \(6,\)"):
        view.write(torch.zeros(6))
    with pytest.raises(ValueError, match="not finite"):
        view.write(torch.full((4, 6), 1e6))
    assert torch.equal(view.read(), before)
    assert not view.fits(torch.full((4, 6), 1e6))
    assert not view.fits(torch.zeros(4, 6), torch.full((4,), 1e6))
    assert view.fits(torch.zeros(4, 6), torch.zeros(4))


def test_write_bias_refuses_other_shapes_and_numbers_that_overflow() -> None:
    view = WeightView("w", nn.Linear(6, 4).half(), part=(1, 2, 2))
    first = view.module.bias[:2].clone()
    view.write_bias(torch.ones(2, dtype=torch.float64))
    assert torch.equal(view.module.bias, torch.cat([first, torch.ones(2).half()]))
    with pytest.raises(ValueError, match="w: the new bias has entries that are not finite"):
        view.write_bias(torch.full((2,), 1e6))
    for other in (view, WeightView("w", nn.Linear(6, 4, bias=False))):
        with pytest.raises(ValueError, match=r"w has no bias of shape \(4,\)"):
            other.write_bias(torch.zeros(4))
    assert torch.equal(view.module.bias, torch.cat([first, torch.ones(2).half()]))


def test_weights_tied_to_the_outside_are_left_alone() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
    model.head = nn.Linear(8, 8)
    model.head.weight = model.layers[0]["b"].weight
    first, second = decoder_blocks(model)
    assert [view.name for view in first.weights] == ["layers.0.a.weight"]
    assert [view.name for view in second.weights] == ["layers.1.a.weight", "layers.1.b.weight"]


def test_weights_that_blocks_share_are_those_of_the_first_and_noted() -> None:
    model = build("llama", layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert [len(block.weights) for block in decoder_blocks(model)] == [7, 7, 4]
    (note,) = notes_on(model)
    assert note.startswith("3 matrices, such as model.layers.2.mlp.gate_proj.weight, are those of an earlier block")


def test_the_list_with_the_most_parameters_holds_the_blocks() -> None:
    model = nn.Module()
    model.tower = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    model.decoder = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(2)])
    assert [block.name for block in decoder_blocks(model)] == ["decoder.0", "decoder.1"]


def test_models_that_cannot_be_read_are_named() -> None:
    with pytest.raises(UserError, match="Linear: no list of decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))
    norms = nn.Module()
    norms.layers = nn.ModuleList([nn.LayerNorm(4)])
    with pytest.raises(UserError, match=r"Module: cannot read block layers.0: it has no Linear"):
        decoder_blocks(norms)


def test_an_expert_is_a_slice_that_is_read_and_put_back() -> None:
    model = build("mixtral")
    view = next(view for view in decoder_blocks(model)[1].weights if view.name.endswith("down_proj.2"))
    stored = view.parameter
    before = stored.clone()
    assert view.shape == (16, 24)
    assert torch.equal(view.read(), stored[2])
    view.write(torch.zeros(16, 24))
    assert torch.equal(stored != before, torch.arange(4)[:, None, None].expand_as(before) == 2)
    with pytest.raises(ValueError, match=r"experts.down_proj.2 has shape \(16, 24\)"):
        view.write(torch.zeros(24, 16))


def test_a_half_of_a_matrix_is_its_rows() -> None:
    linear = nn.Linear(3, 8)
    first, second = (WeightView("w", linear, part=(i, i + 1, 2)) for i in range(2))
    assert torch.equal(torch.cat([first.read(), second.read()]), linear.weight)
    assert second.bias is not None
    assert torch.equal(second.bias, linear.bias[4:])
    second.write(torch.zeros(4, 3))
    assert torch.equal(linear.weight.abs().sum(1) == 0, torch.arange(8) >= 4)


class Mixture(nn.Module):
    """Experts, a router with an output for each of them, and a gate of the shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.shared_gate = nn.Linear(8, 1)
        self.shared = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.num_experts = 4
        self.experts.up = nn.Parameter(torch.randn(4, 6, 8))


def test_routers_are_not_pruned() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Mixture()])
    (block,) = decoder_blocks(model)
    assert [view.name for view in block.weights] == [
        "layers.0.shared.weight",
        *(f"layers.0.experts.up.{e}" for e in range(4)),
    ]
    assert [weight.name for weight in linear_weights(model)] == ["layers.0.shared.weight", "layers.0.experts.up"]


def test_a_parameter_of_another_form_is_refused_rather_than_left_dense() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))])
    with pytest.raises(
        UserError, match=r"Module: cannot read block layers.1: layers.1.1.weight \(4, 4, 3\) is not the matrix"
    ):
        decoder_blocks(model)


def test_an_encoder_and_other_senses_are_refused() -> None:
    tiny = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(
        UserError, match=r"^T5ForConditionalGeneration is an encoder with a decoder: only decoder-only models"
    ):
        decoder_blocks(T5ForConditionalGeneration(T5Config(**tiny)))
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    seeing = LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision))
    )
    with pytest.raises(UserError, match=r"^LlavaForConditionalGeneration reads more than text: only text-only models"):
        decoder_blocks(seeing)
