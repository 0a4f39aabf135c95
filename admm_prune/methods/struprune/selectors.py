"""The selection of the structured groups to keep in one matrix: by structured OBS, by ADMM or by a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from admm_prune.ops import group_compensation, precision
from admm_prune.point import Point
from admm_prune.problem import Quadratic, SupportConstraint
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.result import Result
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.group_obs import GroupMask, GroupOBS

Selector = Literal["obs", "obs-one-shot", "admm", "mask", "mask-interactions"]
_OBS = GroupOBS(batch=None)


class SeededADMM:
    """ADMM that starts from the solution of structured OBS, and is never worse than that."""

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        seed = _OBS.solve(problem, start=start)
        result = ADMM().solve(problem, start=seed.solution)
        return replace(
            result,
            seconds=seed.seconds + result.seconds,
            notes=tuple(dict.fromkeys((*seed.notes, *result.notes))),
        )


SELECTORS: Mapping[Selector, Callable[[], Solver]] = {
    "obs": lambda: _OBS,
    "obs-one-shot": lambda: GroupOBS(batch=0),
    "admm": SeededADMM,
    "mask": GroupMask,
    "mask-interactions": lambda: GroupMask(interactions=True),
}


@precision.full()
def losses(problem: GroupReconstruction, width: int, selector: Selector, compensate: bool) -> Tensor:
    """The loss when k = 0, ..., n groups are removed in the order of the selector: (n + 1,), float64, on the CPU.

    The last entry, the loss without any group, is the energy of the whole output.
    """
    count = problem.minimizer.shape[1] // width
    if compensate:
        batch = count if selector == "obs-one-shot" else _OBS.size(count)
        rises = group_compensation.eliminate(problem.hessian, problem.minimizer, width, count, batch).losses
    else:
        scores = group_compensation.interactions(problem.hessian, problem.minimizer, width).diagonal()
        rises = scores.sort().values.cumsum(0)
    return torch.cat([rises.new_zeros(1), rises]).cpu()


@precision.full()
def solve(problem: GroupReconstruction, selector: Selector, compensate: bool) -> tuple[Result, Tensor]:
    """Selects the groups to keep; their weights are refitted by least squares if `compensate`, otherwise dense.

    Returns:
        The result, and a boolean mask (in,) of the columns that are kept.
    """
    result = SELECTORS[selector]().solve(problem)
    assert isinstance(problem.constraint, SupportConstraint)
    mask = problem.constraint.select(result.solution.map(torch.abs))  # of full size even if remaining weights are zero
    dense = problem.initial()
    solution = problem.refit(mask) if compensate else dense.map(lambda w, m: w.where(m, 0), mask)
    return replace(result, solution=solution, objective=problem.value(solution), state=None), mask["weight"][0]
