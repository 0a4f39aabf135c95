"""Experiment trackers: TensorBoard, Weights & Biases, trackio, or a custom one."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from admm_prune.data.durable import writing
from admm_prune.errors import UserError
from admm_prune.methods.callbacks import Tracker
from admm_prune.models.evaluate import METRICS
from admm_prune.runs.journal.folder import absolute, check_writable, flattened
from admm_prune.runs.journal.journal import home_of


def _package(extra: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"--log {extra} needs the package: pip install 'admm-prune[{extra}]'") from error


def _checked(folder: Path, out: Path | None) -> Path:
    """The absolute path of a folder for log files.

    Raises:
        UserError: the folder cannot be written, or is inside the output or its journal, which the run moves or deletes.
    """
    place = absolute(folder)
    for taken in () if out is None else (absolute(out), home_of(out)):
        if place.resolve().is_relative_to(taken.resolve()):
            raise UserError(f"log: {folder} is in {taken}, which the run itself writes and replaces: choose another")
    check_writable(place / "events")
    return place


class TensorBoard:
    """Event files in a folder, by `torch.utils.tensorboard`."""

    def __init__(self, folder: str, out: Path | None = None) -> None:
        self._open: Callable[[str], Any] = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._writer: Any = None
        # Remote locations, such as gs://, are written by TensorBoard's file system layer.
        self._place = folder if "://" in folder else str(_checked(Path(folder), out))

    def start(self, settings: Mapping[str, Any]) -> None:
        lines = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        with writing(Path(self._place)):
            self._writer = self._open(self._place)
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{lines}", 0)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        with writing(Path(self._place)):
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def finish(self, summary: Mapping[str, float]) -> None:
        with writing(Path(self._place)):
            for name, value in summary.items():
                self._writer.add_scalar(name, value, 0)
            self._writer.close()


class WandB:
    """A run of Weights & Biases in a project."""

    def __init__(self, project: str) -> None:
        self._wandb = _package("wandb", "wandb")
        self._project = project
        self._run: Any = None

    def start(self, settings: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(project=self._project, config=dict(settings))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)


class Trackio:
    """A run of trackio in a project."""

    def __init__(self, project: str) -> None:
        self._trackio = _package("trackio", "trackio")
        self._project = project

    def start(self, settings: Mapping[str, Any]) -> None:
        self._trackio.init(project=self._project, config=dict(settings))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        if summary:
            self._trackio.log(dict(summary))
        self._trackio.finish()


_KINDS: Mapping[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def tracker_of(log: str | Tracker | None, out: Path | None = None) -> Tracker | None:
    """The tracker of "tensorboard:FOLDER", "wandb:PROJECT" or "trackio:PROJECT", or the object itself.

    Args:
        out: the output folder of the run.

    Raises:
        UserError: the kind is unknown, nothing follows the colon, or its package is not installed; the folder cannot be
            written, or is inside the output; or the object lacks methods of a `Tracker`.
    """
    if log is None or isinstance(log, str):
        return None if log is None else _tracker_named(log, out)
    lacking = [name for name in ("start", "log", "finish") if not callable(getattr(log, name, None))]
    if lacking or isinstance(log, type):
        what = f"the class {log.__name__}" if isinstance(log, type) else f"a {type(log).__name__}"
        raise UserError(f"log must be a string or an object with start, log and finish, not {what}")
    return log


def _tracker_named(text: str, out: Path | None) -> Tracker:
    kind, _, place = text.partition(":")
    if kind not in _KINDS or not place:
        raise UserError(f"log must be tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT, not '{text}'")
    return TensorBoard(place, out) if kind == "tensorboard" else _KINDS[kind](place)


@contextmanager
def followed(tracker: Tracker | None, settings: Mapping[str, Any]) -> Generator[dict[str, float]]:
    """Context of a tracked run. Yields a dictionary for the figures of the whole run, which are logged at the end."""
    summary: dict[str, float] = {}
    if tracker is None:
        yield summary
        return
    tracker.start(flat(settings))
    try:
        yield summary
    except BaseException:
        tracker.finish({})
        raise
    tracker.finish(summary)


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """`flattened`, without values that are None or empty, and with other values than numbers as strings."""
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in flattened(content).items()
        if value not in (None, (), [])
    }


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures of a whole run, from its manifest."""
    figures = {"sparsity": report["sparsity"]}
    figures |= {f"{which}/{name}": report[which][name] for which in ("dense", "pruned") for name in METRICS}
    for task, row in ((report["tasks"] or {}).get("results") or {}).items():
        figures |= {f"tasks/{task}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}
