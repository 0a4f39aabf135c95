"""Products with packed matrices: beside float64, bit by bit beside their documented order, and without a library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.ops import backend, bits, packed

LIBRARY = packed._library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the C++ library is not built: no compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def masked(rows: int, width: int, sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A matrix of which about that fraction is zero: 0 and 1 are exact, and the first row is empty in between."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=g)
    w[torch.rand(rows, width, generator=g) < sparsity] = 0
    if 0 < sparsity < 1 and rows > 1:
        w[0] = 0
    return w.to(dtype)


def inputs(tokens: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_lanes(x: Tensor, w: Tensor) -> Tensor:
    """x W^T in the order that csrc/packed.cpp documents: 32 lanes, fused multiply-adds, sums of the lanes in halves.

    A product of two float32 is exact in the 64 bits of a long double, and so is a sum that does not cancel further.
    """
    width = -(-w.shape[1] // 32) * 32
    left, right = (np.zeros((m.shape[0], width), np.float32) for m in (x, w))
    left[:, : x.shape[1]], right[:, : w.shape[1]] = x.float().numpy(), w.float().numpy()
    lanes = np.zeros((x.shape[0], w.shape[0], 32), np.float32)
    for first in range(0, width, 32):
        columns = slice(first, first + 32)
        products = left[:, None, columns].astype(np.longdouble) * right[None, :, columns]
        lanes = (products + lanes).astype(np.float32)
    half = 16
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return torch.from_numpy(np.ascontiguousarray(lanes[..., 0]))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 140),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    tokens=st.one_of(st.integers(0, 20), st.sampled_from([47, 48, 128])),
    dtype=st.sampled_from(DTYPES),
    of_inputs=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
    kernels=st.sampled_from(["auto", "torch"]),
)
def test_products(rows, width, sparsity, tokens, dtype, of_inputs, with_bias, threads, kernels) -> None:
    w = masked(rows, width, sparsity, dtype, seed=rows + width)
    x = inputs(tokens, width, of_inputs)
    bias = inputs(1, rows, of_inputs, seed=2)[0] if with_bias else None
    matrix = packed.pack(w)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with backend.forced(kernels):
            y = packed.linear(x, matrix, bias)
            dense = packed.unpack(matrix)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(dense, w)
    assert y.dtype == of_inputs
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ w.double().abs().T + 1
    rounding = EPS[of_inputs] if kernels == "auto" else EPS[of_inputs] + EPS[dtype]  # torch multiplies in x's dtype
    assert bool(((y.double() - exact).abs() <= 4 * rounding * scale).all())


@needs_library
@pytest.mark.bitwise
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("width", [32, 97, 1100])
@pytest.mark.parametrize("isa", LIBRARY.supported if LIBRARY else ["none"])
def test_the_order_of_additions(isa: str, width: int, dtype: torch.dtype) -> None:
    """On every instruction set of this machine; a zero in the mask is as a stored zero; tokens do not matter."""
    library = packed._Library(packed._LIBRARY, isa)
    w = masked(7, width, 0.6, torch.float32 if dtype == torch.int8 else dtype)
    matrix, full = packed.pack(w), packed.pack(w, torch.ones_like(w, dtype=torch.bool))
    if dtype == torch.int8:
        matrix, full = packed.quantize(matrix, 64), packed.quantize(full, 64)
        w = packed.unpack(matrix)
    x = inputs(19, width)
    expected = by_lanes(x, w)
    assert torch.equal(library.linear(x, matrix, None), expected)
    assert torch.equal(library.linear(x, full, None), expected)
    for tokens in (1, 2, 3):
        assert torch.equal(library.linear(x[:tokens].contiguous(), matrix, None), expected[:tokens])
    assert torch.equal(library.unpack(matrix, 2, 6, torch.float32), w[2:6].float())


@needs_library
@pytest.mark.bitwise
def test_threads_do_not_change_the_result() -> None:
    w, x = masked(333, 200, 0.7, torch.bfloat16), inputs(3, 200, torch.bfloat16)
    matrix = packed.pack(w)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(packed.linear(x, matrix))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@needs_library
@pytest.mark.bitwise
def test_results_are_rounded_as_torch_rounds() -> None:
    """Identity matrices: every bit pattern of 16 bits comes back, and float32 is rounded to nearest even."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    eye = packed.pack(torch.eye(64))
    for dtype in (torch.bfloat16, torch.float16):
        values = x.view(dtype)
        values = values[values.isfinite()]
        values = values[: len(values) // 64 * 64].view(-1, 64)
        y = torch.cat([packed.linear(part, eye) for part in values.split(8)])
        assert torch.equal(y, values)
        stored = packed.pack(values.flatten()[:, None])  # every number as a weight
        assert torch.equal(packed.linear(torch.ones(1, 1, dtype=dtype), stored)[0], values.flatten())
        wide = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)) * 2.0 ** torch.arange(-32, 32)
        bias = wide[0].clamp(-1e4, 1e4).to(dtype)
        half = packed.pack(torch.eye(64, dtype=dtype))
        assert torch.equal(LIBRARY.unpack(packed.pack(wide), 0, 40, dtype), wide.to(dtype))
        doubled = packed.linear(bias[None], half, bias)
        assert torch.equal(doubled, (bias.float() * 2).to(dtype)[None])


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_numbers_that_are_not_finite_spread_as_in_a_dense_product(kernels: str) -> None:
    w = masked(3, 40, 0.5)
    x = inputs(1, 40)
    x[0, 7] = torch.inf
    with backend.forced(kernels):
        y = packed.linear(x, packed.pack(w))
    assert torch.equal(y.isnan(), (x @ w.T).isnan())


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_even_layouts_have_no_offsets(keep: int, of: int) -> None:
    w = inputs(5, 64).unflatten(1, (-1, of))
    w = torch.zeros_like(w).scatter_(2, w.topk(keep, 2).indices, w.topk(keep, 2).values).flatten(1)
    matrix = packed.pack(w)
    assert matrix.offsets is None
    assert matrix.values.numel() == w.numel() * keep // of
    x = inputs(3, 64)
    torch.testing.assert_close(packed.linear(x, matrix), x @ w.T)
    assert torch.equal(packed.unpack(matrix), w)
    w[0, w[0].nonzero()[0]] = 0  # one zero more is stored, so that the layout stays even
    again = packed.pack(w)
    assert again.offsets is None
    assert torch.equal(packed.unpack(again), w)
    assert torch.equal(packed.unpack(packed.from_parts(again.bits, again.values, 64)), w)


def test_int8() -> None:
    w, x = masked(6, 200, 0.5), inputs(2, 200)
    for group in (None, 32, 64):
        matrix = packed.quantize(packed.pack(w), group)
        assert matrix.values.dtype == torch.int8
        dense = packed.unpack(matrix)
        size = group or 200
        for row in range(6):
            for start in range(0, 200, size):
                part = slice(start, start + size)
                step = float(w[row, part].abs().max()) / 127
                assert float((dense[row, part] - w[row, part]).abs().max()) <= 0.501 * step
        assert bool((dense[w == 0] == 0).all())
        torch.testing.assert_close(packed.linear(x, matrix), x @ dense.T, rtol=1e-5, atol=1e-5)
        with backend.forced("torch"):
            torch.testing.assert_close(packed.unpack(matrix), dense, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be a multiple of 32"):
        packed.quantize(packed.pack(w), 40)


def test_minus_zero_is_a_zero() -> None:
    """Half of the zeros that a product with a mask leaves are negative."""
    w = masked(4, 40, 0.5)
    assert packed.pack(-1.0 * w).values.numel() == int((w != 0).sum())


def test_parts_that_do_not_belong_together_are_refused() -> None:
    matrix = packed.pack(masked(4, 20, 0.5))
    with pytest.raises(ValueError, match="do not belong together"):
        packed.from_parts(matrix.bits, matrix.values[:-1], 20)
    wrong = matrix.bits.clone()
    wrong[0, -1] |= 0x80
    with pytest.raises(ValueError, match="beyond the width"):
        packed.from_parts(wrong, matrix.values, 20)
    with pytest.raises(TypeError, match="float64"):
        packed.pack(torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [2, 200])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_bias_in_another_dtype_than_the_inputs(tokens: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model whose norms and biases are kept in float32: the result is in the dtype of the inputs."""
    if kernels == "torch":
        monkeypatch.setattr(packed, "_usable", lambda: None)
    w, bias = masked(4, 40, 0.5), torch.arange(4.0)
    for dtype in (torch.float64, torch.bfloat16):
        x = inputs(tokens, 40, dtype)
        y = packed.linear(x, packed.pack(w), bias)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ w.double().T + bias, rtol=2**-6, atol=2**-4)  # bfloat16


def test_gradients_of_a_single_vector() -> None:
    x, bias = inputs(1, 40)[0].requires_grad_(), torch.zeros(4, requires_grad=True)
    w = masked(4, 40, 0.5)
    packed.linear(x, packed.pack(w), bias).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0))
    assert torch.equal(bias.grad, torch.ones(4))


@needs_library
def test_what_the_library_would_read_beyond_its_tensors_is_refused() -> None:
    matrix, x = packed.pack(masked(4, 40, 0.5)), inputs(2, 40)
    with pytest.raises(ValueError, match=r"a bias \(3,\) on cpu for 4 rows"):
        packed.linear(x, matrix, torch.ones(3))
    elsewhere = packed.Packed(matrix.bits.to("meta"), matrix.values.to("meta"), None, None, 40, 40)
    with pytest.raises(RuntimeError, match="the inputs are on the CPU, the packed weights on meta"):
        packed.linear(x, elsewhere)


def test_int8_has_no_code_for_nan() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN and Inf cannot be rounded"):
            packed.quantize(packed.pack(torch.tensor([[1.0, value, 0.0]])))


@needs_library
def test_a_build_of_torch_without_mkldnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for macOS: it lacks the operators that tell which products a processor has."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    x = inputs(2, 40, torch.bfloat16)
    assert packed.linear(x, packed.pack(masked(4, 40, 0.5, torch.bfloat16))).dtype == torch.bfloat16


def test_bytes() -> None:
    w = masked(64, 512, 0.9, torch.bfloat16)
    matrix = packed.pack(w)
    assert matrix.nbytes == 64 * 512 // 8 + 2 * int((w != 0).sum()) + 4 * 65


def test_the_operator_is_registered_correctly() -> None:
    w, x = masked(6, 40, 0.5), inputs(3, 40).requires_grad_()
    bias = torch.zeros(6, requires_grad=True)
    matrix = packed.pack(w)
    parts = (matrix.bits, matrix.values, matrix.offsets, matrix.scales)
    arguments = (x, *parts, bias, matrix.width, matrix.group)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.admm_prune.packed_linear.default, arguments, test_utils=tests)
    unpacking = (*parts, matrix.width, matrix.group, torch.float32)
    torch.library.opcheck(torch.ops.admm_prune.packed_unpack.default, unpacking, test_utils=tests)
    y = packed.linear(x, matrix, bias)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach() @ w)
    torch.testing.assert_close(bias.grad, 2 * y.detach().sum(0))
    compiled = torch.compile(lambda x: torch.ops.admm_prune.packed_linear(x, *arguments[1:]), backend="aot_eager")
    assert torch.equal(compiled(x.detach()), y)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is missing, and one that is no library: torch multiplies, and says so."""
    w, x = masked(6, 40, 0.5), inputs(3, 40)
    (tmp_path / "damaged.so").write_bytes(b"no library")
    for name in ("missing.so", "damaged.so"):
        monkeypatch.setattr(packed, "_LIBRARY", tmp_path / name)
        packed._library.cache_clear()
        try:
            assert "without the C++ library" in packed.described()
            torch.testing.assert_close(packed.linear(x, packed.pack(w)), x @ w.T)
        finally:
            packed._library.cache_clear()


def test_wide_offsets() -> None:
    """As of a matrix with more than 2^31 values."""
    matrix = packed.pack(masked(6, 40, 0.5))
    wide = dataclasses.replace(matrix, offsets=matrix.offsets.long())
    x = inputs(2, 40)
    assert torch.equal(packed.linear(x, wide), packed.linear(x, matrix))


def test_bits_of_the_mask_are_those_of_ops_bits() -> None:
    w = masked(3, 50, 0.5)
    assert torch.equal(bits.unpack(packed.pack(w).bits, 50), w != 0)
