"""The device, its memory, and the processes that torchrun has started."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from admm_prune.errors import UserError
from admm_prune.models.parallel import LOST, LostProcessError, World
from admm_prune.settings import Settings, options

_MIB = 2**20
_GROUP = Path("/sys/fs/cgroup")  # the control group of the container
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_PATIENCE = timedelta(hours=12)  # one process may solve a large layer while the others wait
_store: Any = None  # the key-value store of torchrun, which outlives its processes


def pick_device(name: str) -> str:
    """The device of this name; for "auto" "cuda" if there is a CUDA device, otherwise "cpu".

    Raises:
        UserError: there is no such device.
    """
    options(Settings)["device"].check("device", name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu")
    return name


def check_dtype(name: str | None) -> None:
    """Raises UserError unless `name` is None or a dtype in which models are stored."""
    options(Settings)["dtype"].check("dtype", name)


class PeakMemory:
    """Measures the peak memory of a `with` block, beyond the memory at its start.

    On CUDA it is the memory that torch has allocated on the device. On the CPU it is resident memory: exact on Linux,
    where the high-water mark of the kernel can be reset; a lower bound on other systems, where the mark never falls.

    Attributes:
        extra_mib: the result in MiB, after the block.
    """

    extra_mib: float = 0.0
    highest: ClassVar[int] = 0  # the largest high-water mark of this process before a reset
    _measuring: ClassVar[list[PeakMemory]] = []

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._seen = 0  # the largest mark before a reset by another measurement

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _reset_high_water()
            self._before = _high_water()
            self._measuring.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._measuring.remove(self)
            peak = max(self._seen, _high_water())
        self.extra_mib = round((peak - self._before) / _MIB, 1)

    @classmethod
    def keep(cls, mark: int) -> None:
        """Records a mark that is about to be reset, for all active measurements."""
        cls.highest = max(cls.highest, mark)
        for one in cls._measuring:
            one._seen = max(one._seen, mark)


def free_bytes(device: torch.device | str) -> int:
    """The available bytes of a CUDA device, or of the host within the limit of the control group.

    Pages of files that were not used recently count as available: they are dropped when memory is needed.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = [_meminfo("MemAvailable:")]
    with suppress(OSError, ValueError):  # there is no limit, or it cannot be read
        used = int((_GROUP / "memory.current").read_text())
        available.append(int((_GROUP / "memory.max").read_text()) - used + _inactive_file_bytes())
    return max(0, min(available))


def described() -> str:
    """A description of the machine: GPU, processor, cores available to this process, memory, system; no host name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{processor()}, {cores} core{'s' if cores > 1 else ''}, {memory:.0f} GiB of memory, {platform.system()}"
    )


def processor() -> str:
    """The model name of the processor, or its architecture if the system does not report the name."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def resident_bytes() -> int:
    """The resident memory of this process in bytes."""
    return _proc_bytes(Path("/proc/self/status"), "VmRSS:") or peak_resident_bytes()


def return_freed_memory() -> None:
    """Makes the C library return freed memory to the system, now and in the future.

    glibc raises the size above which it does so up to 32 MiB while a process runs, and keeps smaller pieces: a process
    that loads one block after the other would accumulate the memory of blocks that it has freed. No effect with other
    C libraries.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 2**16)
        library.malloc_trim(0)


def _inactive_file_bytes() -> int:
    """The bytes of file pages in the control group that were not used recently; 0 if they cannot be read."""
    with suppress(OSError, ValueError):
        for line in (_GROUP / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def _meminfo(field: str) -> int:
    return _proc_bytes(Path("/proc/meminfo"), field) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _proc_bytes(path: Path, field: str) -> int | None:
    """The value in kB of a line of a file in /proc, in bytes; None if there is no such line."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def _reset_high_water() -> None:
    PeakMemory.keep(_high_water())
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _high_water() -> int:
    recorded = _proc_bytes(Path("/proc/self/status"), "VmHWM:")
    if recorded is not None:
        return recorded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_resident_bytes() -> int:
    """The peak resident memory of this process in bytes, including libraries and mapped files."""
    return max(PeakMemory.highest, _high_water())


def started() -> tuple[int, int]:
    """(rank of this process, number of processes) from the environment of torchrun; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Generator[World]:
    """Context that joins all processes of torchrun into one world: over gloo on the CPU, and over NCCL on CUDA devices,
    of which each process has one.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: there is no such device.
        LostProcessError: another process ended during the context.
    """
    global _store  # noqa: PLW0603  # one group per process, whose failures are reported after it is destroyed
    if started()[1] == 1:
        yield World()
        return
    backend = "gloo"
    if pick_device(device) == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    _store = store
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield World.current()
        dist.barrier()  # no process exits while another may still need it
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl", "peer")):
            raise LostProcessError(LOST) from error
        raise
    dist.destroy_process_group()


def speaks(error: Exception | None) -> bool:
    """Whether this process reports why the run has failed: the first one that notices."""
    rank, size = started()
    if size == 1 or _store is None:
        return rank == 0
    try:
        return int(_store.add("said", 1)) == 1
    except RuntimeError:  # the process of the store has also exited
        return isinstance(error, LostProcessError)
