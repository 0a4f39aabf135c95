"""The recipes that train: exactly sparse, repeatable, never worse than what they passed, compared with their peers."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import admm_prune
from admm_prune.data.sequences import Batch, Row, Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Outcome, Runtime, Task
from admm_prune.methods.elsa.baselines import DensitySchedule, Gradual, Staged, TunedDense, stages_of
from admm_prune.methods.elsa.elsa import TRAINED, Elsa
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.elsa.trainer import (
    DEFAULT_RATE,
    MeasuredRate,
    endless_batches,
    held_out_loss,
    measured_rate,
)
from admm_prune.methods.registry import recipe_named, with_baselines
from admm_prune.methods.target import Target, target_named
from admm_prune.models.loading import load
from admm_prune.models.losses import Distillation, next_token_loss
from admm_prune.models.parallel import World
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.runs.texts import Texts
from admm_prune.settings import Settings, TextSettings
from tests.models.tiny_models import build

# Losses are compared exactly with those in float32; "auto" is bfloat16 on some processors.
FLOAT32 = Engine(precision="float32")
PRUNING = [recipe.name for recipe in TRAINED if recipe.name != "tuned-dense"]


def texts(model_folder: Path, text_file: Path) -> Texts:
    return Texts(TextSettings(data=str(text_file), length=32, packing="windows"), load(str(model_folder)))


def pruned(
    recipe: Trained, target: str, model_folder: Path, text_file: Path, *, dtype: str | None = None, seed: int = 0
) -> tuple[nn.Module, Outcome]:
    model = load(str(model_folder), dtype=dtype).model
    calibration = texts(model_folder, text_file).calibration(40)
    outcome = recipe.prune(model, Task(target=target_named(target), calibration=calibration, seed=seed))
    return model, outcome


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("target", ["0.7", "2:4"])
def test_every_matrix_meets_the_target_exactly_and_all_else_is_trained(
    name: str, target: str, model_folder: Path, text_file: Path
) -> None:
    recipe = replace(recipe_named(name, steps=24), batch_size=2)
    dense = dict(load(str(model_folder)).model.named_parameters())
    model, outcome = pruned(recipe, target, model_folder, text_file)
    views = [view for block in decoder_blocks(model) for view in block.weights]
    for view, report in zip(views, outcome.layers, strict=True):
        kept = int(view.read().count_nonzero())
        assert report.sparsity == 1 - kept / view.parameter.numel()
        assert kept <= round((1 - target_named(target).fraction) * view.parameter.numel())
        if target == "2:4":
            assert int(view.read().unflatten(1, (-1, 4)).count_nonzero(-1).max()) <= 2
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.get_input_embeddings().weight, dense["model.embed_tokens.weight"])
    rates = outcome.details["training"]["lr"]
    assert all(rate > 0 for rate in (rates if isinstance(rates, list) else [rates]))
    json.dumps(outcome.details, allow_nan=False)


@pytest.mark.bitwise
@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Elsa, Staged])
def test_two_runs_are_equal_to_the_bit_and_another_seed_is_not(
    kind: type[Trained], dtype: str, model_folder: Path, text_file: Path
) -> None:
    recipe = kind(steps=20, batch_size=2)
    first, again, other = (
        pruned(recipe, "0.8", model_folder, text_file, dtype=dtype, seed=seed)[0] for seed in (0, 0, 1)
    )
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == getattr(torch, dtype)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [Elsa, Staged])
def test_the_model_is_trained_between_projections(kind: type[Staged], model_folder: Path, text_file: Path) -> None:
    # A smaller rate, for a text that is soon learned by heart.
    recipe = kind(steps=60, batch_size=2, lr_multiplier=0.3, engine=FLOAT32)
    model, outcome = pruned(recipe, "0.9", model_folder, text_file)
    stages = outcome.details["stages"]
    training = outcome.details["training"]
    plan = recipe.projections(target_named("0.9"))
    expected = [(round(at * training["steps"]), str(target)) for at, target in plan]
    assert [(stage["step"], stage["target"]) for stage in stages] == expected
    assert training["held_out_loss"] < stages[-1]["held_out_loss"]
    assert training["loss"][-1]["loss"] < training["loss"][0]["loss"]
    _, held_out = texts(model_folder, text_file).calibration(40).split(0.1)
    assert training["held_out_loss"] == held_out_loss(model, held_out)


def test_training_that_does_harm_is_undone(model_folder: Path, text_file: Path) -> None:
    """A rate far too high ends worse than the projection that it began with, which is then what is returned."""
    calibration = texts(model_folder, text_file).calibration(40)
    recipe = Staged(steps=20, batch_size=4, lr=3.0, schedule=None, engine=FLOAT32)
    model, outcome = pruned(recipe, "0.5", model_folder, text_file)
    assert any("worse on held-out sequences" in note for note in outcome.notes)
    _, held_out = calibration.split(0.1)
    assert held_out_loss(model, held_out) == outcome.details["stages"][-1]["held_out_loss"]
    assert all(layer.sparsity == 0.5 for layer in outcome.layers)


def test_a_dense_model_that_training_makes_worse_is_returned_as_it_was(model_folder: Path, text_file: Path) -> None:
    dense = load(str(model_folder)).model
    model, outcome = pruned(TunedDense(steps=8, batch_size=4, lr=3.0), "0", model_folder, text_file)
    assert any("worse on held-out sequences" in note for note in outcome.notes)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    better, outcome = pruned(TunedDense(steps=20, batch_size=4), "0", model_folder, text_file)
    assert outcome.notes == ()
    assert not torch.equal(better.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_a_loss_that_is_not_finite_is_noted(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("admm_prune.methods.elsa.trainer.held_out_loss", lambda *_: math.inf)
    _, outcome = pruned(Gradual(steps=4, batch_size=4, lr=1e-3, interval=1), "0.5", model_folder, text_file)
    assert outcome.notes == ("the loss of the model on held-out sequences is not finite",)


@pytest.mark.parametrize("kind", [Elsa, Staged])
def test_notes_of_layer_problems_reach_the_result(kind: type[Staged], model_folder: Path, text_file: Path) -> None:
    model = load(str(model_folder)).model
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0.0
    task = Task(target=target_named("0.5"), calibration=texts(model_folder, text_file).calibration(40))
    outcome = kind(steps=4, batch_size=4, lr=1e-6).prune(model, task)
    stages = outcome.details["stages"]
    dead = [name for name, notes in stages[0]["notes"].items() if any("channels are dead" in n for n in notes)]
    assert [name.split(".")[-2] for name in dead[:3]] == ["q_proj", "k_proj", "v_proj"]
    assert [note.partition(" layer problems have notes")[0] for note in outcome.notes if "layer problems" in note] == [
        f"projection at step {stage['step']}: {len(stage['notes'])}" for stage in stages if stage.get("notes")
    ]


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [(0.0, [0.0, 0.2, 0.4]), (1.0, [0.0]), (0.7, [0.0, 0.2, 0.3]), (0.5, [0.0, 0.2, 0.4, 0.5]), (0.6, [0.0, 0.2, 0.4])],
)
def test_no_stage_comes_after_the_support_was_fixed(frozen: float, expected: list[float]) -> None:
    plan = Elsa(frozen=frozen).projections(target_named("0.9"))
    assert [at for at, _ in plan] == pytest.approx(expected)
    assert plan[-1][1] == target_named("0.9")


def test_a_short_last_part_is_the_last_step(model_folder: Path, text_file: Path) -> None:
    """Of 6 steps the last hundredth is none."""
    _, outcome = pruned(Elsa(steps=6, batch_size=2, lr=1e-5, frozen=0.01), "0.5", model_folder, text_file)
    stages = outcome.details["stages"]
    assert [stage["step"] for stage in stages] == [0, 5]
    assert "relative_error" not in stages[-1]  # no layer problem, but the support of z
    assert outcome.details["training"]["held_out_loss"] <= stages[-1]["held_out_loss"]


def test_all_of_the_run_on_a_fixed_support_starts_at_the_layers_solution(model_folder: Path, text_file: Path) -> None:
    how: dict[str, Any] = {"steps": 6, "batch_size": 2, "lr": 1e-3, "schedule": None}
    elsa, outcome = pruned(Elsa(**how, frozen=1.0), "0.5", model_folder, text_file)
    staged, _ = pruned(Staged(**how), "0.5", model_folder, text_file)
    assert [stage["step"] for stage in outcome.details["stages"]] == [0]
    for a, b in zip(elsa.parameters(), staged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_elsa_starts_every_stage_at_the_layers_solution_and_changes_its_support(
    model_folder: Path, text_file: Path
) -> None:
    _, outcome = pruned(Elsa(steps=60, batch_size=2, lr=5e-3), "0.9", model_folder, text_file)
    stages, updates = outcome.details["stages"], outcome.details["training"]["dual_updates"]
    assert [("relative_error" in stage) for stage in stages] == [True, True, True, False]
    for stage, following in pairwise(stages):
        between = [update for update in updates if stage["step"] < update["step"] <= following["step"]]
        assert between[0]["primal_residual"] < 0.2  # x has not left z yet
        assert any(update["churn"] > 0 for update in between)
        expected = min(float(stage["target"]), 0.9)
        assert all(update["sparsity"] == pytest.approx(expected, abs=0.01) for update in between[:-1])


@pytest.mark.parametrize(("name", "part"), [("elsa-published", 1.0), ("gradual", 0.5)])
def test_the_published_rate_has_no_warm_up(
    name: str, part: float, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("admm_prune.methods.elsa.trainer._WINDOW", 1)

    def first(figures: dict[str, float], step: int) -> None:
        assert (step, figures["train/lr"]) == (1, pytest.approx(part * 1e-3))
        raise KeyboardInterrupt

    task = Task(target=target_named("0.5"), calibration=texts(model_folder, text_file).calibration(40))
    recipe = replace(recipe_named(name, steps=40), lr=1e-3, batch_size=2)  # type: ignore[type-var]
    with pytest.raises(KeyboardInterrupt):
        recipe.prune(load(str(model_folder)).model, task, Runtime(on_record=first))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"first": 0.0}, "first of DensitySchedule must be positive and finite, not 0.0"),
        ({"first": 1.5}, "first of DensitySchedule must lie between 0 and 1, not 1.5"),
        ({"ratio": 1.0}, "ratio and until of a schedule must be less than 1, not 1.0 and 0.4"),
        ({"until": 1.0}, "ratio and until of a schedule must be less than 1, not 0.58 and 1.0"),
        ({"ratio": math.nan}, "ratio of DensitySchedule must be a number, not nan"),
    ],
    ids=str,
)
def test_a_schedule_out_of_range_is_refused(how: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DensitySchedule(**how)


def test_held_out_text_without_a_token_to_score_is_refused(model_folder: Path) -> None:
    rows = tuple(Row(torch.tensor([1, 1 if i == 1 else 5]), 1) for i in range(3))
    task = Task(target=target_named("0.5"), calibration=Sequences(rows, "documents", 2, 1, 8))
    with pytest.raises(UserError, match="gradual chooses by held-out text, which has no token to score"):
        Gradual(steps=2, lr=1e-3).prune(load(str(model_folder)).model, task)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"steps": 0}, "steps of Elsa must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size of Elsa must be at least 1, not 0"),
        ({"lr": -1.0}, "lr of Elsa must be at least 0, not -1.0"),
        ({"lr_multiplier": math.nan}, "lr_multiplier of Elsa must be a number, not nan"),
        ({"distillation": 1.5}, "distillation of Elsa must lie between 0 and 1, not 1.5"),
        ({"warm_up": -0.1}, "warm_up of Elsa must lie between 0 and 1, not -0.1"),
        ({"frozen": 1.5}, "frozen of Elsa must lie between 0 and 1, not 1.5"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_in_a_line(how: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Elsa(**how)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_rate_that_is_recorded_is_that_of_the_step(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("admm_prune.methods.elsa.trainer._WINDOW", 3)
    records: list[tuple[int, float]] = []
    runtime = Runtime(on_record=lambda figures, step: records.append((step, figures["train/lr"])))
    task = Task(target=target_named("0.5"), calibration=texts(model_folder, text_file).calibration(40))
    Gradual(steps=4, batch_size=2, lr=1e-3).prune(load(str(model_folder)).model, task, runtime)
    assert records == [(step, pytest.approx(1e-3 * (1 - (step - 1) / 4))) for step in (3, 4)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("0.5", [0.5]),
        ("0.75", [0.75]),
        ("0.9", [0.75, 1 - math.sqrt(0.25 * 0.1), 0.9]),
        ("0.99", [1 - 0.25 * 0.04 ** (i / 6) for i in range(6)] + [0.99]),
        ("2:4", [(2, 4)]),
        ("1:8", [(2, 8), (1, 8)]),
        ("0.0", [0.0]),
        ("1.0", [1.0]),
    ],
)
def test_densities_fall_in_equal_ratios(target: str, expected: list[object]) -> None:
    plan = stages_of(target_named(target), DensitySchedule())
    assert [t.pattern or pytest.approx(t.sparsity) for _, t in plan] == expected
    assert [at for at, _ in plan] == pytest.approx([0.4 * i / max(1, len(plan) - 1) for i in range(len(plan))])
    assert plan[-1][1] == target_named(target)
    assert stages_of(target_named(target), None) == [(0.0, target_named(target))]


class Bend(nn.Module):
    """A loss of two weights, steep along one and flat along the other."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, 0.5, 0.0]))


def bent(model: Bend, batch: Tensor) -> Tensor:
    return (model.x * torch.tensor([10.0, 1.0, 5.0])).square().sum() + 0 * batch.sum()


def test_the_measured_step_is_the_best_along_the_signs_of_the_gradient() -> None:
    model = Bend()
    before = model.x.detach().clone()

    def backward(batch: Tensor) -> Tensor:
        loss = bent(model, batch)
        loss.backward()
        return loss.detach()

    measured = measured_rate(model, backward, [torch.zeros(1)] * 4, lambda: float(bent(model, torch.zeros(1))))
    assert torch.equal(model.x, before)
    assert model.x.grad is None
    steps = torch.linspace(0, 1.5, 15001)
    values = [float(100 * (1 - s) ** 2 + (0.5 - s) ** 2) for s in steps]
    best = float(steps[values.index(min(values))])
    # A zero weight stays, the rms is of the others; the search ends within a factor 2^0.4, or at 1/4 of the rms.
    ceiling = 0.25 * math.sqrt((1 + 0.25) / 2)
    assert measured.step == pytest.approx(min(best, ceiling), rel=0.35)
    assert measured.decrease > 0
    assert measured.rate(0.5) == pytest.approx(2.3 * measured.step)
    assert measured.rate(0.25) > measured.rate(0.5) > measured.rate(1.0)


def measured_by(sign: float = 1.0, far: float = math.inf, last: float = 1.0) -> tuple[MeasuredRate, Tensor]:
    """The measured step on `Bend`, and the weights afterwards.

    Args:
        sign: of the gradient.
        far: the loss is flat at 1000 for weights further than this from the first ones.
        last: a factor of the last batch's gradient.
    """
    model = Bend()
    before = model.x.detach().clone()
    batches = [torch.zeros(1)] * 2 + [torch.ones(1)]

    def backward(batch: Tensor) -> Tensor:
        (sign * (last if batch else 1.0) * bent(model, batch)).backward()
        return torch.zeros(())

    def loss() -> float:
        away = float((model.x.detach() - before).abs().max())
        return 1000.0 if away > far else float(bent(model, torch.zeros(1)).detach())

    return measured_rate(model, backward, batches, loss), model.x.detach()


@pytest.mark.parametrize("far", [1e-3, 2e-4])
def test_a_loss_that_is_flat_far_away_is_measured_by_smaller_steps(far: float) -> None:
    measured, x = measured_by(far=far)
    assert measured.usable
    assert 0 < measured.step <= far
    assert torch.equal(x, Bend().x)


@pytest.mark.parametrize("how", [{"sign": -1.0}, {"far": 0.0}, {"last": math.nan}, {"last": math.inf}], ids=str)
def test_what_cannot_be_measured_is_not_used_as_if_it_were(how: dict[str, float]) -> None:
    """Steps uphill, a loss that no step lowers, and gradients that are not finite."""
    measured, x = measured_by(**how)
    assert not measured.usable
    assert measured.rate(1.0) == measured.rate(0.1) == DEFAULT_RATE == recipe_named("elsa-published").lr
    assert torch.equal(x, Bend().x)


@pytest.mark.parametrize("kind", [Elsa, Staged, Gradual])
def test_a_rate_that_could_not_be_measured_is_the_default_with_a_note(
    kind: type[Trained], model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("admm_prune.methods.elsa.trained.measured_rate", lambda *_: MeasuredRate(0.1, -1.0))
    _, outcome = pruned(kind(steps=20, batch_size=4, lr_multiplier=2.0), "0.5", model_folder, text_file)
    assert set(outcome.details["training"]["lr"]) == {2 * DEFAULT_RATE}
    assert [note for note in outcome.notes if "rate" in note] == [
        "the learning rate could not be measured, because no step along the gradient lowers the loss: 0.0004 is used"
    ]


def test_batches_of_an_epoch_show_every_sequence_once(model_folder: Path, text_file: Path) -> None:
    calibration = texts(model_folder, text_file).calibration(24)
    batches = endless_batches(calibration, 4, seed=0)
    epochs = [[tuple(row.tolist()) for _ in range(6) for row in next(batches).input_ids] for epoch in range(2)]
    everything = sorted(tuple(row.ids.tolist()) for row in calibration.rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_losses_are_those_of_the_evaluation_and_of_the_dense_model(model_folder: Path, text_file: Path) -> None:
    sequences = texts(model_folder, text_file).calibration(8)
    model = load(str(model_folder)).model
    (batch,) = sequences.batches
    assert float(next_token_loss(model, batch)) == pytest.approx(held_out_loss(model, sequences), rel=1e-5)
    other = copy.deepcopy(model)
    nn.init.normal_(other.model.layers[0].mlp.down_proj.weight)
    assert float(Distillation(model, weight=1.0)(model, batch)) == pytest.approx(0.0, abs=1e-6)
    apart = float(Distillation(model, weight=1.0)(other, batch))
    assert apart > 0.01
    mixed = float(Distillation(model, weight=0.25)(other, batch))
    assert mixed == pytest.approx(0.75 * float(next_token_loss(other, batch)) + 0.25 * apart, rel=1e-5)
    assert _kl(model, other, batch) == pytest.approx(apart, rel=1e-4)


def _kl(teacher: nn.Module, model: nn.Module, batch: Batch) -> float:
    """The mean over the scored tokens of sum p log(p / q), in float64."""
    with torch.no_grad():
        p, q = (m(input_ids=batch.input_ids).logits.double().softmax(-1)[:, :-1] for m in (teacher, model))
    return float((p * (p / q).log()).sum(-1)[batch.scored[:, 1:]].mean())


@pytest.mark.slow
def test_a_comparison_sets_elsa_beside_its_baselines(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    settings = ComparisonSettings(
        run=Settings(str(model_folder), data=str(text_file), samples=24, length=32, packing="windows", steps=10),
        methods=("admm", "elsa"), targets=(Target(sparsity=0.6),),
    )  # fmt: skip
    comparison = compare(settings, tmp_path / "out")
    methods = [(row.method, row.target) for row in comparison.rows]
    assert methods == [
        ("tuned-dense", "0%"),
        *((name, "60%") for name in ("admm", "elsa", "admm-finetuned", "gradual", "staged")),
    ]
    assert (tmp_path / "out/report.html").read_text().count("tuned-dense") >= 1
    assert with_baselines(["wanda", "admm", "wanda"]) == ["wanda", "admm"]


def test_prune_takes_the_steps_and_the_report_has_the_curve(
    tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    report = admm_prune.prune(
        model_folder,
        method="elsa",
        sparsity=0.6,
        data=str(text_file),
        length=32,
        samples=24,
        steps=20,
        out=tmp_path / "out",
    )
    assert report.details["training"]["steps"] < 20  # the others measured the rate
    assert report.pruned.perplexity < math.inf
    manifest = json.loads((tmp_path / "out/admm_prune.json").read_text())
    assert manifest["settings"]["steps"] == 20
    assert manifest["details"]["training"]["loss"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": "admm", "steps": 10, "sparsity": 0.5}, "admm does not train: --steps is for elsa"),
        ({"method": "elsa", "steps": 0, "sparsity": 0.5}, "steps must be at least 1, not 0"),
        ({"method": "tuned-dense", "sparsity": 0.5}, "tuned-dense prunes nothing"),
        ({"method": "elsa", "sparsity": 0.5, "ridge": 0.1}, "elsa takes no ridge"),
        ({"method": "elsa", "sparsity": 0.5, "bounds": True}, "elsa trains all weights, .* leave --bounds out"),
        ({"method": "tuned-dense", "sparsity": 0.0, "bounds": True}, "has no layer problems to bound"),
        ({"method": "struprune", "sparsity": 0.5, "bounds": True}, "struprune removes groups, .* leave --bounds out"),
        ({"method": "gradual", "pattern": "16:32"}, r"down_proj.weight: 32 does not divide"),
        ({"method": "elsa", "pattern": "16:32"}, r"down_proj.weight: 32 does not divide"),
        ({"method": "elsa", "sparsity": 0.5, "samples": 1}, "at least 2 sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_in_a_line(
    how: dict[str, object], words: str, model_folder: Path, text_file: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        admm_prune.prune(model_folder, data=str(text_file), length=32, **how)
    assert "\n" not in str(caught.value)


def test_gradual_pruning_reaches_its_target_before_the_end(model_folder: Path, text_file: Path) -> None:
    model, outcome = pruned(Gradual(steps=40, batch_size=4, interval=4, power=0.25), "0.75", model_folder, text_file)
    assert {round(layer.sparsity, 6) for layer in outcome.layers} == {0.75}
    assert math.isfinite(outcome.details["training"]["held_out_loss"])
    assert isinstance(model, nn.Module)


def test_steps_that_were_skipped_are_reported(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def overflowing(model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss(model, batch) * (math.inf if next(calls) in (2, 5) else 1.0)

    monkeypatch.setattr("admm_prune.methods.elsa.trained.next_token_loss", overflowing)
    recipe = Gradual(steps=12, batch_size=4, interval=2, lr=1e-3)
    model, outcome = pruned(recipe, "0.5", model_folder, text_file)
    assert (outcome.details["training"]["steps"], outcome.details["training"]["skipped"]) == (12, 2)
    assert any("2 steps skipped" in note for note in outcome.notes)
    assert {round(layer.sparsity, 6) for layer in outcome.layers} == {0.5}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Elsa(steps=8, interval=8, batch_size=4, lr=1e-3), "no update of z and u fits into 8 steps of training"),
        (Gradual(steps=16, batch_size=4, lr=1e-3), "all weights were removed at once, in 16 steps"),
        (Staged(steps=2, batch_size=4), "one step trained"),
        (Elsa(steps=24, batch_size=4, lr=1e-3), ""),
    ],
    ids=["elsa", "gradual", "staged", "long enough"],
)
def test_a_run_too_short_for_its_method_is_noted(
    recipe: Trained, words: str, model_folder: Path, text_file: Path
) -> None:
    _, outcome = pruned(recipe, "0.5", model_folder, text_file)
    notes = [note for note in outcome.notes if "step" in note and "held-out" not in note]
    assert bool(notes) == bool(words)
    assert not words or words in notes[-1]


def test_a_loss_that_is_not_finite_is_not_called_one_that_no_step_lowers(model_folder: Path, text_file: Path) -> None:
    model = load(str(model_folder)).model
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.inf)
    task = Task(target=target_named("0.5"), calibration=texts(model_folder, text_file).calibration(40))
    outcome = TunedDense(steps=20, batch_size=4).prune(model, replace(task, target=target_named("0")))
    assert any("because the loss or its gradient is not finite: 0.0002 is used" in note for note in outcome.notes)


@pytest.mark.parametrize("kind", [Elsa, Staged, Gradual])
def test_several_processes_refuse_a_sparsity_of_experts_before_any_work(
    kind: type[Trained], model_folder: Path, text_file: Path
) -> None:
    task = Task(target=target_named("0.5"), calibration=texts(model_folder, text_file).calibration(40))
    with pytest.raises(UserError, match="holds the matrices of experts, which several processes cannot prune"):
        kind(steps=20).prune(build("mixtral", layers=1), task, Runtime(world=World(size=2)))
