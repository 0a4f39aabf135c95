"""Multi-process runs: distribution of work, and collective communication.

A single process is a world of size 1 without communication, so that callers need no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from admm_prune.errors import UserError, WriteError

T = TypeVar("T")

LOST = "another process of this run ended or cannot be reached"


class LostProcessError(UserError):
    """Another process has exited: this one cannot continue."""


@dataclass(frozen=True)
class World:
    """All processes of the run; the first one writes files and reports."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The processes of torch's default group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def partition(self, items: Sequence[T]) -> list[T]:
        """This process's share of some items; the shares are disjoint, and their sizes differ by at most one."""
        return list(items[self.rank :: self.size])

    def assigned(self, costs: Sequence[float]) -> list[int]:
        """Assigns pieces of work to processes by cost: the most expensive first, each to the least loaded process."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += costs[i]
        return owners

    def divided(
        self,
        costs: Sequence[float],
        work: Callable[[list[int]], Iterable[T]],
        changed: Callable[[int], Iterable[Tensor]] = lambda _: (),
    ) -> list[T]:
        """The results, in all processes, of pieces of work each of which is done by one process.

        Args:
            work: does some pieces, given by their numbers, in order.
            changed: the tensors that it changes in place: they become the same everywhere.
        """
        owners = self.assigned(costs)
        numbers = [i for i, owner in enumerate(owners) if owner == self.rank]
        mine = dict(zip(numbers, work(numbers), strict=True))
        for i, owner in enumerate(owners if self.size > 1 else ()):
            for values in changed(i):
                values.copy_(self.broadcast(values.contiguous(), owner))
        done = {i: result for those in self.all_gather(mine) for i, result in those.items()}
        return [done[i] for i in range(len(costs))]

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            with communicating():
                dist.all_reduce(values)
        return values

    def broadcast(self, values: Tensor, owner: int) -> Tensor:
        """Broadcasts `values` from the process `owner`, in place."""
        if self.size > 1:
            with communicating():
                dist.broadcast(values, owner)
        return values

    def all_gather(self, value: T) -> list[T]:
        """Gathers the values of all processes."""
        everywhere: list[Any] = [value] * self.size
        if self.size > 1:
            with communicating():
                dist.all_gather_object(everywhere, value)
        return everywhere

    def in_all(self, work: Callable[[], None]) -> None:
        """Does something in every process; the UserError of one is raised in all of them."""
        failure = None
        try:
            work()
        except UserError as error:
            failure = _plain(error)
        failures = [one for one in self.all_gather(failure) if one is not None]
        if failures:
            raise failures[0]

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
        """The result of the first process in all processes, or its UserError."""
        if self.size == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = compute()
            except UserError as error:
                answer[1] = _plain(error)
        with communicating():
            dist.broadcast_object_list(answer, 0)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result


ALONE = World()


def _plain(error: UserError) -> UserError:
    """An error as it is sent to other processes."""
    kind = WriteError if isinstance(error, WriteError) else UserError
    return kind(str(error))


@contextmanager
def communicating() -> Generator[None]:
    """Within it torch's errors of communication are `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:  # gloo's, and the base of NCCL's
        raise LostProcessError(LOST) from error
