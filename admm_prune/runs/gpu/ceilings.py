"""What the device at hand can do, measured in the same run: rates of products, and of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from admm_prune.kernels import precision, products

RATES = ("float64", "float32", "bfloat16", "bfloat16x3")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, *, repeats: int = 5, warm_up: int = 1) -> float:
    """The median time of a call, the device idle before and after."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times)


@dataclass(frozen=True)
class Work:
    """What has to be done at least: operations by the precision of their products, and bytes read or written."""

    operations: dict[str, float]
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        names = {**self.operations, **other.operations}
        sums = {name: self.operations.get(name, 0.0) + other.operations.get(name, 0.0) for name in names}
        return Work(sums, self.moved + other.moved)

    def __mul__(self, times: float) -> Work:
        return Work({name: times * n for name, n in self.operations.items()}, times * self.moved)


@dataclass(frozen=True)
class Ceilings:
    """Operations a second by precision, bytes a second read, and read and written."""

    operations: dict[str, float]
    read: float
    copied: float

    def floor(self, work: Work) -> float:
        """Seconds: operations and bytes at their ceilings, the shorter hidden behind the longer."""
        computing = sum(n / self.operations[name] for name, n in work.operations.items())
        return max(computing, work.moved / self.copied)

    def bound(self, work: Work) -> str:
        """Which of the two it is."""
        computing = sum(n / self.operations[name] for name, n in work.operations.items())
        return "operations" if computing >= work.moved / self.copied else "bytes"


@precision.full()
def measured(device: torch.device, *, width: int, entries: int) -> Ceilings:
    """From square products of `width`, and from reading and copying `entries` float32 numbers, that no cache holds."""
    operations = {}
    for name in RATES:
        dtype = torch.float64 if name == "float64" else torch.float32
        a, b, out = (torch.rand(width, width, dtype=dtype, device=device) for _ in range(3))
        if name == "bfloat16":
            half, other = a.bfloat16(), b.bfloat16()
            spent = seconds_of(lambda x=half, y=other: x @ y, device)  # type: ignore[misc]
        else:
            ready = products.prepared(b, "bfloat16x3" if name == "bfloat16x3" else "exact")
            spent = seconds_of(lambda x=a, y=ready, z=out: products.multiply(x, y, out=z), device)  # type: ignore[misc]
        operations[name] = 2 * width**3 / spent
    source = torch.rand(entries, device=device)
    target = torch.empty_like(source)
    read = 4 * entries / seconds_of(source.sum, device)
    copied = 8 * entries / seconds_of(lambda: target.copy_(source), device)
    return Ceilings(operations, read, copied)
