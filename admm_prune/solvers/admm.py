"""ADMM for sparsity-constrained problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Problem, Proximable, Quadratic, SupportConstraint, require
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative, projection_in_its_metric
from admm_prune.solvers.polish import refit
from admm_prune.solvers.schedules import Constant, CubicSparsity, LogSpaced, PenaltySchedule, SupportDriven
from admm_prune.solvers.x_updates import DenseUpdate, ProximalUpdate, QuadraticUpdate


@dataclass
class State:
    """z = d + u and one bit per weight: d = mask * z is feasible, u = tau (1 - mask) * z is the scaled dual."""

    update: DenseUpdate
    z: Point
    mask: Point
    x: Point
    rho: float = 0.0
    tau: float = 0.0  # no dual before the first step
    changed: int = 0  # entries that entered the support since the penalty was last set
    kept: int = 1
    last_changes: int = 0


@dataclass(frozen=True, kw_only=True)
class ADMM(Iterative[State]):
    """min f(x) + indicator_C(d), x = d, with scaled dual u:

        x <- argmin f(x) + rho |x - (d - u)|^2,    z <- a x + (1 - a) d + u,    d <- P_C(z),    u <- z - d.

    C is a family of supports, so d and u never overlap and z with one bit per weight is the whole state. A Quadratic
    problem is solved in Jacobi-scaled coordinates (unit diagonal), any Proximable one in its own; rho is in units of
    that diagonal, of the problem's curvature otherwise. u is rescaled whenever rho changes, so that rho u is kept.

    Args:
        penalty: how rho moves.
        relaxation: a, from 1 (the textbook) to below 2. Above 1 it saves iterations, but the support only comes to rest
            under a higher final penalty: at 1.5 it cycles on real layers where 0.65 is enough on synthetic ones.
        ramp: prune gradually, along this sparsity schedule; None prunes fully from the start.
        freeze_after: iterations after which the support stays as it is; None never.
        polish: least-squares refit on the final support, where the problem is Quadratic.
        tolerance: stop when the penalty is settled, nothing changed in the support, and |x - d| / |d| is at most this.

    Raises:
        TypeError: the problem is neither Quadratic nor Proximable, or its constraint is no SupportConstraint.

    Sources: Meng et al., ALPS, 2024 (the splitting); Boza, Fast and Effective Weight Update for Pruned Large Language
    Models, 2024 (`gradual`); the log-spaced penalty, the compact state and the coordinates are ours.
    """

    penalty: PenaltySchedule = LogSpaced(0.15, 1.2, over=24, every=4)
    relaxation: float = 1.3
    ramp: CubicSparsity | None = None
    freeze_after: int | None = None
    polish: bool = True
    polish_iterations: int = 4
    tolerance: float = 1e-6
    max_iterations: int = 24

    @classmethod
    def fast(cls) -> ADMM:
        """About half the work of the default, 2 to 7 % more error on the synthetic layers of `benchmarks`."""
        return cls(penalty=LogSpaced(0.3, 2.0, over=12, every=4), max_iterations=12, polish_iterations=2)

    @classmethod
    def best(cls) -> ADMM:
        """Some three times the work of the default, about 1 % less error on the same layers."""
        penalty = LogSpaced(0.1, 1.0, over=60, every=5)
        return cls(penalty=penalty, relaxation=1.0, max_iterations=60, polish_iterations=10)

    @classmethod
    def alps(cls) -> ADMM:
        """The controller as published; its damping, 0.01 mean(diag H), belongs to the problem."""
        return cls(penalty=SupportDriven(), relaxation=1.0, max_iterations=300, polish_iterations=10, tolerance=3e-4)

    @classmethod
    def gradual(cls) -> ADMM:
        """As published, with the schedule that its released code computes but does not use."""
        return cls(
            penalty=Constant(1.0),
            relaxation=1.0,
            ramp=CubicSparsity(15),
            freeze_after=15,
            max_iterations=20,
            polish=False,
        )

    def check(self, problem: Problem) -> None:
        if not isinstance(problem, Quadratic):
            require(
                self, problem, Proximable, "its x-step minimizes value plus a square; a Quadratic problem serves too"
            )
        if not isinstance(problem.constraint, SupportConstraint):
            raise TypeError(
                f"ADMM needs a SupportConstraint (it keeps z and one bit per weight); "
                f"{type(problem.constraint).__name__} of {type(problem).__name__} lacks select"
            )

    def init(self, problem: Quadratic | Proximable, start: Point | None) -> State:
        update = QuadraticUpdate(problem) if isinstance(problem, Quadratic) else ProximalUpdate(problem)
        z = (update.origin() if start is None else update.scaled(start)).clone()
        mask = self._select(problem, z.map(torch.abs), 0)
        return State(update, z, mask, x=z)

    def step(self, problem: Quadratic | Proximable, state: State, iteration: int) -> None:
        s = state
        if iteration % self.penalty.every == 0:
            rho = self.penalty.rho(iteration, s.rho, s.changed / max(1, s.kept))
            if rho != s.rho:
                s.tau *= s.rho / rho
                s.rho = rho
                s.x = Point()  # frees its memory for the factorization
                s.update.prepare(rho)
            s.changed = 0
        tau = s.tau
        target = s.z.map(lambda z, kept: _either(kept, 1.0, -tau, z.dtype).mul_(z), s.mask)  # d - u
        s.x = s.update.minimize(target)
        s.z.map(lambda z, kept, x: _ascend(z, kept, x, tau, self.relaxation), s.mask, s.x)
        if self.freeze_after is None or iteration < self.freeze_after:
            target.map(lambda out, z: torch.abs(z, out=out), s.z)
            mask = self._select(problem, target, iteration)
            s.last_changes = sum(int(torch.count_nonzero(mask[name] & ~before)) for name, before in s.mask.items())
            s.changed += s.last_changes
            s.mask = mask
            s.kept = mask.count_nonzero()
        else:
            s.last_changes = 0
        s.tau = 1.0

    def measure(self, state: State, iteration: int) -> Progress:
        d = state.z * state.mask
        size = _norm(d) or 1.0
        return Progress(
            iteration=iteration,
            primal_residual=_norm(d.add_(state.x, -1.0)) / size,
            rho=state.rho,
            support_changes=state.last_changes,
        )

    def converged(self, progress: Progress) -> bool:
        ramp_done = self.ramp is None or progress.iteration >= self.ramp.over
        residual = progress.primal_residual
        return ramp_done and progress.support_changes == 0 and residual is not None and residual <= self.tolerance

    def solution(self, problem: Quadratic | Proximable, state: State) -> Point:
        d = state.z.map(lambda z, kept: z.where(kept, 0), state.mask)
        if self.ramp is not None:  # along the ramp d is less sparse than asked
            d = problem.constraint.project(d)
        return state.update.unscaled(d)

    def projected_start(self, problem: Quadratic | Proximable, start: Point | None) -> Point:
        """The projection in the metric of the solver's coordinates: diag(A), where the problem is Quadratic."""
        if not isinstance(problem, Quadratic):
            return super().projected_start(problem, start)
        return projection_in_its_metric(problem, start)

    def finish(self, problem: Quadratic | Proximable, state: State, point: Point) -> Point:
        if not self.polish or not isinstance(state.update, QuadraticUpdate):
            return point
        update = state.update
        refitted, _ = refit(
            update.scaled_hessian(),
            update.origin()["weight"],
            update.scaled(point)["weight"],
            tolerance=1e-5,
            max_iterations=self.polish_iterations,
        )
        return update.unscaled(Point(weight=refitted))

    def _select(self, problem: Problem, score: Point, iteration: int) -> Point:
        constraint = problem.constraint
        assert isinstance(constraint, SupportConstraint)
        if self.ramp is not None and iteration + 1 < self.ramp.over:
            constraint = constraint.tightened(self.ramp.fraction(iteration))
        return constraint.select(score)


def _norm(x: Point) -> float:
    """|x| in the tensors' own precision: a residual is read to two digits, and every iteration pays for it."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in x.values()))


def _ascend(z: Tensor, kept: Tensor, x: Tensor, tau: float, relaxation: float) -> Tensor:
    """z <- a x + (1 - a) d + u with d = mask z and u = tau (1 - mask) z, in place."""
    return z.mul_(_either(kept, 1 - relaxation, tau, z.dtype)).add_(x, alpha=relaxation)


def _either(mask: Tensor, inside: float, outside: float, dtype: torch.dtype) -> Tensor:
    """`inside` where the mask is True, `outside` elsewhere; several times faster than torch.where on the CPU."""
    return mask.to(dtype).mul_(inside - outside).add_(outside)
