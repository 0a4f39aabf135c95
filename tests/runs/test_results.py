"""The result of a run as an object: what it shows, what pandas gets, and what is read back from its folder."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import admm_prune
from admm_prune import Report, UserError, load_report
from admm_prune.runs.claims import with_digest
from admm_prune.runs.journal.folder import finite
from tests.runs.html_page import parse


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Report:
    """A run by ADMM that was written to a folder. Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "admm"
    how: dict[str, Any] = {"data": str(text_file), "samples": 8, "eval_samples": 4, "device": "cpu", "ridge": "auto"}
    return admm_prune.prune(model_folder, method="admm", sparsity=0.7, out=out, **how)


def altered(report: Report, place: Path, change: Any) -> Path:
    """A copy of the run's folder with another manifest."""
    assert report.out is not None
    shutil.copytree(report.out, place)
    manifest = json.loads((place / "admm_prune.json").read_text())
    change(manifest)
    (place / "admm_prune.json").write_text(json.dumps(manifest))
    return place


def test_a_report_reads_back_as_it_was(report: Report) -> None:
    assert report.out is not None
    again = load_report(report.out)
    assert json.dumps(finite(again.as_json())) == json.dumps(finite(report.as_json()))
    assert again.timings() == report.timings()
    assert again.dense == report.dense
    assert again.notes == report.notes
    assert [layer.name for layer in again.layers] == [layer.name for layer in report.layers]
    first, other = report.layers[0], again.layers[0]
    assert (first.convergence, first.diagnosis, first.ridge_trials) == (
        other.convergence,
        other.diagnosis,
        other.ridge_trials,
    )
    assert again.model is None
    assert report.model is not None
    assert repr(again) == repr(report)


def test_it_is_written_in_a_line(report: Report) -> None:
    text = repr(report)
    assert "\n" not in text
    assert len(text) < 400
    assert text.startswith("Report('admm, 70% of ")
    assert f"perplexity={report.pruned.perplexity:.4g} (dense {report.dense.perplexity:.4g})" in text
    assert "layers=14" in text


def test_a_notebook_shows_both_models(report: Report) -> None:
    root = parse(report._repr_html_())
    (body,) = root.find_all("tbody")
    rows = [[cell.text for cell in row.find_all("td")] for row in body.find_all("tr")]
    ratio = report.pruned.perplexity / report.dense.perplexity
    assert rows[0] == [
        "perplexity", f"{report.dense.perplexity:.3f}", f"{report.pruned.perplexity:.3f}", f"{ratio:.3f}"
    ]  # fmt: skip
    assert "mean relative error of 14 matrices" in root.text
    assert report.pruned.protocol in root.text


def test_a_name_with_markup_is_escaped(report: Report, tmp_path: Path) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["settings"]["model"] = "<script>alert(1)</script>"

    shown = load_report(altered(report, tmp_path / "run", rename))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_the_layers_are_a_data_frame(report: Report) -> None:
    pytest.importorskip("pandas", reason="comes with datasets")
    frame = report.to_pandas()
    assert list(frame.index) == [layer.name for layer in report.layers]
    assert frame.loc[report.layers[3].name, "relative_error"] == report.layers[3].relative_error
    assert frame.loc["model.layers.1.mlp.up_proj.weight", ["block", "matrix"]].tolist() == [1, "mlp.up_proj"]
    assert (frame["rows"] * frame["columns"]).sum() == report.block_weights
    zeros = (frame["sparsity"] * frame["rows"] * frame["columns"]).sum()
    assert zeros / report.block_weights == pytest.approx(report.sparsity)
    assert frame["diagnosis"].iloc[0] == ", ".join(finding.code for finding in report.layers[0].diagnosis)


def test_without_pandas_it_says_what_to_install(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="to_pandas needs pandas: pip install pandas"):
        report.to_pandas()


def test_figures_that_are_not_finite_come_back(report: Report, tmp_path: Path) -> None:
    def overflow(manifest: dict[str, Any]) -> None:
        manifest["pruned"]["perplexity"] = None

    again = load_report(altered(report, tmp_path / "run", overflow))
    assert math.isnan(again.pruned.perplexity)
    assert "perplexity=nan" in repr(again)
    assert "nan" in again._repr_html_()


def test_a_folder_without_times_is_read(report: Report, tmp_path: Path) -> None:
    place = altered(report, tmp_path / "run", lambda manifest: None)
    (place / "timings.json").unlink()
    again = load_report(place)
    assert math.isnan(again.seconds)
    assert again.phases == ()


def test_what_is_no_report_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a finished run"):
        load_report(tmp_path)
    with pytest.raises(UserError, match="is a comparison: load one of its models"):
        load_report(altered(report, tmp_path / "compared", lambda manifest: manifest.update(rows=[])))

    def unlike(manifest: dict[str, Any]) -> None:
        manifest.update(with_digest({**manifest, "layers": [{"name": "x"}]}))

    for number, change in enumerate((lambda manifest: manifest.pop("dense"), unlike)):
        place = altered(report, tmp_path / str(number), change)
        with pytest.raises(UserError, match="is not a manifest of this release") as refused:
            load_report(place)
        assert "\n" not in str(refused.value)
