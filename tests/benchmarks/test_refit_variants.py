"""The variants of the blockwise refit are different ones, and what is not a variant is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import refit_variants


def test_every_variant_descends_on_its_own_loss(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = "none,relative block 2,squared block 2,relative model 2,relative block 2 0.1 0.9 1"
    options = ["--model", str(model_folder), "--data", str(text_file), "--samples", "8", "--length", "16"]
    options += ["--eval-samples", "2", "--method", "wanda", "--variants", variants]
    refit_variants.main([str(tmp_path), *options])
    rows = {row["variant"]: row for row in csv.DictReader((tmp_path / "runs.csv").open(encoding="utf-8"))}
    assert list(rows) == variants.split(",")
    assert rows.pop("none")["before"] == ""
    before = {name: float(row["before"]) for name, row in rows.items()}
    assert len(set(before.values())) == 4
    assert len({row["after"] for row in rows.values()}) == 4
    assert all(float(row["after"]) < before[name] for name, row in rows.items())
    table = capsys.readouterr().out
    assert "relative block 2" in table
    refit_variants.main([str(tmp_path), *options])  # nothing is left to do
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("variant", ["relative", "block relative", "relative block many", "relative block 2 0.1 0.9 x"])
def test_a_variant_that_there_is_not(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refit_variants.main([str(tmp_path / "out"), "--variants", variant])
    assert f"there is no variant '{variant}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
