"""`admm_prune.prune` from Python: what it returns is what it saves, and what it refuses it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import admm_prune
from admm_prune.errors import UserError
from admm_prune.methods.base import Task
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import Target
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs import prune
from admm_prune.runs.evaluate import evaluate_model
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings

IDS = torch.tensor([[0, 5, 17, 42, 99, 3, 260]])


@pytest.mark.bitwise
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stock_transformers_loads_the_model_to_the_bit(
    tmp_path: Path, model_folder: Path, text_file: Path, dtype: str
) -> None:
    report = admm_prune.prune(
        model_folder, method="sparsegpt", sparsity=0.6, data=str(text_file), out=tmp_path / "out", dtype=dtype
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == report.model.dtype == getattr(torch, dtype)
    assert torch.equal(loaded(input_ids=IDS).logits, report.model(input_ids=IDS).logits)
    assert report.out == tmp_path / "out"
    manifest = json.loads((tmp_path / "out/admm_prune.json").read_text())
    del manifest["sha256"]  # over all the rest
    assert manifest == json.loads(json.dumps(report.as_json()))


@pytest.mark.bitwise
def test_a_module_is_pruned_in_place_like_its_folder(model_folder: Path, text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    report = admm_prune.prune(model, tokenizer=tokenizer, method="wanda", pattern="2:4", data=str(text_file))
    assert report.model is model
    by_folder = admm_prune.prune(str(model_folder), method="wanda", pattern="2:4", data=str(text_file))
    assert torch.equal(model(input_ids=IDS).logits, by_folder.model(input_ids=IDS).logits)
    assert report.pruned == by_folder.pruned


def test_a_layer_error_is_measured_against_the_dense_weight(model_folder: Path, text_file: Path) -> None:
    """With all weights gone every output is lost, with none gone none is: whatever the dtype shares its memory with."""
    for sparsity, error in ((1.0, 1.0), (0.0, 0.0)):
        report = admm_prune.prune(model_folder, method="magnitude", sparsity=sparsity, data=str(text_file))
        first = report.layers[0]
        assert first.relative_error == pytest.approx(error, abs=1e-12)
        assert first.relative_error_validation == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_an_error_on_tokens_that_a_weight_was_fitted_to_is_no_validation_error(
    method: str, model_folder: Path, text_file: Path
) -> None:
    report = admm_prune.prune(model_folder, method=method, sparsity=0.5, data=str(text_file), samples=4)
    assert all(layer.relative_error and layer.relative_error_validation is None for layer in report.layers)


def test_a_target_that_one_weight_does_not_admit_leaves_all_of_them_alone(model_folder: Path, text_file: Path) -> None:
    loaded = load(str(model_folder))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    text = Texts(TextSettings(data=str(text_file)), loaded).calibration()
    # 32 divides the width of every weight but the last of a block, which is 48.
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: pattern 16:32 needs a width"):
        recipe_named("magnitude").prune(loaded.model, Task(target=Target(pattern=(16, 32)), calibration=text))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_target_is_refused_before_the_text_is_read(model_folder: Path) -> None:
    with pytest.raises(UserError, match="pattern 16:32 needs a width"):
        admm_prune.prune(model_folder, pattern="16:32", data="missing.txt")


def test_a_module_that_cannot_be_used_is_refused(model_folder: Path, text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(UserError, match="needs its tokenizer"):
        admm_prune.prune(model, sparsity=0.5, data=str(text_file))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(UserError, match=r"call model\.eval\(\) first"):
        admm_prune.prune(model.train(), tokenizer=tokenizer, sparsity=0.5, data=str(text_file))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"eval_samples": 0}, "eval_samples must be at least 1, not 0"),
        ({"length": 1}, "length must be at least 2, not 1"),
        ({"packing": "tight"}, "packing must be auto, documents, windows or segments"),
        ({"ridge": float("nan")}, "ridge must be 'auto' or a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        admm_prune.prune("embedded", sparsity=0.5, **settings)  # type: ignore[arg-type]


def test_progress_counts_the_blocks(model_folder: Path, text_file: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = admm_prune.prune(
        model_folder,
        method="magnitude",
        sparsity=0.5,
        data=str(text_file),
        progress=lambda done, total, at_work: seen.append((done, total, at_work)),
    )
    names = [block.name for block in decoder_blocks(report.model)]
    at = seen.index((0, 2, names[0]))
    assert seen[at : at + 3] == [(0, 2, names[0]), (1, 2, names[1]), (2, 2, "")]
    assert all(label == "" for _, _, label in (*seen[:at], *seen[at + 3 :])), "batches of the evaluations"


def test_the_judging_part_of_a_local_file_does_not_calibrate(model_folder: Path, text_file: Path) -> None:
    report = admm_prune.prune(model_folder, method="magnitude", sparsity=0.0, data=str(text_file))
    texts = report.manifest["texts"]
    assert (texts["calibration"]["documents"], texts["evaluation"]["documents"]) == (54, 6)
    assert report.pruned == report.dense, "nothing was pruned"
    documents = text_file.read_text().split("<|endoftext|>")
    assert report.dense.characters == sum(map(len, documents[54:]))


def test_a_local_file_is_judged_whole_by_eval(model_folder: Path, text_file: Path) -> None:
    judgement = evaluate_model(str(model_folder), TextSettings(data=str(text_file)), device="cpu")
    assert judgement.figures.characters == sum(map(len, text_file.read_text().split("<|endoftext|>")))
    assert judgement.sparsity == 0.0


def test_the_report_shows_what_the_models_write(model_folder: Path, text_file: Path) -> None:
    report = admm_prune.prune(str(model_folder), method="magnitude", sparsity=0.9, data=str(text_file), samples=4)
    said = report.as_json()["continuation"]
    assert set(said) == {"prompt", "dense", "pruned"}
    assert all(isinstance(text, str) and text for text in said.values())
    assert said["dense"] != said["pruned"]


@pytest.mark.parametrize("how", [{}, {"stream": True}], ids=["memory", "stream"])
def test_a_model_that_was_not_saved_well_is_not_reported_as_saved(
    how: dict[str, bool], model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = prune.save

    def badly(loaded: LoadedModel, folder: Path, metadata: dict[str, object]) -> None:
        written(loaded, folder, metadata)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))

    monkeypatch.setattr(prune, "save", badly)
    with pytest.raises(UserError, match=r"^nothing was saved: .* the logits are not\); report this$"):
        admm_prune.prune(
            model_folder, method="wanda", sparsity=0.5, data=str(text_file), samples=8, eval_samples=2,
            out=tmp_path / "out", device="cpu", **how,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    report = admm_prune.prune(  # what was done is kept: it is written again
        model_folder, method="wanda", sparsity=0.5, data=str(text_file), samples=8, eval_samples=2,
        out=tmp_path / "out", device="cpu", resume=True, **how,
    )  # fmt: skip
    assert evaluate_model(str(tmp_path / "out"), TextSettings(data=str(text_file)), device="cpu").sparsity == 0.5
    assert report.out == tmp_path / "out"


def test_a_second_copy_is_made_only_where_it_fits(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[bool] = []
    checked = prune.check_reloaded

    def check(*arguments: Any, **how: Any) -> None:
        ways.append(how["whole"])
        checked(*arguments, **how)

    monkeypatch.setattr(prune, "check_reloaded", check)
    for room in (2**40, 0):
        monkeypatch.setattr(prune, "free_bytes", lambda _, room=room: room)
        admm_prune.prune(
            model_folder, method="magnitude", sparsity=0.5, data=str(text_file), samples=4, eval_samples=2,
            out=tmp_path / f"{room}", device="cpu", stream=False,
        )  # fmt: skip
    assert ways == [True, False]
