"""Adapters of peft on a pruned model: no part of the mask, merged under it, and refused where they would be lost."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from admm_prune import keep_sparsity, merge_lora
from admm_prune.errors import UserError
from tests.models.test_recovery import pruned, train, zeros
from tests.models.tiny_models import build

KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "copies": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    "prompts": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefixes": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_no_part_of_the_mask(kind: str) -> None:
    """Held are the pruned weights, by whatever name they have now; every adapter trains as without a mask."""
    model = peft.get_peft_model(pruned(), KINDS[kind]())
    free = peft.get_peft_model(pruned(), KINDS[kind]())
    free.load_state_dict(model.state_dict())
    results = []
    for adapted in (model, free):
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        if adapted is model:
            kept = keep_sparsity(model, optimizer)
        train(adapted, optimizer, steps=3)
        results.append({name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad})
    prefix = "base_model." if kind in ("prompts", "prefixes") else "base_model.model."
    held = {name.replace(".base_layer", "").removeprefix(prefix) for name in kept.masks}
    weights = set(zeros(pruned()))
    if kind == "copies":
        assert {name for name in held if "up_proj" not in name} == {name for name in weights if "up_proj" not in name}
        assert sum("modules_to_save" in name for name in held) == 3
    else:
        assert held == weights
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
    kept.check()
    model.state_dict()


def test_adapters_on_experts_are_no_part_of_the_mask() -> None:
    model, _ = adapted_experts("mixtral", init=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    kept = keep_sparsity(model, optimizer)
    assert not [name for name in kept.masks if "lora_" in name]
    losses = train(model, optimizer, steps=4)
    assert losses[-1] < losses[0]
    assert all(float(p.abs().sum()) > 0 for name, p in model.named_parameters() if "lora_B" in name)


def adapted_experts(family: str, *, init: bool) -> tuple[peft.PeftModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = build(family).requires_grad_(True)
    stacked = [name for name, p in model.named_parameters() if "experts." in name and p.ndim == 3]
    with torch.no_grad():
        for name in stacked:
            parameter = model.get_parameter(name)
            parameter[torch.rand_like(parameter) < 0.6] = 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=init,
    )
    return peft.get_peft_model(model, config), before


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_adapters_on_experts_are_merged_under_the_mask(family: str) -> None:
    adapted, before = adapted_experts(family, init=False)
    plain, _ = adapted_experts(family, init=False)
    plain.load_state_dict(adapted.state_dict())
    dense = plain.merge_and_unload()
    merged, weights = merge_lora(adapted)
    stacked = [weight for weight in weights if ".experts." in weight.name]
    assert {weight.name.rpartition(".")[2] for weight in stacked} == {"gate_up_proj", "down_proj"}
    for weight in weights:
        now, was = merged.get_parameter(weight.name), before[weight.name]
        whole = dense.get_parameter(weight.name)
        kept = was != 0 if ".experts." in weight.name else torch.ones_like(was, dtype=torch.bool)
        torch.testing.assert_close(now, torch.where(kept, whole, 0.0), rtol=0, atol=1e-6)
        assert not torch.equal(now, was)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]


def grown(**how: object) -> tuple[peft.PeftModel, torch.Tensor]:
    """A model with adapters drawn at random, and its logits."""
    torch.manual_seed(2)
    family = str(how.pop("family", "llama" if how.pop("tied", False) else "llama-untied"))
    model = build(family)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **how)).eval()
    with torch.no_grad():
        return adapted, adapted(input_ids=torch.arange(1, 17)[None]).logits


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"], "tied": True},
        {"target_modules": ["lm_head"], "tied": True},
        {"target_modules": ["lm_head", "embed_tokens"], "tied": True},
        {"target_modules": ["embed_tokens"], "tied": True, "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "tied": True},
        {"target_parameters": ["q_proj.weight"], "target_modules": []},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.1": 2}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_dense_model_merged_computes_what_the_adapters_did(how: dict[str, object], tmp_path: Path) -> None:
    """Without zeros there is no mask: the merged model, saved and loaded, gives the logits of the adapted one."""
    adapted, logits = grown(**how)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
                logits = adapted(input_ids=torch.arange(1, 17)[None]).logits
    merged, _ = merge_lora(adapted)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=torch.arange(1, 17)[None]).logits, logits, rtol=1e-4, atol=1e-5)
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings == shared
    assert shared == bool(how.get("ensure_weight_tying"))
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=torch.arange(1, 17)[None]).logits, logits, rtol=1e-4, atol=1e-5)


def test_active_adapters_are_merged_and_no_others() -> None:
    adapted, first = grown(target_modules=["q_proj"])
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    adapted.set_adapter("second")
    with torch.no_grad():
        second = adapted(input_ids=torch.arange(1, 17)[None]).logits
    other = copy.deepcopy(adapted)
    merged, weights = merge_lora(adapted)
    assert len(weights) == 6
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=torch.arange(1, 17)[None]).logits, second, rtol=1e-3, atol=1e-4)
    other.set_adapter("default")
    merged, weights = merge_lora(other)
    assert len(weights) == 3
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=torch.arange(1, 17)[None]).logits, first, rtol=1e-3, atol=1e-4)


def test_adapters_that_were_injected_are_merged_once() -> None:
    torch.manual_seed(2)
    model = build("llama")
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(0.1)
        logits = model(input_ids=torch.arange(1, 17)[None]).logits
    merged, weights = merge_lora(model)
    assert {weight.name for weight in weights} == {
        "lm_head.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3))
    }  # fmt: skip
    assert set(merged.state_dict()) == set(build("llama").state_dict())
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=torch.arange(1, 17)[None]).logits, logits)


def test_a_trained_copy_is_put_under_the_mask_of_its_original() -> None:
    model = pruned()
    was = zeros(model)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]))
    train(adapted, torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2))
    trained = adapted.base_model.model.model.layers[0].mlp.up_proj.modules_to_save["default"].weight.detach().clone()
    merged, weights = merge_lora(adapted)
    name = "model.layers.0.mlp.up_proj.weight"
    report = next(weight for weight in weights if weight.name == name)
    assert report.sparsity == pytest.approx(float(was[name].float().mean()))
    assert 0.1 < report.dropped < 1
    assert torch.equal(merged.get_parameter(name), trained.masked_fill(was[name], 0))


def test_a_convolution_of_gpt2_is_merged_under_the_mask() -> None:
    torch.manual_seed(0)
    model = build("gpt2")
    weight = model.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        weight[torch.rand_like(weight) < 0.5] = 0
    was = weight.detach().clone()
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    delta = adapted.base_model.model.transformer.h[0].attn.c_attn.get_delta_weight("default").detach().clone()
    merged, _ = merge_lora(adapted)
    now = merged.transformer.h[0].attn.c_attn.weight
    torch.testing.assert_close(now, was + delta * (was != 0), rtol=0, atol=1e-6)


def test_adapters_that_cannot_be_merged_leave_the_model_alone() -> None:
    adapted, _ = grown(target_modules=["q_proj"])
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(UserError, match="disabled"):
        merge_lora(adapted)
    mixed, _ = grown(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    with pytest.raises(UserError, match=r"embed_tokens.*trainable_tokens\.TrainableTokensLayer"):
        merge_lora(mixed)
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())
    with pytest.raises(UserError, match=r"ia3\.Linear cannot be merged"):
        merge_lora(peft.get_peft_model(pruned(), KINDS["ia3"]()))
    with pytest.raises(UserError, match="LoRA with a bias"):
        merge_lora(grown(target_modules=["c_attn"], lora_bias=True, family="gpt2")[0])
