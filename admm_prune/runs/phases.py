"""What the parts of a run take: seconds, and the extra memory at their peak."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from admm_prune.runs.memory import PeakMemory


@dataclass
class Phase:
    """One part of a run; its figures are there when it is over.

    Attributes:
        peak_mib: at its peak, over what was held when it began; see `PeakMemory`.
    """

    name: str
    seconds: float = 0.0
    peak_mib: float = 0.0


class Phases(list[Phase]):
    """The phases of a run in their order; calling it measures another one over a `with` block."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Generator[Phase]:
        phase = Phase(name)
        began = time.perf_counter()
        with PeakMemory(self._device) as memory:
            yield phase
        phase.seconds, phase.peak_mib = round(time.perf_counter() - began, 3), memory.extra_mib
        self.append(phase)
