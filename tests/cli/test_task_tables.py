"""Results on tasks on stdout: metrics by their names, as in cards and reports; in JSON as the harness has them."""

from __future__ import annotations

from pathlib import Path

from tests.cli.outcome import Command
from tests.runs.test_tasks import tasks

__all__ = ["tasks"]  # a fixture


def cells(out: str, task: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.split()[:1] == [task])
    return line.split()


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
