"""ADMM for sparsity-constrained problems."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Problem, Proximable, Quadratic, SupportConstraint, fits, require
from admm_prune.result import Progress
from admm_prune.solvers.base import Iterative, projection_in_its_metric
from admm_prune.solvers.polish import refit_
from admm_prune.solvers.schedules import Constant, CubicSparsity, LogSpaced, PenaltySchedule, SupportDriven
from admm_prune.solvers.x_updates import DenseUpdate, ProximalUpdate, QuadraticUpdate


@dataclass
class State:
    """z = d + u and one bit per weight: d = mask * z is feasible, u = tau (1 - mask) * z is the scaled dual."""

    update: DenseUpdate
    z: Point
    mask: Point
    d: Point = field(default_factory=Point)  # mask * z during a solve; empty between solves
    x: Point = field(default_factory=Point)  # likewise
    rho: float = 0.0
    tau: float = 0.0  # no dual before the first step
    changed: int = 0  # entries that entered the support since the penalty was last set
    kept: int = 1
    last_changes: int = 0
    residual: float = 0.0  # |x - d|_D / |d|_D

    def release(self) -> None:
        """Gives up all memory that a step would make again."""
        self.x, self.d = Point(), Point()
        self.update.release()


@dataclass(frozen=True, kw_only=True)
class ADMM(Iterative[State]):
    """min f(x) + indicator_C(d), x = d, with scaled dual u:

        x <- argmin f(x) + rho |x - (d - u)|_D^2,    z <- a x + (1 - a) d + u,    d <- P_C(z),    u <- z - d.

    C is a family of supports, so d and u never overlap and z with one bit per weight is the whole state. Distances and
    the projection are taken in the metric D = diag(A) of a Quadratic problem; any Proximable one has D = 1 and rho in
    units of its curvature. u is rescaled whenever rho changes, so that rho u is kept.

    Args:
        penalty: how rho moves.
        relaxation: a, from 1 (the textbook) to below 2. Above 1 it saves iterations, but the support only comes to rest
            under a higher final penalty: at 1.5 it cycles on real layers where 0.65 is enough on synthetic ones.
        ramp: prune gradually, along this sparsity schedule; None prunes fully from the start.
        fast_until: a penalty set before this iteration has its products in bfloat16, if the problem is in float32 and
            the machine gains by it. Only the support depends on them; later penalties settle it in full precision.
        freeze_after: iterations after which the support stays as it is; None never.
        polish: least-squares refit on the final support, where the problem is Quadratic.
        tolerance: stop when nothing changed in the support and |x - d|_D / |d|_D is at most this.

    Raises:
        TypeError: the problem is neither Quadratic nor Proximable, or its constraint is no SupportConstraint.

    Sources: Meng et al., ALPS, 2024 (the splitting); Boza, Fast and Effective Weight Update for Pruned Large Language
    Models, 2024 (`gradual`); the log-spaced penalty, the compact state and the metric are ours.
    """

    penalty: PenaltySchedule = LogSpaced(0.15, 1.2, over=32, every=4)
    relaxation: float = 1.3
    ramp: CubicSparsity | None = None
    fast_until: int = 29
    freeze_after: int | None = None
    polish: bool = True
    polish_iterations: int = 3
    tolerance: float = 1e-6
    max_iterations: int = 32

    @classmethod
    def fast(cls) -> ADMM:
        """Less than half the work of the default, 1 to 6 % more error on the synthetic layers of `benchmarks`."""
        penalty = LogSpaced(0.3, 1.6, over=12, every=4)
        return cls(penalty=penalty, relaxation=1.5, fast_until=12, max_iterations=12, polish_iterations=2)

    @classmethod
    def best(cls) -> ADMM:
        """Some two times the work of the default, about 1 % less error on the same layers."""
        penalty = LogSpaced(0.1, 1.0, over=60, every=5)
        return cls(penalty=penalty, relaxation=1.0, fast_until=50, max_iterations=60, polish_iterations=10)

    @classmethod
    def alps(cls) -> ADMM:
        """The controller as published; its damping, 0.01 mean(diag H), belongs to the problem."""
        return cls(
            penalty=SupportDriven(),
            relaxation=1.0,
            fast_until=0,
            max_iterations=300,
            polish_iterations=10,
            tolerance=3e-4,
        )

    @classmethod
    def gradual(cls) -> ADMM:
        """As published, with the schedule that its released code computes but does not use."""
        return cls(
            penalty=Constant(1.0),
            relaxation=1.0,
            fast_until=0,
            ramp=CubicSparsity(15),
            freeze_after=15,
            max_iterations=20,
            polish=False,
        )

    def check(self, problem: Problem) -> None:
        if not fits(problem, Quadratic):
            require(
                self, problem, Proximable, "its x-step minimizes value plus a square; a Quadratic problem serves too"
            )
        if not isinstance(problem.constraint, SupportConstraint):
            raise TypeError(
                f"ADMM needs a SupportConstraint (it keeps z and one bit per weight); "
                f"{type(problem.constraint).__name__} of {type(problem).__name__} lacks select"
            )

    def init(self, problem: Quadratic | Proximable, start: Point | None) -> State:
        update = QuadraticUpdate(problem) if fits(problem, Quadratic) else ProximalUpdate(problem)
        z = (update.origin() if start is None else start).map(_contiguous_copy)
        score = update.weighed(z, z.map(torch.empty_like))
        return State(update, z, self._select(problem, score.map(torch.abs_), 0))

    def step(self, problem: Quadratic | Proximable, state: State, iteration: int) -> None:
        s = state
        if iteration % self.penalty.every == 0:
            rho = self.penalty.rho(iteration, s.rho, s.changed / max(1, s.kept))
            if rho != s.rho:
                s.tau *= s.rho / rho
                s.rho = rho
                s.x, s.d = Point(), Point()  # frees their memory for the factorization
                s.update.prepare(rho, fast=iteration < self.fast_until)
            s.changed = 0
        if not s.d:
            s.d = s.z.map(torch.empty_like).map(_masked, s.z, s.mask)
        if not s.x:
            s.x = s.z.map(torch.empty_like)
        # From here to the end of the step s.d holds, one after the other: d, the target d - u, the score, the new d.
        s.z.map(lambda z, d, x: _part(z, d, x, s.tau, self.relaxation), s.d, s.x)
        s.x = s.update.minimize(s.d, out=s.x)
        s.z.add_(s.x, self.relaxation)
        if self.freeze_after is None or iteration < self.freeze_after:
            mask = self._select(problem, s.update.weighed(s.z, out=s.d).map(torch.abs_), iteration)
            s.last_changes = sum(int(torch.count_nonzero(mask[name] > before)) for name, before in s.mask.items())
            s.changed += s.last_changes
            s.mask = mask
            s.kept = mask.count_nonzero()
        else:
            s.last_changes = 0
        s.d.map(_masked, s.z, s.mask)
        s.tau = 1.0
        away = _norm(s.update.weighed(s.x.add_(s.d, -1.0), out=s.x))
        s.residual = away / (_norm(s.update.weighed(s.d, out=s.x)) or 1.0)

    def measure(self, state: State, iteration: int) -> Progress:
        return Progress(
            iteration=iteration,
            primal_residual=state.residual,
            rho=state.rho,
            support_changes=state.last_changes,
        )

    def converged(self, progress: Progress) -> bool:
        ramp_done = self.ramp is None or progress.iteration >= self.ramp.over
        residual = progress.primal_residual
        return ramp_done and progress.support_changes == 0 and residual is not None and residual <= self.tolerance

    def solution(self, problem: Quadratic | Proximable, state: State) -> Point:
        d = state.z.map(lambda z, kept: z.where(kept, 0), state.mask)
        # Along the ramp d is less sparse than asked.
        return d if self.ramp is None else problem.constraint.project(d)

    def projected_start(self, problem: Quadratic | Proximable, start: Point | None) -> Point:
        """The projection in the metric of the solver's coordinates: diag(A), where the problem is Quadratic."""
        if not fits(problem, Quadratic):
            return super().projected_start(problem, start)
        return projection_in_its_metric(problem, start)

    def finish(self, problem: Quadratic | Proximable, state: State, point: Point) -> Point:
        state.release()
        if not self.polish or not fits(problem, Quadratic):
            return point
        refit_(problem, point["weight"], tolerance=1e-5, max_iterations=self.polish_iterations)
        return point

    def _select(self, problem: Problem, score: Point, iteration: int) -> Point:
        constraint = problem.constraint
        assert isinstance(constraint, SupportConstraint)
        if self.ramp is not None and iteration + 1 < self.ramp.over:
            constraint = constraint.tightened(self.ramp.fraction(iteration))
        return constraint.select(score)


def _norm(x: Point) -> float:
    """|x| in the tensors' own precision: a residual is read to two digits, and every iteration pays for it."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in x.values()))


def _part(z: Tensor, d: Tensor, scratch: Tensor, tau: float, relaxation: float) -> Tensor:
    """With u = tau (z - d): d <- d - u, the target, and z <- (1 - a) d + u, what the relaxed step adds a x to."""
    torch.mul(z, tau, out=scratch)
    torch.add(scratch, d, alpha=1.0 - relaxation - tau, out=z)
    d.mul_(1.0 + tau).sub_(scratch)
    return z


def _masked(out: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    """out <- mask * z; a product with bytes is half the time of one with booleans."""
    return torch.mul(z, mask.view(torch.uint8), out=out)


def _contiguous_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
