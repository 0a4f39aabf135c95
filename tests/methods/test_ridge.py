"""The ridge chosen on validation tokens is the one that serves tokens never seen."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from admm_prune.data.sequences import Row, Sequences
from admm_prune.errors import UserError
from admm_prune.methods import ridge
from admm_prune.methods.base import Ridge, Task
from admm_prune.methods.joint import Joint
from admm_prune.methods.layerwise import prune_shared
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import composed
from admm_prune.methods.ridge import GRID, choose_ridge, parse_ridge
from admm_prune.methods.sparsellm import SPARSELLM
from admm_prune.methods.target import Target
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import WeightView
from admm_prune.plan.plan import make_plan
from admm_prune.problems.constraints import Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.statistics import LayerStatistics
from tests.catalogue import correlated_inputs, random_weight
from tests.models.tiny_models import VOCABULARY, build
from tests.unchanged import unchanged

TEXT = Sequences((), "windows", 8, None, 1)


def split_grams(tokens: int, width: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = correlated_inputs(tokens + 4000, width, 0, torch.float32)
    seen, validation, unseen = x[:tokens], x[int(0.85 * tokens) : tokens], x[tokens:]
    return seen.T @ seen, validation.T @ validation, unseen.T @ unseen


def test_every_trial_is_reported_the_best_one_first() -> None:
    gram, validation, _ = split_grams(600)
    trials = choose_ridge(random_weight(32, 48, 0, torch.float32), gram, validation, Unstructured(0.5))
    assert sorted((trial.ridge, trial.damping) for trial in trials) == sorted(GRID)
    errors = [trial.error for trial in trials]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "step"), [(1, 12), (5, 3), (6, 2), (11, 2), (12, 1)])
def test_evenly_spaced_rows_represent_the_layer(
    rows: int, step: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(12, 48, 0, dtype)
    gram, validation, _ = (x.to(dtype) for x in split_grams(600))
    expected = choose_ridge(weight[::step].clone(), gram, validation, Unstructured(0.5))
    monkeypatch.setattr(ridge, "_ROWS", rows)
    with unchanged(weight, gram, validation):
        assert choose_ridge(weight, gram, validation, Unstructured(0.5)) == expected


@pytest.mark.parametrize("grid", [[pair for pair in GRID if not pair[i]] for i in (0, 1)], ids=["damping", "ridge"])
def test_scarce_text_asks_for_more_than_plenty(grid: list[tuple[float, float]]) -> None:
    weight, constraint = random_weight(32, 48, 0, torch.float32), Unstructured(0.5)
    chosen = {}
    for tokens in (60, 6000):
        gram, validation, _ = split_grams(tokens)
        best = choose_ridge(weight, gram, validation, constraint, grid)[0]
        chosen[tokens] = best.ridge + best.damping
    assert chosen[60] > chosen[6000]


def test_the_choice_serves_unseen_tokens() -> None:
    weight, constraint = random_weight(32, 48, 0, torch.float32), Unstructured(0.5)
    gram, validation, unseen = split_grams(60)
    chosen = choose_ridge(weight, gram, validation, constraint)[0]

    def error(ridge: float, damping: float) -> float:
        problem = LayerReconstruction(weight, gram, constraint, ridge=ridge, damping=damping)
        return problem.relative_error(ADMM().solve(problem).solution, unseen)

    every = {pair: error(*pair) for pair in GRID}
    assert every[chosen.ridge, chosen.damping] <= 1.02 * min(every.values())
    assert every[chosen.ridge, chosen.damping] < 0.9 * max(every.values())


def test_a_channel_that_only_the_validation_tokens_use_is_no_obstacle() -> None:
    x = correlated_inputs(400, 48, 0, torch.float32)
    x[:, 5] = 0
    x[340:, 5] = 1.0
    x[:, 7] = 0
    gram, validation = x.T @ x, x[340:].T @ x[340:]
    gram[5, 5] -= 1e-4  # as rounding may
    trials = choose_ridge(random_weight(32, 48, 0, torch.float32), gram, validation, Unstructured(0.5))
    assert all(0 < trial.error < 1 for trial in trials)


def pruned(task: Task, statistics: LayerStatistics) -> list[Any]:
    views = []
    for seed, name in enumerate("qk"):
        linear = nn.Linear(48, 16, bias=False)
        linear.weight.data = random_weight(16, 48, seed, torch.float32)
        views.append(WeightView(name, linear))
    reports = prune_shared(SharedInput(tuple(views), statistics), LOCAL_METHODS["admm"], task)
    return [(report, view.read()) for report, view in zip(reports, views, strict=True)]


def test_a_layer_pruned_with_auto_is_the_one_pruned_with_what_auto_chose() -> None:
    gram, validation, _ = split_grams(60)
    statistics = LayerStatistics(gram, 60, validation, 9)
    task = Task(target=Target(0.5), calibration=TEXT, ridge="auto")
    by_choice = pruned(task, statistics)
    report = by_choice[0][0]
    assert len(report.ridge_trials) == len(GRID)
    assert (report.ridge, report.damping) == (report.ridge_trials[0].ridge, report.ridge_trials[0].damping)
    assert by_choice[1][0].ridge_trials == report.ridge_trials, "chosen once for the input that both share"
    own = pruned(replace(task, ridge=None), statistics)[0][0]
    assert (own.ridge, own.damping) == (LOCAL_METHODS["admm"].ridge, LOCAL_METHODS["admm"].damping)
    assert own.ridge_trials == ()
    by_number = pruned(replace(task, ridge=0.125), statistics)[0][0]
    assert by_number.ridge == 0.125
    with pytest.raises(UserError, match="auto needs validation tokens"):
        pruned(task, LayerStatistics(gram, 60))


@pytest.mark.parametrize("wrong", ["much", "", "-1", "nan", float("inf"), -0.5])
def test_a_ridge_that_is_none_is_refused(wrong: str | float) -> None:
    with pytest.raises(UserError, match="ridge must be 'auto' or a finite number that is not negative, not"):
        parse_ridge(wrong)


def test_a_ridge_is_read() -> None:
    assert [parse_ridge(text) for text in (None, "auto", "0.1", 0, 1e-3)] == [None, "auto", 0.1, 0.0, 1e-3]


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
@pytest.mark.parametrize("ridge", [0.3, "auto"])
def test_a_ridge_that_changes_nothing_is_refused_before_any_work(name: str, ridge: Ridge) -> None:
    """It was reported as used; with "auto" every matrix was solved seven times to choose it."""
    model, task = build("llama", layers=1), Task(target=Target(0.5), calibration=TEXT, ridge=ridge)
    with pytest.raises(UserError, match=f"^{name} only scores weights, whatever the ridge: leave --ridge out$"):
        composed(name).check_task(task)
    with pytest.raises(UserError, match="leave --ridge out"):
        composed(name).prune(model, task)
    with pytest.raises(UserError, match="leave --ridge out"):
        make_plan("embedded", method=name, sparsity=0.5, samples=2, length=32, ridge=ridge)


@pytest.mark.parametrize("name", [*LOCAL_METHODS, *(recipe.name for recipe in SPARSELLM)])
def test_a_ridge_is_taken_where_anything_depends_on_it(name: str) -> None:
    task = Task(target=Target(0.5), calibration=TEXT, ridge=0.3)
    recipe, taken = composed(name), name not in ("wanda", "magnitude")
    with nullcontext() if taken else pytest.raises(UserError):
        recipe.check_task(task)
    composed(name, joint=Joint(coordinate=("attention",))).check_task(task)
    recipe.check_task(replace(task, bounds=True))
    recipe.check_task(replace(task, ridge=None))


@pytest.mark.parametrize(("name", "ridge"), [("wanda", None), ("admm", 0.03)])
def test_only_a_ridge_that_was_used_is_reported(name: str, ridge: float | None) -> None:
    x = correlated_inputs(300, 48, 0, torch.float32)
    layer = nn.Linear(48, 16, bias=False).requires_grad_(False)
    shared = SharedInput((WeightView("0.weight", layer),), LayerStatistics(gram=x.T @ x, tokens=300))
    (report,) = prune_shared(shared, LOCAL_METHODS[name], Task(target=Target(0.5), calibration=TEXT))
    assert report.ridge == ridge
    assert (report.damping is None) == (ridge is None)


@pytest.mark.parametrize("solver", ["wanda", "magnitude"])
def test_matrices_outside_of_the_networks_have_no_ridge_where_it_changes_nothing(solver: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows = tuple(Row(torch.randint(1, VOCABULARY, (24,), generator=g), 24) for _ in range(6))
    task = Task(target=Target(0.5), calibration=Sequences(rows, "windows", 24, None, 4), ridge="auto")
    outcome = composed("sequential", solver=solver).prune(build("llama", layers=1), task)
    assert {(report.ridge, report.ridge_trials) for report in outcome.layers} == {(None, ())}
    assert outcome.details["feed_forward"][0]["damped"]["down"] in map(list, GRID)
