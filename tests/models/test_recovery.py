"""Recovery keeps the zeros: any optimizer, clipped gradients, copies, a trainer's checkpoints."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from admm_prune import keep_sparsity, merge_lora
from admm_prune.errors import UserError
from admm_prune.models.structure import decoder_blocks
from tests.models.tiny_models import build

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


@pytest.mark.bitwise
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_mask_is_that_of_parameters_put_in_the_place_of_others(family: str) -> None:
    """`assign` replaces parameters, and parts those that an embedding and a head share; the optimizer has the old."""
    model = build(family).requires_grad_(True)
    dense = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for weight in (model.get_output_embeddings().weight, decoder_blocks(model)[0].weights[0].parameter):
            weight[::2] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_sparsity(model, optimizer)
    sparse = copy.deepcopy(model.state_dict())
    model.load_state_dict(sparse, assign=True)
    kept.check()
    model.load_state_dict({**sparse, "lm_head.weight": dense["lm_head.weight"]}, assign=True)
    for check in (kept.check, model.state_dict):
        with pytest.raises(UserError, match=r"^\S+: \d+ pruned weights are no longer zero"):
            check()
    model.load_state_dict(dense, assign=True)
    with pytest.raises(UserError, match=r"pruned weights are no longer zero"):
        model.state_dict()
    optimizer.step()
    kept.check()
    assert 0.4 < kept.sparsity < 0.6


def test_the_gradient_of_a_parameter_put_in_the_place_of_another_is_masked_as_it_is_accumulated() -> None:
    """Clipping would see the pruned weights; the parameter that was there is left alone from then on."""
    model = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight[::2] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_sparsity(model, optimizer)
    old = model.weight
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.weight.requires_grad_(True)
    optimizer.param_groups[0]["params"] = [model.weight]
    optimizer.step()
    x = torch.ones(3, 8)
    model(x).square().sum().backward()
    assert model.weight.grad is not None
    assert int(model.weight.grad[::2].count_nonzero()) == 0
    assert int(model.weight.grad[1::2].count_nonzero()) > 0
    (x @ (old + 1).T).square().sum().backward()
    assert old.grad is not None
    assert int(old.grad[::2].count_nonzero()) > 0
    kept.remove()
    model.weight.grad = None
    (x @ (model.weight + 1).T).square().sum().backward()
    assert model.weight.grad is not None
    assert int(model.weight.grad[::2].count_nonzero()) > 0


def test_a_merge_beyond_the_range_of_float16_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).half()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))  # type: ignore[arg-type]
    layer = adapted.base_model.model[0]  # type: ignore[index]
    with torch.no_grad():
        layer.weight.fill_(6e4)
        layer.lora_A["default"].weight.fill_(100)
        layer.lora_B["default"].weight.fill_(100)
    with pytest.raises(UserError, match=r"^0: the merged weight is beyond the range of torch\.float16"):
        merge_lora(adapted)


def test_a_parameter_of_another_shape_is_refused() -> None:
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0] = 0
    kept = keep_sparsity(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.weight = torch.nn.Parameter(torch.ones(2, 4))
    with pytest.raises(UserError, match=r"weight: it was replaced by a parameter of shape \(2, 4\).*\(4, 4\)"):
        kept.check()


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


def test_what_a_merge_drops_of_adapters_with_nan_is_nan() -> None:
    adapted = with_adapters(pruned())
    name, layer = next((n, m) for n, m in adapted.named_modules() if hasattr(m, "get_delta_weight"))
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(math.nan)
    dropped = {weight.name: weight.dropped for weight in merge_lora(adapted)[1]}
    assert math.isnan(dropped[f"{name.removeprefix('base_model.model.')}.weight"])


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


def two_layers(sparsity: float = 0.8) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[torch.rand_like(layer.weight) < sparsity] = 0
    return model


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    return model(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))).square().mean()


def kept_norm(model: torch.nn.Module, dense: torch.nn.Module) -> float:
    """The norm of the gradients of `dense`, a twin of the model, over what the model has kept."""
    total = 0.0
    for parameter, twin in zip(model.parameters(), dense.parameters(), strict=True):
        kept = parameter != 0 if parameter.ndim > 1 else torch.ones_like(parameter, dtype=torch.bool)
        total += float(twin.grad[kept].square().sum())
    return total**0.5


@pytest.mark.parametrize("case", ["plain", "accumulated", "zeroed in place", "foreach", "unfrozen", "compiled"])
def test_clipping_sees_the_kept_weights_alone(case: str) -> None:
    model, twin = two_layers(0.9), two_layers(0.9)
    called = torch.compile(model, backend="eager") if case == "compiled" else model
    if case == "unfrozen":
        model.requires_grad_(False)
    optimizer = torch.optim.AdamW(called.parameters(), lr=1e-3, foreach=case == "foreach" or None)
    keep_sparsity(called, optimizer)
    model.requires_grad_(True)
    if case == "zeroed in place":
        loss_of(model).backward()
        optimizer.zero_grad(set_to_none=False)
    for seed in range(3 if case == "accumulated" else 1):
        loss_of(called, seed).backward()
        loss_of(twin, seed).backward()
    expected = kept_norm(model, twin)
    assert float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e9)) > 1.1 * expected
    assert float(torch.nn.utils.clip_grad_norm_(called.parameters(), 0.1 * expected)) == pytest.approx(expected)
    after = torch.nn.utils.get_total_norm([p.grad for p in called.parameters()])
    assert float(after) == pytest.approx(0.1 * expected, rel=1e-4)


def test_gradients_of_shared_and_sparse_weights_are_masked() -> None:
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        embedding.weight[:, 1] = 0
        head.weight[0] = 0
    model = torch.nn.ModuleDict({"embedding": embedding, "one": head, "two": head})
    kept = keep_sparsity(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert set(kept.masks) == {"embedding.weight", "one.weight"}
    head(head(embedding(torch.tensor([1, 1, 3])))).square().sum().backward()
    assert embedding.weight.grad.is_sparse
    assert bool((embedding.weight.grad.to_dense()[:, 1] == 0).all())
    assert float(embedding.weight.grad.to_dense().norm()) > 0
    assert bool((head.weight.grad[0] == 0).all())
    assert bool((head.weight.grad[1:] != 0).any())


def test_gradients_that_are_assigned_are_masked_before_the_step() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keep_sparsity(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert torch.equal(momentum != 0, two_layers()[0].weight != 0)


def copied(what: object, how: str) -> object:
    if how == "deepcopy":
        return copy.deepcopy(what)
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def break_mask(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.add_(1.0)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_of_the_model_asserts_its_own_mask(how: str) -> None:
    model = two_layers()
    keep_sparsity(model, torch.optim.AdamW(model.parameters()))
    other = copied(model, how)
    other.state_dict()
    break_mask(model)
    other.state_dict()
    with pytest.raises(UserError, match=r"0\.weight: \d+ pruned weights are no longer zero"):
        model.state_dict()
    other = copied(two_layers_held(), how)
    break_mask(other)
    with pytest.raises(UserError, match="a copy of the model needs keep_sparsity"):
        other.state_dict()


def two_layers_held() -> torch.nn.Module:
    model = two_layers()
    keep_sparsity(model, torch.optim.AdamW(model.parameters()))
    return model


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("removed", [False, True])
def test_model_optimizer_and_mask_are_copied_together(how: str, removed: bool) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kept = keep_sparsity(model, optimizer)
    loss_of(model).backward()
    optimizer.step()
    if removed:
        kept.remove()
    other, its_optimizer, its_kept = copied((model, optimizer, kept), how)
    before = other[0].weight.detach().clone()
    loss_of(other).backward()
    assert bool((other[0].weight.grad[before == 0] == 0).all()) != removed
    its_optimizer.step()
    assert not torch.equal(other[0].weight, before)
    assert torch.equal(model[0].weight, before)
    assert bool((other[0].weight[before == 0] == 0).all()) != removed
    its_kept.remove()
    break_mask(other)
    other.state_dict()
    assert bool((model[0].weight == 0).any())


def test_an_average_of_the_weights_is_sparse_and_checked() -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_sparsity(model, optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].weight == 0, two_layers()[0].weight == 0)
    break_mask(averaged.module)
    with pytest.raises(UserError, match="no longer zero"):
        averaged.state_dict()


def test_the_mask_of_a_compiled_model_is_checked_from_every_side() -> None:
    model = two_layers()
    compiled = torch.compile(model, backend="eager")
    kept = keep_sparsity(compiled, torch.optim.AdamW(compiled.parameters(), lr=1e-2))
    assert set(kept.masks) == {"0.weight", "2.weight"}
    break_mask(model)
    for module in (compiled, model, model[0], torch.nn.DataParallel(model)):
        with pytest.raises(UserError, match=r"^0\.weight"):
            module.state_dict()


def test_what_has_no_mask_is_refused_or_left_alone() -> None:
    model = torch.nn.ModuleDict(
        {"pruned": two_layers(), "head": torch.nn.Linear(16, 3), "router": torch.nn.Linear(3, 3)}
    )
    with torch.no_grad():
        for name in ("head", "router"):
            model[name].weight.zero_()
    assert set(keep_sparsity(model, torch.optim.SGD(model.parameters())).masks) == {
        "pruned.0.weight",
        "pruned.2.weight",
    }
    with pytest.raises(UserError, match="no zeros to keep"):
        keep_sparsity(model["head"], torch.optim.SGD(model["head"].parameters()))
    with pytest.raises(UserError, match="sharded or not in memory"):
        keep_sparsity(two_layers().to("meta"), torch.optim.SGD(model.parameters()))
