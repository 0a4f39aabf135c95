"""ADMM, the alternating direction method of multipliers, for problems with a sparsity constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from admm_prune.errors import UserError, check_at_least
from admm_prune.ops import backend, selection, splitting
from admm_prune.point import Point
from admm_prune.problem import Problem, Proximable, Quadratic, RunConstraint, SupportConstraint, fits, require
from admm_prune.result import Progress
from admm_prune.solvers.admm_state import ADMMState, Batch, Measured, Stepper
from admm_prune.solvers.base import Iterative, projection_in_its_metric
from admm_prune.solvers.refit import refit_
from admm_prune.solvers.schedules import Constant, CubicSparsity, LogSpaced, PenaltySchedule, SupportDriven
from admm_prune.solvers.x_updates import ProximalUpdate, QuadraticUpdate

_UNREAD = 16  # maximum number of iterations whose measures stay on the device


@dataclass(frozen=True, kw_only=True)
class ADMM(Iterative[ADMMState]):
    """min f(x) + indicator_C(d), x = d, with scaled dual u:

        x <- argmin f(x) + rho |x - (d - u)|_D^2,    z <- a x + (1 - a) d + u,    d <- P_C(z),    u <- z - d.

    C is determined by supports, so d and u never overlap, and z with one bit per weight is the whole state. For a
    Quadratic problem, distances and the projection are in the metric D = diag(A); for any other Proximable one D = 1,
    and rho is in units of its curvature. u is rescaled whenever rho changes, so that rho u stays the same.

    Args:
        penalty: the schedule of rho.
        relaxation: a, between 0 and 2, 1 as in textbooks. Values above 1 save iterations, but the support only becomes
            stable at a higher final penalty: with a = 1.5 it cycles on real layers at 0.65, which suffices on synthetic
            ones.
        ramp: the schedule of the sparsity, to prune gradually; None prunes to the target from the start.
        fast_until: steps at a penalty that was set before this iteration multiply in bfloat16, if the problem is in
            float32 and the machine is faster in bfloat16. Only the support depends on them; later penalties use full
            precision.
        freeze_after: the number of iterations after which the support is fixed; None never fixes it.
        refit: whether to end with a least-squares refit on the support, if the problem is Quadratic.
        refit_iterations: the maximum number of conjugate gradient iterations of the refit.
        tolerance: stop when the support has not changed and |x - d|_D / |d|_D is at most this.
        graphs: on CUDA, record all steps at one penalty as a CUDA graph, and replay it at the following penalties. This
            is faster if matrices are so small that launching kernels takes longer than running them. The numbers are
            the same; the buffers of a step and the operator stay in memory while the Hessian is factored.

    Raises:
        UserError: a setting out of range.
        TypeError: the problem is neither Quadratic nor Proximable, or its constraint is no SupportConstraint.

    Reference implementation: `textbook.admm`.

    Sources: Meng et al., ALPS, 2024 (the splitting); Boza, Fast and Effective Weight Update for Pruned Large Language
    Models, 2024 (`gradual`); the log-spaced penalty, the compact state and the metric are ours.
    """

    batched: ClassVar[bool] = True

    penalty: PenaltySchedule = LogSpaced(0.15, 1.2, over=32, every=4)
    relaxation: float = 1.3
    ramp: CubicSparsity | None = None
    fast_until: int = 29
    freeze_after: int | None = None
    refit: bool = True
    refit_iterations: int = 3
    tolerance: float = 1e-6
    graphs: bool = False
    max_iterations: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, relaxation=0, fast_until=0, freeze_after=0, refit_iterations=0, tolerance=0)
        if not 0 < self.relaxation < 2:
            raise UserError(f"relaxation of ADMM must lie between 0 and 2, not {self.relaxation}")

    @classmethod
    def fast(cls) -> ADMM:
        """Less than half the work of the default; 1 to 6 % more error on the synthetic layers of `benchmarks`."""
        penalty = LogSpaced(0.3, 1.6, over=12, every=4)
        return cls(penalty=penalty, relaxation=1.5, fast_until=12, max_iterations=12, refit_iterations=2)

    @classmethod
    def best(cls) -> ADMM:
        """About twice the work of the default; about 1 % less error on the same layers."""
        penalty = LogSpaced(0.1, 1.0, over=60, every=5)
        return cls(penalty=penalty, relaxation=1.0, fast_until=50, max_iterations=60, refit_iterations=10)

    @classmethod
    def alps(cls) -> ADMM:
        """ALPS with its published penalty controller; its damping, 0.01 mean(diag H), is a setting of the problem."""
        return cls(
            penalty=SupportDriven(),
            relaxation=1.0,
            fast_until=0,
            max_iterations=300,
            refit_iterations=10,
            tolerance=3e-4,
        )

    @classmethod
    def gradual(cls) -> ADMM:
        """Gradual ADMM as published, with the schedule that its released code computes but does not use."""
        return cls(
            penalty=Constant(1.0),
            relaxation=1.0,
            fast_until=0,
            ramp=CubicSparsity(15),
            freeze_after=15,
            max_iterations=20,
            refit=False,
        )

    def check(self, problem: Problem) -> None:
        if not fits(problem, Quadratic):
            require(
                self, problem, Proximable, "its x-step minimizes value plus a square; a Quadratic problem works too"
            )
        if not isinstance(problem.constraint, SupportConstraint):
            raise TypeError(
                f"ADMM needs a SupportConstraint (it keeps z and one bit per weight); "
                f"{type(problem.constraint).__name__} of {type(problem).__name__} lacks select"
            )

    def init(self, problem: Quadratic | Proximable, start: Point | None) -> ADMMState:
        update = QuadraticUpdate(problem) if fits(problem, Quadratic) else ProximalUpdate(problem)
        z = (update.origin() if start is None else start).map(_contiguous_copy)
        root = update.root
        score = Point({name: x.abs() if name not in root else (x * root[name]).abs_() for name, x in z.items()})
        return ADMMState(update, z, self._select(problem, score, 0))

    def step(self, problem: Quadratic | Proximable, state: ADMMState, iteration: int) -> None:
        state.leave()
        self._step(problem, state, iteration, self._rho(state, iteration))

    def step_all(self, problems: Sequence[Quadratic | Proximable], states: Sequence[ADMMState], iteration: int) -> None:
        """Steps Quadratic problems of equal shape and constraint as one stacked batch, while their penalties agree."""
        rho, *others = {self._rho(state, iteration) for state in states}
        batch = None if others else Batch.of(problems, states)
        if batch is None:
            super().step_all(problems, states, iteration)
            return
        self._step(problems[0], batch.whole, iteration, rho)
        batch.follow(penalty_due=iteration % self.penalty.every == 0)

    def _rho(self, state: ADMMState, iteration: int) -> float:
        """The penalty of a step."""
        if iteration % self.penalty.every:
            return state.rho
        return self.penalty.rho(iteration, state.rho, state.changed / max(1, state.support_size))

    def _step(self, problem: Quadratic | Proximable, s: ADMMState, iteration: int, rho: float) -> None:
        stepper = Stepper(s, self.graphs)
        # 1. rho <- rho_t,  u <- (rho_{t-1} / rho_t) u;  A + rho D is factored.
        if iteration % self.penalty.every == 0:
            s.changed = 0
        if rho != s.rho:
            stepper.set_penalty(rho, fast=iteration < self.fast_until)
        # 2. to 5., replayed from a recording if the operations are the same as before.
        if not s.ahead:
            iterations = range(iteration, iteration + self._together(s, iteration))
            tau = stepper.tau()
            taus = [tau, *(1.0 for _ in iterations[1:])]
            kind = tuple(map(self._selects, iterations))
            s.ahead = stepper.run(
                lambda: [self._update(problem, s, i, t) for i, t in zip(iterations, taus, strict=True)],
                kind,
                repeats=not self._ramps(iteration),
            )
        s.unread.append(Measured(iteration + 1, s.rho, self._selects(iteration), s.ahead.pop(0)))
        s.tau = 1.0

    def _selects(self, iteration: int) -> bool:
        """Whether the support may change in this iteration."""
        return self.freeze_after is None or iteration < self.freeze_after

    def _together(self, s: ADMMState, iteration: int) -> int:
        """The number of iterations recorded as one: all at a penalty, unless the host reads something between them."""
        every = self.penalty.every
        whole = iteration % every == 0 and iteration + every <= self.max_iterations and every <= _UNREAD
        reads = self.objective_every > 0 or self._ramps(iteration) or not backend.on_device(s.device)
        return every if self.graphs and whole and not reads and backend.records(s.device) else 1

    def _update(
        self, problem: Quadratic | Proximable, s: ADMMState, iteration: int, tau: float | Tensor
    ) -> list[Tensor]:
        """Updates x, z, the support M and d in place.

        Args:
            tau: the factor in u = tau (1 - M) z.

        Returns:
            The measures of `splitting.settle_` for each tensor of the point.
        """
        a, z, offset, root = self.relaxation, s.z, s.update.offset, s.update.root
        d = score = s.d  # one buffer, which holds d, then the target or the score, then the new d
        # 2. x <- argmin f(x) + rho |x - target|_D^2  with  target = d - u
        target = Point(  # and z <- (1 - a) d + u, the rest of step 3
            {
                name: splitting.to_target_(z[name], d[name], s.x[name], offset.get(name), tau, a, s.update.form)
                for name in z
            }
        )
        x = s.x = s.update.minimize(target, out=s.x)
        selects = self._selects(iteration)
        in_one = self._choose(problem, s, iteration) if selects else None  # 3. to 5.
        if in_one is not None:
            return [in_one]
        # 3. z <- a x + (1 - a) d + u
        for name in z:  # and score = |z sqrt(D)|
            splitting.relax_(z[name], x[name], offset.get(name), root.get(name), score[name], a)
        # 4. M <- the support of P_C(z)
        mask, before = s.mask, (s.mask if selects else Point())
        if selects:
            with selection.skip_nan_check():  # a non-finite residual reveals NaN too
                mask = self._select(problem, score, iteration, s.problems)
        # 5. d <- M z,  u <- (1 - M) z, which z and M represent
        measures = [
            splitting.settle_(z[name], mask[name], before.get(name), d[name], x[name], root.get(name)) for name in z
        ]
        if selects:
            s.mask = s.mask.copy_(mask) if self.graphs else mask  # a recording has fixed addresses
        return measures

    def _choose(self, problem: Problem, s: ADMMState, iteration: int) -> Tensor | None:
        """Steps 3 to 5 in one launch of a kernel that selects the support within short runs of entries; None if the
        constraint or the device does not allow it."""
        name, *others = s.z
        z = s.z[name]
        if others or z.ndim != 2 or not backend.uses_triton(z, torch.float32):
            return None
        constraint = self._constraint(problem, iteration)
        if not isinstance(constraint, RunConstraint):
            return None
        runs = constraint.runs((z.shape[0] // s.problems, z.shape[1]))
        if runs is None:
            return None
        offset, root = s.update.offset.get(name), s.update.root.get(name)
        return splitting.choose_(z, s.x[name], offset, root, s.mask[name], s.d[name], runs, self.relaxation)

    def _ramps(self, iteration: int) -> bool:
        """Whether the sparsity of this iteration is not yet the final one."""
        return self.ramp is not None and iteration + 1 < self.ramp.over

    def measures(self, state: ADMMState, iteration: int) -> Sequence[Progress]:
        """Reads the measures of the steps: on the CPU after each step; on a device only when the penalty may change and
        at the end, so that the host does not wait for every step."""
        every = min(self.penalty.every, _UNREAD)
        evaluates = self.objective_every and iteration % self.objective_every == 0
        waits = iteration % every and iteration < self.max_iterations and not evaluates
        return () if waits and backend.on_device(state.device) else state.progress()

    def measure(self, state: ADMMState, iteration: int) -> Progress:
        return self.measures(state, self.max_iterations)[-1]

    def converged(self, progress: Progress) -> bool:
        ramp_done = self.ramp is None or progress.iteration >= self.ramp.over
        residual = progress.primal_residual
        return ramp_done and progress.support_changes == 0 and residual is not None and residual <= self.tolerance

    def solution(self, problem: Quadratic | Proximable, state: ADMMState) -> Point:
        z, mask = state.views()
        d = z.map(lambda x, m: x.where(m, 0), mask)
        # During the ramp d is less sparse than the target.
        return d if self.ramp is None else problem.constraint.project(d)

    def projected_start(self, problem: Quadratic | Proximable, start: Point | None) -> Point:
        """The projection in the metric of the solver: diag(A) if the problem is Quadratic."""
        if not fits(problem, Quadratic):
            return super().projected_start(problem, start)
        return projection_in_its_metric(problem, start)

    def finish(self, problem: Quadratic | Proximable, state: ADMMState, point: Point) -> Point:
        state.release()
        if self.refit and fits(problem, Quadratic):
            refit_(problem, point["weight"], tolerance=1e-5, max_iterations=self.refit_iterations)
        return point

    def notes(self, state: ADMMState) -> tuple[str, ...]:
        proximal = self.graphs and isinstance(state.update, ProximalUpdate)
        unplayed = ("steps were not replayed: a proximal operator is not recorded",) if proximal else ()
        return (*backend.note(state.device), *state.notes, *unplayed)

    def _constraint(self, problem: Problem, iteration: int) -> SupportConstraint:
        """The constraint of this iteration, which depends on the ramp."""
        constraint: Any = problem.constraint  # a SupportConstraint: `check` has seen to it
        if self.ramp is not None and self._ramps(iteration):
            constraint = constraint.scaled_to(self.ramp.fraction(iteration))
        return constraint  # type: ignore[no-any-return]

    def _select(self, problem: Problem, score: Point, iteration: int, problems: int = 1) -> Point:
        constraint: Any = self._constraint(problem, iteration)
        if problems > 1:
            return score.map(lambda s: constraint.select_each(s.view(problems, -1, s.shape[1])).flatten(0, 1))
        chosen: Point = constraint.select(score)
        return chosen


def _contiguous_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
