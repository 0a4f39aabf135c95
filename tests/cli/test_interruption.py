"""Work that breaks off: nothing is left behind, and what was there before stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from admm_prune.cli import interrupts
from admm_prune.cli.progress import shown_progress
from admm_prune.runs import prune
from tests.cli.outcome import Command

MODES = pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)],
    ids=["^C", "full disk"],
)


def breaks(error: BaseException) -> object:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_an_interrupt_while_the_command_line_is_imported(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admm_prune.cli._run", breaks(KeyboardInterrupt()))
    outcome = command("list")
    assert (outcome.status, outcome.out, outcome.err) == (130, "", "admm-prune: interrupted\n")


@pytest.fixture
def arguments(model_folder: Path, text_file: Path) -> tuple[object, ...]:
    return ("--model", model_folder, "--data", text_file, "--samples", 8, "--out", "deep/out", "--sparsity", "0.5")


@pytest.mark.sampled(2)
@MODES
@pytest.mark.parametrize("moment", ["save", "write_json"])
@pytest.mark.parametrize("name", ["run", "compare"])
def test_what_breaks_off_is_kept_beside_its_place_and_resumed(
    command: Command, place: Path, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch,
    name: str, moment: str, error: BaseException, status: int,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(prune, moment, breaks(error))
        outcome = command(name, *arguments)
    assert (outcome.status, outcome.out) == (status, "")
    of_a_row = str(place / "deep/out.partial/checkpoints/models/magnitude-50")  # a comparison's, with its own journal
    written = of_a_row if name == "compare" else "deep/out"
    last = {
        130: "interrupted: continue with the same command and --resume (deep/out.partial holds the finished part)",
        2: f"cannot write to {written}: No space left on device: finished work is kept in {written}.partial; "
        "continue with --resume",
    }
    assert outcome.err.splitlines()[-1] == f"admm-prune: {last[status]}"
    assert [path.name for path in (place / "deep").iterdir()] == ["out.partial"]
    assert command(name, *arguments, "--resume").status == 0
    assert [path.name for path in (place / "deep").iterdir()] == ["out"]


@MODES
def test_a_folder_of_ours_survives_a_run_that_breaks_off_and_is_then_replaced_whole(
    command: Command, place: Path, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch,
    error: BaseException, status: int,
) -> None:  # fmt: skip
    assert command("run", *arguments, "--method", "magnitude").status == 0
    out = place / "deep/out"
    (out / "leftover.txt").write_text("of an earlier release")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(prune, "write_json", breaks(error))
        assert command("run", *arguments, "--method", "wanda", "--overwrite").status == status
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.partial"}
    assert command("run", *arguments, "--method", "wanda", "--resume", "--overwrite").status == 0
    assert '"method": "wanda"' in (out / "admm_prune.json").read_text()
    assert not (out / "leftover.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_comes_while_a_run_is_at_work_is_not_replaced(
    command: Command, place: Path, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tracker's would be, that is named as the output is."""
    save, notes = prune.save, place / "deep/out/notes.txt"

    def comes(*given: Any) -> None:
        notes.parent.mkdir()
        notes.write_text("mine")
        save(*given)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "save", comes)
        outcome = command("run", *arguments)
    assert outcome.status == 2
    reason = "deep/out exists and was not written by admm-prune: choose another output"
    assert outcome.err.splitlines()[-1] == f"admm-prune: {reason}"
    assert notes.read_text() == "mine"
    shutil.move(notes.parent, place / "theirs")
    assert command("run", *arguments, "--resume").status == 0
    assert (place / "deep/out/admm_prune.json").is_file()


@pytest.mark.slow
def test_a_real_interrupt_of_a_comparison_says_how_to_go_on(
    tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    """It comes within the second of many rows."""
    sparsities = ",".join(f"0.{i}" for i in range(10, 90))
    command = [
        Path(sys.executable).with_name("admm-prune"), "compare", "--model", model_folder, "--data", text_file,
        "--methods", "admm", "--sparsity", sparsities, "--out", "out",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "evaluating the dense model\n"
        assert process.stderr.readline() == "comparing: 0/80 admm 10%\n"
        assert process.stderr.readline() == "comparing: 1/80 admm 11%\n"
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    advice = "continue with the same command and --resume (out.partial holds the finished part)"
    assert err.splitlines()[-1] == f"admm-prune: interrupted: {advice}"
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.slow
def test_a_real_interrupt_of_a_run_says_how_to_go_on(tmp_path: Path) -> None:
    """It comes when the first block is done."""
    command = [
        Path(sys.executable).with_name("admm-prune"), "run", "--method", "wanda", "--sparsity", "0.5", "--samples", "4",
        "--eval-samples", "2", "--length", "64", "--out", "out",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("pruning: 1/"):
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    advice = "continue with the same command and --resume (out.partial holds the finished part)"
    assert err.splitlines()[-1] == f"admm-prune: interrupted: {advice}"
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert len(list((tmp_path / "out.partial/tensors").iterdir())) >= 1


def test_an_interrupt_that_was_swallowed_ends_the_next_step_of_the_work() -> None:
    with interrupts.remembered(), shown_progress("work") as progress:
        progress.step(0, 2, "before")
        with suppress(KeyboardInterrupt):  # as a destructor would
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with pytest.raises(KeyboardInterrupt):
            progress.step(1, 2, "after")
    with interrupts.remembered(), shown_progress("work") as progress:
        progress.step(0, 1, "other work")
