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
_ATTAINED = 0.5  # fraction of a data sheet's peak assumed for large products; not measured
_GB = 1e9


@dataclass(frozen=True)
class Machine:
    """Rates in units a second, by the kinds of `Work`.

    Attributes:
        source: where they come from.
        memory: bytes of the device; None where it is the host's.
    """

    name: str
    source: str
    rates: Mapping[str, float]
    memory: int | None = None

    def seconds(self, work: Work) -> float:
        """All of the work, one kind after the other: nothing overlaps."""
        return sum(count / self.rates[kind] for kind, count in work.counts.items())


# NVIDIA's data sheets (H100 SXM and H200: dense bfloat16, TF32 not used, FP64 tensor cores; A100 SXM 80 GB).
_SHEETS: Mapping[str, tuple[float, float, float, float, float]] = {
    # bfloat16, float32, float64 operations a second, bytes of memory traffic a second, bytes of memory
    "h100": (989e12, 67e12, 67e12, 3.35e12, 80e9),
    "h200": (989e12, 67e12, 67e12, 4.8e12, 141e9),
    "a100": (312e12, 19.5e12, 19.5e12, 2.039e12, 80e9),
}
GPUS = tuple(_SHEETS)


def gpu_memory(name: str) -> int:
    """Bytes of memory of a GPU, by its data sheet.

    Raises:
        UserError: no such GPU is known.
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


def measured_here(folder: Path | None = None, half: torch.dtype = torch.bfloat16) -> Machine:
    """This machine's processor, with the threads that torch has, in about three seconds.

    Args:
        folder: whose disk is measured; the system's place for temporary files by default.
        half: the narrow dtype that is multiplied.
    """
    rates: dict[str, float] = {}
    for kind, dtype in (("float64", torch.float64), ("float32", torch.float32), ("half", half)):
        a = torch.randn(_SIDE, _SIDE).to(dtype)
        rates[f"products_{kind}"] = _rate(lambda a=a: a @ a, 2 * _SIDE**3)  # type: ignore[misc]
        if dtype is not half:
            spd = (a @ a.T).add_(torch.eye(_SIDE, dtype=dtype), alpha=_SIDE)
            rates[f"factor_{kind}"] = _rate(
                lambda spd=spd: torch.cholesky_inverse(torch.linalg.cholesky(spd)),  # type: ignore[misc]
                _SIDE**3,
            )
    x = torch.randn(_ENTRIES)
    out = torch.empty_like(x)
    rates["traffic"] = _rate(lambda: torch.mul(x, 2.0, out=out), 8 * _ENTRIES)
    rates["select"] = _rate(lambda: x[: _ENTRIES // 8].kthvalue(_ENTRIES // 16), _ENTRIES // 8)
    data = bytes(_FILE // 4)
    rates["hash"] = _rate(lambda: hashlib.sha256(data), len(data))
    tiny = torch.randn(8)
    rates["calls"] = _rate(lambda: [tiny.mul(2.0) for _ in range(1000)], 1000)
    rates |= _disk(folder)
    return Machine("this machine", "measured", rates)


def _rate(run: Callable[[], object], units: float) -> float:
    """Units a second: the mean over a fifth of a second, after one call that does not count."""
    run()
    began, done = time.perf_counter(), 0
    while True:
        run()
        done += 1
        seconds = time.perf_counter() - began
        if seconds >= _LEAST:
            return done * units / seconds


def _disk(folder: Path | None) -> dict[str, float]:
    """Through the system's cache, as a run reads and writes."""
    data = bytes(_FILE)
    with writing(folder or Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "disk"
        write = _rate(lambda: path.write_bytes(data), _FILE)
        return {"disk_write": write, "disk_read": _rate(path.read_bytes, _FILE)}
