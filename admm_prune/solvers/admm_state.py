"""The state of a solve by ADMM, of one problem or of several that are stepped together, and how steps are executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from admm_prune.ops import backend
from admm_prune.ops.backend import Replayed
from admm_prune.point import Point
from admm_prune.problem import BatchedConstraint, Problem
from admm_prune.result import Progress
from admm_prune.solvers.x_updates import DenseUpdate, QuadraticUpdate


@dataclass
class ADMMState:
    """z = d + u and one bit per weight: d = mask * z is feasible, u = tau (1 - mask) * z is the scaled dual."""

    update: DenseUpdate
    z: Point  # empty while it is part of a batch, like the mask
    mask: Point
    d: Point = field(default_factory=Point)  # mask * z during a solve; empty between solves
    x: Point = field(default_factory=Point)  # likewise
    rho: float = 0.0
    tau: float = 0.0  # no dual before the first step
    changed: int = 0  # entries that entered the support since the penalty was last set
    support_size: int = 1
    unread: list[Measured] = field(default_factory=list)
    problems: int = 1  # number of stacked problems
    batch: Batch | None = None  # the batch in which it is stepped
    replayed: tuple[object, Replayed[list[list[Tensor]]]] | None = None  # the replayed steps, and what identifies them
    stored_tau: Tensor | None = None  # tau where recorded steps read it
    ahead: list[list[Tensor]] = field(default_factory=list)  # measures of steps that were taken with an earlier one
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(iter((self if self.batch is None else self.batch.whole).z.values())).device

    def views(self) -> tuple[Point, Point]:
        """z and the mask, which the next step changes."""
        return (self.z, self.mask) if self.batch is None else self.batch.views(self)

    def leave(self) -> None:
        """Copies its tensors out of the batch, if it is in one."""
        if self.batch is not None:
            self.batch.part()

    def release(self) -> None:
        """Frees all memory that a step would allocate again."""
        self.leave()
        self.x, self.d, self.replayed, self.stored_tau = Point(), Point(), None, None
        self.update.release()

    def read(self) -> list[Measured]:
        """The unread measures, in one copy from the device."""
        if self.batch is not None:
            self.batch.read()
        unread, self.unread = self.unread, []
        if not unread or not backend.on_device(unread[0].numbers[0]):
            self.update.check()
            return unread
        measured = torch.stack([row for one in unread for row in one.numbers])
        flags = [flag.reshape(-1).double() for flag in self.update.unchecked()]
        numbers = torch.cat([measured.reshape(-1), *flags]).cpu()
        rows = numbers[: measured.numel()].view(measured.shape)
        self.update.check([numbers[measured.numel() :]] if flags else [])
        count = len(unread[0].numbers)
        return [replace(one, numbers=rows[i * count : (i + 1) * count].unbind()) for i, one in enumerate(unread)]

    def progress(self) -> list[Progress]:
        """The progress since it was last read; counts the changes of the support."""
        news = []
        for measured in self.read():
            entered, sizes, residuals, norms = zip(*(row.tolist() for row in measured.numbers), strict=True)
            changes = int(sum(entered))
            if measured.selected:
                self.changed += changes
                self.support_size = int(sum(sizes))
            residual = math.hypot(*residuals) / (math.hypot(*norms) or 1.0)
            news.append(
                Progress(measured.iteration, primal_residual=residual, rho=measured.rho, support_changes=changes)
            )
        return news


@dataclass(frozen=True)
class Measured:
    """The measures of a step, still on the device: for every tensor of the point, the result of `splitting.settle_`."""

    iteration: int
    rho: float
    selected: bool  # whether the support was updated
    numbers: Sequence[Tensor]


@dataclass(frozen=True)
class Stepper:
    """Carries out the steps of a state: its buffers, its factors, and the replay of recorded steps.

    Args:
        graphs: steps are recorded and replayed where a device supports it, so that all tensors stay at their places.
    """

    state: ADMMState
    graphs: bool

    def set_penalty(self, rho: float, *, fast: bool) -> None:
        """Sets rho, and tau such that rho u does not change; factors for it, as `DenseUpdate.prepare`."""
        s = self.state
        s.tau *= s.rho / rho
        s.rho = rho
        if not self.graphs:
            s.x, s.d = Point(), Point()  # frees their memory for the factorization
        s.update.prepare(rho, fast=fast, in_place=self.graphs)

    def tau(self) -> float | Tensor:
        """The tau of the next step; in memory, where a recording reads it anew."""
        s = self.state
        if not (self.graphs and backend.records(s.device)):
            return s.tau
        if s.stored_tau is None:
            s.stored_tau = next(iter(s.z.values())).new_empty(())
        return s.stored_tau.fill_(s.tau)

    def run(self, steps: Callable[[], list[list[Tensor]]], kind: object, *, repeats: bool) -> list[list[Tensor]]:
        """The measures of steps that are executed, or replayed.

        Args:
            steps: may change between calls only in what is in memory, `tau` included.
            kind: steps of one kind are the same operations.
            repeats: whether these steps may be recorded, and replaced by recorded ones of their kind.
        """
        s = self.state
        if not s.d:
            s.d = s.z.map(lambda z, mask: z * mask.view(torch.uint8), s.mask)
        if not s.x:
            s.x = s.z.map(torch.empty_like)
        place = s.update.place
        if not (self.graphs and repeats) or place is None:
            return steps()
        if s.replayed is None or s.replayed[0] != (kind, place) or not backend.records(s.device):  # tau is in `steps`
            s.replayed = ((kind, place), Replayed(steps, s.device))
        replayed = s.replayed[1]
        returned = replayed()
        copies = iter(torch.stack([x for one in returned for x in one]).unbind())
        measures = [[next(copies) for _ in one] for one in returned]
        if replayed.note and replayed.note not in s.notes:
            s.notes.append(replayed.note)
        return measures


@dataclass
class Batch:
    """Solves of problems of one shape that are stepped together while their penalties are equal.

    The rows of all problems are stacked in `whole`; counts and measures are kept separately.
    """

    whole: ADMMState
    members: Sequence[ADMMState]

    @classmethod
    def of(cls, problems: Sequence[Problem], states: Sequence[ADMMState]) -> Batch | None:
        """The batch of the states, which leave any other; None if they cannot be stepped together."""
        first = states[0]
        if first.batch is not None and first.batch.holds(states):
            return first.batch
        first.leave()
        alike = {(s.rho, s.tau, *((n, x.shape, x.dtype, x.device) for n, x in s.z.items())) for s in states}
        quadratic = [p for s in states if isinstance(s.update, QuadraticUpdate) for p in s.update.problems]
        constraint = problems[0].constraint
        if (
            len(alike) > 1
            or len(quadratic) < len(states)
            or not isinstance(constraint, BatchedConstraint)
            or any(problem.constraint != constraint for problem in problems)
        ):
            return None
        update = QuadraticUpdate(*quadratic)
        assert isinstance(first.update, QuadraticUpdate)
        update.continue_as(first.update)
        whole = ADMMState(
            update,
            z=Point(weight=torch.cat([s.z["weight"] for s in states])),
            mask=Point(weight=torch.cat([s.mask["weight"] for s in states])),
            rho=first.rho,
            tau=first.tau,
            problems=len(states),
        )
        batch = cls(whole, tuple(states))
        for state in states:
            state.release()
            state.z, state.mask, state.batch = Point(), Point(), batch
        return batch

    def holds(self, states: Sequence[ADMMState]) -> bool:
        """Whether its members are these and no others."""
        return len(states) == len(self.members) and all(a is b for a, b in zip(states, self.members, strict=True))

    def follow(self, *, penalty_due: bool) -> None:
        """Updates the members after a step of the whole."""
        for state in self.members:
            state.rho, state.tau = self.whole.rho, self.whole.tau
            if penalty_due:
                state.changed = 0

    def views(self, state: ADMMState) -> tuple[Point, Point]:
        """z and the mask of a member."""
        place = next(i for i, member in enumerate(self.members) if member is state)
        z, mask = (x.map(lambda t: t.chunk(len(self.members))[place]) for x in (self.whole.z, self.whole.mask))
        return z, mask

    def read(self) -> None:
        """Distributes the measures to the members."""
        for measured in self.whole.read():
            for state, numbers in zip(self.members, measured.numbers[0].unbind(), strict=True):
                state.unread.append(replace(measured, numbers=[numbers]))

    def part(self) -> None:
        """Dissolves the batch: every member continues on its own."""
        self.read()
        for state in self.members:
            z, mask = self.views(state)
            state.z, state.mask = z.clone(), mask.clone()
            state.notes += [note for note in self.whole.notes if note not in state.notes]
            assert isinstance(state.update, QuadraticUpdate)
            assert isinstance(self.whole.update, QuadraticUpdate)
            state.update.continue_as(self.whole.update)
        for state in self.members:
            state.batch = None
