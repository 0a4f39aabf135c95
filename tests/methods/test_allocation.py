"""Allocation over the matrices of a model: budgets to one weight, estimates against autograd, searches, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import admm_prune
from admm_prune.data.sequences import Row, Sequences
from admm_prune.errors import UserError
from admm_prune.methods.allocation import measurements, search
from admm_prune.methods.allocation.budget import _estimated, held_out
from admm_prune.methods.allocation.levels import nearby_levels
from admm_prune.methods.allocation.measurements import Gradients, Levels, mean_loss
from admm_prune.methods.allocation.rules import RULES, AllocationRule
from admm_prune.methods.allocation.search import (
    GRADIENT_PASSES,
    Losses,
    SearchResult,
    Space,
    Table,
    _direction,
    evolutionary_search,
    gradient_search,
    neighbours,
)
from admm_prune.methods.base import IN_PROCESS, NOTHING, Journal, Task
from admm_prune.methods.layerwise import Layerwise
from admm_prune.methods.local import LOCAL_METHODS, Method
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import Target
from admm_prune.models.loading import load
from admm_prune.models.losses import next_token_loss
from admm_prune.models.structure import decoder_blocks
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.blockwise import allocating
from admm_prune.plan.counting import Work, counted, measured_cost
from admm_prune.problems.allocation import Curve
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.runs.results import Report
from admm_prune.settings import Settings
from admm_prune.verify.run import verify_folder
from tests.models.tiny_models import VOCABULARY, build

Prune = Callable[..., Report]
DISCRETE = ("2:4", "patterns")


def text(rows: int = 6, length: int = 24, seed: int = 0) -> Sequences:
    g = torch.Generator().manual_seed(seed)
    drawn = tuple(Row(torch.randint(1, VOCABULARY, (length,), generator=g), length) for _ in range(rows))
    return Sequences(drawn, "windows", length, None, 4)


def task(target: Target) -> Task:
    return Task(target=target, calibration=text())


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {view.name: view.read().clone() for block in decoder_blocks(model) for view in block.weights}


def zeros(model: PreTrainedModel) -> int:
    return sum(int((weight == 0).sum()) for weight in weights(model).values())


@pytest.mark.parametrize("rule", [name for name in RULES if name not in DISCRETE])
def test_every_rule_meets_the_budget_to_one_weight_and_leaves_the_model_dense(rule: str) -> None:
    model = build("llama", layers=3)
    dense = weights(model)
    total = sum(weight.numel() for weight in dense.values())
    asked = task(Target(sparsity=0.613))
    allocated = AllocationRule(rule, passes=6).applied(model, asked, IN_PROCESS)
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in dense.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert allocated.details["removed"] == allocated.details["budget"] == total - round((1 - 0.613) * total)
    json.dumps(allocated.details)
    pruned = Task(target=allocated.target, calibration=asked.calibration)
    Layerwise(LOCAL_METHODS["sparsegpt"]).prune(model, pruned)
    assert zeros(model) == allocated.details["budget"]


@pytest.mark.parametrize("rule", ["uniform", "owl", "equal-slope", "fisher", "knapsack", "search", "evolutionary"])
def test_patterns_are_mixed_and_remove_at_least_the_budget(rule: str) -> None:
    model = build("llama", layers=3)
    sizes = {name: weight.numel() for name, weight in weights(model).items()}
    allocated = AllocationRule(rule, passes=6).applied(model, task(Target(pattern=(2, 4))), IN_PROCESS)
    targets = allocated.details["targets"]
    assert set(targets.values()) <= {"1:4", "2:4", "3:4", "4:4"}
    assert 0 <= allocated.details["removed"] - sum(sizes.values()) // 2 < max(sizes.values())
    if rule == "uniform":
        assert set(targets.values()) == {"2:4"}
    Layerwise(LOCAL_METHODS["magnitude"]).prune(model, task(allocated.target))
    assert zeros(model) == allocated.details["removed"]


def test_a_sparsity_in_patterns_mixes_dense_and_sparse_matrices() -> None:
    model = build("llama", layers=3)
    total = sum(weight.numel() for weight in weights(model).values())
    details = AllocationRule("patterns").applied(model, task(Target(sparsity=0.3)), IN_PROCESS).details
    assert {"4:8", "8:8"} <= set(details["targets"].values()) <= {"8:8", "4:8", "2:4", "1:4"}
    assert details["removed"] >= details["budget"] == total - round(0.7 * total)
    assert details["bound"] <= details["loss"]
    assert details["gap"] < 0.01


@pytest.mark.parametrize(
    ("rule", "target", "level"),
    [(name, Target(pattern=(1, 4)), "1:4") for name in RULES if name != "patterns"]
    + [("patterns", Target(sparsity=0.75), "1:4"), ("fisher", Target(sparsity=1.0), "1.0")],
)
def test_a_budget_at_the_last_level_needs_no_measurement(
    rule: str, target: Target, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evolutionary search ended in an IndexError there."""
    monkeypatch.delattr(measurements, "levels")
    monkeypatch.delattr(measurements, "gradients")
    model = build("llama", layers=2)
    allocated = AllocationRule(rule, passes=6).applied(model, task(target), IN_PROCESS)
    assert allocated.details["targets"] == dict.fromkeys(weights(model), level)
    assert allocated.details["removed"] == allocated.details["budget"]


@pytest.mark.parametrize(
    ("rule", "target", "message"),
    [
        ("patterns", Target(sparsity=0.8), r"patterns: 80% of .* to go, and 75% can go at most, at 1:4: prune less$"),
        (
            "fisher",
            Target(pattern=(1, 4), layers=(("model.layers.0.mlp.up_proj.weight", "3:4"),)),
            r"fisher: 8\d\.\d+% of .* to go, and 75% can go at most, at 1:4",
        ),
    ],
)
def test_a_budget_beyond_the_last_levels_is_refused_before_any_work(rule: str, target: Target, message: str) -> None:
    model = build("llama", layers=2)
    recipe, rule_named = recipe_named("sparsegpt"), AllocationRule(rule)
    with pytest.raises(UserError, match=message):
        rule_named.check(recipe, model, target)
    with pytest.raises(UserError, match=message):
        rule_named.applied(model, task(target), IN_PROCESS)


@pytest.mark.parametrize(
    ("rows", "length", "evaluated"), [(64, 1024, 2), (16, 512, 4), (12, 64, 3), (2, 8, 1), (64, 4096, 1), (5, 24, 1)]
)
def test_a_search_evaluates_on_a_quarter_of_the_text_and_at_most_about_2048_tokens(
    rows: int, length: int, evaluated: int
) -> None:
    pruned_on, evaluated_on = held_out(text(rows, length))
    assert len(evaluated_on.rows) == evaluated
    assert len(pruned_on.rows) == rows - evaluated


@pytest.mark.parametrize(("method", "pattern"), [("admm", None), ("wanda", None), ("sparsegpt", (2, 4))])
def test_the_levels_near_an_allocation_are_those_of_a_run_with_one_other_level(
    method: str, pattern: tuple[int, int] | None
) -> None:
    model, asked = build("llama", layers=3), task(Target(sparsity=0.5))
    dense = weights(model)
    start = Target(pattern=pattern) if pattern else Target(sparsity=0.5)
    nearby = {name: nearby_levels(start, 0.95) for name in dense}
    local = LOCAL_METHODS[method]
    pruned = measurements.pruned_nearby(model, asked, IN_PROCESS, nearby, local)
    assert all(torch.equal(weight, dense[name]) for name, weight in weights(model).items())
    assert {len(levels) for levels in pruned.values()} == {3}
    name = "model.layers.2.self_attn.o_proj.weight"  # in the last block: it changes the inputs of no other matrix
    for k, level in enumerate(nearby[name].targets):
        fresh = build("llama", layers=3)
        target = replace(start, layers=((name, str(level)),))
        Layerwise(local).prune(fresh, Task(target=target, calibration=asked.calibration))
        for other, weight in weights(fresh).items():
            assert torch.equal(pruned[other][k if other == name else nearby[other].start], weight)


@pytest.mark.parametrize(
    ("start", "most", "levels"),
    [
        (Target(sparsity=0.7), 0.95, ["0.6", "0.7", "0.775"]),
        (Target(sparsity=0.2), 0.95, ["0.0", "0.2", "0.4"]),
        (Target(sparsity=0.0), 0.95, ["0.0", "0.25"]),
        (Target(sparsity=0.95), 0.95, ["0.933333", "0.95"]),
        (Target(pattern=(2, 4)), 0.95, ["3:4", "2:4", "1:4"]),
        (Target(pattern=(4, 4)), 0.95, ["4:4", "3:4"]),
        (Target(pattern=(1, 4)), 0.95, ["2:4", "1:4"]),
    ],
)
def test_the_levels_of_a_search_are_next_to_its_start(start: Target, most: float, levels: list[str]) -> None:
    nearby = nearby_levels(start, most)
    assert [str(level) for level in nearby.targets] == levels
    assert nearby.targets[nearby.start] == start


def test_a_search_prunes_its_levels_by_the_method_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = []

    def record(model: Any, task: Any, runtime: Any, nearby: Any, method: Method) -> dict[str, list[Tensor]]:
        methods.append(method.name)
        return measure(model, task, runtime, nearby, method)

    measure = measurements.pruned_nearby
    monkeypatch.setattr(measurements, "pruned_nearby", record)
    for name in ("wanda", "sparsellm", None):
        recipe = None if name is None else recipe_named(name)
        asked = task(Target(sparsity=0.5))
        AllocationRule("search", 2).applied(build("llama", layers=2), asked, IN_PROCESS, recipe)
    assert methods == ["wanda", recipe_named("sparsellm").method.name, "sparsegpt"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", ["search", "evolutionary"])
def test_a_search_without_held_out_text_is_refused_before_any_work(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(measurements, "levels")
    monkeypatch.delattr(measurements, "gradients")
    asked = Task(target=Target(sparsity=0.5), calibration=text(rows=1))
    with pytest.raises(UserError, match="a search needs held-out text: give at least two calibration sequences"):
        AllocationRule(rule).applied(build("llama", layers=2), asked, IN_PROCESS)


def test_uniform_is_the_run_without_an_allocation_up_to_a_weight_of_each_matrix() -> None:
    allocated = AllocationRule("uniform").applied(build("llama", layers=2), task(Target(sparsity=0.7)), IN_PROCESS)
    model = build("llama", layers=2)
    sizes = {name: weight.numel() for name, weight in weights(model).items()}
    for name, target in allocated.details["targets"].items():
        assert abs(float(target) - 0.7) * sizes[name] <= 1


def test_matrices_with_targets_of_their_own_keep_them_and_count() -> None:
    model = build("llama", layers=2)
    names = list(weights(model))
    layers = ((names[0], "0.25"), (names[1], "dense"))
    asked = task(Target(sparsity=0.6, layers=layers))
    allocated = AllocationRule("fisher").applied(model, asked, IN_PROCESS)
    assert dict(allocated.target.layers) | dict(layers) == dict(allocated.target.layers)
    Layerwise(LOCAL_METHODS["magnitude"]).prune(model, Task(target=allocated.target, calibration=asked.calibration))
    after = weights(model)
    pruned = [name for name in names if name != names[1]]
    total = sum(after[name].numel() for name in pruned)
    assert sum(int((after[name] == 0).sum()) for name in pruned) == total - round(0.4 * total)
    assert float((after[names[0]] == 0).double().mean()) == pytest.approx(0.25, abs=1 / after[names[0]].numel())


@pytest.mark.parametrize("rule", ["search", "evolutionary"])
def test_matrices_with_targets_of_their_own_have_these_during_a_search(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", layers=2)
    dense = weights(model)
    own, untouched = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    seen = []

    def loss(model: Any, text: Sequences) -> float:
        now = weights(model)
        seen.append([int((now[name] == 0).sum()) for name in (own, untouched)])
        return measure(model, text)

    measure = mean_loss
    monkeypatch.setattr(search, "mean_loss", loss)
    asked = task(Target(sparsity=0.5, layers=((own, "0.9"), (untouched, "dense"))))
    AllocationRule(rule, 5).applied(model, asked, IN_PROCESS)
    assert seen
    assert all(zeros == [Target(sparsity=0.9).removed_from(dense[own].numel()), 0] for zeros in seen)
    assert all(torch.equal(weight, dense[name]) for name, weight in weights(model).items())


def test_overrides_that_leave_no_way_to_the_sparsity_are_refused() -> None:
    model = build("llama", layers=2)
    layers = tuple((name, "0.0") for name in list(weights(model))[:-1])
    with pytest.raises(UserError, match="the overrides alone leave no way to 60%"):
        AllocationRule("uniform").applied(model, task(Target(sparsity=0.6, layers=layers)), IN_PROCESS)


@pytest.mark.parametrize("rule", ["fisher", "owl", "knapsack"])
def test_everything_can_go(rule: str) -> None:
    model = build("llama", layers=2)
    details = AllocationRule(rule).applied(model, task(Target(sparsity=1.0)), IN_PROCESS).details
    assert set(details["targets"].values()) == {"1.0"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_squares_of_gradients_are_those_of_autograd(family: str) -> None:
    model, sequences = build(family, layers=2), text(3)
    names = frozenset(weights(model))
    measured = measurements.gradients(model, sequences, names, keep=True)
    views = [view for block in decoder_blocks(model) for view in block.weights]
    parameters = list(dict.fromkeys(view.parameter for view in views))
    squares = {view.name: torch.zeros(view.shape[0], dtype=torch.float64) for view in views}
    sums = {view.name: torch.zeros(view.shape) for view in views}
    for parameter in parameters:
        parameter.requires_grad_()
    for row in sequences.rows:
        batch = sequences.batch([row.ids])
        loss = next_token_loss(model, batch) * batch.scored.sum()
        by_parameter = dict(zip(map(id, parameters), torch.autograd.grad(loss, parameters), strict=True))
        for view in views:
            gradient = view.within(by_parameter[id(view.parameter)])
            squares[view.name] += gradient.double().square().sum(1)
            sums[view.name] += gradient
    assert measured.tokens == sequences.scored_tokens
    for view in views:
        assert torch.allclose(measured.squares[view.name], squares[view.name], rtol=1e-4), view.name
        assert torch.allclose(measured.means[view.name] * measured.tokens, sums[view.name], rtol=1e-3, atol=1e-5)
        assert view.parameter.grad is None


def test_errors_at_patterns_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admm_prune.methods.allocation.budget._estimated", lambda *_: torch.full((4,), math.nan))
    with pytest.raises(UserError, match=r"the allocation patterns: .*: the losses of a curve must be finite"):
        AllocationRule("patterns").applied(build("llama", layers=2), task(Target(sparsity=0.4)), IN_PROCESS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    """The gradients of the mean loss, those of the sum divided by 200, are below the smallest number of float16."""
    model, sequences = build("llama", layers=2), text(3, length=200)
    names = frozenset(weights(model))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0**-10)
    measured = measurements.gradients(model.to(dtype), sequences, names, keep=True)
    expected = measurements.gradients(model.float(), sequences, names, keep=True)
    for name, mean in expected.means.items():
        assert measured.means[name].dtype == torch.float32
        assert float((measured.means[name] - mean).norm() / mean.norm()) < 0.1, name
        assert float(measured.squares[name].sum() / expected.squares[name].sum()) == pytest.approx(1.0, abs=0.05), name


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = build("llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight.fill_(60000.0)
    model.half()
    with pytest.raises(UserError, match=r"the gradients of the loss are not finite in torch\.float16: use --dtype"):
        AllocationRule("fisher").applied(model, task(Target(sparsity=0.6)), IN_PROCESS)


def test_the_model_is_dense_again_after_an_error() -> None:
    model, asked = build("llama", layers=2), task(Target(sparsity=0.5))
    before = weights(model)

    def loss() -> float:
        raise UserError("interrupted")

    with pytest.raises(UserError, match="interrupted"):
        measurements.levels(
            model, asked, IN_PROCESS, {name: [Target(sparsity=0.5)] for name in before}, loss=loss, reference=0
        )
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_the_errors_of_a_level_are_those_of_pruning_alone() -> None:
    """In the first block, whose inputs are dense in any run."""
    model, asked = build("llama", layers=2), task(Target(sparsity=0.5))
    path = {name: [Target(sparsity=0.3), Target(sparsity=0.5)] for name in weights(model)}
    levels = measurements.levels(model, asked, IN_PROCESS, path, keep=True)
    reports = Layerwise(LOCAL_METHODS["sparsegpt"]).prune(model, asked).layers
    for view, report in zip(decoder_blocks(model)[0].weights, reports, strict=False):
        rows = levels.rows[view.name]
        assert float(rows[1].sum() / rows[-1].sum()) == pytest.approx(report.relative_error, rel=1e-3)
        assert torch.equal(levels.weights[view.name][1], view.read())


def test_the_second_order_estimate_is_the_rise_of_a_quadratic_loss() -> None:
    """1/2 E[(d . x dw)^2] with d and x independent, drawn; every token is a sequence of its own."""
    g = torch.Generator().manual_seed(0)
    tokens, rows, width = 40_000, 3, 5
    inputs = torch.randn(tokens, width, generator=g).double() * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    slopes = torch.randn(tokens, rows, generator=g).double() * torch.tensor([0.5, 1.0, 2.0])
    change = torch.randn(rows, width, generator=g).double()
    exact = 0.5 * (slopes * (inputs @ change.T)).square().sum(1).mean()
    squares = torch.einsum("ti,tj->i", slopes.square(), inputs.square())  # g_ij = d_ti x_tj
    gram = inputs.T @ inputs
    levels = Levels(
        rows={"w": ((change @ gram) * change).sum(1)[None]},
        traces={"w": float(gram.trace())},
        weights={},
        first_order={},
        losses=[],
    )
    estimate = _estimated("w", levels, Gradients(squares={"w": squares}, means={}, tokens=tokens))
    assert float(estimate) == pytest.approx(float(exact), rel=0.05)


@dataclass
class Convex:
    """Losses c_l n_l exp(6 s_l), whose optimum is s_l = t - ln(c_l) / 6.

    Attributes:
        losses, gradients: the numbers of measurements.
        limit: the sparsity of a matrix beyond which the loss overflows.
    """

    space: Space
    costs: list[float]
    losses: int = 0
    gradients: int = 0
    limit: float = 1.0

    def sparsities(self, chosen: Sequence[int]) -> list[float]:
        terms = zip(self.space.curves, self.space.sizes, self.space.first, chosen, strict=True)
        return [float(curve.savings[k] + first) / size for curve, size, first, k in terms]

    def loss(self, chosen: Sequence[int]) -> float:
        self.losses += 1
        s = self.sparsities(chosen)
        if max(s) > self.limit:
            return math.inf
        return sum(c * n * math.exp(6 * x) for c, n, x in zip(self.costs, self.space.sizes, s, strict=True))

    def rises(self, chosen: Sequence[int], step: int) -> list[float]:
        self.gradients += 1
        assert max(self.sparsities(chosen)) <= self.limit, "a gradient where the loss is not finite"
        around = [neighbours(curve.count, k) for curve, k in zip(self.space.curves, chosen, strict=True)]
        ends = [self.sparsities([pair[end] for pair in around]) for end in (0, 1)]
        terms = zip(self.costs, self.space.sizes, self.sparsities(chosen), *ends, strict=True)
        return [6 * c * n * math.exp(6 * s) * (above - below) for c, n, s, below, above in terms]


def space_of(sizes: Sequence[int], levels: Sequence[Sequence[float]], fraction: float) -> Space:
    curves = [
        Curve(str(l), torch.zeros(len(own)).double(), torch.tensor([round(n * x) for x in own]).double(), least=0)
        for l, (n, own) in enumerate(zip(sizes, levels, strict=True))
    ]
    return Space(sizes, curves, round(fraction * sum(sizes)), 1.0, [0] * len(sizes))


def synthetic(count: int = 8, seed: int = 0) -> tuple[Space, Convex]:
    """Matrices of one size with levels 0.05 apart, and costs over four orders of e."""
    costs = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(4).exp()
    space = space_of([1000] * count, [[0.0, *(0.45 + 0.05 * k for k in range(11))]] * count, 0.7)
    return space, Convex(space, costs.tolist())


class Memory(Journal):
    """Keeps records, and ends the run at the n-th."""

    keeps = True

    def __init__(self, stop: int | None = None) -> None:
        self.records: list[Any] = []
        self.stop = stop

    def finished(self, part: str) -> list[Any]:
        return list(self.records)

    def commit(self, part: str, index: int, content: Any, **_: Any) -> None:
        if index == self.stop:
            raise KeyboardInterrupt
        assert index == len(self.records)
        self.records.append(content)


def searches(space: Space, losses: Losses, passes: int) -> dict[str, Callable[[Journal], SearchResult]]:
    zero = torch.zeros(len(space.sizes), dtype=torch.float64)
    return {
        "gradient": lambda journal: gradient_search(space, losses, zero, passes, journal),
        "evolutionary": lambda journal: evolutionary_search(space, losses, space.levels(zero), passes, journal),
    }


@pytest.mark.parametrize("kind", ["gradient", "evolutionary"])
def test_a_search_keeps_the_budget_counts_its_passes_and_finds_a_better_allocation(kind: str) -> None:
    space, losses = synthetic()
    found = searches(space, losses, 120)[kind](NOTHING)
    assert found.passes <= 120
    removed = sum(float(c.savings[k]) for c, k in zip(space.curves, found.levels, strict=True))
    assert space.budget <= removed < space.budget + 50, "less than a step of a level too much"
    assert found.loss == pytest.approx(losses.loss(found.levels))
    assert found.loss < 0.75 * found.start, "uniform is far from the optimum"


def test_the_gradient_search_beats_the_evolutionary_one_at_equal_passes() -> None:
    ratios = []
    for seed in range(3):
        space, losses = synthetic(count=16, seed=seed)
        both = searches(space, losses, 64)
        ratios.append(both["gradient"](NOTHING).loss / both["evolutionary"](NOTHING).loss)
    assert sum(ratios) / len(ratios) < 0.97


def test_the_gradient_search_ends_near_the_best_of_all_allocations() -> None:
    space, losses = synthetic(count=4)
    found = searches(space, losses, 5000)["gradient"](NOTHING)
    assert found.passes < 500
    levels = range(len(space.curves[0].losses))
    removed = [float(x) for x in space.curves[0].savings]
    within = (choice for choice in product(levels, repeat=4) if sum(removed[k] for k in choice) >= space.budget)
    assert found.loss <= 1.05 * min(map(losses.loss, within))


@pytest.mark.parametrize("passes", [1, 2, 4, 5, 6, 40, 1000])
def test_the_passes_of_a_gradient_search_are_those_of_its_measurements(passes: int) -> None:
    space, losses = synthetic()
    found = searches(space, losses, passes)["gradient"](NOTHING)
    assert found.passes == losses.losses + GRADIENT_PASSES * losses.gradients <= passes
    assert (losses.gradients > 0) == (passes > GRADIENT_PASSES + 1), "a gradient and the loss after it"


def test_the_gradient_search_weighs_matrices_of_unlike_sizes_and_levels() -> None:
    """The price of a weight, not of a level or of a matrix, is the same everywhere at the end."""
    levels = [0.05 * k for k in range(20)]
    space = space_of([400, 400, 1600, 6400], [levels[::2], levels, levels[::3], levels], 0.6)
    losses = Convex(space, [1.0, 40.0, 8.0, 2.0])
    found = searches(space, losses, 400)["gradient"](NOTHING)
    best = math.inf
    for choice in product(*(range(len(curve.losses)) for curve in space.curves)):
        removed = sum(float(curve.savings[k]) for curve, k in zip(space.curves, choice, strict=True))
        if removed >= space.budget:
            best = min(best, losses.loss(choice))
    assert found.loss <= 1.05 * best
    assert found.start > 1.2 * best


def test_a_step_of_the_gradient_search_is_that_of_its_formula() -> None:
    """Matrix 0 is dense and matrix 1 at its last level: one-sided; matrix 2 has no other level."""
    space = Space(
        [100, 100, 100, 300],
        [
            Curve("0", torch.zeros(3).double(), torch.tensor([0, 20, 80]).double(), least=0),
            Curve("1", torch.zeros(3).double(), torch.tensor([0, 40, 50]).double(), least=0),
            Curve("2", torch.zeros(2).double(), torch.tensor([0, 0]).double(), least=0),
            Curve("3", torch.zeros(4).double(), torch.tensor([0, 90, 180, 270]).double(), least=0),
        ],
        240,
        1.0,
        [0] * 4,
    )
    step = _direction(space, [0, 2, 0, 2], [0.4, 0.1, 5.0, 9.0])
    d = [0.4 / 20, 0.1 / 10, 0.0, 9.0 / 180]
    weights = [100 * 0.02, 100 * 0.5 * 0.5, 0.0, 300 * 0.6 * 0.4]
    mean = sum(w * x for w, x in zip(weights, d, strict=True)) / sum(weights)  # all d are positive: m = mu
    expected = [(x - mean) / mean for x in d]
    assert step.tolist() == pytest.approx([expected[0], expected[1], 0.0, expected[3]])
    far = _direction(space, [0, 2, 0, 2], [0.4, 10.0, 5.0, -0.9])
    assert float(far.max()) == 2.0
    assert _direction(space, [0, 2, 0, 2], [0.0] * 4).tolist() == [0.0] * 4


def restricted(space: Space, lowest: int, highest: int) -> Space:
    """The allocations over some levels of a space."""
    kept = slice(lowest, highest + 1)
    curves = [
        replace(curve, losses=curve.losses[kept], savings=curve.savings[kept] - curve.savings[lowest])
        for curve in space.curves
    ]
    return replace(space, curves=curves, first=[int(curve.savings[lowest]) for curve in space.curves])


def test_levels_need_not_begin_at_zero() -> None:
    space, _ = synthetic()
    part, z = restricted(space, 2, 9), torch.linspace(-1.0, 1.0, len(space.sizes), dtype=torch.float64)
    assert part.removed(z) == space.removed(z)
    levels = [k + 2 for k in part.levels(z)]
    assert levels == space.levels(z)
    assert torch.equal(part.removed_at(part.levels(z)), space.removed_at(levels))


def test_the_gradient_search_stays_within_the_levels() -> None:
    space, losses = synthetic()
    part = restricted(space, 5, 7)
    far = torch.tensor([-9.0, 9.0] * 4, dtype=torch.float64)
    assert (1000 * part.within_levels(far).sigmoid()).round().tolist() == [650.0, 750.0] * 4
    losses.space = part
    found = gradient_search(part, losses, torch.zeros_like(far) + math.log(0.7 / 0.3), 40, NOTHING)
    assert found.loss < found.start
    assert set(found.levels) == {0, 1, 2}


def test_the_gradient_search_returns_from_an_allocation_at_which_the_model_overflows() -> None:
    space, losses = synthetic()
    losses.limit = 0.8  # the first steps lead beyond it
    found = searches(space, losses, 120)["gradient"](NOTHING)
    assert max(losses.sparsities(found.levels)) <= 0.8
    assert found.loss < found.start


@pytest.mark.parametrize("kind", ["gradient", "evolutionary"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_search_ends_where_no_other_allocation_is_left(kind: str, share: float) -> None:
    """At their last levels no matrix can lose more; of two unlike matrices none can lose it for the other."""
    savings = torch.tensor([0.0, 100, 200]).double()
    curves = [Curve(f"m{l}", savings.clone(), scale * savings, least=0) for l, scale in enumerate((1, 3))]
    space = Space([400, 1200], curves, round(share * 800), 1.0, [0, 0])
    found = searches(space, Convex(space, [1.0, 3.0]), 1000)[kind](NOTHING)
    assert found.levels == ([2, 2] if share == 1 else [1, 1])
    assert found.passes == 1 or (kind == "gradient" and found.passes < 100)


@pytest.mark.parametrize("kind", ["gradient", "evolutionary"])
def test_a_search_that_is_resumed_is_the_one_that_was_not_interrupted(kind: str) -> None:
    whole = searches(*synthetic(), 70)[kind](NOTHING)
    journal = Memory(stop=17)
    with pytest.raises(KeyboardInterrupt):
        searches(*synthetic(), 70)[kind](journal)
    journal.stop = None
    space, losses = synthetic()
    resumed = searches(space, losses, 70)[kind](journal)
    assert resumed == whole
    assert losses.losses + losses.gradients == len(journal.records) - 17


def test_the_rises_of_a_table_are_its_losses_to_first_order() -> None:
    """Levels that differ little: the change of the loss on the text is <g, W_above - W_below>."""
    model = build("llama", layers=2).double()
    views = [view for block in decoder_blocks(model) for view in block.weights]
    g = torch.Generator().manual_seed(0)
    moved = [1e-3 * torch.randn(view.shape, generator=g, dtype=torch.float64) for view in views]
    weights_of = [[None, view.read() + move, view.read() + 2 * move] for view, move in zip(views, moved, strict=True)]
    rest = text(6, seed=1)
    for step, rows in enumerate((rest.rows[::3], rest.rows[1::3], rest.rows[2::3], rest.rows[::3])):
        # The text is taken in three parts, as many sequences at a time as are held out; here they are also held out.
        table = Table(model, rest, replace(rest, rows=rows), views, weights_of)
        chosen = [1] * len(views)
        rises = table.rises(chosen, step)
        for i in (0, 3, len(views) - 1):
            above, below = ([*chosen[:i], level, *chosen[i + 1 :]] for level in (2, 0))
            assert rises[i] == pytest.approx(table.loss(above) - table.loss(below), rel=2e-3)  # norms are in float32
        table.restore()


@pytest.fixture
def prune(model_folder: Path, text_file: Path) -> Prune:
    return partial(admm_prune.prune, model_folder, data=str(text_file), samples=12, device="cpu")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"method": "sparsellm", "sparsity": 0.55, "allocation": "fisher"}, marks=pytest.mark.slow),
        {
            "method": "wanda",
            "pattern": "2:4",
            "allocation": "equal-slope",
            "stream": True,
            "overrides": {"re:.*k_proj": "3:4"},
        },
        pytest.param(
            {"method": "admm", "sparsity": 0.6, "allocation": "search", "allocation_passes": 5, "ignore": "v_proj"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_allocated_run_is_recorded_shown_and_verified(prune: Prune, tmp_path: Path, how: dict[str, Any]) -> None:
    report = prune(**how, out=tmp_path / "out")
    assert report.budget == "model"
    details = report.details["allocation"]
    assert details["rule"] == how["allocation"]
    by_name = {layer.name: layer for layer in report.layers}
    reached = sum(
        by_name[name].shape[0] * by_name[name].shape[1] - by_name[name].nonzeros for name in details["targets"]
    )
    assert reached == details["removed"]
    assert verify_folder(tmp_path / "out", device="cpu", quick=True).failures == []
    page = (tmp_path / "out/report.html").read_text()
    assert f"distributed by the rule {how['allocation']}" in page
    assert "Sparsity of every matrix over the blocks" in page
    recipe = (tmp_path / "out/recipe.yaml").read_text()
    assert f"allocation: {how['allocation']}" in recipe


def test_targets_that_do_not_add_up_are_detected(prune: Prune, tmp_path: Path) -> None:
    prune(method="magnitude", sparsity=0.6, allocation="uniform", out=tmp_path / "out")
    manifest = tmp_path / "out/admm_prune.json"
    content = json.loads(manifest.read_text())
    targets = content["details"]["allocation"]["targets"]
    targets[next(iter(targets))] = "0.1"
    manifest.write_text(json.dumps(content))
    failures = verify_folder(tmp_path / "out", device="cpu", quick=True).failures
    assert any("the targets of the allocation remove" in failure for failure in failures)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"allocation": "owls"}, "unknown allocation 'owls' (did you mean 'owl'?): choose one of uniform, "),
        ({"allocation": "owl", "allocation_passes": 9}, "allocation passes are for the allocations search and evol"),
        (
            {"sparsity": 0.8, "allocation": "patterns"},
            "the allocation patterns: 80% of the weights that share the budget",
        ),
        ({"allocation": "fisher", "stream": True}, "needs the whole model in memory: use --no-stream, or one of uni"),
        ({"method": "struprune", "allocation": "owl"}, "struprune allocates its budget itself"),
        ({"method": "elsa", "allocation": "owl"}, "elsa trains all weights to one target"),
        ({"allocation": "uniform", "overrides": {"Linear": 0.9}}, "the overrides alone leave no way to 50%"),
        ({"sparsity": None, "pattern": "2:4", "allocation": "patterns"}, "mixes patterns itself"),
        ({"allocation": "evolutionary", "samples": 1}, "a search needs held-out text: give at least two calibration"),
    ],
)
def test_what_cannot_be_allocated_is_refused_before_any_work(
    prune: Prune, tmp_path: Path, how: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as refusal:
        prune(**{"sparsity": 0.5, "method": "magnitude", "out": tmp_path / "out", **how})
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_text_that_a_search_cannot_use_is_refused_before_the_dense_model_is_evaluated(
    prune: Prune, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("admm_prune.runs.prune.evaluated_dense")
    with pytest.raises(UserError, match="a search needs held-out text"):
        prune(sparsity=0.5, method="wanda", allocation="search", samples=1)
    run = Settings(str(model_folder), data=str(text_file), samples=1, device="cpu", allocation="search")
    settings = ComparisonSettings(run=run, methods=("wanda",), targets=(Target(0.5),))
    monkeypatch.delattr("admm_prune.runs.compare.evaluated_dense", raising=False)
    with pytest.raises(UserError, match="a search needs held-out text"):
        compare(settings, tmp_path / "out")


@pytest.mark.slow
def test_a_comparison_allocates_for_every_method(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = Settings(str(model_folder), data=str(text_file), samples=12, device="cpu", allocation="fisher")
    settings = ComparisonSettings(
        run=run, methods=("magnitude", "sparsegpt"), targets=(Target(0.5), Target(None, (2, 4)))
    )
    comparison = compare(settings, tmp_path / "out")
    assert comparison.manifest["settings"]["allocation"] == "fisher"
    assert len(comparison.rows) == 4
    assert verify_folder(tmp_path / "out", device="cpu", quick=True).failures == []


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["owl", "equal-slope", "fisher", "search", "evolutionary"])
def test_the_plan_of_an_allocation_is_at_most_seven_tenths_too_much(rule: str) -> None:
    anatomy, g = Anatomy.of("embedded", "float32"), torch.Generator().manual_seed(0)
    rows = tuple(Row(torch.randint(4096, (256,), generator=g), 256) for _ in range(8))
    asked = Task(target=Target(0.5), calibration=Sequences(rows, "windows", 256, None, 8))
    stages = allocating(anatomy, AllocationRule(rule, 8), asked, stream=False)
    model = load("embedded", dtype="float32").model
    with counted() as counting:
        counting.know(*model.parameters(), *model.buffers())
        AllocationRule(rule, 8).applied(model, asked, IN_PROCESS)
    planned = sum((stage.work for stage in stages), Work()).operations
    assert 0.65 * counting.work.operations <= planned <= 1.7 * counting.work.operations


@pytest.mark.parametrize("rule", ["fisher", "measured", "search"])
def test_the_plan_of_an_allocation_counts_the_activations_of_a_backward_pass(rule: str) -> None:
    rows = tuple(Row(torch.randint(4096, (256,), generator=torch.Generator().manual_seed(0)), 256) for _ in range(4))
    asked = Task(target=Target(0.5), calibration=Sequences(rows, "windows", 256, None, 8))
    stages = allocating(Anatomy.of("embedded", "float32"), AllocationRule(rule, 8), asked, stream=False)
    (planned,) = [stage.parts["activations"] for stage in stages if "gradients" in stage.name]
    model = load("embedded", dtype="float32").model
    with counted() as counting:
        counting.know(*model.parameters(), *model.buffers())
        with measured_cost(counting) as cost:
            names = frozenset(view.name for block in decoder_blocks(model) for view in block.weights)
            measurements.gradients(model, asked.calibration, names)
    assert planned == pytest.approx(cost.peak, rel=0.1)
    assert planned > 4 * 256 * len(decoder_blocks(model)) * 10 * model.config.hidden_size


def test_the_page_says_of_every_rule_whether_it_streams() -> None:
    page = (Path(__file__).parents[2] / "docs/methods/allocation.md").read_text(encoding="utf-8")
    table = page.split("| rule | from | measured | streams |\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[1:]]
    assert {row[0].strip("`"): row[3] for row in cells} == {
        name: "no" if rule.whole else "yes" for name, rule in RULES.items()
    }


@pytest.mark.parametrize("name", ["admm", "sparsellm", "wanda"])
def test_methods_of_layers_and_networks_take_an_allocation(name: str) -> None:
    AllocationRule("fisher").check(recipe_named(name), build("llama", layers=2), Target(sparsity=0.5))
