"""Descent on a support: Adam on sampled gradients, all weights at once, zeros stay zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from admm_prune.point import Point
from admm_prune.problem import Problem, Stochastic, SupportConstraint, require
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative


@dataclass
class State:
    """The point, its support and Adam's moments."""

    x: Point
    mask: Point
    optimizer: torch.optim.Adam
    scale: list[float]  # of each tensor: what its learning rate is in units of
    loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SupportDescent(Iterative[State]):
    """x <- x - rate * rms(x_i) * Adam(mask * sampled gradient), for every tensor x_i; the support of the start stays.

    Neither exact nor limited to one block: it follows the problem's own loss through all of its tensors together.

    Args:
        rate: relative to the root mean square of a tensor's kept entries; rises over `warm_up` steps, then falls
            linearly to zero at step `over`.
        betas: of Adam.

    Raises:
        TypeError: the problem is not Stochastic, or its constraint no SupportConstraint.

    Source: Kingma and Ba, Adam, 2015.
    """

    rate: float = 0.05
    warm_up: int = 5
    over: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    max_iterations: int = 200

    def check(self, problem: Problem) -> None:
        require(self, problem, Stochastic, "it follows sampled gradients")
        if not isinstance(problem.constraint, SupportConstraint):
            raise TypeError(
                f"SupportDescent needs a SupportConstraint, which it cannot leave on a support of it; "
                f"{type(problem.constraint).__name__} of {type(problem).__name__} lacks select"
            )

    def init(self, problem: Stochastic, start: Point | None) -> State:
        x = self.projected_start(problem, start).clone()
        mask = problem.constraint.select(x.map(torch.abs))  # type: ignore[attr-defined]  # as checked
        scale = [float(part.square().sum() / max(1, int(kept.sum()))) ** 0.5 for part, kept in _pairs(x, mask)]
        parameters = [{"params": [part], "lr": 0.0} for part in x.values()]
        return State(x, mask, torch.optim.Adam(parameters, betas=self.betas), scale)

    def step(self, problem: Stochastic, state: State, iteration: int) -> None:
        state.loss, gradient = problem.sample_gradient(state.x, iteration)
        rate = self.rate * min(1.0, (iteration + 1) / self.warm_up) * max(0.0, 1.0 - iteration / self.over)
        for group, scale, part, (slope, kept) in zip(
            state.optimizer.param_groups, state.scale, state.x.values(), _pairs(gradient, state.mask), strict=True
        ):
            group["lr"] = rate * scale
            part.grad = slope.mul_(kept)
        state.optimizer.step()
        for part in state.x.values():
            part.grad = None

    def measure(self, state: State, iteration: int) -> Progress:
        return Progress(iteration=iteration)

    def converged(self, progress: Progress) -> bool:
        return False

    def solution(self, problem: Stochastic, state: State) -> Point:
        return state.x.map(lambda part, kept: part.where(kept, 0), state.mask)


def _pairs(x: Point, mask: Point) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x[name], mask[name]) for name in x]
