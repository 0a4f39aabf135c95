"""ADMM on samples of a loss: `SparseAdam` as a solver of any `Stochastic` problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from admm_prune.errors import check_at_least, check_fractions
from admm_prune.point import Point
from admm_prune.problem import Problem, Stochastic, SupportConstraint, checked_constraint, require
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative
from admm_prune.solvers.elsa.anchors import AnchorFormat
from admm_prune.solvers.elsa.moments import MomentFormat
from admm_prune.solvers.elsa.settings import Penalty, Score
from admm_prune.solvers.schedules import warm_up_then_linear
from admm_prune.solvers.sparse_adam import SparseAdam

_SCORE = Score(fisher="clean", power=0.25)
# A penalty that increases over several orders of magnitude was best on quadratics with a known optimum.
_PENALTY = Penalty(value=10.0, shape="exponential", start=1e-3, units="absolute")


@dataclass
class _Training:
    """The weights, their optimizer, and the learning rate schedule."""

    weights: dict[str, nn.Parameter]
    optimizer: SparseAdam
    rates: LambdaLR

    def point(self) -> Point:
        return Point({name: weight.detach() for name, weight in self.weights.items()})


@dataclass(frozen=True, kw_only=True)
class StochasticADMM(Iterative[_Training]):
    """min f(x) with x = z, z in C, from samples of f's gradient; an iteration is one step of Adam on one sample.

        x <- Adam's step on a sample of f(x) + (rho / 2) |x - z + u|^2,
        and every `interval` steps:   z <- P(x + u),   u <- u + x - z.

    The feasible point of an iteration is x on the current support. If the problem is validated on other samples than
    it is trained on (`SurrogateFree`), `objective_every` returns the best such point by validation loss.

    Args:
        total_steps: the length of the schedules of rate, penalty and freeze; a smaller `max_iterations` runs a part.
        lr: Adam's, with a short warm-up and linear decay, in units of the root mean square of the initial weights: at
            0.05 a step moves each weight by at most a twentieth of that.
        penalty: its value in units of twice the problem's curvature, the mean diagonal of the Hessian.
        score: selects the support, as in `SparseAdam`.
        interval: steps between dual updates.
        freeze: the fraction of the run, at its end, with a frozen support.
        anchor: how z and u are stored: see `Anchors`.
        moments: how Adam's moments are stored: see `Moments`.
        tolerance: stop where, after a dual update, |x - z| / |z| and |z - z_before| / |z| are both below it; 0 never.
        seed: of stochastic rounding.
    """

    max_iterations: int = 1000
    total_steps: int = 1000
    lr: float = 0.05
    penalty: Penalty = _PENALTY
    score: Score = _SCORE
    interval: int = 8
    freeze: float = 0.25
    anchor: AnchorFormat = "full"
    moments: MomentFormat = "full"
    tolerance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, total_steps=1, lr=0, interval=1, tolerance=0, seed=0)
        check_fractions(self, "freeze")

    def check(self, problem: Problem) -> None:
        require(self, problem, Stochastic, "its steps follow gradients of samples")
        checked_constraint(self, problem, SupportConstraint, "its supports are those of the largest scores")

    def init(self, problem: Any, start: Point | None) -> _Training:
        x = problem.initial() if start is None else start
        scale = problem.initial().norm() / x.numel() ** 0.5 or 1.0
        weights = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in x.items()}
        optimizer = SparseAdam(
            [{"params": list(weights.items()), "constraint": problem.constraint}],
            lr=self.lr * scale,
            clip=None,
            penalty=replace(self.penalty, value=2.0 * problem.curvature * self.penalty.value, units="absolute"),
            score=self.score,
            interval=self.interval,
            total_steps=self.total_steps,
            freeze=self.freeze,
            anchor=self.anchor,
            moments=self.moments,
            seed=self.seed,
        )
        return _Training(weights, optimizer, LambdaLR(optimizer, warm_up_then_linear(self.total_steps)))

    def step(self, problem: Any, state: _Training, iteration: int) -> None:
        _, gradient = problem.sample_gradient(state.point(), iteration)
        for name, weight in state.weights.items():
            weight.grad = gradient[name]
        state.optimizer.step()
        state.rates.step()

    def measure(self, state: _Training, iteration: int) -> Progress:
        """The residuals of a dual update, in the iterations that end with one."""
        history = state.optimizer.history
        if not history or history[-1].step != state.optimizer.steps_done:
            return Progress(iteration)
        update = history[-1]
        return Progress(
            iteration,
            primal_residual=update.residual_of_solution,
            dual_residual=update.dual_residual,
            rho=update.rho,
            support_changes=update.support_changes,
        )

    def converged(self, progress: Progress) -> bool:
        primal, dual = progress.primal_residual, progress.dual_residual
        return primal is not None and dual is not None and max(primal, dual) < self.tolerance

    @torch.no_grad()
    def solution(self, problem: Any, state: _Training) -> Point:
        with state.optimizer.projected():
            return state.point().clone()

    def notes(self, state: _Training) -> tuple[str, ...]:
        return state.optimizer.notes
