"""What follows a run from outside: trackers of its figures, and callbacks at its phases and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from admm_prune.errors import UserError


class Tracker(Protocol):
    """Receives the figures of a run. Names are as "block/relative_error", "train/loss", "pruned/perplexity"."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """The run begins; its settings are as in the manifest, flat: "target.sparsity"."""
        ...

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one block or of one step of training, counted from 0; steps never fall."""
        ...

    def finish(self, summary: Mapping[str, float]) -> None:
        """The run is over: its figures as a whole; empty where it broke off."""
        ...


class Callback:
    """Receives the events of a run; override the methods of the events you need.

    An exception that a method raises ends the run, which `resume=True` continues if it has `out`. In a process group
    the methods are called in every process.
    """

    def on_phase_begin(self, name: str) -> None:
        """A phase begins, such as "evaluating the dense model" or "pruning"."""

    def on_phase_end(self, name: str, seconds: float, peak_mib: float) -> None:
        """A phase is over; `peak_mib` is its peak memory beyond that at its start."""

    def on_progress(self, done: int, total: int, name: str) -> None:
        """So many of all steps of the phase are done: blocks or steps of training, batches of an evaluation.

        Args:
            name: of the part that is being processed; empty at the end and in an evaluation.
        """

    def on_figures(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one block or of one step of training, as `Tracker.log` receives them."""


class Callbacks(Callback):
    """Several callbacks as one, called in their order.

    Args:
        callbacks: one or several.
        progress: a function in place of a callback that has `on_progress` alone.

    Raises:
        UserError: an object is no `Callback`, or `progress` no function.
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
