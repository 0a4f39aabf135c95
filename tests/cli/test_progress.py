"""Progress: phases with bars and the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

import admm_prune
from admm_prune.cli import progress
from tests.cli.outcome import Command

Steps = dict[str, list[tuple[int, int, str]]]


class Seen(admm_prune.Callback):
    def __init__(self, seen: Steps) -> None:
        self.seen = seen

    def on_phase_begin(self, name: str) -> None:
        self.seen[name] = []

    def on_progress(self, done: int, total: int, name: str) -> None:
        [*self.seen.values()][-1].append((done, total, name))


RUN_PHASES = [
    *("opening the model", "reading the text", "evaluating the dense model", "pruning"),
    *("evaluating the pruned model", "writing the model", "loading the folder again", "hashing the files"),
]


def test_a_run_reports_its_phases_and_the_steps_within(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    seen: Steps = {}
    admm_prune.prune(
        model_folder, method="magnitude", sparsity=0.5, data=str(text_file), out=tmp_path / "out",
        callbacks=Seen(seen),
    )  # fmt: skip
    assert list(seen) == RUN_PHASES
    assert seen["pruning"] == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1"), (2, 2, "")]
    for name in ("evaluating the dense model", "evaluating the pruned model"):
        batches = len(seen[name]) - 1
        assert seen[name] == [(i, batches, "") for i in range(batches + 1)]
        assert batches > 0


def test_a_streamed_evaluation_counts_blocks_and_batches(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    seen: Steps = {}
    admm_prune.prune(
        model_folder, method="magnitude", sparsity=0.5, data=str(text_file), out=tmp_path / "out", stream=True,
        callbacks=Seen(seen),
    )  # fmt: skip
    steps = seen["evaluating the dense model"]
    assert steps == [(i, len(steps) - 1, "") for i in range(len(steps))]
    assert len(steps) > 3, "two blocks, and at least a batch"


def test_the_lines_of_a_run_off_a_terminal(command: Command, place: Path, run: tuple[object, ...]) -> None:
    outcome = command(*run, "--method", "magnitude", "--sparsity", "0.5", "--out", "out")
    assert outcome.err.splitlines() == [
        "evaluating the dense model",
        "pruning: 0/2 model.layers.0",
        "pruning: 1/2 model.layers.1",
        "evaluating the pruned model",
    ]
    assert "\x1b" not in outcome.err + outcome.out


def test_plain_lines_say_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.0, 40.0, 45.0, 100.0, 3700.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = progress.Lines("starting", shown=True)
    lines.phase("evaluating")
    for done in (0, 10, 11, 20):
        lines.step(done, 40)  # after 0, 40, 45 and 100 s
    lines.step(21, 400, "block 21")
    assert capsys.readouterr().err.splitlines() == [
        "evaluating",
        "evaluating: 10/40 (2:00 left)",
        "evaluating: 20/40 (1:40 left)",
        "evaluating: 21/400 block 21 (18:32:56 left)",
    ]


def test_the_phases_of_one_of_many_runs_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.Lines("comparing", shown=True)
    lines.phase("evaluating the dense model")
    lines.step(0, 8)
    lines.count(0, 2, "wanda 50%")
    lines.phase("pruning")
    lines.step(0, 2, "model.layers.0")
    lines.count(2, 2, "")
    assert capsys.readouterr().err.splitlines() == ["evaluating the dense model", "comparing: 0/2 wanda 50%"]


def test_a_process_that_is_not_shown_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown_progress("pruning", shown=False) as silent:
        silent.phase("pruning")
        silent.step(0, 2, "model.layers.0")
        silent.count(0, 2, "wanda 50%")
    assert capsys.readouterr().err == ""


def terminal() -> tuple[io.StringIO, Progress]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, color_system=None)
    return written, Progress(*progress.columns(), console=console, auto_refresh=False)


def test_bars_keep_finished_phases_with_steps() -> None:
    written, rich_progress = terminal()
    with rich_progress:
        bars = progress.Bars("starting", rich_progress)
        bars.phase("evaluating the dense model")
        bars.step(3, 8)
        bars.phase("pruning")
        bars.step(1, 2, "model.layers.1")
        rich_progress.refresh()
        shown = [task.description for task in rich_progress.tasks]
    assert shown == ["evaluating the dense model", "pruning"]
    lines = written.getvalue().splitlines()
    assert any("evaluating the dense model" in line and "3/8" in line for line in lines)
    assert any("pruning" in line and "1/2" in line and "model.layers.1" in line for line in lines)


def test_bars_of_many_runs_show_the_current_one() -> None:
    _, rich_progress = terminal()
    bars = progress.Bars("comparing", rich_progress)
    bars.count(1, 6, "wanda 70%")
    for phase in ("pruning", "evaluating the pruned model"):
        bars.phase(phase)
        bars.step(1, 2)
    tasks = {task.description: task.fields["counted"] for task in rich_progress.tasks}
    assert tasks == {"comparing": "1/6", "evaluating the pruned model": "1/2"}
