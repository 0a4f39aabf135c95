"""Runs followed from outside: what TensorBoard reads back, and what the interfaces of others are called with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import admm_prune
from admm_prune.errors import UserError
from admm_prune.runs.trackers import flat, tracker_of


class Recorder:
    """A tracker of anybody's making."""

    def __init__(self) -> None:
        self.settings: Mapping[str, Any] = {}
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.summary: Mapping[str, float] | None = None

    def start(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(figures)))

    def finish(self, summary: Mapping[str, float]) -> None:
        self.summary = summary


def prune(model_folder: Path, text_file: Path, **how: Any) -> Any:
    settings: dict[str, Any] = {"sparsity": 0.5, "data": str(text_file), "samples": 12, "device": "cpu", **how}
    return admm_prune.prune(model_folder, **settings)


def test_every_block_is_told_with_the_figures_of_its_layers(model_folder: Path, text_file: Path) -> None:
    told = Recorder()
    report = prune(model_folder, text_file, method="sparsegpt", log=told)
    assert told.settings["method"] == "sparsegpt"
    assert told.settings["target.sparsity"] == 0.5
    assert [step for step, _ in told.lines] == [0, 1]
    for step, figures in told.lines:
        own = [layer.relative_error for layer in report.layers if f"layers.{step}." in layer.name]
        assert figures["block/relative_error"] == pytest.approx(sum(own) / len(own))
        assert figures["block/sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert told.summary == {
        "sparsity": report.sparsity,
        "dense/perplexity": report.dense.perplexity, "dense/bits_per_char": report.dense.bits_per_char,
        "pruned/perplexity": report.pruned.perplexity, "pruned/bits_per_char": report.pruned.bits_per_char,
    }  # fmt: skip


def test_training_is_told_point_by_point(model_folder: Path, text_file: Path) -> None:
    told = Recorder()
    report = prune(model_folder, text_file, method="elsa-published", steps=40, log=told)
    curve = [(point["step"], point["loss"]) for point in report.details["training"]["loss"]]
    assert [(step, figures["train/loss"]) for step, figures in told.lines] == curve


def test_a_run_that_breaks_off_is_finished_without_figures(model_folder: Path, text_file: Path) -> None:
    told = Recorder()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model_folder, text_file, method="magnitude", log=told, progress=interrupt)
    assert told.summary == {}


def test_tensorboard_reads_back_what_was_told(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    report = prune(model_folder, text_file, method="wanda", log=f"tensorboard:{tmp_path / 'events'}")
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    told = events.Scalars("block/relative_error")
    assert [event.step for event in told] == [0, 1]
    first = [layer.relative_error for layer in report.layers if "layers.0." in layer.name]
    assert told[0].value == pytest.approx(sum(first) / len(first), rel=1e-6)
    assert events.Scalars("pruned/perplexity")[0].value == pytest.approx(report.pruned.perplexity, rel=1e-6)


def test_wandb_and_trackio_are_called_as_they_ask_to_be(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, text_file: Path
) -> None:
    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(
        log=lambda data, *, step: calls.append(("log", step, data)),
        summary=SimpleNamespace(update=lambda data: calls.append(("summary", data))),
        finish=lambda *, exit_code: calls.append(("finish", exit_code)),
    )

    def init(*, project: str, config: dict[str, Any]) -> Any:
        calls.append(("init", project, config["method"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    report = prune(model_folder, text_file, method="magnitude", log="wandb:mine")
    assert calls[0] == ("init", "mine", "magnitude")
    assert [call[:2] for call in calls[1:3]] == [("log", 0), ("log", 1)]
    assert calls[3][1]["pruned/perplexity"] == report.pruned.perplexity
    assert calls[4] == ("finish", 0)
    calls.clear()
    trackio = SimpleNamespace(
        init=init,
        log=lambda data, step=None: calls.append(("log", step, data)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    prune(model_folder, text_file, method="magnitude", log="trackio:mine")
    assert [call[:2] for call in calls] == [("init", "mine"), ("log", 0), ("log", 1), ("log", None), ("finish",)]


def test_trackers_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("nonesuch:x", "tensorboard", "tensorboard:"):
        with pytest.raises(UserError, match="log must be tensorboard:FOLDER"):
            tracker_of(text)
    for kind in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(UserError, match=rf"pip install 'admm-prune\[{kind}\]'"):
            tracker_of(f"{kind}:x")


@pytest.mark.parametrize("folder", ["out", "out/logs", "out.partial/logs", "other/../out/logs"])
def test_a_tracker_in_the_output_is_refused_before_any_work(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """At the end the output would not be ours to replace."""
    pytest.importorskip("tensorboard", reason="an extra")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^log: .* is in .*/out.*, which the run itself writes and replaces"):
        prune(tmp_path / "no model", text_file, method="wanda", log=f"tensorboard:{folder}", out="out")
    assert not list(tmp_path.iterdir())
    assert tracker_of("tensorboard:logs", Path("out")) is not None
    assert tracker_of("tensorboard:outs", Path("out")) is not None


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, text_file: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    (tmp_path / "file").write_text("a file")
    for folder in ("/proc/nothing/x", tmp_path / "file", tmp_path / "file/logs"):
        with pytest.raises(UserError, match=r"^cannot write .* is not a writable folder"):
            prune(tmp_path / "no model", text_file, method="wanda", log=f"tensorboard:{folder}")


def test_events_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    tracker: Any = tracker_of(f"tensorboard:{tmp_path / 'logs'}")
    tracker.start({})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker._writer, "add_scalar", full)
    with pytest.raises(UserError, match=r"^cannot write to .*/logs: No space left on device$"):
        tracker.log({"x": 1.0}, 0)


def test_settings_are_told_flat() -> None:
    content = {"a": {"b": 1, "c": None, "d": ()}, "e": [1, 2], "f": "x"}
    assert flat(content) == {"a.b": 1, "e": "[1, 2]", "f": "x"}
