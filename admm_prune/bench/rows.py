"""A row of the benchmark, measured under its own limits of time and memory; a failed row does not end the benchmark."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, Literal, TypeVar

import torch

from admm_prune.bench.baselines import Ceilings, Work, synchronize
from admm_prune.data.hub import first_line

Status = Literal["measured", "failed", "no memory", "no time", "too long"]
_RESERVE = 0.06  # fraction of a device's memory that is left free

Made = TypeVar("Made")


class SharedData(Generic[Made]):
    """Data that several rows share: created on the device for the first of them, and released after the last.

    Args:
        draw: creates it, from its shape and the device.
    """

    def __init__(self, draw: Callable[[int, int, torch.device], Made], rows: int, width: int, device: torch.device):
        self.rows, self.width = rows, width
        self._draw, self._device = draw, device
        self._held: Made | None = None

    def __call__(self) -> Made:
        if self._held is None:
            self._held = self._draw(self.rows, self.width, self._device)
            synchronize(self._device)
        return self._held

    def release(self) -> None:
        self._held = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure.

    Attributes:
        section: which part of the benchmark.
        name: what ran.
        case: on what: a shape and a target.
        seconds: None if it did not finish.
        floor_seconds: lower bound on the time, at the ceilings measured in this run.
        bound: by operations or by bytes.
        peak_bytes: of the device, beyond what was allocated before.
        error: relative error of a layer, undamped, in float64.
        baseline: whether it is a baseline.
        more: anything else, by name.
        note: why there is no figure, or a remark on it.
    """

    section: str
    name: str
    case: str
    status: Status
    seconds: float | None = None
    floor_seconds: float | None = None
    bound: str | None = None
    peak_bytes: int | None = None
    error: float | None = None
    baseline: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def reached(self) -> float | None:
        """The floor as a fraction of the time."""
        if not self.seconds or self.floor_seconds is None:
            return None
        return self.floor_seconds / self.seconds


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The result of a measurement."""

    seconds: float
    work: Work | None = None
    error: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A measurement to be made.

    Attributes:
        run: makes it.
        needs: bytes of the device's memory, an approximate upper limit.
        limit: seconds.
    """

    section: str
    name: str
    case: str
    run: Callable[[], Figures]
    needs: float = 0.0
    limit: float = 30.0
    baseline: bool = False


class Runner:
    """Runs measurements one after the other, until the time budget is used up.

    Args:
        budget: seconds for all.
        tell: callback for every row.
    """

    def __init__(
        self, device: torch.device, ceilings: Ceilings, budget: float, tell: Callable[[Measurement], None] | None = None
    ) -> None:
        self.device, self.ceilings = device, ceilings
        self._end = time.perf_counter() + budget
        self._tell = tell
        self.rows: list[Measurement] = []

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()

    def run(self, cases: Iterable[Case]) -> list[Measurement]:
        """The rows of some cases, in their order."""
        rows = []
        for case in cases:
            row = self._one(case)
            rows.append(row)
            self.rows.append(row)
            if self._tell is not None:
                self._tell(row)
        return rows

    def _one(self, case: Case) -> Measurement:
        def row(status: Status, **values: Any) -> Measurement:
            return Measurement(
                section=case.section, name=case.name, case=case.case, baseline=case.baseline, status=status, **values
            )

        limit = min(case.limit, self.left)
        if limit <= 0:
            return row("no time", note="the time for the whole benchmark was over")
        peak = None
        try:
            free = free_memory(self.device)
            if free is not None and case.needs > free:
                return row("no memory", note=f"needs about {case.needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            with time_limit(limit), peak_of(self.device) as peaks:
                figures = case.run()
                synchronize(self.device)
            peak = peaks[0] if peaks else None
        except TimeoutError:
            return row("too long", note=f"stopped after {limit:.0f} s")
        except torch.OutOfMemoryError as error:
            return row("no memory", note=first_line(error)[:200])
        except Exception as error:  # such as those of a compiler: the other rows are still measured
            return row("failed", note=f"{type(error).__name__.lstrip('_')}: {first_line(error)[:200]}")
        finally:
            with suppress(RuntimeError):  # after some errors the device is unusable: the rows so far are kept
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        work = figures.work
        return row(
            "measured",
            seconds=figures.seconds,
            floor_seconds=None if work is None else self.ceilings.floor(work),
            bound=None if work is None else self.ceilings.bound(work),
            peak_bytes=peak,
            error=figures.error,
            more=figures.more,
            note=figures.note,
        )


def free_memory(device: torch.device) -> float | None:
    """Bytes that may be taken on a device; None where there is no such limit."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0.0, free + unused - _RESERVE * total)


@contextmanager
def peak_of(device: torch.device) -> Generator[list[int]]:
    """Receives, at the end, the peak memory of a CUDA device in bytes, beyond what was allocated before."""
    peaks: list[int] = []
    if device.type != "cuda":
        yield peaks
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peaks
    peaks.append(torch.cuda.max_memory_allocated(device) - before)


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raises TimeoutError in the block after some seconds; only in the main thread, if the system has timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def measured_row(rows: Sequence[Measurement], name: str, case: str | None = None) -> Measurement | None:
    """The first measured row of this name."""
    matches = (r for r in rows if r.name == name and r.status == "measured" and case in (None, r.case))
    return next(matches, None)
