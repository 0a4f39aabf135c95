"""The selection of the structured groups to keep in one matrix: by structured OBS, by ADMM or by a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

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
_MASKS: Mapping[Selector, GroupMask] = {"mask": GroupMask(), "mask-interactions": GroupMask(interactions=True)}


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
    "mask": lambda: _MASKS["mask"],
    "mask-interactions": lambda: _MASKS["mask-interactions"],
}


@precision.full()
def losses(problem: GroupReconstruction, width: int, selector: Selector, compensate: bool) -> Tensor:
    """Losses when k = 0, ..., n groups are removed: (2, n + 1), float64, on the CPU.

    The first row is the curve that the allocation uses, and nondecreasing. With compensation it has the losses along
    structured OBS; without, the sums of the smallest Q_gg, which leave out the interactions of the removed groups.

    The second row is the loss of the groups that the selector removes first. With compensation it is the first row,
    which is exact for "obs" and "obs-one-shot". Without, it is sum_{g,h} Q_gh over these groups; for "admm", over those
    of its start.
    """
    hessian, minimizer = problem.hessian, problem.minimizer
    count = minimizer.shape[1] // width

    def eliminated() -> group_compensation.Elimination:
        batch = count if selector == "obs-one-shot" else _OBS.size(count)
        return group_compensation.eliminate(hessian, minimizer, width, count, batch)

    if compensate:
        curve = removed = eliminated().losses
    else:
        q = group_compensation.interactions(hessian, minimizer, width)
        order = _MASKS[selector].order(q, count) if selector in _MASKS else eliminated().order
        curve = q.diagonal().sort().values.cumsum(0)
        q = q[order][:, order]
        removed = (q.diagonal() + 2 * q.tril(-1).sum(1)).cumsum(0).clamp_min(0.0)
    return pad(torch.stack([curve, removed]), (1, 0)).cpu()


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
