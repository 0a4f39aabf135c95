"""Value and output projections as one problem: closed forms against direct solves, and the value along the updates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problems import attention as module
from admm_prune.problems.attention import AttentionOutput, AttentionTokens, Probabilities
from admm_prune.problems.constraints import NofM, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.testing import assert_problem_conforms

WIDTH, SIZE, HEADS, OUTPUTS = 8, 3, 4, 5
LENGTHS = (9, 14, 7, 12)
EXACT = {"tolerance": 1e-13, "max_iterations": 400}
FORMS = [(groups, biases) for groups in (1, 2, 4) for biases in (False, True)]


def probabilities(g: torch.Generator, lengths: tuple[int, ...], groups: int) -> Probabilities:
    """Causal ones: of random logits, for sequences of these lengths."""
    every = []
    for length in lengths:
        logits = 2 * torch.randn(HEADS, length, length, generator=g, dtype=torch.float64)
        every.append(logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1))
    return Probabilities(tuple(every), groups)


def attention(
    groups: int = 2,
    *,
    biases: bool = False,
    seed: int = 0,
    sets: Mapping[str, SparseSet] | None = None,
    noise: float = 0.0,
    held_out: int | None = None,
    **options: object,
) -> AttentionOutput:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights = Point(value=draw(groups * SIZE, WIDTH), output=draw(OUTPUTS, HEADS * SIZE))
    vectors = {"value": draw(groups * SIZE), "output": draw(OUTPUTS)} if biases else {}
    mixer = draw(WIDTH, WIDTH)

    def tokens(lengths: tuple[int, ...]) -> AttentionTokens:
        inputs, mixing = draw(sum(lengths), WIDTH) @ mixer, probabilities(g, lengths, groups)
        empty = AttentionTokens(inputs, torch.zeros(len(inputs), OUTPUTS, dtype=torch.float64), mixing)
        outputs = predicted(weights, vectors, empty)
        return AttentionTokens(inputs, outputs + noise * draw(*outputs.shape), mixing)

    calibration = tokens(LENGTHS)
    if held_out is not None:
        g.manual_seed(held_out)
    return AttentionOutput(
        weights, calibration, sets or {}, biases=vectors, validation=tokens((8, 11)), **EXACT | options
    )  # type: ignore[arg-type]


def predicted(x: Mapping[str, Tensor], biases: Mapping[str, Tensor], tokens: AttentionTokens) -> Tensor:
    """sum_h A_h (X V_g(h)^T + 1 b_g^T) O_h^T + 1 b^T, head after head."""
    assert isinstance(tokens.mixing, Probabilities)
    outputs, start = [], 0
    for every in tokens.mixing.sequences:
        inputs = tokens.inputs[start : start + every.shape[1]]
        start += len(inputs)
        total = torch.zeros(len(inputs), OUTPUTS, dtype=torch.float64)
        for head, one in enumerate(every):
            group = head * tokens.mixing.groups // HEADS
            rows, columns = slice(group * SIZE, (group + 1) * SIZE), slice(head * SIZE, (head + 1) * SIZE)
            values = inputs @ x["value"][rows].T + (biases["value"][rows] if biases else 0)
            total += one @ values @ x["output"][:, columns].T
        outputs.append(total + (x.get("bias", biases["output"]) if biases else 0))
    return torch.cat(outputs)


def biases_of(problem: AttentionOutput) -> dict[str, Tensor]:
    x = problem.initial()
    return {"value": problem.biases["value"], "output": x["bias"]} if "bias" in x else {}


def moved(problem: AttentionOutput, seed: int = 0) -> Point:
    g = torch.Generator().manual_seed(seed)
    return problem.initial().map(lambda x: x + 0.5 * torch.randn(x.shape, generator=g, dtype=torch.float64))


def mixed_inputs(problem: AttentionOutput) -> list[Tensor]:
    """M_h = A_h X of every head, over all tokens."""
    mixing = problem.tokens.mixing
    assert isinstance(mixing, Probabilities)
    return [
        torch.cat([p[h] @ problem.tokens.inputs[s] for p, s in zip(mixing.sequences, mixing.spans, strict=True)])
        for h in range(HEADS)
    ]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("entries", [1, HEADS * WIDTH, 3 * HEADS * WIDTH, 5 * HEADS * WIDTH + 1, 10**6])
def test_the_metric_samples_tokens_before_the_mixed_inputs_are_joined(
    entries: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionOutput, "widest", 0)
    monkeypatch.setattr(module, "_MIXED_ENTRIES", entries)
    problem = attention(groups)
    heads = problem.weights["output"].square().sum(0).view(HEADS, SIZE).sum(1)
    expected, mixed = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), torch.stack(mixed_inputs(problem))
    for span in problem.tokens.mixing.spans:
        stride = -(-len(problem.tokens.inputs[span]) * HEADS * WIDTH // entries)
        some = mixed[:, span][:, ::stride]
        expected += stride * torch.einsum("hni,hnj,h->ij", some, some, heads / heads.sum())
    held, join = [], torch.cat

    def recorded(parts: list[Tensor], dim: int = 0) -> Tensor:
        held.append(sum(part.untyped_storage().nbytes() for part in parts) // 8)
        return join(parts, dim)

    monkeypatch.setattr(torch, "cat", recorded)
    metric = problem._metric
    monkeypatch.undo()
    torch.testing.assert_close(metric, expected)
    if entries < max(LENGTHS) * HEADS * WIDTH:
        assert max(held) <= max(entries, HEADS * WIDTH)
    sizes = [len(problem._mixed_inputs(0, problem.tokens.inputs[:9], stride)) for stride in (1, 2, 8, 9, 20)]
    assert sizes == [9, 5, 2, 1, 1]


def design(problem: AttentionOutput, output: Tensor) -> Tensor:
    """The matrix (n m, G e d) that maps the entries of V to those of the output."""
    groups = len(problem.weights["value"]) // SIZE
    blocks = [torch.zeros(0)] * groups
    for h, inputs in enumerate(mixed_inputs(problem)):
        part = torch.einsum("oi,nj->noij", output[:, h * SIZE : (h + 1) * SIZE], inputs).flatten(2).flatten(0, 1)
        group = h * groups // HEADS
        blocks[group] = part if not len(blocks[group]) else blocks[group] + part
    return torch.cat(blocks, 1)


@pytest.mark.parametrize(("groups", "biases"), FORMS)
def test_the_value_is_that_of_the_formula(groups: int, biases: bool) -> None:
    problem = attention(groups, biases=biases)
    x = moved(problem)
    for tokens, value in (
        (problem.tokens, problem.value(x)),
        (problem.validation, problem.validation_loss(x) * float(problem.validation.targets.square().sum())),
    ):
        missing = predicted(x, biases_of(problem), tokens) - tokens.targets
        assert value == pytest.approx(float(missing.square().sum()), rel=1e-12)
    energy = float(problem.tokens.targets.square().sum())
    assert problem.value(problem.initial()) <= 1e-14 * energy  # a difference of energies


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_unmix_is_the_adjoint_of_mix(groups: int) -> None:
    g = torch.Generator().manual_seed(3)
    mixing = probabilities(g, LENGTHS, groups)
    for number, span in enumerate(mixing.spans):
        n = span.stop - span.start
        values, mixed = (torch.randn(n, k * SIZE, generator=g, dtype=torch.float64) for k in (groups, HEADS))
        left, right = (mixing.mix(number, values) * mixed).sum(), (values * mixing.unmix(number, mixed)).sum()
        assert float(left) == pytest.approx(float(right), rel=1e-12)


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("widest", [0, 8192])
@pytest.mark.parametrize(("groups", "biases"), FORMS)
def test_values_solve_the_normal_equations(
    groups: int, biases: bool, widest: int, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionOutput, "widest", widest)  # by products over the tokens, or with the mixed Gram
    problem = attention(groups, biases=biases, noise=0.3, damped={"value": (0.02, 0.003)})
    x = moved(problem)
    mask = torch.rand(x["value"].shape, generator=torch.Generator().manual_seed(4)) < kept
    found = problem.fitted_value(x["output"], x, mask=None if kept == 1 else mask)
    matrix, zero = design(problem, x["output"]), Point({**x, "value": torch.zeros_like(x["value"])})
    targets = (problem.tokens.targets - predicted(zero, biases_of(problem), problem.tokens)).flatten()
    # The ridge of the docstring, written out.
    heads = [x["output"][:, h * SIZE : (h + 1) * SIZE].square().sum(0) for h in range(HEADS)]
    strengths = [o.square().sum() for o in problem.weights["output"].split(SIZE, 1)]
    rows = torch.cat([sum(heads[h] for h in range(HEADS) if h * groups // HEADS == k) for k in range(groups)])
    diagonal = sum(s * m.square().sum(0) for s, m in zip(strengths, mixed_inputs(problem), strict=True))
    diagonal = diagonal / sum(strengths)
    anchor = (rows[:, None] * (0.02 * diagonal + 0.003 * diagonal.mean())).flatten()
    hessian = matrix.T @ matrix + anchor.diag()
    right = matrix.T @ targets + anchor * problem.weights["value"].flatten()
    chosen = mask.flatten() if kept < 1 else torch.ones_like(mask.flatten())
    direct = torch.zeros_like(right)
    direct[chosen] = torch.linalg.solve(hessian[chosen][:, chosen], right[chosen])
    assert torch.allclose(found.flatten(), direct, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("widest", [0, 8192])
@pytest.mark.parametrize("biases", [False, True])
def test_values_are_fitted_on_some_spans_of_a_long_text(
    biases: bool, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solution is that of these spans alone; sums are scaled to all tokens."""
    monkeypatch.setattr(AttentionOutput, "widest", widest)
    whole = attention(2, biases=biases, noise=0.3, damped={"value": (0.02, 0.003)})
    tokens = whole.tokens
    assert isinstance(tokens.mixing, Probabilities)
    chosen = [slice(0, LENGTHS[0]), slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))]  # the first and the third: 9 + 7
    some = AttentionTokens(
        *(torch.cat([part[span] for span in chosen]) for part in (tokens.inputs, tokens.targets)),
        Probabilities(tokens.mixing.sequences[::2], 2),
    )
    options = {"biases": whole.biases, "damped": whole.damped, **EXACT}
    sample = AttentionOutput(whole.weights, some, {}, **options)  # type: ignore[arg-type]
    x = moved(whole)
    assert not torch.allclose(whole.fitted_value(x["output"], x), sample.fitted_value(x["output"], x), rtol=1e-3)
    monkeypatch.setattr(module, "_TOKENS_PER_INPUT", 2)  # 16 of 42 tokens, for 8 inputs
    long = AttentionOutput(whole.weights, tokens, {}, **options)  # type: ignore[arg-type]
    fitted, expected = long.fitted_value(x["output"], x), sample.fitted_value(x["output"], x)
    torch.testing.assert_close(fitted, expected, rtol=1e-9, atol=1e-9)
    scale = sum(LENGTHS) / len(some.inputs)
    torch.testing.assert_close(
        long.value_hessian_times(x["value"], x["output"]), scale * sample.value_hessian_times(x["value"], x["output"])
    )
    torch.testing.assert_close(long._metric, scale * sample._metric)
    assert long.value(x) == whole.value(x)


def test_a_sample_has_as_many_tokens_as_it_should_whatever_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = attention(2)
    monkeypatch.setattr(AttentionOutput, "_count", 4110)
    monkeypatch.setattr(module, "_TOKENS_PER_INPUT", 4)
    for lengths in ((10, 4100), (4100, 10), (1,) * 4110, (2000, 10, 2000, 100)):
        ends = torch.tensor((0, *lengths)).cumsum(0).tolist()
        spans = [slice(a, b) for a, b in pairwise(ends)]
        vars(problem).pop("_sampled", None)
        vars(problem)["tokens"] = AttentionTokens(
            problem.tokens.inputs,
            problem.tokens.targets,
            SimpleNamespace(spans=spans, heads=HEADS),  # type: ignore[arg-type]
        )
        taken = sum(lengths[number] for number in problem._sampled)
        assert 4 * WIDTH <= taken <= max(4 * WIDTH, max(lengths) + 10)


def test_values_that_are_not_finite_are_rejected() -> None:
    problem = attention(2, sets={"value": Unstructured(0.5), "output": Unstructured(0.5)})
    before = problem.constraint.project(problem.initial())
    after = Point({**before, "output": before["output"] * torch.nan})
    assert problem.safeguarded(before, after, "output") is before
    assert problem.safeguarded(before, after, "value") is before


def test_the_attention_is_run_once_for_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = attention(2, noise=0.3)
    calls: list[int] = []
    mix = Probabilities.mix
    monkeypatch.setattr(Probabilities, "mix", lambda self, *args: calls.append(1) or mix(self, *args))
    x, other = moved(problem), moved(problem, 1)
    y = Point({**x, "output": other["output"]})
    values = [problem.value(x), problem.value(y), problem.value(other), problem.value(x)]
    assert len(calls) == 2 * len(LENGTHS)
    assert values[0] == values[3] == attention(2, noise=0.3).value(x)
    assert values[1] == attention(2, noise=0.3).value(y)
    changed = x["value"].clone()
    x["value"].mul_(2)  # in place: other values, which are not those held
    assert problem.value(x) == attention(2, noise=0.3).value(x)
    x["value"].copy_(changed)
    assert problem.value(x) == values[0]


@pytest.mark.parametrize(("groups", "biases"), FORMS)
def test_the_output_solves_its_least_squares(groups: int, biases: bool) -> None:
    problem = attention(groups, biases=biases, noise=0.3)
    x = moved(problem)
    block = problem.block("output", x)
    joined = problem.joined(x, "output", block, Point(weight=block.minimizer))
    columns = []
    for h, inputs in enumerate(mixed_inputs(problem)):
        rows = slice(h * groups // HEADS * SIZE, (h * groups // HEADS + 1) * SIZE)
        columns.append(inputs @ x["value"][rows].T + (biases_of(problem)["value"][rows] if biases else 0))
    matrix = torch.cat([*columns, *([torch.ones(len(columns[0]), 1)] if biases else [])], 1).double()
    direct = torch.linalg.lstsq(matrix, problem.tokens.targets).solution.T
    assert torch.allclose(joined["output"], direct[:, : HEADS * SIZE], rtol=1e-8, atol=1e-8)
    if biases:
        assert torch.allclose(joined["bias"], direct[:, -1], rtol=1e-8, atol=1e-8)


def test_the_separable_metric_is_exact_for_one_head_with_orthogonal_outputs() -> None:
    """Where O_h^T O_h is diagonal and there is one head, the surrogate of the values is the objective."""
    g = torch.Generator().manual_seed(0)
    problem = attention(1)
    tokens = AttentionTokens(
        problem.tokens.inputs,
        problem.tokens.targets,
        Probabilities(tuple(p[:1] for p in problem.tokens.mixing.sequences), 1),  # type: ignore[attr-defined]
    )
    output = torch.linalg.qr(torch.randn(OUTPUTS, SIZE, generator=g, dtype=torch.float64)).Q * torch.tensor([1.0, 2, 4])
    weights = Point(value=problem.weights["value"], output=output)
    problem = AttentionOutput(weights, tokens, {}, **EXACT)  # type: ignore[arg-type]
    x = problem.initial()
    block = problem.block("value", x)
    best = problem.value(Point({**x, "value": problem.fitted_value(output, x)}))
    for _ in range(3):
        value = torch.randn(SIZE, WIDTH, generator=g, dtype=torch.float64)
        y = Point({**x, "value": value})
        assert block.value(problem.part(y, "value")) == pytest.approx(problem.value(y) - best, rel=1e-8)


SETS: tuple[dict[str, SparseSet], ...] = (
    {"value": Unstructured(0.6), "output": Unstructured(0.5)},
    {"value": RowWise(0.5), "output": NofM(1, 2)},
    {"value": NofM(2, 4), "output": RowWise(0.7)},
)


@given(st.sampled_from(FORMS), st.integers(0, 9999), st.sampled_from(SETS), st.sampled_from(["gpt", "wanda", "size"]))
@settings(max_examples=25, deadline=None)
def test_the_value_never_rises_once_the_weights_are_sparse(
    form: tuple[int, bool], seed: int, sets: Mapping[str, SparseSet], inner: str
) -> None:
    options = {"sets": sets, "noise": 0.2, "damped": {"value": (0.01, 0.0)}, "tolerance": 1e-4}
    problem = attention(form[0], biases=form[1], seed=seed, **options)  # type: ignore[arg-type]
    solver = {"gpt": SparseGPT(), "wanda": Wanda(), "size": Magnitude()}[inner]
    x = problem.constraint.project(problem.initial())
    value = problem.value(x)
    for name in problem.order * 2:
        block = problem.block(name, x)
        x = problem.safeguarded(x, problem.joined(x, name, block, solver.solve(block).solution), name)
        assert problem.constraint.contains(x)
        assert problem.value(x) <= value * (1 + 1e-12), name
        value = problem.value(x)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_coordination_has_less_error_than_the_matrices_alone(groups: int) -> None:
    sets = {"value": Unstructured(0.5), "output": Unstructured(0.5)}
    problem = attention(groups, sets=sets, seed=groups)
    inputs = problem.tokens.inputs
    dense = problem.initial()
    alone = {
        "value": ADMM().solve(LayerReconstruction(dense["value"], inputs.T @ inputs, sets["value"])),
        "output": ADMM().solve(problem.block("output", dense)),
    }
    start = Point({name: result.solution["weight"] for name, result in alone.items()})
    result = Alternating(inner=ADMM(), max_iterations=3).solve(problem, start=start)
    assert problem.value(result.solution) < 0.8 * problem.value(start)
    assert problem.constraint.contains(result.solution)


@pytest.mark.parametrize("biases", [False, True])
def test_it_conforms(biases: bool) -> None:
    make = partial(attention, 2, biases=biases, noise=0.5, max_iterations=10)
    assert_problem_conforms(
        lambda seed: make(seed=seed), other_held_out=lambda seed: make(seed=seed, held_out=seed + 1), examples=2
    )


def test_processes_with_a_part_of_the_tokens_find_the_same_values() -> None:
    """Sums over tokens are all that is exchanged."""
    whole = attention(2, noise=0.3)
    x, tokens = moved(whole), whole.tokens
    halves = [
        AttentionTokens(tokens.inputs[a:b], tokens.targets[a:b], Probabilities(tokens.mixing.sequences[s], 2))  # type: ignore[attr-defined]
        for a, b, s in ((0, 23, slice(0, 2)), (23, None, slice(2, 4)))
    ]
    parts = [AttentionOutput(whole.weights, half, {}) for half in halves]
    v = moved(whole, 1)["value"]
    assert sum(part.value(x) for part in parts) == pytest.approx(whole.value(x), rel=1e-12)
    sums = parts[0].value_hessian_times(v, x["output"]) + parts[1].value_hessian_times(v, x["output"])
    assert torch.allclose(sums, whole.value_hessian_times(v, x["output"]), rtol=1e-12)


def test_other_shapes_are_refused() -> None:
    problem = attention(2)
    for name, shape, message in (
        ("output", (OUTPUTS, HEADS * SIZE + 1), "13 inputs of the output projection are not 4 heads"),
        ("value", (2 * SIZE + 1, WIDTH), "7 values are no heads of 3 for 4 query heads"),
    ):
        weights = Point({**problem.weights, name: torch.zeros(shape, dtype=torch.float64)})
        with pytest.raises(ValueError, match=message):
            AttentionOutput(weights, problem.tokens, {})


def test_an_output_projection_of_zeros_and_targets_of_zeros() -> None:
    """No head is stronger than another where all are cut off; what V does then changes no output."""
    plain = attention()
    weights = Point({**plain.weights, "output": torch.zeros_like(plain.weights["output"])})
    sets = {"value": Unstructured(0.5), "output": Unstructured(0.5)}
    problem = AttentionOutput(weights, plain.tokens, sets, validation=plain.validation)
    result = Alternating(inner=Wanda(), max_iterations=1).solve(problem)
    assert problem.constraint.contains(result.solution)
    problem.validation = AttentionTokens(
        plain.validation.inputs, torch.zeros_like(plain.validation.targets), plain.validation.mixing
    )
    assert problem.validation_loss(plain.weights) == pytest.approx(
        float(predicted(plain.weights, {}, plain.validation).square().sum())
    )
