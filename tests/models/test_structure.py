from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from admm_prune.errors import UserError
from admm_prune.models.structure import WeightView, decoder_blocks

LLAMA = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
OPT = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "opt": ("model.decoder.layers", OPT),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}


def test_blocks_and_weights_of_every_family(model: PreTrainedModel, family: str) -> None:
    path, names = EXPECTED[family.partition("-")[0]]
    blocks = decoder_blocks(model)
    assert [block.name for block in blocks] == [f"{path}.{i}" for i in range(3)]
    for block in blocks:
        assert [view.name for view in block.weights] == [f"{block.name}.{name}.weight" for name in names]
        for view in block.weights:
            assert model.get_parameter(view.name) is view.parameter


def test_a_view_is_the_matrix_of_y_equals_w_x_plus_b(model: PreTrainedModel) -> None:
    for view in decoder_blocks(model)[0].weights:
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
    with pytest.raises(ValueError, match=r"w is of shape \(4, 6\), not \(6,\)"):
        view.write(torch.zeros(6))
    with pytest.raises(ValueError, match="not finite"):
        view.write(torch.full((4, 6), 1e6))
    assert torch.equal(view.read(), before)


def test_weights_tied_to_the_outside_are_left_alone() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
    model.head = nn.Linear(8, 8)
    model.head.weight = model.layers[0]["b"].weight
    first, second = decoder_blocks(model)
    assert [view.name for view in first.weights] == ["layers.0.a.weight"]
    assert [view.name for view in second.weights] == ["layers.1.a.weight", "layers.1.b.weight"]


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


def test_fused_experts_are_refused_rather_than_left_dense() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"MixtralForCausalLM: cannot read block model.layers.0: .*experts"):
        decoder_blocks(MixtralForCausalLM(config))
