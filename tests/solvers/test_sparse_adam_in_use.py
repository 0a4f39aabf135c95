"""SparseAdam where others drive it: the Trainer of transformers, compiled models, states that pass between dtypes."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_prune import SparseAdam
from admm_prune.solvers.elsa.settings import Penalty, Timeline

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


class Regression(nn.Module):
    """Of the kind that `transformers.Trainer` takes: the loss is among what it returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        prediction = self.second(self.first(x).relu())
        return {"loss": (prediction - labels).square().mean(), "logits": prediction}


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    x, truth = torch.randn(count, 16, generator=random), torch.randn(16, 4, generator=random)
    return [{"x": each, "labels": each @ truth} for each in x]


def trainer(folder: Path, optimizer: SparseAdam, model: nn.Module, **how: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 12, "learning_rate": 0.01,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "lr_scheduler_type": "linear",
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **how})
    return Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None))


def pruned(model: Regression) -> SparseAdam:
    return SparseAdam(model, sparsity=0.75, lr=0.01, total_steps=12, interval=3)


def test_the_trainer_of_transformers_takes_a_step_for_the_batches_it_accumulates(tmp_path: Path) -> None:
    model = Regression()
    optimizer = pruned(model)
    trainer(tmp_path, optimizer, model).train()
    assert (optimizer.steps_done, optimizer.skipped, optimizer.frozen) == (12, 0, True)
    assert len(optimizer.history) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = optimizer.finalize()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"first.weight": 128, "second.weight": 32}
    assert int(model.first.weight.count_nonzero()) == 128


@pytest.mark.bitwise
def test_a_run_of_the_trainer_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    models = [Regression(), Regression()]
    whole, optimizer = pruned(models[0]), pruned(models[1])
    saving = {"save_strategy": "steps", "save_steps": 5, "save_only_model": False}
    trainer(tmp_path, whole, models[0], **saving).train()
    trainer(tmp_path, optimizer, models[1], **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert optimizer.steps_done == whole.steps_done == 12
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    assert all(torch.equal(mask, optimizer.masks()[name]) for name, mask in whole.finalize().items())


def test_total_steps_counted_in_parts_of_batches_is_warned_about(tmp_path: Path) -> None:
    model = Regression()
    optimizer = SparseAdam(model, sparsity=0.75, total_steps=24, interval=3)
    trainer(tmp_path, optimizer, model).train()
    with pytest.warns(UserWarning, match=r"after 12 steps of total_steps=24.*batches whose gradients are accumulated"):
        optimizer.finalize()
    assert int(model.first.weight.count_nonzero()) == 128


@pytest.mark.parametrize("inside", [False, True], ids=["model", "submodule"])
def test_a_compiled_model_is_pruned_under_the_names_of_the_model(inside: bool) -> None:
    plain, wrapped = Regression(), Regression()
    if inside:
        wrapped.first = torch.compile(wrapped.first, backend="eager")
    compiled: Any = wrapped if inside else torch.compile(wrapped, backend="eager")
    how: dict[str, Any] = {"sparsity": 0.5, "targets": ("first.*",), "lr": 0.01, "total_steps": 8, "interval": 2}
    chosen = {"first.weight": torch.arange(512).reshape(32, 16) % 2 == 0}
    ends = []
    for model in (plain, compiled):
        optimizer = SparseAdam(model, masks=chosen, **how)
        for row in rows(8):
            model(row["x"], row["labels"])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        ends.append((names, optimizer.finalize(), [p.detach() for p in model.parameters()]))
    (names, masks, weights), (other_names, other_masks, other_weights) = ends
    assert names == other_names == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert torch.equal(masks["first.weight"], other_masks["first.weight"])
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_repr_is_that_of_a_torch_optimizer_before_and_after_steps() -> None:
    model = Regression()
    optimizer = pruned(model)
    for row in rows(2):
        text = repr(optimizer)
        assert text.startswith("SparseAdam (\nParameter Group 0\n")
        assert "betas: (0.9, 0.999)" in text
        assert f"steps_done: {optimizer.steps_done}\n" in text
        model(**row)["loss"].backward()
        optimizer.step()


def stepped(optimizer: SparseAdam, p: Tensor, start: int, stop: int) -> None:
    for step in range(start, stop):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        p.grad = (2.0 * p.detach() + noise).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("anchor", "moments"), [("full", "full"), ("bfloat16", "full"), ("int8", "int8")])
@pytest.mark.parametrize("end", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_passes_to_weights_of_another_dtype(
    start: torch.dtype, end: torch.dtype, anchor: Any, moments: Any
) -> None:
    """As with a run that is continued in a narrower dtype; codes and masks keep theirs, floats the working one."""
    how: dict[str, Any] = {"sparsity": 0.5, "lr": 0.01, "total_steps": 16, "interval": 2, "anchor": anchor}
    how["moments"] = moments
    p = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(start))
    saving = SparseAdam([p], **how)
    stepped(saving, p, 0, 5)
    q = nn.Parameter(p.detach().to(end, copy=True))
    going_on = SparseAdam([q], **how)
    going_on.load_state_dict(copy.deepcopy(saving.state_dict()))
    fresh = SparseAdam([r := nn.Parameter(q.detach().clone())], **how)
    stepped(fresh, r, 0, 1)
    for key, value in going_on.state[q].items():
        native = fresh.state[r][key]
        assert not isinstance(value, Tensor) or (value.dtype, value.shape) == (native.dtype, native.shape)
    assert torch.equal(going_on.state[q]["mask"], saving.state[p]["mask"])
    assert torch.allclose(
        going_on.state[q]["exp_avg"].double(), saving.state[p]["exp_avg"].double(), rtol=1e-6, atol=0.0
    )
    assert going_on.steps_done == 5
    stepped(saving, p, 5, 16)
    stepped(going_on, q, 5, 16)
    assert going_on.frozen
    assert torch.isfinite(q).all()
    assert int(q.count_nonzero()) == 2048
    with torch.no_grad():
        assert float((p.double() - q.double()).norm() / p.double().norm()) < 0.2
    assert (saving.masks()["0.0"] == going_on.masks()["0.0"]).double().mean() > 0.95


def test_hooks_of_states_see_and_exchange_them_as_with_torch() -> None:
    seen: list[str] = []
    p, q = (nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    saving, loading = (SparseAdam([x], sparsity=0.5, interval=2) for x in (p, q))
    stepped(saving, p, 0, 3)
    saving.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    saving.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})

    def exchange(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append(f"loading, more {saved.pop('more')}")
        groups = [{**group, "lr": 0.5} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    loading.register_load_state_dict_pre_hook(exchange)
    loading.register_load_state_dict_post_hook(lambda o: seen.append(f"loaded, {o.steps_done} steps"))
    saved = saving.state_dict()
    loading.load_state_dict(saved)
    assert seen == ["saving", "loading, more 1", "loaded, 3 steps"]
    assert (loading.param_groups[0]["lr"], saving.param_groups[0]["lr"]) == (0.5, 1e-3)
    assert torch.equal(loading.state[q]["exp_avg"], saving.state[p]["exp_avg"])
    assert torch.equal(loading.masks()["0.0"], saving.masks()["0.0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_decoupled_penalty_pulls_weights_of_every_dtype(dtype: torch.dtype) -> None:
    """In 16 bits a step of 3e-4 of the weight is far below the distance of two numbers."""
    p = nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = SparseAdam(
        [p], sparsity=0.5, lr=2e-3, interval=1000, freeze=0.0, anchor="full", betas=(0.0, 0.999),
        penalty=Penalty(value=0.15, decoupled=True),
    )  # fmt: skip
    off = ~next(iter(optimizer.masks().values()))
    off[0] = False
    before = p.detach().clone().float()
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        p.grad[0, 0] = 1e-3  # the pull is in units that need a gradient
        optimizer.step()
    rate = 2e-3 * 0.15 / float(before.square().mean().sqrt())
    moved = float(p.detach().float()[off].norm() / before[off].norm())
    assert moved == pytest.approx((1 - rate) ** 100, abs=1e-6 if dtype is torch.float32 else 2e-3)


@pytest.mark.parametrize(
    "how",
    [{"clip_penalty": True}, {"clip": None}, {"penalty": Penalty(value=1e6, units="absolute")},
     {"clip_penalty": True, "penalty": Penalty(value=1e6, units="absolute")}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("anchor", ["full", "bfloat16", "int8"])
def test_the_penalty_does_not_overflow_the_dtype_of_a_finite_gradient(how: dict[str, Any], anchor: Any) -> None:
    p = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).half())
    optimizer = SparseAdam(
        [p], **{"sparsity": 0.5, "lr": 0.01, "penalty": 1.0, "interval": 100, "anchor": anchor, **how}
    )
    for _ in range(4):
        p.grad = torch.where(p.detach() > 0, 65504.0, -65504.0).half()  # the penalty pulls to the same side
        optimizer.step()
        assert torch.isfinite(p.grad).all()
        assert all(torch.isfinite(x).all() for x in optimizer.state[p].values() if isinstance(x, Tensor))
        assert torch.isfinite(p).all()
    assert (optimizer.steps_done, optimizer.skipped) == (4, 0)


@pytest.mark.parametrize(("total", "freeze"), [(20, 1.0), (2, 0.9), (1, 0.75), (20, 0.99)], ids=str)
@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("penalty", [0.1, math.inf])
def test_a_run_that_is_frozen_throughout_is_sparse_throughout(
    total: int, freeze: float, ramp: float, penalty: float
) -> None:
    p = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    optimizer = SparseAdam([p], sparsity=0.75, total_steps=total, freeze=freeze, ramp=ramp, penalty=penalty, interval=2)
    start = p.detach().clone()
    largest = start.abs() >= start.abs().flatten().sort(descending=True).values[31]
    for step in range(total):
        stepped(optimizer, p, step, step + 1)
        assert optimizer.frozen
        assert torch.equal(p != 0, largest)
    assert torch.equal(optimizer.finalize()["0.0"], largest)


def test_progress_without_steps_before_the_freeze_is_complete() -> None:
    timeline = Timeline(total_steps=2, freeze=0.9, ramp=0.5)
    assert (timeline.freeze_at, timeline.progress(0), timeline.fraction(0)) == (0, 1.0, 1.0)
    assert Timeline(total_steps=2, freeze=0.5, ramp=0.5).fraction(0) == 0.0


def test_parameters_that_are_exchanged_for_others_are_pruned_as_they_were() -> None:
    """accelerate shards a model after its optimizer was created, and exchanges the parameters in its groups."""
    from transformers.pytorch_utils import Conv1D

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(12, 16), nn.Tanh(), nn.Linear(12, 4))

    given, exchanged = network(), network()
    optimizers = [SparseAdam(model, pattern=(1, 4), lr=0.01, total_steps=8, interval=2) for model in (given, exchanged)]
    for name, parameter in list(exchanged.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(exchanged.get_submodule(owner), last, nn.Parameter(parameter.detach().clone()))
    for group in optimizers[1].param_groups:
        group["params"] = [exchanged.get_parameter(name) for name in group["param_names"]]
    for model, optimizer in zip((given, exchanged), optimizers, strict=True):
        for step in range(8):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    masks = [optimizer.finalize() for optimizer in optimizers]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert bool((masks[1]["0.weight"].view(4, 4, 12).sum(1) == 1).all()), "groups of four inputs, of in x out"
