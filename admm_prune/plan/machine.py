"""The speed of a machine: measured in a few seconds, or from the data sheet of a GPU."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from admm_prune.data.durable import writing
from admm_prune.errors import UserError
from admm_prune.plan.counting import Work

_LEAST = 0.2  # seconds of each measurement
_SIDE, _ENTRIES, _FILE = 768, 1 << 22, 1 << 26
_GPU_SIDE, _GPU_ENTRIES = 4096, 1 << 26  # large enough that the time of starting kernels does not count
_ATTAINED = 0.5  # fraction of a data sheet's peak assumed for large products; not measured
_GB = 1e9


@dataclass(frozen=True)
class Machine:
    """The rates of a machine for the kinds of `Work`, in units per second.

    Attributes:
        source: where the rates come from.
        memory: the memory of the device in bytes; None if that is the memory of the host.
    """

    name: str
    source: str
    rates: Mapping[str, float]
    memory: int | None = None

    def seconds(self, work: Work) -> float:
        """The time of the work, if no two kinds of it overlap."""
        return sum(count / self.rates[kind] for kind, count in work.counts.items())


# NVIDIA's data sheets (H100 SXM and H200: dense bfloat16, TF32 not used, FP64 tensor cores; A100 SXM 80 GB).
_SHEETS: Mapping[str, tuple[float, float, float, float, float]] = {
    # operations per second in bfloat16, float32 and float64; bytes of memory traffic per second; bytes of memory
    "h100": (989e12, 67e12, 67e12, 3.35e12, 80e9),
    "h200": (989e12, 67e12, 67e12, 4.8e12, 141e9),
    "a100": (312e12, 19.5e12, 19.5e12, 2.039e12, 80e9),
}
GPUS = tuple(_SHEETS)


def gpu_memory(name: str) -> int:
    """Bytes of memory of a GPU, by its data sheet.

    Raises:
        UserError: the GPU is unknown.
    """
    if name not in _SHEETS:
        raise UserError(f"gpu must be {', '.join(GPUS[:-1])} or {GPUS[-1]}, not '{name}'")
    return int(_SHEETS[name][-1])


def gpu_named(name: str, host: Machine) -> Machine:
    """Another GPU, at half of the peak rates of its data sheet; disk and calls as measured on the host.

    Raises:
        UserError: no such GPU is known.
    """
    memory = gpu_memory(name)
    half, single, double, traffic, _ = _SHEETS[name]
    rates = {
        "products_half": _ATTAINED * half,
        "products_float32": _ATTAINED * single,
        "products_float64": _ATTAINED * double,
        "factor_float32": _ATTAINED * single / 10,
        "factor_float64": _ATTAINED * double / 10,
        "select": traffic / 64,
        "traffic": _ATTAINED * traffic,
        **{
            kind: host.rates[kind]
            for kind in ("disk_read", "disk_write", "hash", "calls", "tokenize")
            if kind in host.rates
        },
    }
    source = f"NVIDIA's data sheet, at {_ATTAINED:.0%} of the peak; not measured"
    return Machine(name, source, rates, memory)


def measured_here(
    folder: Path | None = None, half: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Machine:
    """Measures this machine in about three seconds: the processor, with the number of threads of torch, or a GPU.

    Args:
        folder: a folder on the disk to measure; by default that for temporary files.
        half: the 16-bit dtype whose products are measured.
        device: that computes.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    side, entries = (_GPU_SIDE, _GPU_ENTRIES) if gpu else (_SIDE, _ENTRIES)

    def rate(run: Callable[[], object], units: float) -> float:
        return _rate(run, units, torch.cuda.synchronize if gpu else None)

    rates: dict[str, float] = {}
    for kind, dtype in (("float64", torch.float64), ("float32", torch.float32), ("half", half)):
        a = torch.randn(side, side, device=device).to(dtype)
        rates[f"products_{kind}"] = rate(lambda a=a: a @ a, 2 * side**3)  # type: ignore[misc]
        if dtype is not half:
            spd = (a @ a.T).add_(torch.eye(side, dtype=dtype, device=device), alpha=side)
            rates[f"factor_{kind}"] = rate(
                lambda spd=spd: torch.cholesky_inverse(torch.linalg.cholesky(spd)),  # type: ignore[misc]
                side**3,
            )
    x = torch.randn(entries, device=device)
    out = torch.empty_like(x)
    rates["traffic"] = rate(lambda: torch.mul(x, 2.0, out=out), 8 * entries)
    rates["select"] = rate(lambda: x[: entries // 8].kthvalue(entries // 16), entries // 8)
    data = bytes(_FILE // 4)
    rates["hash"] = _rate(lambda: hashlib.sha256(data), len(data))
    tiny = torch.randn(8, device=device)
    rates["calls"] = rate(lambda: [tiny.mul(2.0) for _ in range(1000)], 1000)
    rates |= _disk(folder)
    return Machine(torch.cuda.get_device_name(device) if gpu else "this machine", "measured", rates)


def _rate(run: Callable[[], object], units: float, synchronize: Callable[[], object] | None = None) -> float:
    """Units per second: the mean over at least a fifth of a second, after one call to warm up.

    Args:
        synchronize: waits for what `run` has started on another device.
    """
    wait = synchronize or (lambda: None)
    run()
    wait()
    began, done = time.perf_counter(), 0
    while True:
        run()
        wait()
        done += 1
        seconds = time.perf_counter() - began
        if seconds >= _LEAST:
            return done * units / seconds


def _disk(folder: Path | None) -> dict[str, float]:
    """The rates of writing and reading a file through the page cache, as a run does."""
    data = bytes(_FILE)
    with writing(folder or Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "disk"
        write = _rate(lambda: path.write_bytes(data), _FILE)
        return {"disk_write": write, "disk_read": _rate(path.read_bytes, _FILE)}
