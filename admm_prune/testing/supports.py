"""Exact optima by enumeration of supports, and problems with a single capability each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import (
    Blockwise,
    Constraint,
    Coordinated,
    Differentiable,
    Minimizable,
    Problem,
    Proximable,
    Quadratic,
    Refittable,
    Stochastic,
    fits,
)
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.testing.results import Case, equal, random_like, rms

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
    sparse_cuts = [_family(case, constraint, frame, nothing, free) for free in cuts]
    full = grown(case, constraint, frame, torch.randperm(size, generator=g))
    inside, outside = (x[torch.randperm(len(x), generator=g)] for x in (full.nonzero()[:, 0], (~full).nonzero()[:, 0]))
    free = torch.cat([inside[: SOME // 2], outside[: SOME // 2]])
    return [*sparse_cuts, _family(case, constraint, frame, full.index_fill(0, free, False), free)]


def admits(case: Case, constraint: Constraint, frame: Frame, support: Tensor) -> bool:
    with case.guard("say of any finite point whether it contains it"):
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
    codes, bits = torch.arange(2 ** len(free)), all_masks(len(free))
    admitted = torch.tensor([admits(case, constraint, frame, forced.index_put((free,), b)) for b in bits])
    case.require(bool(admitted[0]), "contain the point of an admissible support from which entries were taken")
    for j in range(len(free)):
        smaller = admitted[codes[admitted & bits[:, j]] ^ (1 << j)]
        case.require(
            bool(smaller.all()),
            "contain a point of an admissible support also after one of its entries has become zero",
            f"entry {int(free[j])} can not",
        )
    return Family(forced, free, bits[admitted].double())


def all_masks(count: int) -> Tensor:
    """(2^count, count): every row of `count` zeros and ones, as booleans; row i holds the bits of i."""
    return (torch.arange(2**count)[:, None] >> torch.arange(count)) & 1 == 1


def column_cuts(width: int, step: int) -> Iterator[list[int]]:
    """Partitions of the columns at multiples of `step`: fine, by two, in half, and uneven ones."""
    every = list(range(0, width, step))
    half = every[len(every) // 2]
    for starts in (every, every[::2], [0, half], every[:1] + every[2:], every[:1] + every[-1:]):
        yield sorted({*starts, width})


class Bare:
    """A minimal problem: a value and a constraint."""

    def __init__(self, inside: LayerReconstruction) -> None:
        self._inside = inside

    @property
    def constraint(self) -> Constraint:
        return self._inside.constraint

    @property
    def curvature(self) -> float:
        return self._inside.curvature

    def initial(self) -> Point:
        return self._inside.initial()

    def value(self, x: Point) -> float:
        return self._inside.value(x)


class OnlyProximable(Bare):
    def prox(self, v: Point, rho: float) -> Point:
        return self._inside.prox(v, rho)


class OnlyRefittable(Bare):
    def refit(self, mask: Point) -> Point:
        return self._inside.refit(mask)


class OnlyDifferentiable(Bare):
    def value_and_gradient(self, x: Point) -> tuple[float, Point]:
        """f(V) and 2 (V A - G)."""
        gradient = 2 * (x["weight"] @ self._inside.hessian - self._inside.linear)
        return self.value(x), Point(weight=gradient)


class OnlyStochastic(Bare):
    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """f(V + e) and its gradient, e a small random shift of the draw's own."""
        g = torch.Generator().manual_seed(draw)
        shift = x.map(lambda v: 0.01 * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v))
        return OnlyDifferentiable(self._inside).value_and_gradient(x + shift)


class OnlyBlockwise(Bare):
    """One block, which is the layer itself."""

    order = ("weight",)

    def block(self, name: str, x: Point) -> Problem:
        if name not in self.order:
            raise KeyError(f"there is no block {name}")
        return cast(Problem, self._inside)


def check_held_out(case: Case, problem: Problem, other: Problem, points: list[Point], seed: int) -> None:
    """Checks that two problems that differ in their held-out data alone differ in `validation_loss` alone.

    Initial point, curvature, values, gradients, sampled gradients, prox, refit, minimize, the tensors of a Quadratic
    problem and all of these of each block must be bitwise equal.
    """
    pairs = zip(_answers(problem, points, seed), _answers(other, points, seed), strict=True)
    for (name, ours), (_, theirs) in pairs:
        case.require(equal(ours, theirs), f"have a {name} that does not depend on held-out data")
    if fits(problem, Coordinated) and fits(other, Coordinated):
        losses = [(problem.validation_loss(x), other.validation_loss(x)) for x in points]
        case.require(
            any(ours != theirs for ours, theirs in losses),
            "use its held-out data in `validation_loss`",
            f"both give {losses[0][0]}",
        )


def _answers(problem: Problem, points: list[Point], seed: int) -> Iterator[tuple[str, Any]]:
    """Everything that a problem computes except `validation_loss`, by name."""
    yield "initial point", problem.initial()
    yield "curvature", problem.curvature
    last = points[-1]
    for x in points:
        yield "value", problem.value(x)
        if fits(problem, Differentiable):
            yield "gradient", problem.value_and_gradient(x)
    if fits(problem, Stochastic):
        for draw in (0, 1, 7):
            yield "sampled gradient", problem.sample_gradient(last, draw)
    if fits(problem, Quadratic):
        for name in ("hessian", "linear", "minimizer"):
            yield name, Point({name: getattr(problem, name)})
    if fits(problem, Proximable):
        for rho in (1e-2, 1.0, 30.0):
            yield "prox", problem.prox(last, rho)
    if fits(problem, Refittable):
        mask = random_like(last, seed).map(lambda score: score > 0)
        yield "refit", problem.refit(mask)
        yield "refit", problem.refit(mask.map(torch.ones_like))
    if fits(problem, Minimizable):
        yield "minimum", problem.minimize()
    if fits(problem, Blockwise):
        for x in points:
            for block in problem.order:
                inner = problem.block(block, x)
                start = inner.initial()
                near = start + random_like(start, seed, 0.1 * rms(start))
                for name, answer in _answers(inner, [start, near], seed):
                    yield f"{name} of block {block}", answer
