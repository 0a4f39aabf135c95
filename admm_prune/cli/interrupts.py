"""Keeps interrupts from being lost: exceptions raised in a destructor or a foreign callback are swallowed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()
_advice: list[str] = []


@contextmanager
def remembered() -> Generator[None]:
    """Within it SIGINT raises KeyboardInterrupt as usual, and `check` raises it again if it was lost."""
    _seen.clear()
    _advice.clear()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def advise(advice: str) -> None:
    """Adds advice to the line that reports an interrupt."""
    _advice[:] = [advice]


def message() -> str:
    """The line that reports an interrupt."""
    return ": ".join(["interrupted", *_advice])


def check() -> None:
    """Raises KeyboardInterrupt if there was an interrupt that did not propagate."""
    if _seen.is_set():
        raise KeyboardInterrupt


def _raise(number: int, frame: FrameType | None) -> None:
    _seen.set()
    raise KeyboardInterrupt
