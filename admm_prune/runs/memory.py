"""The peak of this process's memory over a stretch of work."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_MIB = 2**20


class PeakMemory:
    """Measures the extra memory at the peak of a `with` block, over what was resident when it began.

    On CUDA it is what torch allocated on the device. Elsewhere it is resident memory: exact on Linux, where the
    kernel's high-water mark can be reset; a lower bound elsewhere, where the mark only ever rises.
    """

    extra_mib: float = 0.0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _reset_high_water()
            self._before = _high_water()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else _high_water()
        self.extra_mib = round((peak - self._before) / _MIB, 1)


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be had: of a CUDA device, else of the host within the limit that its control group sets."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = [_meminfo("MemAvailable:")]
    with suppress(OSError, ValueError):  # no such limit, or none that can be read
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        available.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(available))


def _meminfo(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reset_high_water() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _high_water() -> int:
    """Bytes resident at the high-water mark."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
