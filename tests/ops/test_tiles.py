"""Operations that work in tiles, panels and batches, beside the formula at once: their sizes are made small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admm_prune.ops import activations, exact_refit, packed, precision, quadratic
from tests.unchanged import unchanged

DTYPES = [torch.float32, torch.float64]
ROWS, WIDTH = 11, 10  # no multiples of the tiles


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram(width: int, dtype: torch.dtype) -> Tensor:
    x = drawn(3 * width, width, torch.float64, seed=1)
    return (x.T @ x / width + torch.eye(width, dtype=torch.float64)).to(dtype)


def support(rows: int, width: int) -> Tensor:
    """Rows with from none to all of their entries."""
    order = torch.rand(rows, width, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order < torch.arange(rows)[:, None] % (width + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 3, 4, 10])
def test_sums_of_products(tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_TILE", tile)
    a, b, matrix = drawn(ROWS, WIDTH, dtype), drawn(ROWS, WIDTH, dtype, 3), drawn(WIDTH, WIDTH, dtype, 4)
    with unchanged(a, b, matrix):
        inner, (total, sizes) = quadratic.inner(a, b), quadratic.bilinear(a, matrix, b)
    wide = [x.double() for x in (a, b, matrix)]
    assert inner == pytest.approx(float((wide[0] * wide[1]).sum()), rel=1e-13)
    assert total == pytest.approx(float((wide[0] * (wide[1] @ wide[2])).sum()), rel=1e-13)
    assert sizes == pytest.approx(float((wide[0].abs() * (wide[1].abs() @ wide[2].abs())).sum()), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 3, 10])
def test_the_residual_of_a_factor(tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_TILE", tile)
    hessian = gram(WIDTH, dtype)
    factor = quadratic.inverse_factor(hessian.clone())
    factor[0, -1] += 0.1  # so that there is a residual to measure
    with unchanged(factor, hessian):
        residual = quadratic.factor_residual(factor, hessian)
    signs = torch.randint(0, 2, (WIDTH, quadratic._PROBES), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    v, u, a = signs.double(), factor.double(), hessian.double()
    expected = torch.linalg.vector_norm(u @ (a @ (u.T @ v)) - v, dim=0).max() / WIDTH**0.5
    assert expected > 1e-3
    assert residual == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [1, 50, 10**6])
def test_least_squares_on_a_support(gathered: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_GATHERED", gathered)
    monkeypatch.setattr(exact_refit, "_GATHERED", gathered)
    hessian, minimizer, mask = gram(WIDTH, dtype), drawn(ROWS, WIDTH, dtype), support(ROWS, WIDTH)
    with unchanged(hessian, minimizer, mask):
        direct = quadratic.minimize_on_support(hessian, minimizer, mask)
        exact = exact_refit.exact_refit(hessian, minimizer, mask)
    assert direct.dtype == dtype
    assert float(exact.residual.max()) <= exact_refit.TOLERANCE
    for found, tolerance in ((direct.double(), 1e-4 if dtype == torch.float32 else 1e-10), (exact.weight, 1e-5)):
        torch.testing.assert_close(found, refitted(hessian, minimizer, mask), atol=tolerance, rtol=tolerance)


def refitted(hessian: Tensor, minimizer: Tensor, mask: Tensor) -> Tensor:
    """Row by row, in float64."""
    h, result = hessian.double(), torch.zeros(minimizer.shape, dtype=torch.float64)
    for row, (w, kept) in enumerate(zip(minimizer.double(), mask, strict=True)):
        if bool(kept.any()):
            result[row, kept] = w[kept] + torch.linalg.solve(h[kept][:, kept], h[kept][:, ~kept] @ w[~kept])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", [1, 3, 11])
def test_conjugate_gradients_in_panels(panel: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_PANEL", panel)
    hessian, minimizer, mask = gram(WIDTH, dtype), drawn(ROWS, WIDTH, dtype), support(ROWS, WIDTH)
    v = minimizer.masked_fill(~mask, 0)
    start, tolerance = v.clone(), 1e-5
    with unchanged(hessian, minimizer, mask):
        count, residual = quadratic.conjugate_gradient_on_support_(
            v, hessian, minimizer, mask, tolerance=tolerance, max_iterations=50
        )
    assert 0 < count < 50
    assert 0 < residual <= tolerance
    torch.testing.assert_close(v.double(), refitted(hessian, minimizer, mask), atol=1e-4, rtol=1e-4)
    alone = [start[row : row + 1].clone() for row in range(ROWS)]
    counts = [
        quadratic.conjugate_gradient_on_support_(
            one, hessian, minimizer[row : row + 1], mask[row : row + 1], tolerance=tolerance, max_iterations=50
        )
        for row, one in enumerate(alone)
    ]
    assert (count, residual) == (max(c for c, _ in counts), pytest.approx(max(r for _, r in counts), rel=1e-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
@pytest.mark.parametrize("piece", [1, 16, 109])
def test_pre_activations_in_pieces(piece: int, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    activation = activations.ACTIVATIONS[name]
    m, p, gain, start = (drawn(ROWS, WIDTH, dtype, seed) for seed in range(4))
    for g, begin in ((gain, start), (None, None), (gain.T.contiguous().T, start[:, :1].expand_as(m))):
        monkeypatch.setattr(activations, "_PIECE", 1 << 16)
        whole = activations.pre_activation(m, p, g, 0.7, activation, begin)
        monkeypatch.setattr(activations, "_PIECE", piece)
        with unchanged(m, p, gain, start):
            pieces = activations.pre_activation(m, p, g, 0.7, activation, begin)
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)

        def loss(s: Tensor, g: Tensor | None = g) -> Tensor:
            value = activation.value(s)
            return (s - m).square() + 0.7 * (p - (value if g is None else g * value)).square()

        assert bool((loss(pieces) <= loss(m) + 1e-6).all())


@pytest.mark.parametrize("form", ["bfloat16", "bfloat16x3"])
@pytest.mark.parametrize("panel", [1, 3, 11])
def test_narrow_products_in_panels(panel: int, form: precision.Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn(ROWS, WIDTH, torch.float32), drawn(WIDTH, 7, torch.float32, 1)
    factor = precision.prepared(b, form)
    whole = precision.multiply(a, factor, out=torch.empty(ROWS, 7))
    monkeypatch.setattr(precision, "_PANEL", panel)
    with unchanged(a, b, factor):
        panels = precision.multiply(a, factor, out=torch.full((ROWS, 7), torch.nan))
    torch.testing.assert_close(panels, whole, atol=0.02 if form == "bfloat16" else 1e-6, rtol=0)
    torch.testing.assert_close(panels, a @ b, atol=0.1 if form == "bfloat16" else 1e-3, rtol=0)


@pytest.mark.skipif(packed._library() is None, reason="the C++ library is not built: no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_long_prompts_in_blocks_of_rows(bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 64 rows at once, which is less than there are."""
    monkeypatch.setattr(packed, "_SCRATCH", 1)
    weight = drawn(150, 40, dtype) * (drawn(150, 40, torch.float32, 1) > 0)
    x = drawn(packed.PREFILL_TOKENS_16_BITS, 40, dtype, 2)
    added = drawn(1, 150, dtype, 3)[0] if bias else None
    matrix = packed.pack(weight)
    with unchanged(x, matrix.bits, matrix.values, *([] if added is None else [added])):
        y = packed.linear(x, matrix, added)
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
