"""The history of a solve as it is reported: whole columns, thinned out where there are many iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from admm_prune.result import Progress

_MOST = 64


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """Columns of equal length, a line for each reported iteration; None where a solver does not measure one.

    Attributes:
        iteration: counted from 0, as in `Progress`.
        objective: of the feasible point of the iteration.
        primal_residual: |x - z| / |z|.
        support_changes: entries that entered the support.
        rho: the penalty, in units of the problem's curvature.
    """

    iteration: tuple[int, ...]
    objective: tuple[float | None, ...]
    primal_residual: tuple[float | None, ...]
    support_changes: tuple[int | None, ...]
    rho: tuple[float | None, ...]

    @classmethod
    def of(cls, history: Sequence[Progress], most: int = _MOST) -> Self | None:
        """The history, at most about `most` lines of it at even distances, the last one always; None without any."""
        if not history:
            return None
        stride = -(-len(history) // most)
        chosen = history[(len(history) - 1) % stride :: stride]
        return cls(
            iteration=tuple(p.iteration for p in chosen),
            objective=tuple(p.objective for p in chosen),
            primal_residual=tuple(p.primal_residual for p in chosen),
            support_changes=tuple(p.support_changes for p in chosen),
            rho=tuple(p.rho for p in chosen),
        )
