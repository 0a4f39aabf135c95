"""The benchmark of structured methods on a real model, on a tiny one: rows that are measured once, shared curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from admm_prune.methods.struprune.struprune import StruPrune
from admm_prune.problems.allocation import Curve
from benchmarks import structured_model
from benchmarks.journal import Journal
from benchmarks.structured_model import INFERENCE, KEY, QUALITY


def _quality(path: Path, perplexities: dict[tuple[str, str], float]) -> Journal:
    journal = Journal(path, QUALITY, KEY)
    for (target, method), perplexity in perplexities.items():
        row = dict.fromkeys(QUALITY, 1.0) | {"perplexity": perplexity, "settings": "2 sequences"}
        row |= {"bytes": 100.0 if method == "dense" else 80.0}
        journal.add({"model": "tiny", "target": target, "method": method}, [row])
    return journal


def test_ratios_are_to_the_dense_model_and_to_struprune_at_the_same_target(tmp_path: Path) -> None:
    perplexities = {
        ("0.2", "struprune"): 20.0,
        ("0.2", "structured-wanda"): 30.0,
        ("0.3", "structured-wanda"): 40.0,
        ("dense", "dense"): 10.0,
    }
    inference = Journal(tmp_path / "inference.csv", INFERENCE, KEY)
    timed = dict.fromkeys(INFERENCE, 1.0) | {"prefill_speedup": 1.25, "prefill_differs": 1, "decode_differs": 0}
    inference.add({"model": "tiny", "target": "0.2", "method": "struprune"}, [timed])
    rows = structured_model.rows_of(_quality(tmp_path / "quality.csv", perplexities), inference)
    assert [row["ratio_to_dense"] for row in rows] == [2.0, 3.0, 4.0, 1.0]
    assert [row["ratio_to_struprune"] for row in rows] == [1.0, 1.5, None, None]
    assert [row["bytes_of_dense"] for row in rows] == [0.8, 0.8, 0.8, 1.0]
    table = structured_model.text_table(rows, "head", "OUT")
    assert "1.250 " in table
    assert "1.000~" in table, "a speed-up within the spread is marked"


@pytest.mark.bitwise
def test_curves_are_restored_exactly(tmp_path: Path) -> None:
    savings = torch.arange(4, dtype=torch.float64)
    curves = {
        "0.mlp": Curve("0.mlp", savings / 3, savings, least=2, multiple=2),
        "0.attention": Curve("0.attention", savings / 7, savings, stays=frozenset({1, 2})),
    }
    structured_model.write_curves(tmp_path / "curves.safetensors", curves, 1 / 3)
    restored, seconds = structured_model.read_curves(tmp_path / "curves.safetensors")
    assert seconds == 1 / 3
    assert restored.keys() == curves.keys()
    for name, curve in curves.items():
        assert torch.equal(restored[name].losses, curve.losses)
        assert torch.equal(restored[name].savings, curve.savings)
        limits = [(one.least, one.multiple, one.stays) for one in (restored[name], curve)]
        assert limits[0] == limits[1]


@pytest.mark.slow
def test_rows_are_measured_once_from_shared_curves(
    tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = [str(out), "--model", str(model_folder), "--data", str(text_file), "--eval-data", str(text_file)]
    words += ["--methods", "struprune,structured-global", "--targets", "0.3,0.5", "--samples", "2", "--length", "32"]
    words += ["--eval-samples", "2", "--prefill", "16", "--decode", "2", "--repeats", "2", "--threads", "1"]
    measure, measured = StruPrune.measure, []

    def counted(recipe: StruPrune, *rest: object) -> object:
        measured.append(recipe.name)
        return measure(recipe, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StruPrune, "measure", counted)
    structured_model.main(words)
    assert measured == ["struprune"], "both methods and targets have the same curves"
    rows = json.loads((out / "structured_model.json").read_text())["rows"]
    *pruned, dense = rows
    assert [(row["target"], row["method"]) for row in pruned] == [
        ("0.3", "struprune"), ("0.3", "structured-global"), ("0.5", "struprune"), ("0.5", "structured-global"),
    ]  # fmt: skip
    for row in pruned:
        assert row["removed_of_blocks"] >= float(row["target"]) - 1e-6
        assert 0 < row["removed"] < row["removed_of_blocks"], "embeddings stay"
        assert row["bytes"] < dense["bytes"]
        assert min(row["inference"][name] for name in ("prefill", "decode", "decode_speedup")) > 0
    monkeypatch.setattr(StruPrune, "prune", lambda *rest, **options: pytest.fail("measured again"))
    monkeypatch.setattr(structured_model, "command", lambda *words: pytest.fail("measured again"))
    structured_model.main(words)
