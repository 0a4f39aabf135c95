"""Results on tasks on stdout: metrics by their names, as in cards and reports; in JSON as the harness has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from admm_prune.cli.common import show_tasks
from tests.cli.outcome import Command
from tests.runs.test_model_card import TASKS
from tests.runs.test_tasks import tasks

__all__ = ["tasks"]  # a fixture


def cells(out: str, task: str) -> list[str]:
    """Of the first row of a task."""
    return next(line.split() for line in out.splitlines() if line.split()[:1] == [task])


def test_a_table_has_the_rows_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    show_tasks("tiny", TASKS)
    shown = capsys.readouterr().out
    assert "none" not in shown
    assert cells(shown, "mats") == ["mats", "acc", "0", "0.2500", "0.0625"]
    assert "exact_match (strict)" in shown
    assert "At most 40 questions per task" in shown


@pytest.mark.slow
def test_eval_and_run_name_metrics_as_the_card_does(
    command: Command, place: Path, model_folder: Path, text_file: Path, tasks: Path
) -> None:
    how = ("--tasks", "mats", "--task-folder", tasks, "--shots", 0)
    outcome = command("eval", model_folder, *how)
    assert outcome.status == 0, outcome.err
    assert ",none" not in outcome.out
    assert "standard error" in outcome.out
    figures = command("eval", model_folder, *how, "--json").json()["results"]["mats"]
    value, error = (f"{figures[f'{name},none']:.4f}" for name in ("acc", "acc_stderr"))
    assert cells(outcome.out, "mats") == ["mats", "acc", "0", value, error]

    common = ("--model", model_folder, "--data", text_file, "--samples", 2, "--eval-samples", 1, "--sparsity", 0.5)
    ran = command("run", *common, "--method", "magnitude", *how, "--out", "out")
    assert ran.status == 0, ran.err
    shown = cells(ran.out, "mats")
    assert shown[:3] == ["mats", "acc", "0"]
    assert f"| {' | '.join(shown)} |" in (place / "out/README.md").read_text()
