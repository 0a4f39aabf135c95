"""Schedules of penalties, sparsities and learning rates. All are frozen; the solver holds the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from admm_prune.errors import check_at_least, check_positive


class PenaltySchedule(Protocol):
    @property
    def every(self) -> int:
        """A schedule of the penalty, which may change at intervals; a change costs a factorization."""
        ...

    def rho(self, iteration: int, previous: float, changed: float) -> float:
        """The penalty from `iteration` on.

        Args:
            iteration: counted from 0.
            previous: the penalty so far; 0 before the first.
            changed: entries that entered or left the support since the last call, relative to its size.
        """
        ...


@dataclass(frozen=True)
class Constant:
    """rho_t = value."""

    value: float
    every: int = 1 << 30

    def __post_init__(self) -> None:
        check_positive(self, "value")
        check_at_least(self, every=1)

    def rho(self, iteration: int, previous: float, changed: float) -> float:
        return self.value


@dataclass(frozen=True)
class LogSpaced:
    """rho_t = start (stop / start)^(t / (over - 1)), constant over `every` iterations and after `over`."""

    start: float = 0.1
    stop: float = 1.0
    over: int = 30
    every: int = 3

    def __post_init__(self) -> None:
        check_positive(self, "start", "stop")
        check_at_least(self, over=1, every=1)

    def rho(self, iteration: int, previous: float, changed: float) -> float:
        return float(self.start * (self.stop / self.start) ** min(1.0, iteration / max(1, self.over - 1)))


@dataclass(frozen=True)
class SupportDriven:
    """ALPS's controller: rho grows by 1.3, 1.2 or 1.1 as the support changed by more than 10 %, 0.5 % or at all.

    Source: Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs, 2024, and its code.
    """

    start: float = 0.1
    limit: float = 1e6
    every: int = 3

    def __post_init__(self) -> None:
        check_positive(self, "start", "limit")
        check_at_least(self, every=1)

    def rho(self, iteration: int, previous: float, changed: float) -> float:
        if previous == 0.0:
            return self.start
        factor = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1 if changed > 0 else 1.0
        return min(self.limit, previous * factor)


@dataclass(frozen=True)
class CubicSparsity:
    """The fraction of the final sparsity at iteration t: 1 - (1 - (t + 1) / over)^3.

    Source: Zhu and Gupta, To prune, or not to prune, 2017; used in ADMM by Boza, 2024.
    """

    over: int = 15

    def __post_init__(self) -> None:
        check_at_least(self, over=1)

    def fraction(self, iteration: int) -> float:
        return float(1.0 - max(0.0, 1.0 - (iteration + 1) / self.over) ** 3)


def warm_up_then_linear(steps: int, warm_up: float = 0.05) -> Callable[[int], float]:
    """The factor of a learning rate by the step, for `LambdaLR`: up to 1 in `warm_up` of the run, then down to 0.

    Adam's second moment is estimated from few gradients at first, so that its first steps are the least reliable.

    Args:
        steps: of the run.
        warm_up: a fraction of it.
    """
    rise = max(1, round(warm_up * steps))
    return lambda step: min((step + 1) / rise, max(0.0, (steps - step) / (steps - rise + 1)))
