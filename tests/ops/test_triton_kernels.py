"""Triton's kernels beside their plain-torch twins: on a GPU, and in Triton's interpreter at tiny shapes without one."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from admm_prune import ADMM, LayerReconstruction, NofM, RowWise, SparseAdam
from admm_prune.ops import backend, bits, packed, precision, quadratic, quantization, selection, splitting
from admm_prune.ops.quantization import Stored
from admm_prune.problems.constraints import StackedRows, Unstructured
from admm_prune.solvers.obs import SparseGPT

DEVICES = [pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where Triton runs; it is forced, so that nothing can go another way."""
    if request.param == "cpu" and not backend.interpreted():
        pytest.skip("Triton compiles for the GPU of this machine: its interpreter is off")
    with backend.forced("triton"):
        yield request.param


def drawn(kind: str, shape: tuple[int, ...], device: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "zeros":
        x = x * (x > 0.7)
        x[..., ::3] *= -1.0  # some -0
    elif kind == "bfloat16":
        x = x.bfloat16()
    return x.to(device)


def twin(function, *arguments):
    with backend.forced("torch"):
        return function(*arguments)


@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "bfloat16"])
@pytest.mark.parametrize(("entries", "keep"), [(1, 1), (7, 3), (2500, 1), (2500, 1700), (2500, 2499)])
def test_the_largest_of_all(device, kind, entries, keep) -> None:
    x = drawn(kind, (entries,), device)
    assert torch.equal(selection.largest(x, keep), twin(selection.largest, x, keep))
    assert torch.equal(selection.threshold(x, keep), twin(selection.threshold, x, keep))


def wide(entries: int) -> Tensor:
    """Numbers of both signs over all binades of float32, infinities and denormal numbers included."""
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (entries,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), torch.inf, x)


@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "bfloat16", "wide"])
@pytest.mark.parametrize("keep", [1, 900, 2299])
def test_a_bracket_from_a_sample(device, kind, keep) -> None:
    from admm_prune.ops.triton import selection as fused

    x = wide(2300).to(device) if kind == "wide" else drawn(kind, (2300,), device)
    mask, bad = fused.largest(x, keep, direct=0)
    assert torch.equal(mask, twin(selection.largest, x, keep))
    assert not bool(bad.any())


@pytest.mark.parametrize("keep", [1, 500, 1400])
@pytest.mark.parametrize("low", [True, False])
def test_a_sample_that_misleads_is_found_out(device, keep, low) -> None:
    """All of it lies below the other scores, or above them."""
    from admm_prune.ops.triton import selection as fused

    x = torch.linspace(1.0, 2.0, 2300, device=device)
    sampled = slice(None, None, 2300 // 143 | 1)
    x[sampled] = 0.5 * x[sampled] - 0.5 if low else x[sampled] + 10
    mask, bad = fused.largest(x, keep, direct=0)
    assert torch.equal(mask, twin(selection.largest, x, keep))
    assert not bool(bad.any())


def test_ties_are_placed_across_the_parts_of_programs(device) -> None:
    """Of 5000 equal scores in five parts the first 3100 are kept, beside the larger ones."""
    from admm_prune.ops.triton import selection as fused

    x = torch.ones(2, 5000, device=device)
    x[0, ::7], x[1, ::3] = 2.0, 0.0
    for direct in (0, 1 << 20):
        mask, _ = fused.largest_of_each(x, 3100, direct=direct)
        assert torch.equal(mask, torch.stack([twin(selection.largest, row, 3100) for row in x]))


@pytest.mark.parametrize("keep", [600, 2500, 4999])
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_ties_that_are_not_spread_evenly(device, keep, where) -> None:
    """Parts that kept too many or too few of them are set right."""
    from admm_prune.ops.triton import selection as fused

    x = torch.where(torch.arange(5000) % 2 == 0, 0.5, 2.0).to(device)
    start = {"first": 0, "last": 3900, "middle": 2000}[where]
    x[start : start + 1100] = 1.0
    mask, _ = fused.largest_of_each(x[None], keep, direct=1 << 20)
    assert torch.equal(mask[0], twin(selection.largest, x, keep))


@pytest.mark.parametrize("kind", ["spread", "ties", "bfloat16"])
@pytest.mark.parametrize(("width", "keep"), [(5, 2), (100, 99)])
def test_the_largest_of_rows(device, kind, width, keep) -> None:
    x = drawn(kind, (3, width), device)
    assert torch.equal(selection.largest_per_row(x, keep), twin(selection.largest_per_row, x, keep))


@pytest.mark.parametrize("kind", ["spread", "ties", "bfloat16"])
@pytest.mark.parametrize(("count", "width", "keep"), [(1, 1500, 3), (3, 1100, 700), (2, 16, 15)])
@pytest.mark.parametrize("direct", [0, 1 << 20])
def test_the_largest_of_each_of_several(device, kind, count, width, keep, direct) -> None:
    """By the launches that serve one tensor: rows of any width, whose masks are those of the rows alone."""
    from admm_prune.ops.triton import selection as fused

    x = drawn(kind, (count, width), device)
    mask, bad = fused.largest_of_each(x, keep, direct=direct)
    assert torch.equal(mask, torch.stack([twin(selection.largest, row, keep) for row in x]))
    assert not bool(bad.any())
    x[-1, 3] = math.nan
    assert bool(fused.largest_of_each(x, keep, direct=direct)[1].any())


def test_several_tensors_wider_than_a_row_go_there(device, monkeypatch) -> None:
    monkeypatch.setattr(selection, "_WIDEST_ROW", 64)
    x = drawn("ties", (3, 5, 30), device)
    expected = torch.stack([twin(selection.largest, one, 41) for one in x])
    assert torch.equal(selection.largest_of_each(x, 41), expected)
    assert torch.equal(twin(selection.largest_of_each, x, 41), expected)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 1), (0, 2), (4, 8), (5, 12), (16, 32)])
def test_the_largest_of_groups(device, keep, group) -> None:
    x = drawn("ties", (3, 5 * group), device)
    expected = twin(selection.largest_per_group, x, keep, group)
    assert torch.equal(selection.largest_per_group(x, keep, group), expected)


def test_nan_is_refused_unless_the_caller_will_notice(device) -> None:
    x = drawn("spread", (4, 20), device)
    x[1, 3] = math.nan
    for call in (
        lambda: selection.largest(x, 9),
        lambda: selection.threshold(x, 9),
        lambda: selection.largest_per_row(x, 9),
        lambda: selection.largest_per_group(x, 2, 4),
    ):
        with pytest.raises(ValueError, match="NaN"):
            call()
        with selection.skip_nan_check():
            call()


@pytest.mark.parametrize("shape", [(3, 5), (2, 1030)])
@pytest.mark.parametrize("quadratic", [True, False])
def test_admm_between_two_products(device, shape, quadratic) -> None:
    z, d, x, offset = (drawn("spread", (shape[0], shape[1] + i), device)[:, : shape[1]].contiguous() for i in range(4))
    root = drawn("spread", (shape[1],), device).abs() if quadratic else None
    before, after = z > 0.2, x > 0.1

    def run() -> tuple[Tensor, ...]:
        a, target, y = z.clone(), d.clone(), x.clone()
        given = offset if quadratic else None
        splitting.to_target_(a, target, torch.empty_like(a), given, 0.7, 1.3)
        score, split = torch.empty_like(a), torch.empty_like(a)
        splitting.relax_(a, y, given, root, score, 1.3)
        measured = splitting.settle_(a, after, before, split, y.clone(), root)
        same = splitting.settle_(a, after, None, split, y.clone(), root)
        return a, target, y, score, split, measured.cpu(), same.cpu()

    for ours, theirs in zip(run(), twin(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_admm_between_two_products_of_several_problems(device) -> None:
    """Stacked, with a metric of their own each: what every problem gives alone, bit for bit where Triton takes it."""
    z, d, x, offset = (drawn("spread", (6, 40 + i), device)[:, :40].contiguous() for i in range(4))
    roots = drawn("spread", (3, 40), device).abs()
    before, after = z > 0.2, x > 0.1

    def run(rows: slice, root: Tensor) -> tuple[Tensor, ...]:
        a, target, y = z[rows].clone(), d[rows].clone(), x[rows].clone()
        splitting.to_target_(a, target, torch.empty_like(a), offset[rows], 0.7, 1.3)
        score, split = torch.empty_like(a), torch.empty_like(a)
        splitting.relax_(a, y, offset[rows], root, score, 1.3)
        measured = splitting.settle_(a, after[rows], before[rows], split, y, root)
        same = splitting.settle_(a, after[rows], None, split, score.clone(), root)
        return a, target, score, split, measured, same

    alone = [run(slice(2 * i, 2 * i + 2), roots[i]) for i in range(3)]
    for together, parts in zip(run(slice(0, 6), roots), zip(*alone, strict=True), strict=True):
        joined = torch.stack(parts) if parts[0].shape == (4,) else torch.cat(parts)
        assert torch.equal(together, joined)
    for ours, theirs in zip(run(slice(0, 6), roots), twin(run, slice(0, 6), roots), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "runs"),
    [((4, 8), (2, 4)), ((2, 1040), (2, 4)), ((4, 36), (5, 12)), ((4, 1050), (300, 1050)), ((6, 40), (70, 120))],
)
@pytest.mark.parametrize("problems", [1, 2])
def test_admm_chooses_in_one_launch(device, shape, runs, problems) -> None:
    """Groups, rows, and runs of several rows, with ties; of one problem and of several with a metric of their own."""
    keep, run = runs
    z, x, d, offset = (drawn("ties", (shape[0], shape[1] + i), device)[:, : shape[1]].contiguous() for i in range(4))
    roots = drawn("ties", (problems, shape[1]), device).abs() + 1
    root, before = roots if problems > 1 else roots[0], drawn("spread", shape, device) > 0
    for added in (offset, None):
        ours, theirs = [y.clone() for y in (z, x, d)], [y.clone() for y in (z, x, d)]
        mask = before.clone()
        measured = splitting.choose_(ours[0], ours[1], added, root, mask, ours[2], runs, 1.5)
        assert measured is not None
        with backend.forced("torch"):
            score = torch.empty_like(z)
            splitting.relax_(theirs[0], theirs[1], added, root, score, 1.5)
            expected = selection.largest_per_row(score.view(-1, run), keep).view(shape)
            numbers = splitting.settle_(theirs[0], expected, before, theirs[2], theirs[1], root)
        assert torch.equal(mask, expected)
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[2], theirs[2])
        torch.testing.assert_close(measured.cpu(), numbers.cpu(), rtol=2e-6, atol=2e-6)


def test_admm_has_no_such_launch_for_long_runs(device) -> None:
    z = drawn("spread", (2, 9000), device)
    before = z.clone()
    assert splitting.choose_(z, z, None, None, z > 0, z, (100, 18000), 1.5) is None
    assert splitting.choose_(z, z, None, None, z > 0, z, (4, 4), 1.5) is None
    assert splitting.choose_(z.double(), z, None, None, z > 0, z, (2, 4), 1.5) is None
    assert torch.equal(z, before)


@pytest.mark.parametrize("form", ["exact", "bfloat16", "bfloat16x3"])
def test_a_target_is_written_as_it_is_multiplied(device, form) -> None:
    z, d, offset = (drawn("spread", (3, 1030 + i), device)[:, :1030].contiguous() for i in range(3))
    target = twin(splitting.to_target_, z.clone(), d.clone(), torch.empty_like(z), offset, 0.7, 1.3)
    given_form = splitting.to_target_(z, d, torch.empty_like(z), offset, 0.7, 1.3, form).float()
    if form == "bfloat16x3":
        high, again, low = given_form.split(1030, dim=1)
        assert torch.equal(high, again)
        torch.testing.assert_close(high, target, rtol=2.0**-8, atol=0)
        given_form = high + low
    digits = {"exact": 21, "bfloat16": 8, "bfloat16x3": 16}[form]
    torch.testing.assert_close(given_form, target, rtol=2.0**-digits, atol=1e-6)


@pytest.mark.parametrize("form", ["exact", "bfloat16x3"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_tau_in_memory_gives_the_same_bits(device, form, kernels) -> None:
    z, d, offset = (drawn("spread", (3, 40 + i), device)[:, :40].contiguous() for i in range(3))
    results = []
    for tau in (0.7, torch.tensor(0.7, device=device)):
        a, b = z.clone(), d.clone()
        with backend.forced(kernels):
            results.append((splitting.to_target_(a, b, torch.empty_like(a), offset, tau, 1.3, form), a))
    for stored, given_number in zip(*results, strict=True):
        assert torch.equal(stored, given_number)


@pytest.mark.parametrize("shape", [(5, 3), (2, 6, 1030)])
def test_the_second_factor_of_a_product(device, shape) -> None:
    """As it lies in memory, or transposed."""
    b = drawn("spread", shape, device)
    for x in (b, b.mT):
        ours, theirs = precision.prepared(x, "bfloat16x3"), twin(precision.prepared, x, "bfloat16x3")
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("width", [96, 256, 320, 1200])
def test_triangles_are_inverted_in_blocks(device, width, monkeypatch) -> None:
    """Of one size, or, where the width does not halve into them, by halves first."""
    monkeypatch.setattr(quadratic, "_TRIANGLE", 80)
    factor = torch.linalg.cholesky(layer_problem(1, width, Unstructured(0.5), device).hessian.double(), upper=True)
    whole = torch.contiguous_format
    for x in (factor.clone(memory_format=whole), factor.mT.clone(memory_format=whole).mT):
        quadratic._invert_upper(x)
        torch.testing.assert_close(x @ factor, torch.eye(width, dtype=torch.float64, device=device))


@pytest.mark.parametrize("shape", [(3, 5), (2, 1030), (2, 3, 40)])
def test_numbers_are_split_as_torch_rounds_them(device, shape) -> None:
    """Infinities, denormal numbers and numbers halfway between two others included."""
    x = drawn("spread", shape, device)
    x.view(-1)[:6] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -torch.inf, 1e-40, -0.0, 3.4e38])
    high = x.to(torch.bfloat16)
    expected = torch.cat([high, high, (x - high).to(torch.bfloat16)], dim=-1)
    torch.testing.assert_close(precision._split(x), expected, rtol=0, atol=0, equal_nan=True)
    transposed = x.mT.contiguous().mT
    torch.testing.assert_close(precision._split(transposed), expected, rtol=0, atol=0, equal_nan=True)
    x[..., 1] = math.nan
    assert bool(precision._split(x)[..., 1].isnan().all())


@pytest.mark.parametrize("width", [1, 8, 1030])
def test_bits(device, width) -> None:
    mask = drawn("spread", (3, width), device) > 0
    packed = bits.pack(mask)
    assert torch.equal(packed, twin(bits.pack, mask))
    assert torch.equal(bits.unpack(packed, width), mask)
    x = drawn("spread", (3, width), device)
    restricted = x.clone()
    bits.restrict_(restricted, packed)
    assert torch.equal(restricted, x * mask)


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(
    ("kind", "width", "how"),
    [
        ("zeros", 40, "exact"),
        ("zeros", 300, "exact"),
        ("bfloat16", 140, "exact"),
        ("zeros", 200, "int8"),
        ("2:4", 64, "exact"),
    ],
)
def test_packed_products(device, kind, width, how, tokens) -> None:
    """Of more than one block of rows and columns; an empty row; rows that do not fill a block."""
    w, x = drawn("zeros", (19, width), device), drawn("spread", (tokens, width), device)
    w[3] = 0
    if kind == "2:4":
        w = drawn("spread", (19, width), device)
        w = w.masked_fill(~selection.largest_per_group(w.abs(), 2, 4), 0)
    elif kind == "bfloat16":
        w, x = w.bfloat16(), x.bfloat16()
    matrix = twin(packed.pack, w)
    assert (matrix.offsets is None) == (kind == "2:4")
    if how == "int8":
        matrix = twin(packed.quantize, matrix, 64)
    y = packed.linear(x, matrix, torch.ones(19, dtype=x.dtype, device=device))
    exact = x.double() @ twin(packed.unpack, matrix).double().T + 1
    tolerance = 1e-2 if kind == "bfloat16" else 1e-5
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "how",
    [{}, {"anchor": "int8"}, {"anchor": "full", "weight_decay": 0.1}, {"penalty": math.inf, "ramp": 1.0}],
    ids=str,
)
def test_sparse_adam(device, how) -> None:
    """Three steps with a dual update: the same weights up to rounding, the same masks."""
    ours, masks = trained(device, **how)
    theirs, expected = twin(lambda: trained(device, **how))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


def trained(device: str, **how) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(270, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    model.to(device)
    optimizer = SparseAdam(model, sparsity=0.5, lr=1e-2, interval=2, first_update=1, total_steps=20, **how)
    for _ in range(3):
        x = torch.randn(8, 270, generator=generator).to(device)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().cpu() for name, p in model.named_parameters()}, optimizer.masks()


def narrow_step(x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step on moments in 8 bits, and the exact moments."""
    from admm_prune.ops.triton import adam

    rows, width = x.shape
    m, root = drawn("spread", (rows, width), x.device.type), drawn("spread", (rows, width), x.device.type).abs() * 0.1
    gradient = drawn("spread", (rows, width + 1), x.device.type)[:, :width].to(x.dtype).contiguous()
    first = Stored(*quantization.to_signed_log(m))
    second = Stored(*quantization.to_unsigned_log(root))
    exact_m = 0.9 * quantization.from_signed_log(first.values, first.scales) + 0.1 * gradient.float()
    exact_v = 0.99 * quantization.from_unsigned_log(second.values, second.scales) ** 2 + 0.01 * gradient.float() ** 2
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    adam.step_([adam.Update(x, gradient, first, second, steps=4, seed=seed)], factor=1.0, settings=settings)
    m = quantization.from_signed_log(first.values, first.scales)
    root = quantization.from_unsigned_log(second.values, second.scales)
    return x, m, root, exact_m, exact_v.sqrt()


def test_moments_in_8_bits(device) -> None:
    """Within their levels; the root, rounded at random, right in the mean; x as by the exact moments."""
    x = drawn("spread", (2, 300), device)
    start = x.clone()
    x, m, root, exact_m, exact_root = narrow_step(x, seed=3)
    step = 0.01 * (exact_m / (1 - 0.9**4)) / (exact_root / (1 - 0.99**4) ** 0.5 + 1e-8)
    torch.testing.assert_close(x, start - step, rtol=1e-5, atol=1e-6)
    large = exact_m.abs() > 1e-4
    assert bool(((m - exact_m).abs() <= 0.051 * exact_m.abs())[large].all())
    relative = (root / exact_root - 1)[exact_root > 1e-4]
    assert float(relative.abs().max()) < 0.057
    assert abs(float(relative.mean())) < 4 * 0.057 / 600**0.5  # not biased: 600 draws between neighbouring levels
    again = narrow_step(start.clone(), seed=3)
    assert all(torch.equal(a, b) for a, b in zip((x, m, root), again[:3], strict=True))


def updates(device: str, moments: str) -> list:
    """Of matrices of several widths, one of them without alignment, a vector and a scalar, some with a support."""
    from admm_prune.ops.triton import adam

    made = []
    for number, shape in enumerate([(5, 256), (3, 300), (4, 7), (2, 1500), (6,), ()]):
        x, g, m = (drawn("spread", (*shape, 1 + i), device)[..., 0].contiguous() for i in (number, 7, 9))
        root = m.abs() * 0.1
        first, second = Stored(m), Stored(root.square())
        if moments == "int8" and len(shape) == 2:
            first = Stored(*quantization.to_signed_log(m))
            second = Stored(*quantization.to_unsigned_log(root))
        support = bits.pack(g > 0) if number in (1, 3) else None
        pull = {"rho": 0.3, "anchor": Stored(torch.zeros_like(x))} if number < 2 else {}
        made.append(adam.Update(x, g, first, second, 3 + number, support=support, seed=number, **pull))
    return made


@pytest.mark.parametrize("moments", ["full", "int8"])
def test_a_step_of_many_tensors_is_that_of_each(device, moments, monkeypatch) -> None:
    """Bit for bit, whichever programs share them."""
    from admm_prune.ops.triton import adam

    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    alone, together = updates(device, moments), updates(device, moments)
    for one in alone:
        adam.step_([one], factor=0.5, settings=settings)
    monkeypatch.setattr(adam, "_PROGRAMS", 1)  # several turns for each program
    adam._shared.cache_clear()
    adam.step_(together, factor=0.5, settings=settings)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.first.values, theirs.first.values)
        assert torch.equal(ours.second.values, theirs.second.values)
    found = adam.norms(together)
    adam._shared.cache_clear()
    for norm, one in zip(found.tolist(), together, strict=True):
        g = one.gradient if one.support is None else one.gradient * bits.unpack(one.support, one.width)
        assert norm == pytest.approx(float(g.double().norm()), rel=1e-6)
    together[1].gradient[0, 0] = math.inf
    assert not math.isfinite(adam.norms(together)[1])


def test_random_bits_are_spread_evenly(device) -> None:
    """Of zero gradients a weight between two bfloat16 numbers moves by its weight decay, in the mean."""
    from admm_prune.ops.triton import adam

    x = torch.full((64, 1024), 1.0, dtype=torch.bfloat16, device=device)
    zero = Stored(torch.zeros(64, 1024, device=device)), Stored(torch.zeros(64, 1024, device=device))
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    adam.step_([adam.Update(x, torch.zeros_like(x), *zero, seed=1 << 55)], factor=1.0, settings=settings)
    assert set(x.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    share = 0.001 * 2**8  # of the entries that are rounded down
    rows, columns = (x == 1.0).double().mean(1), (x == 1.0).double().mean(0)
    assert float((x == 1.0).double().mean()) == pytest.approx(1 - share, abs=4 * (share / 65536) ** 0.5)
    for means, count in ((rows, 1024), (columns, 64)):
        deviation = float(means.std()) / (share * (1 - share) / count) ** 0.5
        assert 0.7 < deviation < 1.3


def test_bfloat16_weights_are_rounded_at_random(device) -> None:
    x = drawn("bfloat16", (2, 300), device)
    exact, *_ = narrow_step(x.float(), seed=1)
    rounded, *_ = narrow_step(x.clone(), seed=1)
    below = (exact.contiguous().view(torch.int32) & -65536).view(torch.float32)
    above = ((exact.contiguous().view(torch.int32) & -65536) + 65536).view(torch.float32)
    # The gradient is in bfloat16 too, so that the exact step differs a little: neighbours of it are allowed.
    off = torch.minimum((rounded.float() - below).abs(), (rounded.float() - above).abs())
    assert float((off == 0).float().mean()) > 0.95
    error = (rounded.float() - exact) / (above - below).abs()
    assert abs(float(error.mean())) < 4 * 0.5 / 600**0.5


def test_a_nan_is_not_rounded_away(device) -> None:
    """The NaN of a GPU, all of whose bits but the sign are set, by the kernel and by the reference."""
    from admm_prune.ops.triton import adam

    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=device).view(torch.float32)
    gradient = torch.zeros(2, 300, device=device)
    gradient[:, :2] = nan
    x, zero = torch.ones(2, 300, dtype=torch.bfloat16, device=device), torch.zeros(2, 300, device=device)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    update = adam.Update(x, gradient, Stored(zero), Stored(zero.clone()), seed=1)
    adam.step_([update], factor=1.0, settings=settings)
    assert torch.equal(x.isnan(), gradient.isnan())
    chance = torch.Generator(device).manual_seed(0)
    assert torch.equal(quantization.to_bfloat16(gradient, chance).isnan(), gradient.isnan())


@pytest.mark.parametrize("fisher", ["none", "adam", "int8"])
def test_scores(device, fisher) -> None:
    from admm_prune.ops.triton import supports

    x, c = drawn("spread", (2, 300), device), drawn("ties", (2, 300), device)
    mask = drawn("spread", (2, 301), device)[:, :300] > 0
    v = drawn("spread", (2, 302), device)[:, :300].abs().contiguous()
    v[0, :5] = 1e-40  # denormal
    codes = Stored(*quantization.to_unsigned_log(v.sqrt()))
    second = {"none": None, "adam": Stored(v), "int8": codes}[fisher]
    ours = supports.scores(x, Stored(c.bfloat16()), bits.pack(mask), second, lag=0.5, bonus=1.2, least=2.0**-76)
    factor = {
        "none": torch.ones_like(v),
        "adam": v.sqrt(),
        "int8": quantization.from_unsigned_log(*vars(codes).values()),
    }
    expected = (x - 0.5 * c.masked_fill(mask, 0)).abs() * torch.where(mask, 1.2, 1.0) * factor[fisher]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "constraint",
    [Unstructured(0.6), NofM(2, 4), StackedRows(((2, NofM(3, 8)), (3, NofM(3, 8))))],
    ids=["60%", "2:4", "stacked"],
)
@pytest.mark.parametrize("scope", ["block", "layer"])
def test_sparsegpt(device, constraint, scope) -> None:
    solver = SparseGPT(block=32, mask_scope=scope)
    ours = solver.solve(layer_problem(5, 72, constraint, device)).solution["weight"]
    theirs = twin(solver.solve, layer_problem(5, 72, constraint, device)).solution["weight"]
    assert torch.equal(ours != 0, theirs != 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 34),
    groups=st.integers(1, 12),
    block=st.sampled_from([4, 36, 128]),
    constraint=st.sampled_from([NofM(2, 4), Unstructured(0.5), RowWise(0.5), None]),
)
@pytest.mark.skipif(not backend.interpreted(), reason="drawn shapes are for the interpreter")
def test_panels_of_sparsegpt_in_any_shape(rows, groups, block, constraint) -> None:
    """Blocks of one panel and of several, of whole and of partial ones; None is a mask that is given. All steps of the
    reference, in float64."""
    width, scope = 4 * groups, "layer" if constraint is None else "block"
    problem = layer_problem(rows, width, constraint or Unstructured(0.5), "cpu")
    with backend.forced("triton"):
        ours = SparseGPT(block=block, mask_scope=scope).solve(problem).solution["weight"]
    exact = LayerReconstruction(
        problem.minimizer.double(), problem.hessian.double(), constraint or Unstructured(0.5), ridge=0.0
    )
    theirs = SparseGPT(block=block, mask_scope=scope).solve(exact).solution["weight"]
    assert torch.equal(ours != 0, theirs != 0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_admm(device) -> None:
    """A whole solve by kernels: the error of the plain solve, and a history without gaps."""
    solver = ADMM(max_iterations=6, fast_until=0)
    ours = solver.solve(layer_problem(3, 16, NofM(2, 4), device))
    theirs = twin(solver.solve, layer_problem(3, 16, NofM(2, 4), device))
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-4)
    assert [p.iteration for p in ours.history] == [1, 2, 3, 4, 5, 6]
    assert [p.support_changes for p in ours.history] == [p.support_changes for p in theirs.history]
    again = solver.solve(layer_problem(3, 16, NofM(2, 4), device))
    assert torch.equal(ours.solution["weight"], again.solution["weight"])


def layer_problem(rows: int, width: int, constraint, device: str) -> LayerReconstruction:
    generator = torch.Generator().manual_seed(rows * width)
    x, w = torch.randn(4 * width, width, generator=generator), torch.randn(rows, width, generator=generator)
    return LayerReconstruction(w.to(device), (x.T @ x).to(device), constraint, ridge=0.01)


def test_what_is_forced_and_cannot_be_done_is_refused(monkeypatch) -> None:
    x = torch.ones(4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend.forced("triton"), pytest.raises(RuntimeError, match="a tensor lies on the cpu"):
        selection.largest(x, 2)
    monkeypatch.setattr(backend, "installed", lambda: False)
    with backend.forced("triton"), pytest.raises(RuntimeError, match="not installed"):
        selection.largest(x, 2)
    with pytest.raises(RuntimeError, match="one of auto, torch, triton"), backend.forced("cuda"):
        pass


def test_kernels_run_on_the_current_gpu_alone(monkeypatch) -> None:
    """Triton would launch on the current one, from which memory of another cannot be read."""
    monkeypatch.setattr(backend, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index, current in ((0, True), (1, False)):
        gpu = torch.device("cuda", index)
        x = SimpleNamespace(is_cuda=True, device=gpu, dtype=torch.float32)
        with backend.forced("auto"):
            assert backend.uses_triton(x, torch.float32) is current
            assert backend.records(gpu) is current
            assert bool(backend.note(gpu)) is not current
    assert "cuda:1" in backend.Replayed(lambda: None, gpu).note
    with backend.forced("triton"), pytest.raises(RuntimeError, match=r"torch\.cuda\.set_device"):
        backend.uses_triton(x)


def test_a_gpu_without_triton_says_so(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(backend, "installed", lambda: True)
    with backend.forced("auto"):
        assert backend.note(gpu) == ()
        monkeypatch.setattr(backend, "installed", lambda: False)
        assert "triton is not installed" in backend.note(gpu)[0]
        assert backend.note(torch.device("cpu")) == ()
        assert backend.described("cuda").startswith("torch")


@pytest.mark.parametrize(
    "how", [pytest.param((), marks=pytest.mark.slow, id="shapes"), pytest.param(("--ones",), id="ones")]
)
def test_every_kernel_compiles_for_a_gpu(how: tuple[str, ...]) -> None:
    """For sm_90, without one; in a process of its own, where the interpreter is off."""
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
