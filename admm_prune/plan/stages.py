"""The stages of a run: what is in memory at the peak of each, by part, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from admm_prune.plan.counting import Counting, Work

LIBRARIES = "interpreter and libraries"  # always on the host


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run.

    Attributes:
        parts: bytes in memory at its peak, by what they are for.
        work: of all the times that it happens.
    """

    name: str
    parts: Mapping[str, int]
    work: Work = field(default_factory=Work)

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    def beside(self, parts: Mapping[str, int]) -> Stage:
        """With more in memory at the same time."""
        return replace(self, parts={**parts, **self.parts})

    def times(self, count: float) -> Stage:
        """Happening so many times, one after the other."""
        return replace(self, work=self.work * count)


@dataclass
class Stretch:
    """What a piece of code was counted to take: bytes made at most, bytes left behind, operations."""

    peak: int = 0
    left: int = 0
    work: Work = field(default_factory=Work)


@contextmanager
def stretch(counting: Counting) -> Generator[Stretch]:
    """Counts what is done within, over what was there before."""
    before, found = counting.live, Stretch()
    counting.rest()
    yield found
    found.peak, found.left, found.work = counting.peak - before, counting.live - before, counting.work


def by_name(stages: list[Stage], merge: Callable[[str], str] = str) -> dict[str, Work]:
    """The work of all stages of one name together."""
    found: dict[str, Work] = {}
    for stage in stages:
        name = merge(stage.name)
        found[name] = found.get(name, Work()) + stage.work
    return found
