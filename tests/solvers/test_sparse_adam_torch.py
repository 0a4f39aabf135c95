"""SparseAdam beside torch.optim.AdamW: equal where nothing is pruned, and in all else an optimizer as torch's are."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler

from admm_prune import SparseAdam
from admm_prune.errors import UserError
from admm_prune.solvers.elsa.settings import Penalty, Score

HOW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
DENSE: dict[str, Any] = {"sparsity": 0.0, "clip": None, **HOW}  # SparseAdam that prunes nothing


def matrices(count: int = 2, *, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (8, 16)) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for _ in range(count)]


def give_gradients(parameters: list[Tensor], step: int, *, scale: float = 1.0) -> None:
    random = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=random)).to(p.dtype)


def stepped(optimizer: torch.optim.Optimizer, parameters: list[Tensor], start: int, stop: int) -> None:
    for step in range(start, stop):
        give_gradients(parameters, step)
        optimizer.step()


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "flags",
    [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"lr": torch.tensor(0.01)}, {"lr": 0.0},
     {"betas": (0.5, 0.9)}, {"eps": 1e-3}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_nothing_pruned_it_is_adamw_bit_for_bit(flags: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = matrices(dtype=dtype), matrices(dtype=dtype)
    stepped(SparseAdam(ours, **{**DENSE, **flags}), ours, 0, 40)
    stepped(AdamW(theirs, **{**HOW, **flags}), theirs, 0, 40)
    assert equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (16,), (8, 16)], ids=str)
def test_narrow_parameters_of_any_shape_follow_adamw_in_float32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ours, theirs = matrices(dtype=dtype, shape=shape), [p.detach().float() for p in matrices(dtype=dtype, shape=shape)]
    dense = [{"params": ours, "constraint": None}, {"params": matrices(1), "sparsity": 0.5}]
    stepped(SparseAdam(dense, clip=None, **HOW), ours, 0, 20)
    reference = AdamW(theirs, **HOW)
    for step in range(20):
        give_gradients(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.float()  # type: ignore[union-attr]
        reference.step()
    assert all(torch.allclose(a.float(), b, atol=0.08, rtol=0.02) for a, b in zip(ours, theirs, strict=True))


def test_complex_parameters_are_trained_as_by_adamw_and_refused_where_they_would_be_pruned() -> None:
    ours, theirs = (matrices(1, dtype=torch.complex64) for _ in range(2))
    group = {"params": ours, "constraint": None}
    stepped(SparseAdam([group, {"params": matrices(1), "sparsity": 0.5}], clip=None, **HOW), ours, 0, 10)
    stepped(AdamW(theirs, **HOW), theirs, 0, 10)
    assert equal(ours, theirs)
    with pytest.raises(UserError, match="complex"):
        SparseAdam(ours, sparsity=0.5)


def test_groups_have_their_own_settings_and_gradients_may_be_missing() -> None:
    ours, theirs = matrices(3), matrices(3)
    ours[2].requires_grad_(False)
    for make, p in ((lambda g: SparseAdam(g, **DENSE), ours), (lambda g: AdamW(g, **HOW), theirs)):
        groups = [{"params": p[:1], "lr": 1e-3, "betas": (0.8, 0.9)}, {"params": p[1:], "weight_decay": 0.0}]
        optimizer = make(groups)
        for step in range(12):
            give_gradients(p[: 1 + step % 2], step)
            if step == 6:
                p[0].grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 3 > 0)
    assert equal(ours, theirs)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=20),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 3)]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_adamw(name: str) -> None:
    ours, theirs = matrices(), matrices()
    for optimizer, p in ((SparseAdam(ours, **DENSE), ours), (AdamW(theirs, **HOW), theirs)):
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(10):
            stepped(optimizer, p, step, step + 1)
            scheduler.step()
    assert equal(ours, theirs)


def test_closures_hooks_and_the_gradient_scaler_work_as_with_adamw() -> None:
    seen: list[str] = []
    ours, theirs = matrices(1), matrices(1)
    for optimizer, p in ((SparseAdam(ours, **DENSE), ours), (AdamW(theirs, **HOW), theirs)):
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))

        def closure(x: Tensor = p[0], optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = x.square().sum()
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) > 0
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for found_inf in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(p[0].square().sum()).backward()
            if found_inf:
                p[0].grad.fill_(math.inf)  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
        optimizer.state_dict()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] == ["before", "after"] * 3 + ["saved"]
    assert equal(ours, theirs)


@pytest.mark.parametrize("at", [0, 1, 6, 14], ids=lambda at: f"step {at}")
@pytest.mark.parametrize("how", [{}, {"penalty": math.inf, "ramp": 0.5}, {"penalty": 1e-3}], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_continue_as_the_original_does(way: str, how: dict[str, Any], at: int) -> None:
    import pickle

    model = nn.Linear(16, 8)
    optimizer = SparseAdam(model, sparsity=0.6, lr=0.01, total_steps=20, interval=4, **how)
    stepped(optimizer, list(model.parameters()), 0, at)
    if way == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        torch.save((model, optimizer), file := io.BytesIO())
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    for m, o in ((model, optimizer), (other, copied)):
        stepped(o, list(m.parameters()), at, 20)
        o.finalize()
    assert equal(list(model.parameters()), list(other.parameters()))
    own = set(vars(SparseAdam(nn.Linear(4, 4), sparsity=0.5))) - set(vars(AdamW(matrices())))
    assert own <= set(vars(copied))
    assert len(copied.history) == len(optimizer.history)


def test_two_optimizers_share_no_state_after_one_was_loaded_from_the_other() -> None:
    p, q = matrices(), matrices()
    a, b = (SparseAdam(x, sparsity=0.5, lr=0.01, interval=3) for x in (p, q))
    stepped(a, p, 0, 5)
    for x, y in zip(p, q, strict=True):
        y.data.copy_(x.data)
    b.load_state_dict(a.state_dict())
    stepped(a, p, 5, 10)
    stepped(b, q, 5, 10)
    assert equal(p, q)


def _saved_by_adamw(p: list[Tensor]) -> dict[str, Any]:
    adam = AdamW(p)
    stepped(adam, p, 0, 2)
    return adam.state_dict()


def _saved(p: list[Tensor], **how: Any) -> dict[str, Any]:
    optimizer = SparseAdam(p, **{"sparsity": 0.5, "interval": 2, **how})
    stepped(optimizer, p, 0, 3)
    return optimizer.state_dict()


def _damaged(saved: dict[str, Any], key: str) -> dict[str, Any]:
    del saved["state"][1][key]
    return saved


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (lambda: _saved_by_adamw(matrices()), "not saved by a SparseAdam"),
        (lambda: _saved(matrices(), score=Score(fisher="none")), "no average of squared gradients"),
        (lambda: _saved(matrices(shape=(16, 8)), score=Score(fisher="clean")), "has shape"),
        (lambda: _saved(matrices(), penalty=math.inf), "infinite penalty"),
        (lambda: _saved(matrices(), anchor="int8"), "another format"),
        (lambda: _damaged(_saved(matrices(), score=Score(fisher="clean")), "mask"),
         "was dense in the saved"),
        (lambda: _damaged(_saved(matrices(), score=Score(fisher="clean")), "exp_avg"), "keeps no exp_avg"),
        (lambda: _saved(matrices(1)), "doesn't match the size"),
        (lambda: _saved(matrices(3)), "doesn't match the size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_refused_state_says_why_and_changes_nothing(saved: Callable[[], dict[str, Any]], words: str) -> None:
    refused = saved()
    p, q = matrices(), matrices()
    a, b = (SparseAdam(x, sparsity=0.5, interval=2, score=Score(fisher="clean")) for x in (p, q))
    stepped(a, p, 0, 3)
    stepped(b, q, 0, 3)
    with pytest.raises(ValueError, match=words) as caught:
        a.load_state_dict(refused)
    assert "\n" not in str(caught.value)
    assert len(a.history) == len(b.history) == 1
    stepped(a, p, 3, 8)
    stepped(b, q, 3, 8)
    assert equal(p, q)


def test_a_group_can_be_added_at_any_time_with_its_own_target_and_settings() -> None:
    for at in (0, 3, 8, 16):
        for named in (False, True):
            model, extra = nn.Linear(16, 8), nn.Linear(16, 8)
            optimizer = SparseAdam(model, sparsity=0.5, lr=0.01, total_steps=20, interval=4)
            before = list(model.parameters())
            stepped(optimizer, before, 0, at)
            optimizer.add_param_group(
                {"params": [("e.weight", extra.weight)] if named else [extra.weight], "sparsity": 0.75, "lr": 1e-3}
            )
            optimizer.add_param_group({"params": [extra.bias] if not named else [("e.bias", extra.bias)]})
            stepped(optimizer, [*before, *extra.parameters()], at, 20)
            masks = optimizer.finalize()
            assert set(masks) == {"weight", "e.weight" if named else "2.0"}
            assert (int(model.weight.count_nonzero()), int(extra.weight.count_nonzero())) == (64, 32)
            assert optimizer.param_groups[2]["lr"] == 1e-3
            assert {group["steps_done"] for group in optimizer.param_groups} == {20}
            assert bool((extra.bias != 0).all())


def test_a_group_that_cannot_be_added_leaves_the_optimizer_as_it_was() -> None:
    layer = nn.Linear(16, 8)
    optimizer = SparseAdam(layer, sparsity=0.5)
    before = len(optimizer.param_groups)
    for group, error in (
        ({"params": [layer.weight]}, "more than one parameter group"),
        ({"params": [("weight", nn.Parameter(torch.randn(8, 16)))], "sparsity": 0.5}, "named weight"),
        ({"params": matrices(1), "sparsity": 1.5}, "between 0 and 1"),
        ({"params": matrices(1), "sparsity": 0.5, "pattern": (2, 4)}, "one target"),
        ({"params": [layer.bias], "sparsity": 0.5}, "vector"),
        ({"params": matrices(1), "maximize": True}, "maximize"),
        ({"lr": 0.1}, "needs 'params'"),
    ):
        with pytest.raises(ValueError, match=error):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == before
    stepped(optimizer, list(layer.parameters()), 0, 4)


@pytest.mark.sampled(32)
@pytest.mark.parametrize("first_use", [0, 7, 8, 9, 30, None], ids=str)
@pytest.mark.parametrize(
    "how",
    [{}, {"scope": "model"}, {"penalty": Penalty(value=0.1, shape="cosine")}, {"penalty": Penalty(balance=2.0)},
     {"penalty": Penalty(value=1e-3, units="absolute")}, {"penalty": Penalty(decoupled=True, rescale="lagged")},
     {"penalty": math.inf, "ramp": 1.0}, {"anchor": "int8", "ramp": 0.5}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("zeros", [False, True], ids=["no gradient", "zero gradient"])
def test_a_matrix_may_be_used_late_or_never(first_use: int | None, how: dict[str, Any], zeros: bool) -> None:
    shared, rare = matrices()
    optimizer = SparseAdam([shared, rare], **{"sparsity": 0.5, "lr": 0.01, "total_steps": 40, "interval": 8, **how})
    start = rare.detach().clone()
    for step in range(40):
        used = first_use is not None and step >= first_use
        give_gradients([shared, rare] if used else [shared], step)
        if not used:
            rare.grad = torch.zeros_like(rare) if zeros else None
        optimizer.step()
    masks = optimizer.finalize()
    assert optimizer.skipped == 0
    assert torch.isfinite(rare).all()
    assert torch.isfinite(shared).all()
    assert int(shared.count_nonzero() + rare.count_nonzero()) == 128
    if first_use is None and how.get("penalty") is None and not zeros:  # pruned by magnitude, else as it was
        assert torch.equal(rare, start * masks["0.1"])
        assert start[masks["0.1"]].abs().min() >= start[~masks["0.1"]].abs().max()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 100.0), (torch.float32, 1e25), (torch.bfloat16, 1e25)], ids=str
)
@pytest.mark.parametrize("clip_penalty", [False, True])
def test_finite_gradients_with_a_norm_beyond_their_dtype_are_clipped(dtype, size, clip_penalty) -> None:
    (p,) = matrices(1, dtype=dtype, shape=(1000, 1000))
    optimizer = SparseAdam([p], sparsity=0.5, lr=0.01, clip_penalty=clip_penalty)
    before = p.detach().clone()
    give_gradients([p], 0, scale=size)
    optimizer.step()
    assert (optimizer.skipped, optimizer.steps_done) == (0, 1)
    assert torch.isfinite(p).all()
    assert not torch.equal(p, before)
    p.grad[0, 0] = math.inf  # type: ignore[index]
    optimizer.step()
    assert (optimizer.skipped, optimizer.steps_done) == (1, 1)


@pytest.mark.parametrize(
    "target", [{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "model"}, {"pattern": (2, 4)}], ids=str
)
def test_tensors_and_groups_without_entries_are_passed_over(target: dict[str, Any]) -> None:
    (p,) = matrices(1)
    empty = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(4, 0))]
    groups = [{"params": []}, {"params": [empty[0], p, empty[1]]}, {"params": empty[:0], "constraint": None}]
    optimizer = SparseAdam(groups, **target, total_steps=8, interval=2)
    stepped(optimizer, [p, *empty], 0, 8)
    assert set(optimizer.finalize()) == {"1.1"}
    assert int(p.count_nonzero()) == 64


@pytest.mark.parametrize("moments", ["full", "int8", "bitsandbytes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_in_memory_changes_nothing(moments: Any, dtype: torch.dtype) -> None:
    (p,) = matrices(1, dtype=dtype, shape=(96, 100))
    q = nn.Parameter(p.detach().t().contiguous().t())
    assert not q.is_contiguous()
    for x in (p, q):
        optimizer = SparseAdam([x], sparsity=0.5, lr=0.01, total_steps=12, interval=3, moments=moments)
        stepped(optimizer, [x], 0, 12)
        optimizer.finalize()
    assert torch.allclose(p, q, atol=1e-5)  # norms are summed in the order of memory


def test_repeated_parameters_are_met_as_torch_meets_them() -> None:
    ours, theirs = matrices(1), matrices(1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        a, b = SparseAdam(ours * 2, **DENSE), AdamW(theirs * 2, **HOW)
    stepped(a, ours, 0, 5)
    stepped(b, theirs, 0, 5)
    assert equal(ours, theirs)
    assert list(a.finalize()) == ["0.0"]
    for make in (SparseAdam, AdamW):
        with pytest.raises(ValueError, match="more than one parameter group"):
            make([{"params": ours}, {"params": ours}], **({"sparsity": 0.5} if make is SparseAdam else {}))
    with pytest.raises(UserError, match="two parameters to prune are named weight"):
        SparseAdam([{"params": list(nn.Linear(4, 4, bias=False).named_parameters())} for _ in range(2)], sparsity=0.5)


@pytest.mark.parametrize(
    ("params", "how"),
    [
        (list, {}), (lambda: matrices(1)[0], {}), (lambda: ["weight"], {}),
        (lambda: [{"params": set(matrices())}], {}), (lambda: [matrices(1)[0] * 2], {}), (matrices, {"lr": -1.0}),
        (matrices, {"lr": torch.ones(2)}), (matrices, {"betas": (1.0, 0.9)}), (matrices, {"eps": -1.0}),
        (matrices, {"lr": torch.tensor(0.1), "foreach": True}),
    ],
)  # fmt: skip
def test_what_adamw_refuses_is_refused_with_an_error_of_the_same_kind(params: Any, how: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as theirs:
        AdamW(params(), **how)
    with pytest.raises(theirs.type):
        SparseAdam(params(), sparsity=0.5, **how)


def test_sparse_gradients_are_refused_in_a_line() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SparseAdam(
        [{"params": [embedding.weight], "constraint": None}, *[{"params": matrices(), "sparsity": 0.5}]]
    )
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("steps", [5, 19, 20, 25])
def test_a_run_that_is_not_of_total_steps_is_warned_about(steps: int) -> None:
    (p,) = matrices(1)
    optimizer = SparseAdam([p], sparsity=0.5, total_steps=20, interval=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stepped(optimizer, [p], 0, steps)
        optimizer.finalize()
    said = [str(warning.message) for warning in caught]
    assert len(said) == (0 if steps == 20 else 1 if steps < 20 else 2)
    assert not said or (f"after {steps} steps" in said[-1] and "total_steps=20" in said[-1])
    assert all(warning.filename == __file__ for warning in caught)
