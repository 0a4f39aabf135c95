"""Lower bounds of times: operations and bytes at the measured rates of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Measure = Callable[..., Any]  # see the fixture `measure`


@dataclass
class Rates:
    """Operations a second by dtype, bytes a second, and the lines of the closing table: name, seconds, lower bound.

    All by the CPU time of one thread, which other processes disturb least.
    """

    operations: dict[torch.dtype, float]
    bandwidth: float
    lines: list[tuple[str, float, float]] = field(default_factory=list)

    @classmethod
    def measured(cls) -> Rates:
        """From a square product in each precision, and a copy that no cache holds."""
        source = torch.rand(1 << 25)
        target = torch.empty_like(source)
        return cls(
            operations={dtype: 2 * 1024**3 / _product_seconds(dtype) for dtype in (torch.float32, torch.float64)},
            bandwidth=2 * 4 * source.numel() / _median(lambda: target.copy_(source)),
        )

    def lower_bound(self, operations: float, moved: float, dtype: torch.dtype) -> float:
        """Seconds: the longer of the two, because computing and moving can overlap."""
        return max(operations / self.operations[dtype], moved / self.bandwidth)


@dataclass(frozen=True, eq=False)
class Layer:
    """Numbers of a layer's shape: W (rows, width), and A (width, width) with a unit diagonal."""

    weight: Tensor
    hessian: Tensor

    @classmethod
    def drawn(cls, shape: str) -> Layer:
        """From "OUTxIN"."""
        rows, width = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2 * width, width, generator=generator)
        gram = inputs.T @ inputs
        scale = gram.diagonal().sqrt()
        hessian = gram / scale / scale[:, None]
        hessian.diagonal().fill_(1.03)
        return cls(torch.randn(rows, width, generator=generator), hessian / 1.03)

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]


def _product_seconds(dtype: torch.dtype) -> float:
    a, b, out = (torch.rand(1024, 1024, dtype=dtype) for _ in range(3))
    return _median(lambda: torch.matmul(a, b, out=out))


def _median(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(9):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times)
