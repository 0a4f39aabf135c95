"""Adam on sampled gradients, restricted to a fixed support."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from admm_prune.errors import check_at_least, check_positive
from admm_prune.point import Point
from admm_prune.problem import Problem, Stochastic, SupportConstraint, checked_constraint, require
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative

_TINY = 1e-12  # makes 0 / 0 off the support 0; relative to the largest entry of the first gradient


@dataclass
class DescentState:
    """The point, its support and Adam's moments, which vanish off it."""

    x: Point
    mask: Point
    first: Point
    second: Point
    scale: dict[str, float]  # the unit of each tensor's learning rate
    unit: float = 0.0  # the power of two that brings the first gradient to about 1; 0 before one that is not zero


@dataclass(frozen=True, kw_only=True)
class SupportDescent(Iterative[DescentState]):
    """x_i <- x_i - rate * rms(x_i) * Adam(mask * sampled gradient) for every tensor x_i, on the support of the start.

    Neither exact nor limited to one block: it follows the problem's own loss through all of its tensors together.

    Args:
        rate: relative to the root mean square of a tensor's kept entries; rises over `warm_up` steps, then falls
            linearly to zero at step `over`.
        betas: of Adam.

    Raises:
        UserError: a schedule of no step.
        TypeError: the problem is not Stochastic, or its constraint no SupportConstraint.

    Source: Kingma and Ba, Adam, 2015.
    """

    rate: float = 0.03
    warm_up: int = 5
    over: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    max_iterations: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rate")
        check_at_least(self, warm_up=1, over=1)

    @classmethod
    def of(cls, steps: int) -> SupportDescent:
        """The schedule over so many steps."""
        return cls(over=steps, max_iterations=steps)

    def check(self, problem: Problem) -> None:
        require(self, problem, Stochastic, "it follows sampled gradients")
        checked_constraint(self, problem, SupportConstraint, "it preserves a support")

    def init(self, problem: Stochastic, start: Point | None) -> DescentState:
        x = self.projected_start(problem, start).clone()
        mask = problem.constraint.select(x.map(Tensor.abs))  # type: ignore[attr-defined]  # as checked
        sizes = {name: max(1, int(entries.sum())) for name, entries in mask.items()}
        scale = {name: float((part.square().sum() / sizes[name]).sqrt()) for name, part in x.items()}  # rms
        return DescentState(x, mask, x.zeros_like(), x.zeros_like(), scale)

    def step(self, problem: Stochastic, state: DescentState, iteration: int) -> None:
        _, gradient = problem.sample_gradient(state.x, iteration)
        gradient.mul_(state.mask)
        if state.unit == 0.0:
            largest = max(float(part.abs().max()) for part in gradient.values() if part.numel())
            state.unit = math.ldexp(1.0, -math.frexp(largest)[1]) if largest else 0.0
        gradient.mul_(state.unit)
        rate = self.rate * min(1.0, (iteration + 1) / self.warm_up) * max(0.0, 1.0 - iteration / self.over)
        b1, b2 = self.betas
        rate /= 1 - b1 ** (iteration + 1)
        unbiased = (1 - b2 ** (iteration + 1)) ** 0.5
        for name, part in state.x.items():
            slope, first, second = gradient[name], state.first[name], state.second[name]
            first.lerp_(slope, 1 - b1)
            second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
            part.addcdiv_(first, second.sqrt().div_(unbiased).add_(_TINY), value=-rate * state.scale[name])

    def measure(self, state: DescentState, iteration: int) -> Progress:
        return Progress(iteration=iteration)

    def converged(self, progress: Progress) -> bool:
        return False

    def solution(self, problem: Stochastic, state: DescentState) -> Point:
        return state.x.map(lambda part, mask: part.where(mask, 0), state.mask)
