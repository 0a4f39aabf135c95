"""Pre-activations of split networks against grids, and activations against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.ops.activations import ACTIVATIONS, RELU, Activation, pre_activation

SMOOTH = [name for name in ACTIVATIONS if name != "relu"]


def drawn(count: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    m, p, gain = scale * torch.randn(3, count, 1, generator=g, dtype=torch.float64)
    return m, p, gain


def loss(s: Tensor, m: Tensor, p: Tensor, gain: Tensor, w: float, activation: Activation) -> Tensor:
    return (s - m) ** 2 + w * (p - gain * activation.value(s)) ** 2


def least_on_a_grid(m: Tensor, p: Tensor, gain: Tensor, w: float, activation: Activation) -> Tensor:
    """The least loss on 2001 points of all that can hold the minimum, and on 1001 where the activation bends."""
    radius = loss(m, m, p, gain, w, activation).sqrt()
    best = radius.square()
    for place in torch.linspace(-1, 1, 2001).tolist():
        best = torch.minimum(best, loss(m + place * radius, m, p, gain, w, activation))
    for place in torch.linspace(-17, 8, 1001).tolist():
        best = torch.minimum(best, loss(torch.full_like(m, place), m, p, gain, w, activation))
    return best


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_and_the_turn(name: str) -> None:
    activation = ACTIVATIONS[name]
    s = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    value = activation.value(s)
    (slope,) = torch.autograd.grad(value.sum(), s, create_graph=True)
    told = activation.derivatives(s.detach())
    assert torch.allclose(told[0], value, atol=1e-14)
    assert torch.allclose(told[1], slope, atol=1e-13)
    if name != "relu":
        (bend,) = torch.autograd.grad(slope.sum(), s)
        assert torch.allclose(told[2], bend, atol=1e-12)
    fine = torch.linspace(-4, 1, 500_001, dtype=torch.float64)
    assert activation.value(fine).min().item() == pytest.approx(activation.least, abs=1e-7)
    assert activation.derivatives(torch.tensor(activation.turn, dtype=torch.float64))[1].item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("w", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("gated", [False, True])
def test_relu_is_the_global_minimum(w: float, gated: bool) -> None:
    m, p, gain = drawn(2000, 2.0)
    gain = gain if gated else torch.ones_like(gain)
    s = pre_activation(m, p, gain if gated else None, w, RELU)
    reached = loss(s, m, p, gain, w, RELU)
    below = m.clamp_max(0)
    above = ((m + w * gain * p) / (1 + w * gain**2)).clamp_min(0)
    sublayers = torch.minimum(loss(below, m, p, gain, w, RELU), loss(above, m, p, gain, w, RELU))
    assert (reached - sublayers).max() <= 1e-12
    assert (reached - least_on_a_grid(m, p, gain, w, RELU)).max() <= 1e-12


def test_relu_on_the_edge_of_its_rule() -> None:
    """m >= -kappa max(p, 0) with kappa = sqrt(1 + w) - 1, the published rule for g = 1, alpha = gamma."""
    p = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    m = torch.linspace(-2, 2, 401, dtype=torch.float64)
    rises = pre_activation(m.expand(41, -1), p.expand(-1, 401), None, 1.0, RELU) > 0
    published = (m >= -(2**0.5 - 1) * p.clamp_min(0)) & ((m + p) / 2 > 0)
    assert torch.equal(rises, published)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("scale", "w", "missed"), [(1.0, 1.0, 5e-4), (1.0, 5.0, 3e-3), (30.0, 1.0, 3e-3)])
def test_others_are_the_global_minimum_nearly_always(name: str, scale: float, w: float, missed: float) -> None:
    m, p, gain = drawn(4000, scale)
    s = pre_activation(m, p, gain, w, ACTIVATIONS[name])
    reached = loss(s, m, p, gain, w, ACTIVATIONS[name])
    best = least_on_a_grid(m, p, gain, w, ACTIVATIONS[name])
    excess = (reached - best) / best
    gain[:] = 1
    alone = pre_activation(m, p, None, w, ACTIVATIONS[name])
    assert (excess > 1e-3).double().mean() <= missed
    assert torch.equal(alone, pre_activation(m, p, gain, w, ACTIVATIONS[name])), "without a gate the gain is 1"


@given(
    st.sampled_from(list(ACTIVATIONS)),
    st.integers(0, 999),
    st.sampled_from([0.05, 1.0, 20.0]),
    st.sampled_from([0.1, 3.0, 1000.0]),
)
def test_it_is_finite_and_never_worse_than_where_it_began(name: str, seed: int, w: float, scale: float) -> None:
    activation = ACTIVATIONS[name]
    m, p, gain = drawn(300, scale, seed)
    gain[::7], p[::5], m[::11] = 0, 0, 1000 * scale
    start = drawn(300, scale, seed + 1)[0]
    s = pre_activation(m, p, gain, w, activation, start)
    assert torch.isfinite(s).all()
    for rival in (m, start):
        allowed = loss(rival, m, p, gain, w, activation) * (1 + 1e-12)
        assert (loss(s, m, p, gain, w, activation) <= allowed).all()


def test_float32_agrees_with_float64() -> None:
    m, p, gain = drawn(5000, 1.0)
    exact = pre_activation(m, p, gain, 1.0, ACTIVATIONS["silu"])
    single = pre_activation(m.float(), p.float(), gain.float(), 1.0, ACTIVATIONS["silu"]).double()
    worse = loss(single, m, p, gain, 1.0, ACTIVATIONS["silu"]) / loss(exact, m, p, gain, 1.0, ACTIVATIONS["silu"]) - 1
    assert (worse > 1e-4).double().mean() <= 1e-3
