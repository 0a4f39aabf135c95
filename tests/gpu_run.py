"""A pytest plugin for runs on a GPU that is at hand for minutes: results as they come, and a limit for every test.

    python -m pytest -p tests.gpu_run --results FILE --limit 60 -m gpu tests

Each finished test is a line of JSON in FILE, written at once, so that a run that is cut off leaves what it found. A
test that takes longer than the limit fails. One that does not return to Python, as in a kernel that does not end, takes
its process down with it after another 15 seconds; pytest-xdist then starts a new one for the other tests.

With `-m gpu` files without such a test are not imported. They may need packages that the machine lacks, and one error
of an import would keep pytest from running anything.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

_GRACE = 15.0  # seconds from the exception to the end of the process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="a file for the result of every test, a line of JSON each")
    parser.addoption("--limit", type=float, help="seconds for a test")


def pytest_configure(config: pytest.Config) -> None:
    results = config.getoption("--results")
    if results is not None and not hasattr(config, "workerinput"):  # the process that hears of all tests
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text("", encoding="utf-8")
        config.pluginmanager.register(_Results(results))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("markexpr") != "gpu" or not collection_path.match("test_*.py"):
        return None
    return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


class _Results:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            row["error"] = report.longreprtext[-2000:]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    seconds = item.config.getoption("--limit")
    if seconds is None:
        return (yield)

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
