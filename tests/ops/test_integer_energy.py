"""The quadratic form from products of integers, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.ops import backend, integer_energy, quadratic
from admm_prune.testing.instances import correlated_inputs, random_weight

seeds = st.integers(0, 2**31)


def exact(v: torch.Tensor, a: torch.Tensor, w: torch.Tensor | None = None) -> float:
    e = v.double() if w is None else v.double() - w.double()
    return float(((e @ a.double()) * e).sum())


def bound(v: torch.Tensor, a: torch.Tensor, w: torch.Tensor | None = None) -> float:
    """13 in 2^(-7 s) sum_ij sigma_i |E S|_ij, with the largest sigma_i and S that rounding to powers of two allows."""
    e = (v.double() if w is None else v.double() - w.double()) * a.double().diagonal().sqrt() * math.sqrt(2)
    return 13 * len(a) * 2.0 ** (-7 * integer_energy.DIGITS) * float((2 * e.abs().amax(1) * e.abs().sum(1)).sum())


@given(seed=seeds, out=st.integers(1, 40), width=st.integers(1, 70), spread=st.floats(0, 6), dead=st.booleans())
def test_the_error_is_within_its_bound(seed: int, out: int, width: int, spread: float, dead: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(width + 3, width, generator=g) * torch.logspace(-spread / 2, spread / 2, width)
    if dead:
        x[:, 0] = 0
    a = x.T @ x
    a = (a + a.T) / 2
    v, w = torch.randn(out, width, generator=g), torch.randn(out, width, generator=g)
    v[0] = w[0]
    for origin in (None, w):
        found = float(integer_energy.energy(v, a, origin))
        assert abs(found - exact(v, a, origin)) <= bound(v, a, origin) + 1e-12 * exact(v, a, origin)


@pytest.mark.parametrize("tile", [32, 64])
def test_tiles_give_the_same(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated_inputs(200, 97, 0).float()
    a, v = x.T @ x, random_weight(70, 97, 0).float()
    whole = float(integer_energy.energy(v, a))
    monkeypatch.setattr(integer_energy, "_TILE", tile)
    assert float(integer_energy.energy(v, a)) == pytest.approx(whole, rel=1e-13)


def test_a_solution_is_judged_more_accurately_than_by_products_in_float32() -> None:
    x = correlated_inputs(512, 256, 0).double()
    a = (x.T @ x).float()
    a += 1e-3 * a.diagonal().mean() * torch.eye(256)
    w = random_weight(64, 256, 0).float()
    mask = w.abs() > w.abs().median()
    v = quadratic.minimize_on_support(a.double(), w.double(), mask).float()  # the gradient on the support cancels
    truth = exact(v, a, w)
    e = v - w
    in_float32 = float(((e @ a) * e).double().sum())
    assert abs(float(integer_energy.energy(v, a, w)) / truth - 1) <= 1e-9 < abs(in_float32 / truth - 1)


@pytest.mark.bitwise
@settings(max_examples=10)
@given(seed=seeds, rows=st.integers(1, 40), width=st.integers(1, 70), origin=st.booleans(), reverse=st.booleans())
def test_the_kernel_gives_the_digits_of_the_reference(seed, rows, width, origin, reverse) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.rand(2, rows, 2 * width, generator=g)[:, :, :width]  # rows that lie apart
    scales = torch.exp2(-torch.randint(0, 3, (rows,), generator=g).double()), torch.ones(width, dtype=torch.float64)
    expected = integer_energy.digits(x, *scales, w if origin else None, reverse=reverse)
    with backend.forced("triton"):
        found = integer_energy.digits(x, *scales, w if origin else None, reverse=reverse)
        transposed = integer_energy.digits(x.T.contiguous().T, *scales, w if origin else None, reverse=reverse)
    assert torch.equal(found, expected)
    assert torch.equal(transposed, expected)
    assert found.abs().max() <= 64


def test_scales_are_powers_of_two_where_exp2_in_float32_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which may err in the last bits."""
    x = correlated_inputs(200, 96, 0).float() * torch.logspace(-3, 3, 96)
    a, v, real = x.T @ x, random_weight(40, 96, 0).float(), torch.exp2

    def inexact(power: torch.Tensor) -> torch.Tensor:
        return real(power) * (1 + 2 * torch.finfo(power.dtype).eps)

    monkeypatch.setattr(torch, "exp2", inexact)
    assert abs(float(integer_energy.energy(v, a)) - exact(v, a)) <= 1e-9 * exact(v, a)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan(value: float) -> None:
    v = torch.ones(3, 40)
    v[1, 2] = value
    a = torch.eye(40)
    assert math.isnan(float(integer_energy.energy(v, a)))
    a[1, 2] = value
    assert math.isnan(float(integer_energy.energy(torch.ones(3, 40), a)))


@pytest.mark.parametrize("value", [2.9, 3.5, 300.0])
def test_an_indefinite_matrix_is_multiplied_in_float64_where_its_digits_do_not_fit(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_energy, "_NARROWEST", 32)
    a, v = torch.eye(40), random_weight(40, 40, 0).float()
    a[0, 1] = a[1, 0] = value
    assert math.isnan(float(integer_energy.energy(v, a))) is (value > 3)
    with backend.forced("triton"):
        assert quadratic.energy(v, a) == pytest.approx(exact(v, a), rel=1e-9)


def test_it_is_taken_on_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_energy, "_NARROWEST", 64)
    x = correlated_inputs(200, 97, 0).float()
    a, v = x.T @ x, random_weight(70, 97, 0).float()
    calls = []
    energy = integer_energy.energy
    monkeypatch.setattr(integer_energy, "energy", lambda *given: calls.append(given) or energy(*given))
    on_host = quadratic.energy(v, a)
    assert not calls
    with backend.forced("triton"):
        assert not integer_energy.preferred(v[:, :50], a[:50, :50])  # too narrow
        assert not integer_energy.preferred(v[:20], a)  # too few rows
        assert not integer_energy.preferred(v.double(), a.double())
        assert quadratic.energy(v, a) == pytest.approx(on_host, rel=1e-9)
    assert len(calls) == 1


@pytest.mark.gpu
def test_on_a_device() -> None:
    x = correlated_inputs(4000, 2100, 0).float().cuda()
    a, v = x.T @ x, random_weight(300, 2100, 0).float().cuda()
    assert float(integer_energy.energy(v, a)) == pytest.approx(exact(v, a), rel=1e-9)
