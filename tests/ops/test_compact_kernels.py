"""Masks in bits, blocks in 8 bits, and the largest of scores that lie in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm_prune.ops import bits, histogram, quantization

seeds = st.integers(0, 10_000)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=seeds, rows=st.integers(1, 5), width=st.integers(1, 40))
def test_bits_come_back(seed, rows, width) -> None:
    mask = torch.rand(rows, width, generator=random(seed)) < 0.5
    packed = bits.pack(mask)
    assert packed.shape == (rows, bits.packed_width(width))
    assert torch.equal(bits.unpack(packed, width), mask)


@given(
    seed=seeds, sizes=st.lists(st.integers(1, 60), min_size=1, max_size=7), keep=st.floats(0, 1),
    kind=st.sampled_from(["spread", "ties", "zeros", "denormal"]),
)  # fmt: skip
def test_the_largest_of_pieces_are_those_of_a_stable_sort(seed, sizes, keep, kind) -> None:
    pieces = [torch.rand(size, generator=random(seed + i)) for i, size in enumerate(sizes)]
    if kind == "ties":
        pieces = [(4 * piece).round() for piece in pieces]
    elif kind == "zeros":
        pieces = [piece * (piece > 0.6) for piece in pieces]
    elif kind == "denormal":
        pieces = [piece * 1e-40 for piece in pieces]
    count = round(keep * sum(sizes))
    (masks,) = histogram.largest([histogram.Budget(pieces, count)], histogram.Alone())
    order = torch.cat(pieces).argsort(descending=True, stable=True)[:count]
    expected = torch.zeros(sum(sizes), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(torch.cat(masks), expected)


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_scores_that_do_not_order_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="no largest"):
        histogram.largest([histogram.Budget([torch.tensor([1.0, wrong])], 1)], histogram.Alone())


@given(seed=seeds, width=st.integers(1, 600), scale=st.floats(1e-20, 1e20))
def test_eight_bits_keep_within_their_bounds(seed, width, scale) -> None:
    x = torch.randn(3, width, generator=random(seed)) * scale
    block = torch.nn.functional.pad(x.abs(), (0, -width % 256)).unflatten(1, (-1, 256)).amax(2)
    largest = block.repeat_interleave(256, 1)[:, :width]
    for chance, levels in ((None, 254), (random(seed), 127)):
        error = (quantization.from_int8(*quantization.to_int8(x, chance)) - x).abs()
        assert bool((error <= largest / levels * 1.001).all())
    signed = quantization.from_signed_log(*quantization.to_signed_log(x))
    large = x.abs() > 1.1e-5 * largest
    assert bool(((signed - x).abs()[large] <= 0.05 * x.abs()[large]).all())
    root = quantization.from_unsigned_log(*quantization.to_unsigned_log(x.abs()))
    assert bool(((root - x.abs()).abs()[large] <= 0.028 * x.abs()[large]).all())
    assert bool((root[x != 0] > 0).all())  # it is divided by


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_leaves_what_is_representable(dtype: torch.dtype) -> None:
    """All numbers of 16 bits, the smallest too; others become one of their two neighbours."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    rounded = {torch.bfloat16: quantization.to_bfloat16, torch.float16: quantization.to_float16}[dtype]
    assert torch.equal(rounded(every, random(0)).float(), every)
    every = every.unique()
    below, above = every[:-1], every[1:]
    between = (0.5 * below.double() + 0.5 * above.double()).float()
    found = rounded(between, random(1)).float()
    assert bool(((found == below) | (found == above)).all())


@pytest.mark.parametrize("to", ["int8", "bfloat16", "float16"])
def test_rounding_at_random_keeps_the_mean(to) -> None:
    x = torch.full((1, 256), 0.300123)
    x[0, 0] = 1.0  # the scale of the block
    chance = random(0)
    if to == "int8":
        drawn = [quantization.from_int8(*quantization.to_int8(x, chance)) for _ in range(200)]
    else:
        rounded = {"bfloat16": quantization.to_bfloat16, "float16": quantization.to_float16}[to]
        drawn = [rounded(x, chance).float() for _ in range(200)]
    values = torch.cat(drawn)[:, 1:]
    assert values.unique().numel() == 2
    step = float(values.max() - values.min())
    assert abs(float(values.double().mean()) - 0.300123) <= 5 * step / (2 * values.numel() ** 0.5)
