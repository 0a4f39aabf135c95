"""--verbose and --quiet: what goes to stderr; stdout is the same."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.outcome import Command, Refused

QUICK = ("--method", "magnitude", "--sparsity", 0.5, "--samples", 2, "--eval-samples", 2, "--device", "cpu")


@pytest.fixture
def noted_text(place: Path, text_file: Path) -> Path:
    """A text with half a surrogate pair, of which a run logs a note."""
    path = place / "noted.jsonl"
    lines = [json.dumps({"text": story}) for story in text_file.read_text().split("<|endoftext|>")]
    path.write_text("\n".join([*lines, r'{"text": "half of an emoji \ud83d cut"}']))
    return path


def test_what_a_run_writes_to_stderr(command: Command, model_folder: Path, noted_text: Path) -> None:
    def run(name: str, *options: str) -> Any:
        common = ("run", "--model", model_folder, "--data", noted_text, *QUICK, "--json")
        outcome = command(*common, "--out", noted_text.parent / name, *options)
        assert outcome.json()["sparsity"] == pytest.approx(0.5, abs=0.01)
        return outcome.err

    normal, quiet, verbose = run("a"), run("b", "-q"), run("c", "-v")
    assert normal.count("note: ") == 1
    assert "pruning: 1/2" in normal
    assert "evaluating the dense model ..." not in normal
    assert quiet == ""
    assert re.search(r"^\d\d:\d\d:\d\d evaluating the dense model \.\.\.$", verbose, flags=re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d block 1: .*sparsity 0\.5", verbose, flags=re.MULTILINE)
    assert "pruning: 1/2" not in verbose, "the log has the blocks already"
    assert "note: " in verbose
    assert logging.getLogger("admm_prune").handlers == [], "the handler is removed with the command"


def test_both_at_once_are_refused(refused: Refused, run: tuple[object, ...]) -> None:
    refused("--verbose and --quiet exclude each other", *run, "--sparsity", 0.5, "--out", "p", "-v", "-q")


@pytest.mark.parametrize(
    "name", ["run", "reproduce", "compare", "plan", "capture", "solve", "eval", "verify", "pack", "unpack"]
)
def test_every_command_that_works_has_them(command: Command, name: str) -> None:
    text = command(name, "--help").out
    assert "--verbose" in text
    assert "--quiet" in text
