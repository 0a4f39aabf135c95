"""Runs and comparisons of the rarer kinds: verify accepts what is honest, and names what it could not recompute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from admm_prune.errors import UserError
from admm_prune.methods.target import Target
from admm_prune.runs.claims import with_digest
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.runs.prune import prune
from admm_prune.settings import Settings
from admm_prune.verify.report import Verdict, Verification
from admm_prune.verify.run import verify_folder

FEW: dict[str, Any] = {"samples": 4, "eval_samples": 2}
MANIFEST = "admm_prune.json"


def verified(folder: Path, **how: Any) -> Verification:
    report = verify_folder(folder, device="cpu", **how)
    assert (report.failures, report.unchecked) == ([], [])
    assert report.verdict is Verdict.VERIFIED
    return report


@pytest.mark.parametrize(
    ("methods", "how"),
    [
        (("wanda", "tuned-dense"), {"steps": 2}),  # which has a target of its own
        (("wanda",), {"ignore": ["re:.*k_proj"], "overrides": {"re:.*q_proj": 0.25}}),
        (("struprune",), {}),
    ],
    ids=["dense baseline", "selection", "structured"],
)
def test_a_comparison(
    narrow_model: Path, text_file: Path, tmp_path: Path, methods: tuple[str, ...], how: dict[str, Any]
) -> None:
    run = Settings(str(narrow_model), data=str(text_file), device="cpu", **FEW, **how)
    settings = ComparisonSettings(run=run, methods=methods, targets=(Target(0.5),))
    compare(settings, tmp_path / "all")
    verified(tmp_path / "all")


def test_a_model_that_cannot_be_loaded_is_refuted_by_the_versions_of_its_run_alone(
    narrow_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    prune(str(narrow_model), method="wanda", sparsity=0.5, data=str(text_file), out=folder, device="cpu", **FEW)
    monkeypatch.setattr("admm_prune.verify.run.load", fails_to_load)
    assert verify_folder(folder).failures == ["the model cannot be loaded: an unknown architecture"]
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["environment"]["versions"]["transformers"] = "99.0"
    (folder / MANIFEST).write_text(json.dumps(with_digest(manifest)))
    report = verify_folder(folder)
    assert report.verdict is Verdict.INCOMPLETE
    assert "where the run had 99.0: an unknown architecture" in report.unchecked[0]


def fails_to_load(*_: Any, **__: Any) -> Any:
    raise UserError("an unknown architecture")


def test_a_text_that_moved_keeps_its_notes(narrow_model: Path, text_file: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = [{"body": part} for part in text_file.read_text().split("\n\n")]
    before, after = tmp_path / "before", tmp_path / "after"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(documents)}).save_to_disk(str(before))
    prune(str(narrow_model), method="wanda", sparsity=0.5, data=str(before), out=tmp_path / "run", device="cpu", **FEW)
    verified(tmp_path / "run")
    before.rename(after)
    assert verify_folder(tmp_path / "run", device="cpu").verdict is Verdict.INCOMPLETE
    report = verified(tmp_path / "run", data=str(after))
    assert {"texts.calibration.notes", "texts.evaluation.fingerprint"} <= set(report.checked)
    assert f"{MANIFEST}: texts.calibration.source" in report.fingerprinted
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    manifest["texts"]["evaluation"]["notes"][0] += "x"
    (tmp_path / "run" / MANIFEST).write_text(json.dumps(with_digest(manifest)))
    failures = verify_folder(tmp_path / "run", data=str(after), device="cpu").failures
    assert any("texts.evaluation.notes" in failure for failure in failures)


def test_a_text_from_python_is_named_by_a_file_of_it(narrow_model: Path, text_file: Path, tmp_path: Path) -> None:
    documents = text_file.read_text().split("\n\n")
    prune(str(narrow_model), method="wanda", sparsity=0.5, data=documents, out=tmp_path / "run", device="cpu", **FEW)
    assert verify_folder(tmp_path / "run", device="cpu").verdict is Verdict.INCOMPLETE
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"body": document}) for document in documents))
    report = verified(tmp_path / "run", data=str(rows))
    for name in ("source", "fingerprint", "documents", "notes"):
        assert f"{MANIFEST}: texts.evaluation.{name}" in report.fingerprinted
    assert "texts.evaluation.token_hash" in report.checked
    rows.write_text(json.dumps({"body": "something else, again and again. " * 200}))
    with pytest.raises(UserError, match=r"^--data .*: the evaluation text is not the recorded one"):
        verify_folder(tmp_path / "run", data=str(rows), device="cpu")


def test_another_text_in_the_place_of_the_runs_refutes_nothing(
    narrow_model: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration, evaluation = tmp_path / "calibration.txt", tmp_path / "evaluation.txt"
    for path in (calibration, evaluation):
        path.write_text(text_file.read_text())
    where = {"data": str(calibration), "eval_data": str(evaluation), "out": tmp_path / "run"}
    prune(str(narrow_model), method="magnitude", sparsity=0.5, device="cpu", **where, **FEW)
    calibration.write_text(text_file.read_text()[::-1])
    report = verify_folder(tmp_path / "run", device="cpu")
    assert report.verdict is Verdict.INCOMPLETE
    assert report.unchecked == ["texts.calibration: the calibration text is not the recorded one any more"]
    assert "perplexity" in report.checked
    evaluation.write_text(text_file.read_text()[::-1])
    report = verify_folder(tmp_path / "run", device="cpu")
    assert report.verdict is Verdict.INCOMPLETE
    assert report.unchecked[0].startswith("perplexity: the evaluation text is not the recorded one: token hash ")
    assert {f"{MANIFEST}: pruned", f"{MANIFEST}: texts"} <= set(report.fingerprinted)


def test_a_calibration_text_that_is_gone_leaves_the_evaluation_text_checked(
    narrow_model: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    where = {"data": str(text), "eval_data": str(text_file), "out": tmp_path / "run"}
    prune(str(narrow_model), method="wanda", sparsity=0.5, device="cpu", **where, **FEW)
    text.unlink()
    report = verified(tmp_path / "run")
    assert f"{MANIFEST}: texts.calibration" in report.fingerprinted
    assert {"texts.evaluation.fingerprint", "texts.evaluation.source"} <= set(report.checked)
