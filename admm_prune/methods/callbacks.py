"""Observers of a run: trackers, which log its figures, and callbacks for its phases and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from admm_prune.errors import UserError


class Tracker(Protocol):
    """Receives the figures of a run, under names such as "block/relative_error", "train/loss", "pruned/perplexity"."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """Called when the run begins, with the settings of its manifest under flat names such as "target.sparsity"."""
        ...

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Called with the figures of a block or of a training step. `step` is its index from 0, and never decreases."""
        ...

    def finish(self, summary: Mapping[str, float]) -> None:
        """Called at the end with the figures of the whole run; they are empty if it failed."""
        ...


class Callback:
    """Receives the events of a run. Override the methods for the events you need.

    An exception raised by a method ends the run; `resume=True` continues it if it has `out`. In a process group the
    methods are called in every process.
    """

    def on_phase_begin(self, name: str) -> None:
        """Called when a phase begins, such as "evaluating the dense model" or "pruning"."""

    def on_phase_end(self, name: str, seconds: float, peak_mib: float) -> None:
        """Called when a phase ends. `peak_mib` is its peak memory in MiB beyond the memory at its start."""

    def on_progress(self, done: int, total: int, name: str) -> None:
        """Called when `done` of `total` steps of a phase are done: blocks, training steps or batches of an evaluation.

        Args:
            name: of the part that is being processed; empty at the end and during an evaluation.
        """

    def on_figures(self, figures: Mapping[str, float], step: int) -> None:
        """Called with the figures of a block or of a training step, as `Tracker.log`."""


class Callbacks(Callback):
    """Calls several callbacks in order.

    Args:
        callbacks: one or several.
        progress: a function that is called as `on_progress`.

    Raises:
        UserError: an object is not a `Callback`, or `progress` is not callable.
    """

    def __init__(
        self, callbacks: Callback | Iterable[Callback] = (), progress: Callable[[int, int, str], None] | None = None
    ) -> None:
        given: Any = callbacks
        several = isinstance(given, Iterable) and not isinstance(given, str | Callback)
        chosen: tuple[Any, ...] = tuple(given) if several else (given,)
        for one in chosen:
            if not isinstance(one, Callback):
                kind = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
                raise UserError(f"a callback is an object of a class derived from admm_prune.Callback, not {kind}")
        if progress is not None and not callable(progress):
            raise UserError(f"progress must be a function of three arguments, not {progress!r}")
        self._callbacks: tuple[Callback, ...] = chosen
        self._progress = progress

    def on_phase_begin(self, name: str) -> None:
        for one in self._callbacks:
            one.on_phase_begin(name)

    def on_phase_end(self, name: str, seconds: float, peak_mib: float) -> None:
        for one in self._callbacks:
            one.on_phase_end(name, seconds, peak_mib)

    def on_progress(self, done: int, total: int, name: str) -> None:
        if self._progress is not None:
            self._progress(done, total, name)
        for one in self._callbacks:
            one.on_progress(done, total, name)

    def on_figures(self, figures: Mapping[str, float], step: int) -> None:
        for one in self._callbacks:
            one.on_figures(figures, step)
