"""Decoders that no list names are read by their structure, or refused with the first block that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.checks import check_causal
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load, open_on_disk
from admm_prune.models.structure import decoder_blocks, notes_on
from admm_prune.plan.anatomy import Anatomy
from tests.models import tiny_models
from tests.models.test_capture import near
from tests.models.test_family_table import prune
from tests.models.tiny_models import LLAMA, build, one_by_one

MIXTURE = LLAMA | {"num_experts_per_tok": 2}
UNLISTED: dict[str, tiny_models.Family] = {
    "gpt-oss": ("GptOss", MIXTURE | {"num_local_experts": 4, "head_dim": 8}),
    "qwen2-moe": (
        "Qwen2Moe",
        MIXTURE | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "olmoe": ("Olmoe", MIXTURE | {"num_experts": 4}),
    "mpt": ("Mpt", {"d_model": 16, "n_heads": 4}),
}
HYBRIDS: dict[str, tiny_models.Family] = {
    "mamba": ("Mamba", {"hidden_size": 16, "state_size": 4, "time_step_rank": 4}),
    "qwen3-next": (
        "Qwen3Next",
        MIXTURE
        | {
            "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "falcon-h1": (
        "FalconH1",
        LLAMA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    ),
    "jamba": (
        "Jamba",
        LLAMA
        | {
            "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
            "attn_layer_offset": 1, "use_mamba_kernels": False,
        },
    ),
}  # fmt: skip
ROUTED: dict[str, tiny_models.Family] = {  # whose router is a module of its own, with a linear layer
    "afmoe": ("Afmoe", MIXTURE | {"num_experts": 4, "moe_intermediate_size": 16, "num_dense_layers": 0, "head_dim": 8}),
    "gemma4-moe": (
        "Gemma4",
        LLAMA
        | {
            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "enable_moe_block": True, "head_dim": 8,
            "global_head_dim": 8, "sliding_window": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 300, "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 0,
        },
    ),
    "jetmoe": ("JetMoe", MIXTURE | {"num_local_experts": 4, "kv_channels": 8}),
}  # fmt: skip
RECURRENT: dict[str, tiny_models.Family] = {
    "recurrent-gemma": ("RecurrentGemma", LLAMA | {"lru_width": 16, "attention_window_size": 8}),
}


@pytest.fixture(autouse=True)
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "FAMILIES", tiny_models.FAMILIES | UNLISTED | HYBRIDS | ROUTED | RECURRENT)


@pytest.mark.parametrize("name", ["gpt-oss", "qwen2-moe", "olmoe", "mpt"])
def test_it_is_pruned(name: str, stories: Sequences) -> None:
    model = build(name, layers=2)
    prune(model, "wanda", stories)
    views = [view for block in decoder_blocks(model) for view in block.weights]
    assert len(views) == {"gpt-oss": 24, "qwen2-moe": 30, "olmoe": 24, "mpt": 8}[name]
    assert all(2 * int(view.read().count_nonzero()) <= view.read().numel() for view in views)
    gates = [p for own, p in model.named_parameters() if own.endswith(("router.weight", "gate.weight"))]
    assert all(bool((gate != 0).all()) for gate in gates)


@pytest.mark.parametrize("name", list(ROUTED))
def test_the_router_in_a_module_beside_the_experts_stays_dense(name: str) -> None:
    for block in decoder_blocks(build(name, layers=2)):
        views = {id(view.parameter): view.name for view in block.weights}
        routers = [p for own, p in block.module.named_parameters() if "router." in own and own.endswith("weight")]
        assert routers
        assert [views[id(p)] for p in routers if id(p) in views] == []
        assert len({view.parameter_name for view in block.weights if view.expert is not None}) >= 2


def test_experts_stored_transposed_are_seen(stories: Sequences) -> None:
    """GPT-OSS multiplies by the matrix as stored, without `linear`."""
    model: Any = build("gpt-oss", layers=2)
    view = next(view for view in decoder_blocks(model)[0].weights if view.name.endswith("gate_up_proj.1"))
    assert view.transposed
    assert torch.equal(view.read(), view.parameter[1].T)
    seen: list[Tensor] = []

    def hook(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, choice, *_rest = (*args, *kwargs.values())
        seen.append(hidden[(choice == 1).any(1)])

    with view.module.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        for row in one_by_one(stories):
            model(input_ids=row)
    x = torch.cat(seen).double()
    assert len(x) >= view.shape[1], "or it starves"
    (shared,) = BlockStream(model, decoder_blocks(model), stories, "cpu").collect(0, {view.name})
    assert shared.statistics.tokens == len(x)
    near(shared.statistics.gram, x.T @ x)


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^RecurrentGemmaForCausalLM: cannot read block model\.layers\.0: .*gate_weight"
    ):
        decoder_blocks(build("recurrent-gemma", layers=2))


def test_experts_stacked_in_a_matrix_do_not_stay_dense_unnoticed() -> None:
    """Those of DBRX hold more than nine tenths of its weights."""
    sizes = {"ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
    config = transformers.DbrxConfig(
        d_model=16, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300, ffn_config=sizes,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"cannot read block transformer\.blocks\.0: .*experts\.mlp\.w1 \(96, 16\) is not"
    ):
        decoder_blocks(transformers.DbrxForCausalLM(config))


def test_blocks_that_hand_on_the_tokens_they_attend_to_are_refused_for_that() -> None:
    """Not for seeing later tokens: the hidden states of HY-V4 are several streams, (b, n, streams, d)."""
    torch.manual_seed(0)
    config = transformers.HYV4Config(
        **LLAMA, vocab_size=300, num_hidden_layers=2, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, index_n_heads=2, index_head_dim=8, pad_token_id=0,
        n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"calls blocks with what model\.layers\.0 computes beside the hidden states"):
        check_causal("x", transformers.HYV4ForCausalLM(config).eval())


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_hybrids_are_pruned_but_for_their_convolutions(
    name: str, stories: Sequences, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Linear layers of state space, linear attention and attention blocks; in memory and streamed the same."""
    build(name, layers=2).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    figures = []
    for opens in (load, open_on_disk):
        loaded = opens(str(tmp_path / "dense"))
        dense = dict(loaded.model.named_parameters()) if opens is load else {}
        convolutions = {own: p.clone() for own, p in dense.items() if own.endswith("conv1d.weight")}
        figures.append(evaluate(loaded.model, stories, loaded.offloading).perplexity)
        if opens is load:
            assert convolutions
            prune(loaded.model, "wanda", stories)
            assert all(torch.equal(loaded.model.get_parameter(own), p) for own, p in convolutions.items())
            views = [view for block in decoder_blocks(loaded.model) for view in block.weights]
            assert all(2 * int(view.read().count_nonzero()) <= view.read().numel() for view in views)
            notes = notes_on(loaded.model)
            assert notes[0].startswith(f"{len(convolutions)} depthwise convolutions stay dense, such as ")
    assert figures[0] == figures[1]
    assert Anatomy.of(str(tmp_path / "dense")).blocks
