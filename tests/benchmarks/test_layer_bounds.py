"""The scripts of whole layers run, and their tables say what their rows hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_refit_of_a_layer(layer: Path, tmp_path: Path) -> None:
    refit.main([str(tmp_path / "out"), f"{layer}:7", "--rows", "3", "--date", "2026-11-29"])
    (line,) = json.loads((tmp_path / "out/refit.json").read_text())["layers"]
    assert (line["matrices"], line["rows"], line["above"], line["minimum_norm"]) == (7, 3, 0, 0)
    assert line["residual"] <= 1e-6
    assert "all 7 matrices" in (tmp_path / "out/refit.txt").read_text()


def test_rows_of_a_layer(layer: Path, tmp_path: Path) -> None:
    row_trees.main([str(tmp_path / "out"), str(layer), "--rows", "2", "--widths", "6", "--date", "2026-11-29"])
    lines = json.loads((tmp_path / "out/row_trees.json").read_text())["rows"]
    assert [line["sparsity"] for line in lines] == [0.5, 0.7, 0.9]
    assert all(line["proved"] == 2 and line["worst_gap"] <= 0.01 for line in lines)
