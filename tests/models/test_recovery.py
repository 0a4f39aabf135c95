"""Recovery keeps the zeros: any optimizer, a trainer's checkpoints, LoRA of peft."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from admm_prune import keep_sparsity, merge_lora
from admm_prune.errors import UserError
from admm_prune.models.structure import decoder_blocks

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def pruned() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build("llama").requires_grad_(True)
    with torch.no_grad():
        for block in decoder_blocks(model):
            for view in block.weights:
                weight = view.read().clone()
                weight[torch.rand(weight.shape) < 0.7] = 0
                view.write(weight)
    return model


def zeros(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {view.name: view.read() == 0 for block in decoder_blocks(model) for view in block.weights}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    ids = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_the_others_learn(name: str, tmp_path: Path) -> None:
    model = pruned()
    before, dense = zeros(model), copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model.parameters())
    kept = keep_sparsity(model, optimizer)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    assert 0.6 < kept.sparsity < 0.8
    for view_name, was in before.items():
        now = model.state_dict()[view_name]
        assert bool((now[was] == 0).all())
        assert not torch.equal(now, dense[view_name])
        assert torch.equal(kept.masks[view_name], ~was)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(bool((saved[key][was] == 0).all()) for key, was in before.items())


def test_it_is_adam_on_the_support_to_the_bit() -> None:
    """Masked training by hand: gradients masked, then the weights."""
    model, twin = pruned(), pruned()
    masks = {name: ~was for name, was in zeros(twin).items()}
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, twin))
    keep_sparsity(model, optimizer)
    ids = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(input_ids=ids, labels=ids).loss.backward()
        for name, mask in masks.items():
            twin.get_parameter(name).grad.mul_(mask)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_whoever_writes_beside_the_optimizer_is_found_at_the_save(tmp_path: Path) -> None:
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_sparsity(model, optimizer)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[weight == 0] = torch.where(torch.arange(int((weight == 0).sum())) < 3, 0.5, 0.0)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: 3 pruned weights are no longer zero"):
        model.save_pretrained(tmp_path / "out")
    kept.remove()
    model.save_pretrained(tmp_path / "out")


def test_a_dense_model_is_refused() -> None:
    model = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="no zeros to keep"):
        keep_sparsity(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_trainer_keeps_them_in_its_checkpoints(tmp_path: Path) -> None:
    model = pruned()
    before = zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_sparsity(model, optimizer)
    ids = torch.randint(1, 300, (16, 16), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    for step in (2, 4):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert all(bool((loaded.get_parameter(name)[was] == 0).all()) for name, was in before.items())


def with_adapters(model: torch.nn.Module, **how: object) -> peft.PeftModel:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], **how)
    adapted = peft.get_peft_model(model, config)
    train(adapted, torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2))
    return adapted


def test_lora_merges_under_the_mask(tmp_path: Path) -> None:
    model = pruned()
    before = zeros(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = with_adapters(model)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().clone()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(deltas) == 9
    merged, told = merge_lora(adapted)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert {weight.name for weight in told} == {f"{name}.weight" for name in deltas}
    for weight in told:
        now, was = merged.state_dict()[weight.name], before[weight.name]
        delta = deltas[weight.name.removesuffix(".weight")]
        torch.testing.assert_close(now, dense[weight.name] + delta * ~was, rtol=0, atol=1e-6)
        assert bool((now[was] == 0).all())
        assert weight.sparsity == pytest.approx(float(was.float().mean()))
        lost = float((delta * was).square().sum() / delta.square().sum())
        assert weight.dropped == pytest.approx(lost, abs=1e-5)
        assert 0.4 < weight.dropped < 0.9
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(zeros(again)[name] | ~was, torch.ones_like(was)) for name, was in before.items())


def test_a_plain_merge_would_fill_the_zeros() -> None:
    model = with_adapters(pruned()).merge_and_unload()
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) < 0.01


def test_what_is_no_plain_sum_is_refused() -> None:
    with pytest.raises(UserError, match="no LoRA layers"):
        merge_lora(pruned())
    with pytest.raises(UserError, match="DoRA and LoRA with a bias"):
        merge_lora(with_adapters(pruned(), use_dora=True))
    adapted = with_adapters(pruned())
    adapted.merge_adapter()
    with pytest.raises(UserError, match="merged already"):
        merge_lora(adapted)
