"""LayerReconstruction: its normal form, prox, refit and re-targeting, against direct computation in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm_prune.data.layer_file import LayerFile
from admm_prune.ops import backend, quadratic
from admm_prune.point import Point
from admm_prune.problem import Proximable, Quadratic, Refittable
from admm_prune.problems.closing import Closing
from admm_prune.problems.constraints import NofM, RowWise, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.statistics import GramAccumulator, LayerStatistics, TargetAccumulator
from admm_prune.verify.recomputation import define
from admm_prune.verify.report import Verification
from tests.catalogue import CONSTRAINTS, WIDTH, correlated_inputs, layer, random_weight, retargeted

seeds = st.integers(0, 10_000)


def point(seed: int) -> Point:
    return Point(weight=random_weight(6, WIDTH, seed + 1))


def test_it_has_the_capabilities_it_claims() -> None:
    assert isinstance(layer(Unstructured(0.5)), Quadratic)
    assert isinstance(layer(Unstructured(0.5)), Proximable)
    assert isinstance(layer(Unstructured(0.5)), Refittable)


@given(seed=seeds)
def test_value_is_the_objective_of_the_definition(seed) -> None:
    ridge, damping = 0.02, 0.05
    x, w, v = correlated_inputs(64, WIDTH, seed), random_weight(6, WIDTH, seed), point(seed)["weight"]
    h = x.T @ x
    problem = LayerReconstruction(w, h, Unstructured(0.5), ridge=ridge, damping=damping)
    anchor = ridge * h.diagonal() + damping * h.diagonal().mean()
    direct = (x @ v.T - x @ w.T).square().sum() + ((v - w).square() * anchor).sum()
    assert problem.value(Point(weight=v)) == pytest.approx(float(direct), rel=1e-10)
    assert problem.relative_error(Point(weight=v)) == pytest.approx(
        float((x @ (v - w).T).square().sum() / (x @ w.T).square().sum()), rel=1e-10
    )


@given(seed=seeds)
def test_other_targets_are_met_as_defined(seed) -> None:
    problem = retargeted(CONSTRAINTS["half"], seed=seed)
    x = correlated_inputs(64, WIDTH, seed)
    g = torch.Generator().manual_seed(seed + 20_000)
    target = (x + 0.2 * torch.randn(x.shape, generator=g, dtype=torch.float64)) @ problem.weight.T
    v = point(seed)
    anchor = 0.01 * (x.T @ x).diagonal()
    error = (x @ v["weight"].T - target).square().sum()
    direct = error + ((v["weight"] - problem.weight).square() * anchor).sum()
    assert problem.value(v) == pytest.approx(float(direct), rel=1e-9)
    assert problem.relative_error(v) == pytest.approx(float(error / target.square().sum()), rel=1e-9)
    quadratic_form = torch.trace(v["weight"] @ problem.hessian @ v["weight"].T)
    linear = torch.trace(v["weight"] @ problem.linear.T)
    zero = problem.value(v.zeros_like())
    assert problem.value(v) == pytest.approx(float(quadratic_form - 2 * linear) + zero, rel=1e-9)


@pytest.mark.parametrize("make", [layer, retargeted])
@given(seed=seeds, rho=st.floats(1e-3, 1e3))
def test_prox_satisfies_its_optimality_condition(make, seed, rho) -> None:
    problem, v = make(CONSTRAINTS["half"], seed=seed), point(seed)
    x = problem.prox(v, rho)["weight"]
    gradient = (x @ problem.hessian - problem.linear) + rho * problem.curvature * (x - v["weight"])
    scale = problem.linear.norm() + rho * problem.curvature * v["weight"].norm()
    assert float(gradient.norm() / scale) <= 1e-9


@pytest.mark.parametrize("make", [layer, retargeted])
@given(seed=seeds)
def test_refit_has_no_gradient_left_on_its_support(make, seed) -> None:
    problem = make(CONSTRAINTS["most"], seed=seed)
    mask = problem.constraint.select(point(seed).map(torch.abs))
    v = problem.refit(mask)["weight"]
    assert torch.equal(v != 0, mask["weight"])
    gradient = (v @ problem.hessian - problem.linear)[mask["weight"]]
    assert float(gradient.abs().max() / problem.linear.abs().max()) <= 1e-9


def test_dead_channels_are_named_pruned_first_and_kept_as_they_were() -> None:
    x = correlated_inputs(64, WIDTH, 3)
    x[:, [2, 9]] = 0
    w = random_weight(6, WIDTH, 3)
    problem = LayerReconstruction(w, x.T @ x, Unstructured(2 / WIDTH))
    assert problem.dead.nonzero()[:, 0].tolist() == [2, 9]
    assert "2 of 16 input channels are dead" in problem.notes[0]
    gone = problem.refit(problem.constraint.select(Point(weight=(w * problem.hessian.diagonal().sqrt()).abs())))
    assert not gone["weight"][:, [2, 9]].any()
    assert problem.relative_error(gone) <= 1e-20
    kept = problem.refit(Point(weight=torch.ones_like(w, dtype=torch.bool)))
    assert torch.allclose(kept["weight"][:, [2, 9]], w[:, [2, 9]])


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_a_singular_gram_is_damped_and_says_so(ridge) -> None:
    x = correlated_inputs(3, WIDTH, 0, torch.float32)  # 3 tokens, 16 channels
    problem = LayerReconstruction(random_weight(6, WIDTH, 0, torch.float32), x.T @ x, NofM(2, 4), ridge=ridge)
    assert problem.ridge > ridge
    assert "singular" in problem.notes[-1]
    assert problem.refit(problem.constraint.select(Point(weight=problem.weight.abs()))).is_finite()


@pytest.mark.parametrize("given", ["weight", "cross_gram", "correlation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_relative_to_a_target_of_zero_is_zero_or_infinite(given: str, dtype: torch.dtype) -> None:
    x = correlated_inputs(64, WIDTH, 0, dtype)
    x[:, 3] = 0
    weight = random_weight(6, WIDTH, 0, dtype)
    zeros = torch.zeros_like(weight)
    target = {
        "weight": {},
        "cross_gram": {"cross_gram": torch.zeros(WIDTH, WIDTH, dtype=dtype), "target_energy": 0.0},
        "correlation": {"correlation": zeros, "target_energy": 0.0},
    }[given]
    dense = zeros if given == "weight" else weight
    problem = LayerReconstruction(dense, x.T @ x, RowWise(0.5), **target)
    unseen = zeros.clone()
    unseen[:, 3] = 1
    assert problem.relative_error(Point(weight=zeros)) == 0.0
    assert problem.relative_error(Point(weight=unseen)) == 0.0
    assert problem.relative_error(Point(weight=weight)) == math.inf
    file = LayerFile(weight=dense, gram=x.T @ x, cross_gram=target.get("cross_gram"), metadata={"target_energy": "0.0"})
    if given != "correlation":
        stated = define(file, 0.01, 0.0)
        for v, error in ((zeros, 0.0), (unseen, 0.0), (weight, math.inf)):
            assert stated.relative_error(v.double().numpy()) == (error, 0.0)


@pytest.mark.parametrize("level", [0.1, 1e3, 0.0])
def test_constant_targets_leave_nothing_beside_the_bias(level: float) -> None:
    """In float64, their energy less that of their mean rounds below zero or above it."""
    for tokens in (50, 300, 1000):
        inputs, targets = correlated_inputs(tokens, WIDTH, 0), torch.full((tokens, 4), level, dtype=torch.float64)
        gram, target = GramAccumulator(WIDTH, centre=True), TargetAccumulator(4, WIDTH, centre=True)
        gram.add(inputs)
        target.add(inputs, targets)
        weight = random_weight(4, WIDTH, 0)
        problem = Closing.of(weight, gram, target, RowWise(0.5), (0.01, 0.0), bias=True)
        nothing = torch.zeros_like(weight)
        assert problem.target_energy == 0.0
        assert problem.relative_error(Point(weight=nothing)) == 0.0
        assert torch.allclose(problem.bias(nothing), torch.full((4,), level, dtype=torch.float64))


def test_a_claim_is_not_taken_for_infinite() -> None:
    report = Verification(path=Path("v.safetensors"), kind="layer")
    assert report.compare("error", math.inf, math.inf)
    assert not report.compare("error", 0.5, math.inf)
    assert not report.compare("error", math.inf, 0.5)
    assert not report.compare("error", math.nan, 0.5)


def test_a_damping_that_is_small_beside_the_largest_channels_is_checked_too() -> None:
    """Two correlated channels of 1e12 times the others: a damping of 1e-3 adds 4e-6 of their diagonal."""
    gram = torch.eye(512)
    gram[:2, :2] = 1e12 * torch.tensor([[1.0, 1.00001], [1.00001, 1.0]])  # indefinite by the rounding of long sums
    weight = random_weight(3, 512, 0, torch.float32)
    problem = LayerReconstruction(weight, gram, RowWise(0.5), ridge=0.0, damping=1e-3)
    assert problem.ridge > 0
    assert "raised to" in problem.notes[-1]
    torch.linalg.cholesky(quadratic.unit_diagonal(problem.hessian)[0])


@pytest.mark.parametrize("excess", [1e-12, 1e-7, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ridge_is_raised_until_the_hessian_can_be_factored(excess: float, dtype: torch.dtype) -> None:
    gram = torch.tensor([[1.0, 1 + excess], [1 + excess, 1.0]], dtype=dtype)
    problem = LayerReconstruction(random_weight(3, 2, 0, dtype), gram, RowWise(0.5), ridge=0.0)
    torch.linalg.cholesky(quadratic.unit_diagonal(problem.hessian)[0])
    assert ("raised to" in "".join(problem.notes)) is (problem.ridge > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_that_is_far_from_semidefinite_is_refused(dtype: torch.dtype) -> None:
    gram = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=dtype)
    with pytest.raises(ValueError, match="not positive semidefinite, even with a ridge of 0"):
        LayerReconstruction(random_weight(3, 2, 0, dtype), gram, RowWise(0.5), ridge=0.0)


def test_all_zero_inputs_fall_back_to_magnitude() -> None:
    w = random_weight(6, WIDTH, 0)
    problem = LayerReconstruction(w, torch.zeros(WIDTH, WIDTH, dtype=torch.float64), Unstructured(0.5))
    assert "16 of 16" in problem.notes[0]
    assert problem.relative_error(Point(weight=torch.zeros_like(w))) == 0.0


@pytest.mark.parametrize("other_target", [False, True])
def test_the_error_of_a_point_with_nan_is_nan(other_target) -> None:
    problem = retargeted(CONSTRAINTS["half"]) if other_target else layer(CONSTRAINTS["half"])
    broken = problem.weight.clone()
    broken[0, 0] = math.nan
    assert math.isnan(problem.relative_error(Point(weight=broken)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, "matrix"),
        ({"weight": torch.full((6, WIDTH), float("nan"))}, "NaN or Inf"),
        ({"gram": torch.eye(3)}, "16 x 16"),
        ({"gram": torch.full((WIDTH, WIDTH), float("inf"))}, "NaN or Inf"),
        ({"gram": torch.eye(WIDTH).half()}, "float32 or float64"),
        ({"gram": torch.eye(WIDTH) + torch.ones(WIDTH, WIDTH).triu(1)}, "not symmetric"),
        ({"gram": -torch.eye(WIDTH)}, "negative diagonal"),
        ({"ridge": -1.0}, "negative"),
        ({"ridge": float("nan")}, "finite"),
        ({"damping": float("inf")}, "finite"),
        ({"cross_gram": torch.eye(WIDTH), "target_energy": float("nan")}, "target_energy nan is not the squared norm"),
        ({"cross_gram": torch.eye(WIDTH), "target_energy": -1.0}, "must be finite and not negative"),
        ({"cross_gram": torch.eye(WIDTH)}, "target_energy"),
    ],
)
def test_refusals(change, message) -> None:
    arguments = {"weight": torch.ones(6, WIDTH), "gram": torch.eye(WIDTH), "constraint": Unstructured(0.5)}
    with pytest.raises(ValueError, match=message):
        LayerReconstruction(**{**arguments, **change})


@pytest.mark.bitwise
@given(seed=seeds, cuts=st.lists(st.integers(0, 50), max_size=4))
def test_a_gram_does_not_depend_on_the_pieces(seed, cuts) -> None:
    x = correlated_inputs(50, WIDTH, seed, torch.float32)
    edges = sorted({0, *cuts, 50})
    pieces = GramAccumulator(WIDTH, products=torch.float64)
    for start, stop in pairwise(edges):
        pieces.add(x[start:stop])
    exact = x.double().T @ x.double()
    assert torch.allclose(pieces.gram, exact, rtol=1e-12, atol=1e-12 * float(exact.abs().max()))
    assert torch.equal(pieces.gram, pieces.gram.T)
    assert torch.allclose(pieces.mean, x.double().mean(0))
    assert pieces.tokens == 50


def test_products_in_float32_are_accurate_over_many_tokens_with_massive_channels() -> None:
    width, batches = 48, 32
    exact, fast = GramAccumulator(width, products=torch.float64), GramAccumulator(width)
    for seed in range(batches):  # 2^20 tokens in all
        x = correlated_inputs(2**15, width, seed, torch.float32)
        x[:, 3] += 1000.0  # nearly constant
        x[:, 7] *= 300.0
        x[::100, 9] += 3000.0
        for gram in (exact, fast):
            gram.add(x, lengths=[2048] * 16)
    assert fast.tokens == exact.tokens == 2**20
    root = exact.gram.diagonal().sqrt()
    error = (fast.gram - exact.gram).abs() / root / root[:, None]
    assert float(error.max()) <= 2e-6
    assert float(error.square().mean().sqrt()) <= 2e-7
    assert torch.equal(fast.gram, fast.gram.T)
    assert torch.allclose(fast.mean, exact.mean, rtol=1e-12)


@pytest.mark.bitwise
@given(seed=seeds, lengths=st.lists(st.sampled_from([3, 127, 128, 200, 512, 513, 700]), min_size=1, max_size=5))
def test_products_in_float32_do_not_depend_on_how_sequences_are_batched(seed, lengths) -> None:
    x = correlated_inputs(sum(lengths), 160, seed, torch.float32)  # two panels
    for choice in ("auto", "triton"):  # as on a device that is slow in float64
        together, apart = GramAccumulator(160), GramAccumulator(160)
        with backend.forced(choice):
            together.add(x, lengths=lengths)
            for rows in reversed(x.split(lengths)):
                apart.add(rows, lengths=[len(rows)])
        assert torch.equal(together.gram.float(), apart.gram.float())
    assert torch.allclose(together.gram, x.double().T @ x.double(), rtol=1e-5, atol=1e-5 * len(x))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centred_gram_of_products_in_float32_is_accurate_relative_to_itself(dtype, weighted: bool) -> None:
    width, tokens = 160, 6000
    x = correlated_inputs(tokens, width, 0, torch.float32)
    x[:, ::3] += (300.0 if dtype is torch.float32 else 30.0) * x[:, ::3].std(0)
    x = x.to(dtype)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) if weighted else None
    exact, centring, plain = (
        GramAccumulator(width, products=products, centre=centre)
        for products, centre in ((torch.float64, True), (torch.float32, True), (torch.float32, False))
    )
    for gram in (exact, centring, plain):
        gram.add(x, weights, lengths=[1024] * 5 + [30] * 20 + [280])
    mass = tokens if weights is None else float(weights.double().sum())
    away = x.double() - exact.mean
    of_tokens = away if weights is None else away * weights.double().sqrt()[:, None]
    root = of_tokens.square().sum(0).sqrt().clamp_min(1e-6)  # one channel is dead

    def error(gram: GramAccumulator) -> float:
        shift = mass * gram.mean
        if weights is None:
            found = gram.gram - torch.outer(shift, gram.mean)
        else:  # around the mean of the inputs, which is not that of the weighted ones
            sums = (x.double() * weights.double()[:, None]).sum(0)
            found = gram.gram - torch.outer(sums, gram.mean) - torch.outer(gram.mean, sums)
            found += torch.outer(shift, gram.mean)
        return float(((found - of_tokens.T @ of_tokens) / root / root[:, None]).abs().max())

    assert error(exact) <= 1e-8
    assert error(centring) <= 2e-6
    assert error(plain) > 10 * error(centring)
    scale = exact.gram.diagonal().sqrt().clamp_min(1e-6)
    assert float(((centring.gram - exact.gram) / scale / scale[:, None]).abs().max()) <= 2e-6
    assert torch.equal(centring.gram, centring.gram.T)
    assert torch.equal(centring.mean, exact.mean)


@pytest.mark.bitwise
@given(seed=seeds, lengths=st.lists(st.sampled_from([3, 127, 128, 200, 512, 513, 700]), min_size=1, max_size=5))
def test_correlations_in_float32_do_not_depend_on_how_sequences_are_batched(seed, lengths) -> None:
    x = correlated_inputs(sum(lengths), 40, seed, torch.float32)
    y = correlated_inputs(sum(lengths), 24, seed + 1, torch.float32)
    together, apart, exact = (
        TargetAccumulator(24, 40, products=products) for products in (torch.float32, torch.float32, torch.float64)
    )
    together.add(x, y, lengths)
    exact.add(x, y)
    for inputs, targets in reversed(list(zip(x.split(lengths), y.split(lengths), strict=True))):
        apart.add(inputs, targets, [len(inputs)])
    assert torch.equal(together.correlation.float(), apart.correlation.float())
    roots = y.square().sum(0).sqrt()[:, None].double() * x.square().sum(0).sqrt().double()
    assert float(((together.correlation - exact.correlation).abs() / roots).max()) <= 2e-6
    assert together.energy == pytest.approx(exact.energy, rel=1e-12)
    assert torch.allclose(together.total, exact.total, rtol=1e-10, atol=1e-10 * len(x))


def test_centred_correlations_in_float32_are_accurate_relative_to_themselves() -> None:
    x, y = correlated_inputs(1500, 40, 0, torch.float32), correlated_inputs(1500, 24, 1, torch.float32)
    x, y = x + 300 * x.std(0), y + 300 * y.std(0)
    exact, centring, plain = (
        TargetAccumulator(24, 40, products=products, centre=centre)
        for products, centre in ((torch.float64, True), (torch.float32, True), (torch.float32, False))
    )
    for sums in (exact, centring, plain):
        sums.add(x, y, [1024, 30, 446])
    mean = x.double().mean(0)
    away = [part.double() - part.double().mean(0) for part in (y, x)]
    roots = [part.square().sum(0).sqrt().clamp_min(1e-6) for part in away]

    def error(sums: TargetAccumulator) -> float:
        found = sums.correlation - torch.outer(sums.total, mean)
        return float(((found - away[0].T @ away[1]) / roots[0][:, None] / roots[1]).abs().max())

    assert error(exact) <= 1e-8
    assert error(centring) <= 2e-6
    assert error(plain) > 10 * error(centring)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_inputs_on_a_device_are_as_accurate(dtype: torch.dtype) -> None:
    x = correlated_inputs(2**14, 320, 0, torch.float32).to("cuda", dtype)
    x[:, 3] += 1000.0
    exact, fast = (GramAccumulator(320, "cuda", products=products) for products in (torch.float64, torch.float32))
    for gram in (exact, fast):
        gram.add(x, lengths=[2048] * 8)
    root = exact.gram.diagonal().sqrt()
    assert float(((fast.gram - exact.gram) / root / root[:, None]).abs().max()) <= 2e-6


def test_weighted_tokens_in_float32() -> None:
    x, weights = correlated_inputs(600, WIDTH, 0, torch.float32), torch.rand(600)
    gram = GramAccumulator(WIDTH)
    gram.add(x, weights)
    expected = (x.double() * weights.double()[:, None]).T @ x.double()
    assert torch.allclose(gram.gram, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_validation_tokens_count_as_calibration_tokens() -> None:
    x = correlated_inputs(60, WIDTH, 0, torch.float32)
    parts = [GramAccumulator(WIDTH) for _ in range(3)]
    for part, rows in zip(parts, x.split([40, 10, 10]), strict=True):
        part.add(rows)
    statistics = LayerStatistics.collected(*parts)
    whole = x[:50].double()
    assert statistics.tokens == 50
    assert statistics.validation_tokens == statistics.holdout_tokens == 10
    assert torch.allclose(statistics.gram, (whole.T @ whole).float())
    assert statistics.dead_channels.numel() == 0


def uneven(seed: int, dtype: torch.dtype, shift: float = 0.0) -> tuple[LayerReconstruction, torch.Tensor]:
    """A problem re-targeted to inputs that differ by `shift`, its channels of very different size; and ||Y||^2."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, WIDTH, generator=g, dtype=torch.float64)
    x *= torch.exp(2 * torch.randn(WIDTH, generator=g, dtype=torch.float64))
    w = torch.randn(8, WIDTH, generator=g)
    dense = x * (1 + shift * torch.randn(x.shape, generator=g, dtype=torch.float64))
    energy = (dense @ w.double().T).square().sum()
    gram, cross = (x.T @ x).to(dtype), (dense.T @ x).to(dtype)
    return LayerReconstruction(w, gram, Unstructured(0.0), cross_gram=cross, target_energy=float(energy)), dense - x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_of_nothing_is_never_negative(dtype: torch.dtype) -> None:
    """A third of these were negative: the Gram and its target are rounded, the energy of the target is not."""
    for seed in range(60):
        problem, _ = uneven(seed, dtype)
        for v in (problem.weight, problem.minimizer):
            assert 0.0 <= problem.relative_error(Point(weight=v)) <= 1e-6


@given(seed=seeds)
def test_an_error_is_that_of_the_outputs_on_other_inputs(seed) -> None:
    problem, away = uneven(seed, torch.float64, 0.01)
    error = (away @ problem.weight.double().T).square().sum()
    assert problem.target_energy is not None
    found = problem.relative_error(Point(weight=problem.weight))
    assert found == pytest.approx(float(error) / problem.target_energy, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_energy_that_cannot_be_the_target_s_is_refused(dtype: torch.dtype) -> None:
    right, _ = uneven(0, dtype)
    assert right.target_energy is not None
    for factor in (0.0, 0.5, 0.999):
        problem = LayerReconstruction(
            right.weight,
            right.gram,
            Unstructured(0.5),
            cross_gram=right.cross_gram,
            target_energy=factor * right.target_energy,
        )
        with pytest.raises(ValueError, match="is not the squared norm of the target"):
            problem.relative_error(Point(weight=problem.weight))


def test_a_gram_that_is_none_is_refused_where_an_error_is_negative() -> None:
    gram = torch.ones(WIDTH, WIDTH) * -1.0
    gram.fill_diagonal_(1e-3)
    problem = LayerReconstruction(torch.ones(2, WIDTH), torch.eye(WIDTH), Unstructured(0.5))
    with pytest.raises(ValueError, match="not positive semidefinite"):
        problem.relative_error(Point(weight=torch.zeros(2, WIDTH)), gram)


@given(seed=seeds)
def test_the_value_at_the_minimum_of_another_target_is_that_of_its_definition(seed) -> None:
    """An error of the minimizer, which comes from a solve in float32, changes it in second order only."""
    problem, _ = uneven(seed, torch.float32, 0.3)
    found = problem.minimizer_residual()
    assert found is not None
    assert problem.cross_gram is not None
    assert problem.target_energy is not None
    m, w, a = problem.minimizer.double(), problem.weight.double(), problem.hessian.double()
    anchor = (problem.hessian.diagonal() - problem.gram.diagonal()).double()
    g = w @ problem.cross_gram.double() + w * anchor
    direct = ((m @ a) * m).sum() - 2 * (m * g).sum() + problem.target_energy + (w.square() * anchor).sum()
    assert problem.value(Point(weight=problem.minimizer)) == pytest.approx(float(direct), rel=1e-10)
    assert torch.allclose(found[0], m @ a - g, rtol=1e-6, atol=1e-12 * float(found[1].max()))


def test_a_gram_is_made_symmetric() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g)
    gram = x.T @ x + 1e-6 * torch.randn(6, 6, generator=g)
    problem = LayerReconstruction(torch.ones(2, 6), gram, Unstructured(0.5))
    assert torch.equal(problem.gram, problem.gram.T)
    assert torch.allclose(problem.gram, (gram + gram.T) / 2)
    same = (gram + gram.T) / 2
    assert LayerReconstruction(torch.ones(2, 6), same, Unstructured(0.5)).gram.data_ptr() == same.data_ptr()


def test_an_energy_without_another_target_means_nothing() -> None:
    w, gram = torch.ones(2, WIDTH), torch.eye(WIDTH)
    problem = LayerReconstruction(w, gram, Unstructured(0.5), target_energy=123.0)
    assert problem.value(Point(weight=w)) == 0.0
    assert problem.relative_error(Point(weight=w)) == 0.0
