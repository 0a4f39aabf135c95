"""Every support that a set admits, found by asking `contains` alone: what a projection is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.testing.results import Case

ALL = 12  # entries whose supports are all tried: 4096
SOME = 10  # entries tried at a time where there are more


@dataclass(frozen=True)
class Frame:
    """The form of a point; its entries in one line, in the order of its names, are a flat tensor.

    Args:
        shapes: of every tensor.
        device: where points are put; flat tensors stay on the CPU.
    """

    shapes: Mapping[str, tuple[int, ...]]
    device: str = "cpu"

    @property
    def size(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def point(self, flat: Tensor) -> Point:
        parts = flat.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return Point({name: part.reshape(shape).clone().to(self.device) for (name, shape), part in pairs})

    def flat(self, point: Point) -> Tensor:
        return torch.cat([point[name].reshape(-1) for name in self.shapes]).cpu()


@dataclass(frozen=True)
class Family:
    """The admissible supports that hold all forced entries, some of the free ones, and nothing else.

    Args:
        forced: (n,), boolean.
        free: (k,), indices.
        admissible: (count, k): one row for each support, 1 where a free entry is in it.
    """

    forced: Tensor
    free: Tensor
    admissible: Tensor

    @property
    def largest(self) -> int:
        return int(self.forced.sum()) + int(self.admissible.sum(1).max())


def families(case: Case, constraint: Constraint, frame: Frame) -> list[Family]:
    """All supports, where there are at most 12 entries; else four cuts through them, each of at most 1024 supports.

    Three cuts free ten entries (the first ones, ones far apart, random ones) and leave the others empty. One forces
    most of a largest support, built entry by entry, and frees five of its entries and five others: there the budget
    binds also in large sets.

    Raises:
        AssertionError: an admissible support loses an entry and is not admitted any more; or the empty one is not.
    """
    size = frame.size
    nothing = torch.zeros(size, dtype=torch.bool)
    if size <= ALL:
        return [_family(case, constraint, frame, nothing, torch.arange(size))]
    g = torch.Generator().manual_seed(0)
    far_apart = torch.arange(SOME) * (size // SOME)
    cuts = [torch.arange(SOME), far_apart, torch.randperm(size, generator=g)[:SOME]]
    found = [_family(case, constraint, frame, nothing, free) for free in cuts]
    full = grown(case, constraint, frame, torch.randperm(size, generator=g))
    inside, outside = (x[torch.randperm(len(x), generator=g)] for x in (full.nonzero()[:, 0], (~full).nonzero()[:, 0]))
    free = torch.cat([inside[: SOME // 2], outside[: SOME // 2]])
    return [*found, _family(case, constraint, frame, full.index_fill(0, free, False), free)]


def admits(case: Case, constraint: Constraint, frame: Frame, support: Tensor) -> bool:
    with case.doing("say of any finite point whether it contains it"):
        return bool(constraint.contains(frame.point(support.double())))


def grown(case: Case, constraint: Constraint, frame: Frame, order: Tensor) -> Tensor:
    """A support to which no entry can be added: each entry enters, in this order, if it may."""
    support = torch.zeros(frame.size, dtype=torch.bool)
    for i in order.tolist():
        support[i] = True
        if not admits(case, constraint, frame, support):
            support[i] = False
    return support


def _family(case: Case, constraint: Constraint, frame: Frame, forced: Tensor, free: Tensor) -> Family:
    codes = torch.arange(2 ** len(free))
    bits = (codes[:, None] >> torch.arange(len(free))) & 1 == 1
    admitted = torch.tensor([admits(case, constraint, frame, forced.index_put((free,), b)) for b in bits])
    case.promise(bool(admitted[0]), "contain the point of an admissible support from which entries were taken")
    for j in range(len(free)):
        smaller = admitted[codes[admitted & bits[:, j]] ^ (1 << j)]
        case.promise(
            bool(smaller.all()),
            "contain a point of an admissible support also after one of its entries has become zero",
            f"entry {int(free[j])} can not",
        )
    return Family(forced, free, bits[admitted].double())


def column_cuts(width: int, step: int) -> Iterator[list[int]]:
    """Partitions of the columns at multiples of `step`: fine, by two, in half, and uneven ones."""
    every = list(range(0, width, step))
    half = every[len(every) // 2]
    for starts in (every, every[::2], [0, half], every[:1] + every[2:], every[:1] + every[-1:]):
        yield sorted({*starts, width})
