"""The progress of a command on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from admm_prune.cli import interrupts
from admm_prune.methods.callbacks import Callback

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn, TaskID

_EVERY = 30.0  # seconds between plain lines of steps without names


class Progress(Protocol):
    """The progress of a command: phases, one after the other, each with steps."""

    def phase(self, name: str) -> None:
        """Begins a phase."""
        ...

    def step(self, done: int, total: int, label: str = "") -> None:
        """Shows the steps done in the current phase; `label` is the part that is at work.

        Raises:
            KeyboardInterrupt: there was an interrupt that did not propagate.
        """
        ...

    def count(self, done: int, total: int, label: str) -> None:
        """Shows the runs done, in a command of several runs, each with phases of its own."""
        ...


class Shown(Callback):
    """Shows the phases and the steps of a run."""

    def __init__(self, progress: Progress) -> None:
        self._shown = progress

    def on_phase_begin(self, name: str) -> None:
        self._shown.phase(name)

    def on_progress(self, done: int, total: int, name: str) -> None:
        self._shown.step(done, total, name)


@contextmanager
def shown_progress(what: str, *, shown: bool = True) -> Generator[Progress]:
    """The progress of a command.

    Args:
        what: the phase that the command begins with.
        shown: whether to show anything; False in all but one of several processes.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    logger = logging.getLogger("admm_prune")
    shown = shown and logger.isEnabledFor(logging.WARNING)  # none with --quiet
    if not (console.is_terminal and shown):
        yield Lines(what, shown, steps=not logger.isEnabledFor(logging.INFO))  # the log of --verbose has them
        return
    with Progress(*columns(), console=console) as bars:
        yield Bars(what, bars)


def columns() -> Sequence[ProgressColumn]:
    """The columns of a bar: phase, bar, steps, time, time left, part at work."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[counted]}", justify="right"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[label]}"),
    )


class Bars:
    """A bar for every phase, with the time that is left; those of finished phases stay."""

    def __init__(self, what: str, bars: RichProgress) -> None:
        self._bars = bars
        self._runs: TaskID | None = None
        self._what = what
        self._task = self._added(what)

    def _added(self, name: str) -> TaskID:
        return self._bars.add_task(name, total=None, counted="", label="")

    def phase(self, name: str) -> None:
        self._finish()
        self._task = self._added(name)

    def _finish(self) -> None:
        """A phase of a single run stays, with its time; a phase without steps, or one of many runs, goes."""
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        if self._runs is not None or task.total is None:
            self._bars.remove_task(self._task)
        else:
            self._bars.update(self._task, completed=task.total, label="")

    def step(self, done: int, total: int, label: str = "") -> None:
        interrupts.check()
        self._bars.update(self._task, completed=done, total=total, counted=f"{done}/{total}", label=label)

    def count(self, done: int, total: int, label: str) -> None:
        interrupts.check()
        if self._runs is None:
            self._runs = self._added(self._what)
        self._bars.update(self._runs, completed=done, total=total, counted=f"{done}/{total}", label=label)


class Lines:
    """Plain lines: one for every phase that has steps, and for every step that has a name.

    Phases without steps are those in which wrong input shows: its message stays the only line.
    """

    def __init__(self, what: str, shown: bool, *, steps: bool = True) -> None:
        self._what, self._shown, self._steps = what, shown, steps
        self._of_many = False  # the phases of one of many runs are not shown
        self._begin(what, announce=False)

    def _begin(self, name: str, *, announce: bool = True) -> None:
        self._name, self._announce = name, announce
        self._first: tuple[float, int] | None = None
        self._printed = time.monotonic()

    def phase(self, name: str) -> None:
        interrupts.check()
        self._begin(name)

    def step(self, done: int, total: int, label: str = "") -> None:
        interrupts.check()
        if not self._steps:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
            if self._announce and not (label or self._of_many):
                self._print(self._name)
        if (label and not self._of_many) or (now - self._printed >= _EVERY and done < total):
            self._printed = now
            began, before = self._first
            left = (now - began) / (done - before) * (total - done) if done > before else 0.0
            remaining = f" ({_duration(left)} left)" if left >= 1 else ""
            self._print(f"{self._name}: {done}/{total} {label}".rstrip() + remaining)

    def count(self, done: int, total: int, label: str) -> None:
        interrupts.check()
        self._of_many = True
        if label:
            self._print(f"{self._what}: {done}/{total} {label}")

    def _print(self, line: str) -> None:
        if self._shown:
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
