"""SparseAdam: skipped steps, narrow dtypes, experts without tokens, settings and masks that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.ops import bits
from admm_prune.solvers.elsa.moments import total_norm
from admm_prune.solvers.elsa.settings import Penalty, Score
from admm_prune.solvers.elsa.supports import Scope
from admm_prune.solvers.schedules import warm_up_then_linear
from admm_prune.solvers.sparse_adam import SparseAdam
from tests.models.tiny_models import build


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warm_up", [0.0, 0.05, 0.3, 1.0])
def test_the_rate_reaches_its_peak_once_and_ends_at_zero(steps: int, warm_up: float) -> None:
    factor = warm_up_then_linear(steps, warm_up)
    factors = [factor(step) for step in range(steps + 1)]
    peak = factors.index(max(factors))
    assert factors[peak] == 1.0
    assert peak == max(1, round(warm_up * steps)) - 1
    assert factors[-1] == 0.0
    rising, falling = factors[: peak + 1], factors[peak:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert min(factors[:-1]) > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 0.0}, "eps is above it"),
        ({"lr": -1.0}, "lr and weight_decay are at least 0"),
        ({"betas": (0.9, 1.0)}, "betas are two numbers from 0 to below 1"),
        ({"interval": 4}, "interval is one setting for all groups: give it to SparseAdam itself"),
        ({"clip": 0.1}, "clip is one setting for all groups"),
    ],
    ids=str,
)
def test_a_group_with_settings_that_do_not_fit_is_refused(settings: dict[str, Any], words: str) -> None:
    first, second = nn.Parameter(normal(4, 8)), nn.Parameter(normal(4, 8))
    with pytest.raises(UserError, match=words):
        SparseAdam([{"params": [first], **settings}], sparsity=0.5)
    optimizer = SparseAdam([first], sparsity=0.5)
    with pytest.raises(UserError, match=words):
        optimizer.add_param_group({"params": [second], "sparsity": 0.5, **settings})
    assert len(optimizer.param_groups) == 1


def test_given_masks_are_the_support_where_it_is_fixed_and_else_have_its_size() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    masks = {"0.weight": normal(16, 16) > 0.5, "1.weight": normal(16, 16, seed=1) > -0.5}
    optimizer = SparseAdam(model, sparsity=0.5, ignore=(), masks=masks, freeze=1.0, total_steps=3)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(model.get_parameter(name) == 0, ~mask)
    with pytest.raises(UserError, match=r"the mask of 0.weight is not a support of the target"):
        SparseAdam(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), sparsity=0.5, ignore=(), masks=masks).masks()


@pytest.mark.parametrize("skipped", [0, 11, 25])
def test_skipped_steps_do_not_delay_the_freeze(skipped: int) -> None:
    weight = nn.Parameter(normal(8, 32))
    optimizer = SparseAdam(
        [weight], sparsity=0.9, penalty=math.inf, interval=2, ramp=1.0, total_steps=40, freeze=0.25, lr=1e-3
    )
    frozen = []
    for step in range(40):
        optimizer.zero_grad()
        ((weight - 1) ** 2).sum().backward()
        if step < skipped:
            weight.grad.fill_(math.nan)  # type: ignore[union-attr]
        optimizer.step()
        frozen.append(optimizer.frozen)
    assert optimizer.skipped == skipped
    assert frozen.index(True) == 29
    assert int((weight != 0).sum()) == round(0.1 * weight.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_steps_smaller_than_the_distance_of_two_numbers_add_up(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = SparseAdam([weight], sparsity=0.0, freeze=1.0, total_steps=100, lr=2e-4, clip=None)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().double().mean()) == pytest.approx(0.98, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_a_narrow_gradient_is_not_rounded_to_its_dtype(dtype: torch.dtype) -> None:
    weight = nn.Parameter(normal(300, 300).to(dtype))
    weight.grad = normal(300, 300, seed=1).to(dtype)
    assert total_norm([weight])[1] == pytest.approx(float(weight.grad.double().norm()), rel=1e-5)


def test_what_is_not_finite_off_the_support_becomes_zero() -> None:
    x = torch.tensor([[1.0, math.inf, math.nan, -2.0]])
    bits.restrict_(x, bits.pack(torch.tensor([[True, False, False, False]])))
    assert x.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert not torch.signbit(x).any()


@pytest.mark.parametrize("scope", ["matrix", "model"])
@pytest.mark.parametrize(
    "how",
    [
        {"penalty": math.inf, "ramp": 1.0, "total_steps": 16, "freeze": 0.25},
        {"penalty": Penalty(value=0.15, decoupled=True)},
    ],
    ids=["gradual", "elsa"],
)
def test_experts_without_tokens_keep_their_largest_weights(how: dict[str, Any], scope: Scope) -> None:
    model = build("mixtral", layers=1).requires_grad_(True)
    stacked = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 3}
    score = Score(fisher="adam", power=0.5)
    optimizer = SparseAdam(model, sparsity=0.5, interval=4, scope=scope, score=score, **how)
    for step in range(16):
        for name, parameter in model.named_parameters():
            parameter.grad = normal(*parameter.shape, seed=step)
            if name in stacked:
                parameter.grad[2:] = 0.0
        optimizer.step()
    masks = optimizer.masks()
    assert len(stacked) == 2
    for name, dense in stacked.items():
        assert masks[name].flatten(1).float().mean(1).min() > 0.3
        for mask, weight in zip(masks[name][2:], dense[2:].abs(), strict=True):
            assert weight[mask].min() >= 0.9 * weight[~mask].max()
