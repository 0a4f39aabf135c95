"""Processes that work on one problem with a share of its tokens each, and go on from one and the same point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from admm_prune.models.parallel import World
from admm_prune.point import Point
from admm_prune.result import Result
from admm_prune.solvers.base import Solver


@dataclass(frozen=True)
class Agreed:
    """A solver that ends everywhere with the solution of the first process.

    All of them solve, by statistics that are those of all tokens: where machines round alike nothing changes. What is
    chosen, a support above all, is the choice of one.
    """

    inner: Solver
    world: World

    def solve(self, problem: Any, *, start: Point | None = None) -> Result:
        result = self.inner.solve(problem, start=start)
        return replace(result, solution=result.solution.map(lambda x: self.world.handed(x.contiguous(), 0)))
