"""How training computes: every setting gives the result of plain float32 training, to the rounding it stands for.

Models are in float64, but for their norms, which are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import admm_prune
from admm_prune.data.sequences import Batch, Row, Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Task
from admm_prune.methods.elsa.baselines import Gradual, Staged
from admm_prune.methods.elsa.engine import Engine, float32_weights, multiplies_in_bfloat16, teacher_of
from admm_prune.methods.elsa.trainer import Trainer, held_out_loss
from admm_prune.methods.target import target_named
from admm_prune.models import losses
from admm_prune.models.loading import load
from admm_prune.models.losses import Distillation, next_token_loss
from admm_prune.models.parallel import ALONE, World
from admm_prune.plan.counting import counted
from admm_prune.solvers.sparse_adam import SparseAdam
from tests.methods.test_training_methods import FLOAT32, pruned, texts
from tests.models.tiny_models import VOCABULARY, build

LENGTHS = (9, 12, 5, 12, 3, 8, 11)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"micro_batch": 1},
    {"micro_batch": 3},
    {"gradient_checkpointing": True},
    {"micro_batch": 2, "gradient_checkpointing": True},
]


def sequences(vocabulary: int = VOCABULARY) -> Sequences:
    g = torch.Generator().manual_seed(0)
    rows = tuple(Row(torch.randint(1, vocabulary, (length,), generator=g), length) for length in LENGTHS)
    return Sequences(rows, "documents", max(LENGTHS), None, len(LENGTHS))


def trainer(model: nn.Module, engine: Engine, *, world: World = ALONE, distilled: bool = False) -> Trainer:
    loss = Distillation(teacher_of(model, torch.float32), 0.5) if distilled else next_token_loss
    optimizer = SparseAdam(model, sparsity=0.5, freeze=1.0)
    return Trainer(
        model, optimizer, loss, sequences(), steps=4, batch_size=len(LENGTHS), seed=0, world=world, engine=engine
    )


def gradients(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("how", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_gradient_is_that_of_the_whole_batch(family: str, how: dict[str, Any]) -> None:
    """Sequences differ in length: a mean of the means of micro-batches would be another number."""
    model = build(family).double().requires_grad_(True)
    (batch,) = sequences().batches
    scored = batch.scored[:, 1:]
    logits = model(input_ids=batch.input_ids).logits[:, :-1][scored]
    expected = cross_entropy(logits, batch.input_ids[:, 1:][scored])
    expected.backward()
    expected = expected.detach()
    plain = gradients(model)
    value = trainer(model, Engine(**how)).backward(batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(gradients(model), plain, rtol=1e-3, atol=1e-6)


def test_processes_and_micro_batches_share_a_batch_exactly() -> None:
    """The mean over three processes, with seven sequences in micro-batches of two, and with fewer than processes."""
    model = build("llama").double().requires_grad_(True)
    for rows in (7, 2):
        whole = sequences().batches[0]
        batch = Batch(whole.input_ids[:rows], whole.lengths[:rows], None)
        value = trainer(model, Engine()).backward(batch)
        plain = gradients(model)
        calls, parts = [], []
        for rank in range(3):
            one = trainer(model, Engine(micro_batch=2), world=World(rank, 3))
            calls.append(len(list(one._shares(batch))))
            parts.append(one.backward(batch))
        assert len(set(calls)) == 1  # else processes would wait for each other
        assert float(sum(parts) / 3) == pytest.approx(float(value), rel=1e-6)
        torch.testing.assert_close([g / 3 for g in gradients(model)], plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_sequences_without_a_scored_token_change_nothing(distilled: bool) -> None:
    """Such as those of a text that is nothing but its separator, alone in a micro-batch or beside others."""
    ids = torch.tensor([[1, 5, 9], [1, 1, 1], [1, 7, 4]])
    found = []
    for rows, how in (([0, 2], {}), ([0, 1, 2], {}), ([1, 0, 2], {"micro_batch": 1})):
        model = build("llama").requires_grad_(True)
        batch = Batch(ids[rows], torch.tensor([3] * len(rows)), 1)
        engine = replace(FLOAT32, **how)
        found.append((trainer(model, engine, distilled=distilled).backward(batch), gradients(model)))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    alone = Batch(ids[1:2], torch.tensor([3]), 1)
    assert float(next_token_loss(model, alone).detach()) == float(losses.cross_entropy(model, alone)) == 0.0


class Second(World):
    """The second of two processes, the first of which has computed a loss of 3."""

    def broadcast_from_rank0(self, compute: Callable[[], Any]) -> Any:
        assert compute() != 3.0
        return 3.0


def test_all_processes_decide_by_the_held_out_loss_of_the_first() -> None:
    one = trainer(build("llama").requires_grad_(True), Engine(), world=Second(1, 2))
    assert one.held_out_loss(sequences()) == 3.0


def test_distillation_is_the_same_in_micro_batches_with_activations_computed_again() -> None:
    results = []
    for how in (SETTINGS[0], SETTINGS[-1]):
        model = build("llama-untied").double().requires_grad_(True)
        one = trainer(model, Engine(**how), distilled=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
        results.append((one.backward(sequences().batches[0]), gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)


def test_less_is_held_with_micro_batches_and_with_activations_computed_again() -> None:
    def peak(how: dict[str, Any]) -> int:
        model = build("llama", layers=6).requires_grad_(True)
        one = trainer(model, Engine(**how))
        with counted() as counting:
            counting.know(*model.parameters(), *model.buffers())
            one.backward(sequences().batches[0])
        return counting.peak

    whole, fewer, again = (peak(how) for how in ({}, {"micro_batch": 1}, {"gradient_checkpointing": True}))
    assert fewer < 0.6 * whole
    assert again < 0.6 * whole


def test_models_with_dropout_train_without_it() -> None:
    """As in evaluation: with activations computed again too, which transformers' own checkpointing ties to dropout."""
    model = build("gpt2").requires_grad_(True)
    model.config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    one = trainer(model, Engine(gradient_checkpointing=True))
    values = [float(one.backward(sequences().batches[0])) for _ in range(2)]
    assert values[0] == values[1]
    assert values[0] == pytest.approx(one.held_out_loss(sequences()), rel=1e-5)


def test_logits_that_are_held_whole_bound_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_WHOLE", 3 * max(LENGTHS) * VOCABULARY)
    one, other = (trainer(build(family).requires_grad_(True), Engine()) for family in ("gemma2", "llama"))
    assert [len(piece.lengths) for _, piece in one._shares(sequences().batches[0])] == [3, 3, 1]
    assert len(list(other._shares(sequences().batches[0]))) == 1
    assert one.notes == (
        "the model changes its logits after its output embedding: its loss holds those of 3 sequences at once",
    )
    assert other.notes == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_are_trained_in_float32_and_the_saved_weights_are_those_judged(
    dtype: str, model_folder: Path, text_file: Path
) -> None:
    recipe = Staged(steps=16, batch_size=4, lr=1e-3, schedule=None, engine=FLOAT32)
    model, outcome = pruned(recipe, "0.75", model_folder, text_file, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(layer.sparsity >= 0.75 for layer in outcome.layers)
    _, held_out = texts(model_folder, text_file).calibration(40).split(0.1)
    with float32_weights(model):
        assert held_out_loss(model, held_out) == outcome.details["training"]["held_out_loss"]
    # The same as the float32 model of these weights, rounded in the end.
    wide = load(str(model_folder), dtype=dtype).model.float()
    calibration = texts(model_folder, text_file).calibration(40)
    exact = recipe.prune(wide, Task(target=target_named("0.75"), calibration=calibration))
    assert not any("worse" in note for note in (*outcome.notes, *exact.notes))
    assert outcome.details["training"]["loss"] == exact.details["training"]["loss"]
    for narrow, x in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, x.to(narrow.dtype))


def test_weights_come_back_in_their_own_dtypes_and_zeros_stay() -> None:
    model = build("llama").to(torch.bfloat16)
    model.model.norm.float()
    model.lm_head.weight.data[:, ::2] = 0
    before = [(p.dtype, p.detach().clone()) for p in model.parameters()]
    with float32_weights(model) as dtypes:
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert list(dtypes.values()) == [dtype for dtype, _ in before]
        assert model(input_ids=sequences().batches[0].input_ids).logits.dtype == torch.float32
    for p, (dtype, x) in zip(model.parameters(), before, strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, x)


def test_a_teacher_keeps_ties_and_the_weights_of_the_model() -> None:
    model = build("llama").requires_grad_(True)
    teacher = teacher_of(model, torch.bfloat16)
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    assert not (teacher.model.norm.weight == 7.0).any()


def test_the_precision_that_was_used_is_in_the_details(model_folder: Path, text_file: Path) -> None:
    recipe = Gradual(steps=8, batch_size=4, interval=2, lr=1e-3)
    here = "bf16" if multiplies_in_bfloat16(torch.device("cpu")) else "float32"
    found = []
    for precision, expected in (("auto", here), ("bf16", "bf16"), ("float32", "float32")):
        model, outcome = pruned(
            replace(recipe, engine=Engine(precision=precision)),  # type: ignore[arg-type]
            "0.5", model_folder, text_file,
        )  # fmt: skip
        assert outcome.details["training"]["precision"] == expected
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        found.append(outcome.details["training"]["held_out_loss"])
    assert found[1] == pytest.approx(found[2], rel=0.05)
    assert found[1] != found[2]


@pytest.mark.slow
def test_compiled_blocks_train_alike(model_folder: Path, text_file: Path) -> None:
    recipe = Staged(steps=8, batch_size=4, lr=1e-3, schedule=None)
    (_, plain), (_, compiled) = (
        pruned(replace(recipe, engine=engine), "0.5", model_folder, text_file)
        for engine in (Engine(), Engine(compile=True, gradient_checkpointing=True))
    )
    curves = [outcome.details["training"]["loss"][-1]["loss"] for outcome in (plain, compiled)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_settings_reach_the_engine_and_the_manifest(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    report = admm_prune.prune(
        model_folder, method="gradual", sparsity=0.5, data=str(text_file), length=32, samples=24, steps=20,
        precision="bf16", micro_batch=2, gradient_checkpointing=True, distillation=0.25, out=tmp_path / "out",
    )  # fmt: skip
    assert report.details["training"]["precision"] == "bf16"
    assert report.details["training"]["distillation"] == 0.25
    settings = report.manifest["settings"]
    assert (settings["precision"], settings["micro_batch"], settings["gradient_checkpointing"]) == ("bf16", 2, True)
    assert "micro_batch: 2" in (tmp_path / "out/recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": "admm", "micro_batch": 2}, "admm does not train: --micro-batch is for elsa"),
        ({"method": "wanda", "gradient_checkpointing": True}, "wanda does not train: --gradient-checkpointing is for"),
        ({"method": "elsa", "micro_batch": 0}, "micro_batch must be at least 1, not 0"),
        ({"method": "admm", "distillation": 0.0}, "admm does not train: --distillation is for elsa"),
        ({"method": "elsa", "distillation": 1.5}, "distillation must be at most 1.0, not 1.5"),
        ({"method": "elsa", "precision": "fp8"}, "precision must be auto, bf16 or float32, not 'fp8'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line(how: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        admm_prune.prune("embedded", sparsity=0.5, **how)
    assert "\n" not in str(caught.value)
