"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, model_folder: Path, text_file: Path, monkeypatch, capsys) -> None:
    words = ["--model", str(model_folder), "--data", str(text_file), "--length", "32", "--steps", "20"]
    monkeypatch.setattr(sys, "argv", [str(example), *words])
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"80\.\d% pruned: perplexity \d+", capsys.readouterr().out)
