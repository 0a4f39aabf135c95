"""The scripts of whole layers run, and their tables say what their rows hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from admm_prune.data.layer_file import LayerFile
from benchmarks import layer_bounds, refit, row_trees
from tests.solvers.reference.instances import correlated, normal


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "layer.safetensors"
    LayerFile(weight=normal(6, 16, 0).float(), gram=correlated(16, 0).float(), metadata={"weight": "some.matrix"}).save(
        path
    )
    return path


def test_bounds_of_a_layer(layer: Path, tmp_path: Path) -> None:
    layer_bounds.main([str(tmp_path / "out"), str(layer), "--rows", "4", "--date", "2026-11-29"])
    lines = json.loads((tmp_path / "out/layer_bounds.json").read_text())["layers"]
    assert [line["target"] for line in lines] == ["50 %", "70 %", "90 %", "2:4"]
    for line in lines:
        assert (line["layer"], line["rows"], line["width"]) == ("some.matrix", 4, 16)
        assert 0.3 < line["ratio"] <= 1
        assert 0 < line["trace"] < 1
    assert "some.matrix" in (tmp_path / "out/layer_bounds.txt").read_text()


def test_refit_of_a_model(
    tmp_path: Path, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model",
        str(model_folder),
        "--data",
        str(text_file),
        "--samples",
        "4",
        "--length",
        "64",
        "--blocks",
        "1",
        "--mask",
        "random",
        "--sparsity",
        "0.9",
        "--date",
        "2026-11-29",
    ]
    refit.main([str(tmp_path), *options])
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8")))
    assert [row["weight"].split(".")[-2] for row in rows] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert all(float(row["residual"]) <= 1e-6 and row["above"] == "0" for row in rows)
    assert all(0 < float(row["stored"]) <= 1e-5 for row in rows)  # as float32 rounds
    before, last = (tmp_path / "rows.csv").read_bytes(), capsys.readouterr().out
    refit.main([str(tmp_path), *options])  # nothing is left to do
    assert (tmp_path / "rows.csv").read_bytes() == before
    assert capsys.readouterr().out == last == (tmp_path / "refit.txt").read_text()


def test_residuals_of_a_refit_against_a_direct_solve() -> None:
    hessian, minimizer = correlated(16, 0), normal(6, 16, 1)
    support = normal(6, 16, 2) > 0
    weight = torch.zeros_like(minimizer)
    for row, (w, s) in enumerate(zip(minimizer, support, strict=True)):
        weight[row, s] = torch.linalg.solve(hessian[s][:, s], hessian[s] @ w)
    assert refit.residuals(hessian, minimizer, weight, support).max() < 1e-12
    weight[2] *= 1.01
    changed = refit.residuals(hessian, minimizer, weight, support)
    assert changed[2] == pytest.approx(0.01, rel=1e-9)
    assert changed.argmax() == 2


def test_rows_of_a_layer(layer: Path, tmp_path: Path) -> None:
    row_trees.main([str(tmp_path / "out"), str(layer), "--rows", "2", "--widths", "6", "--date", "2026-11-29"])
    lines = json.loads((tmp_path / "out/row_trees.json").read_text())["rows"]
    assert [line["sparsity"] for line in lines] == [0.5, 0.7, 0.9]
    assert all(line["proved"] == 2 and line["worst_gap"] <= 0.01 for line in lines)
