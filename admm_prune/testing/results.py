"""Checks for every result, their error messages, and slopes computed from values alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from admm_prune.point import Point
from admm_prune.problem import Problem, SupportConstraint
from admm_prune.result import Result, Status

_SCALES = (1e-4, 1e-2, 1.0)


def check_result(case: Case, problem: Problem, result: Result, *, fills: bool, watched: bool = False) -> None:
    """Checks that a result is feasible, reported correctly, and recorded in order.

    Args:
        fills: the solution must keep the full count, where its weights are ordinary.
        watched: a watcher may have stopped it.
    """
    case.require(isinstance(result, Result), "return a Result", f"it returned a {type(result).__name__}")
    x, constraint = result.solution, problem.constraint
    form = {name: (tuple(t.shape), str(t.dtype)) for name, t in x.items()}
    case.require(same_form(x, problem.initial()), "return a solution of the form of the dense weights", f"{form}")
    case.require(x.is_finite(), "return a finite solution")
    if isinstance(constraint, SupportConstraint):
        full = constraint.select(x.map(torch.ones_like)).count_nonzero()
        size = x.count_nonzero()
        case.require(size <= full, "keep no more weights than the constraint admits", f"{size} of {full}")
        case.require(
            constraint.contains(x), "return a point of the constraint", f"{size} of {full} weights, in the wrong places"
        )
        if fills:
            case.require(size == full, "keep as many weights as the constraint admits", f"{size} of {full}")
    else:
        case.require(constraint.contains(x), "return a point of the constraint")
    value = problem.value(x)
    case.require(
        result.objective == value,
        "report as objective exactly the value of its solution",
        f"it reports {result.objective}, problem.value says {value}",
    )
    if result.bound is not None:
        limit = result.objective + 1e-9 * abs(result.objective) + 1e-13 * abs(problem.value(x.zeros_like()))
        case.require(
            result.bound <= limit, "give a bound not above its objective", f"{result.bound} > {result.objective}"
        )
    if result.start_objective is not None:
        case.require(
            not result.objective > result.start_objective,
            "return nothing worse than its start",
            f"{result.objective} > {result.start_objective}",
        )
    case.require(isinstance(result.status, Status), "end with a Status", f"{result.status!r}")
    case.require(watched or result.status is not Status.STOPPED, "say STOPPED only where a watcher asked")
    case.require(math.isfinite(result.seconds) and result.seconds >= 0, "report its seconds", f"{result.seconds}")
    _check_history(case, result)


def _check_history(case: Case, result: Result) -> None:
    numbers = [progress.iteration for progress in result.history]
    in_order = all(a < b for a, b in zip([0, *numbers], [*numbers, result.iterations + 1], strict=True))
    case.require(in_order, "number its history from 1 to `iterations`, upwards", f"{numbers}, {result.iterations}")
    best = result.best_iteration
    case.require(0 <= best <= result.iterations, "find the best point within its iterations", f"at {best}")
    for progress in result.history:
        case.require(
            progress.objective is None or progress.objective >= result.objective,
            "return the best point that it measured",
            f"iteration {progress.iteration} had {progress.objective}, it returned {result.objective}",
        )


def named(thing: object) -> str:
    """The class of a thing, with those of its settings that are not the default ones where it is a dataclass."""
    kind = type(thing).__name__
    if not is_dataclass(thing):
        return kind
    shown = []
    for part in fields(thing):
        value = getattr(thing, part.name)
        if part.default is MISSING or value != part.default:
            inner = named(value) if is_dataclass(value) else repr(value)
            shown.append(f"{part.name}={inner}")
    return f"{kind}({', '.join(shown)})"


@dataclass(frozen=True)
class Case:
    """The class under test and the input: the beginning of every message."""

    owner: str
    input: str

    def narrow(self, more: str) -> Case:
        """The same case with more detail on its input."""
        return replace(self, input=f"{self.input}, {more}")

    def require(self, condition: bool, duty: str, detail: str = "") -> None:
        """Raises AssertionError unless kept: '`owner` on `input` must `duty`; `detail`'."""
        if not condition:
            raise AssertionError(f"{self.owner} on {self.input} must {duty}" + (f"; {detail}" if detail else ""))

    @contextmanager
    def guard(self, what: str) -> Generator[None, None, None]:
        """Turns any exception of the class under test into an AssertionError."""
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{self.owner} on {self.input} must {what}; it raised {kind}: {error}") from error


def same_bits(a: Point, b: Point) -> bool:
    """True where names, dtypes, shapes and all entries are equal."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def equal(a: Any, b: Any) -> bool:
    """True if two results of a problem are bitwise equal: points, tensors, numbers, or tuples of them."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Point) and isinstance(b, Point):
        return same_bits(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def same_form(a: Point, b: Point) -> bool:
    """True where names, shapes, dtypes and devices are equal."""
    return a.keys() == b.keys() and all(
        a[name].shape == x.shape and a[name].dtype == x.dtype and a[name].device == x.device for name, x in b.items()
    )


def shares_memory(a: Point, b: Point) -> bool:
    """True where a tensor of one point and one of the other have a storage in common."""
    theirs = {x.untyped_storage().data_ptr() for x in b.values() if x.numel()}
    return any(x.numel() and x.untyped_storage().data_ptr() in theirs for x in a.values())


@dataclass(frozen=True)
class Slope:
    """(f(x + t d) - f(x - t d)) / 2t, and what rounding may have added to it."""

    value: float
    rounding: float


def precision(point: Point) -> float:
    """eps of the coarsest dtype of a point."""
    return max(torch.finfo(x.dtype).eps for x in point.values())


def rms(point: Point) -> float:
    """The root mean square of the entries; 1 for the zero point."""
    return float(point.norm() / point.numel() ** 0.5) or 1.0


def random_like(point: Point, seed: int, scale: float = 1.0) -> Point:
    """Normal entries, in the form of a point."""
    g = torch.Generator().manual_seed(seed)
    return point.map(lambda x: (scale * torch.randn(x.shape, generator=g, dtype=torch.float64)).to(x))


def slope(value: Callable[[Point], float], x: Point, direction: Point) -> Slope:
    """The central difference along d, with t = eps^(1/3) times the size of x over the size of d."""
    eps = precision(x)
    t = eps ** (1 / 3) * max(rms(x), 1e-3) / rms(direction)
    above, below = value(x + t * direction), value(x - t * direction)
    # Entries of x +- t d are rounded too: the true difference may be off by eps |x| against a step of t |d|.
    return Slope((above - below) / (2 * t), 100 * eps * max(abs(above), abs(below)) / t)


def lower_neighbour(
    value: Callable[[Point], float], x: Point, directions: list[Point], *, smooth: bool, strength: float
) -> str | None:
    """Looks for a point near x, along some directions, where a function is lower than at x.

    Args:
        smooth: the function has a gradient: where its slope is not zero at x, a lower point is near.
        strength: the size of a slope that an error of the size of x would leave; 1.5e-7 of it (in float64) is
            tolerated.

    Returns:
        A description of the point found; None if there is none.
    """
    eps = precision(x)
    at_x = value(x)
    for d in directions:
        for scale in _SCALES:
            step = scale * rms(x) / rms(d)
            for side in (x + step * d, x - step * d):
                at_side = value(side)
                if at_side < at_x - 1000 * eps * max(abs(at_x), abs(at_side)):
                    return f"{at_side} is reached near by, {at_x} was returned"
        if smooth:
            derivative = slope(value, x, d)
            allowed = derivative.rounding + 10 * eps**0.5 * strength * float(d.norm())
            if abs(derivative.value) > allowed:
                return f"the slope along a direction is {derivative.value}, beyond rounding ({allowed})"
    return None
