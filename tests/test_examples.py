"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted({*FOLDER.glob("*.py")} - {FOLDER / "sparse_adam.py"})  # those that take a model


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, model_folder: Path, text_file: Path, monkeypatch, capsys) -> None:
    words = ["--model", str(model_folder), "--data", str(text_file), "--length", "32", "--steps", "20"]
    monkeypatch.setattr(sys, "argv", [str(example), *words])
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"80\.\d% pruned: perplexity \d+", capsys.readouterr().out)


def test_the_example_without_a_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "sparse_adam.py"), run_name="__main__")
    assert re.search(r"pruned: loss 0\.\d+, 256 of 2560 weights kept", capsys.readouterr().out)
