"""Callbacks and the logger of a run: every phase, block and figure, in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import admm_prune
from admm_prune import Callback, UserError
from admm_prune.methods.callbacks import Callbacks


class Recorder(Callback):
    """Notes all events."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_phase_begin(self, name: str) -> None:
        self.events.append(("begin", name))

    def on_phase_end(self, name: str, seconds: float, peak_mib: float) -> None:
        self.events.append(("end", name, seconds, peak_mib))

    def on_progress(self, done: int, total: int, name: str) -> None:
        self.events.append(("progress", done, total, name))

    def on_figures(self, figures: Mapping[str, float], step: int) -> None:
        self.events.append(("figures", step, dict(figures)))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]


def prune(model_folder: Path, text_file: Path, **how: Any) -> Any:
    settings: dict[str, Any] = {"sparsity": 0.5, "data": str(text_file), "samples": 8, "eval_samples": 4, **how}
    return admm_prune.prune(model_folder, method="wanda", device="cpu", **settings)


def test_a_callback_receives_every_event(
    model_folder: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, steps = Recorder(), []
    with caplog.at_level(logging.INFO, logger="admm_prune"):
        report = prune(
            model_folder,
            text_file,
            out=tmp_path / "out",
            callbacks=recorder,
            progress=lambda *step: steps.append(step),
        )
    names = [phase.name for phase in report.phases]
    assert recorder.of("begin") == [(name,) for name in names]
    assert recorder.of("end") == [(phase.name, phase.seconds, phase.peak_mib) for phase in report.phases]
    assert names[:2] == ["opening the model", "reading the text"]
    assert "evaluating the pruned model" in names
    assert names[-1] == "hashing the files"
    assert recorder.of("progress") == steps
    assert [step for step in steps if step[2]] == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1")]
    assert steps[-1][0] == steps[-1][1], "the last batch of the evaluation"
    figures = recorder.of("figures")
    assert [step for step, _ in figures] == [0, 1]
    layers = [layer.relative_error for layer in report.layers if "layers.1." in layer.name]
    assert figures[1][1]["block/relative_error"] == pytest.approx(sum(layers) / len(layers))
    pruning = recorder.events.index(("begin", "pruning"))
    assert pruning < recorder.events.index(("figures", *figures[0]))

    lines = [record.getMessage() for record in caplog.records]
    assert "evaluating the dense model ..." in lines
    blocks = [line for line in lines if line.startswith("block ")]
    assert [line.partition(":")[0] for line in blocks] == ["block 0", "block 1"]
    assert f"relative_error {figures[1][1]['block/relative_error']:.6g}" in blocks[1]
    assert all(record.name.startswith("admm_prune.") for record in caplog.records)


def test_several_callbacks_are_called_in_their_order() -> None:
    first, second = Recorder(), Recorder()
    both = Callbacks([first, second])
    both.on_phase_begin("pruning")
    both.on_phase_end("pruning", 1.0, 2.0)
    both.on_progress(1, 2, "block 0")
    both.on_figures({"block/sparsity": 0.5}, 0)
    assert first.events == second.events
    assert len(first.events) == 4


def test_an_exception_of_a_callback_ends_the_run_which_can_be_resumed(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_figures(self, figures: Mapping[str, float], step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model_folder, text_file, out=tmp_path / "out", callbacks=[Stop()])
    assert not (tmp_path / "out").exists()
    report = prune(model_folder, text_file, out=tmp_path / "out", resume=True)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("wrong", "named"), [(print, "a builtin_function"), ([Recorder], "the class Recorder"), ("x", "a str")]
)
def test_what_is_no_callback_is_refused(wrong: Any, named: str, model_folder: Path, text_file: Path) -> None:
    with pytest.raises(UserError, match=f"derived from admm_prune.Callback, not {named}"):
        prune(model_folder, text_file, callbacks=wrong)
