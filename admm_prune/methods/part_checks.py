"""Checks of third-party solvers, objectives and constraints: common mistakes are reported in one line."""

from __future__ import annotations

import math
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.point import Point
from admm_prune.problems.constraints import SparseSet
from admm_prune.result import Result, Status
from admm_prune.solvers.base import Solver

_SLACK = 0.005  # tolerated difference between two sparsities, beyond the rounding of the set


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a stacked matrix with their own constraint.

    Attributes:
        rows: their number.
        fraction: of their entries that must be zero.
    """

    rows: int
    constraint: SparseSet
    fraction: float


def is_foreign(part: object) -> bool:
    """Whether a part, a class or an object, is defined outside this package."""
    module = getattr(part, "__module__", None) or type(part).__module__
    return module.partition(".")[0] != "admm_prune"


def title_of(part: object) -> str:
    """The name of a part's class, for messages."""
    name = getattr(part, "__qualname__", None)
    return str(name) if name is not None else type(part).__qualname__


@contextmanager
def explained_parts(**parts: object) -> Generator[None]:
    """Context that turns an exception in third-party code into a UserError that names the part. Errors with which a
    part rejects its input (ValueError, LinAlgError, OutOfMemoryError) and those of this package pass unchanged.

    Args:
        parts: by kind: `solver`, `constraint`, `problem`.

    Raises:
        UserError: a third-party part failed; the exception is its cause.
    """
    try:
        yield
    except (ValueError, LinAlgError, torch.OutOfMemoryError):  # refusals, which callers explain
        raise
    except Exception as error:
        foreign = {kind: part for kind, part in parts.items() if is_foreign(part)}
        if not foreign:
            raise
        who = ", ".join(f"the {kind} {title_of(part)}" for kind, part in foreign.items())
        raise UserError(f"{who} failed{_place_of(error)}: {_first_line(error)}") from error


@contextmanager
def suppress_refusals() -> Generator[None]:
    """Context that ends a trial without an error if a part rejects the random problem: it may accept the real ones."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, LinAlgError):
        return


def check_set(constraint: SparseSet, shape: tuple[int, int], fraction: float) -> None:
    """Tries a third-party constraint on a random matrix: its projection must be feasible and have the target sparsity.

    Args:
        shape: (out, in) of the matrix.
        fraction: of the entries that must be zero.

    Raises:
        UserError: the constraint fails, or its projection is infeasible or misses the budget.
        ValueError: the constraint does not admit matrices of this shape.
    """
    if not is_foreign(type(constraint)):
        return
    name = title_of(type(constraint))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    point = Point(weight=drawn.where(drawn != 0, 1.0))
    with explained_parts(constraint=type(constraint)):
        projected: Any = constraint.project(point)
        _check_point(f"the projection on the constraint {name}", projected, point)
        inside = constraint.contains(projected)
        slack = _slack(constraint, shape)
    if not bool(inside):
        raise UserError(f"the constraint {name} does not contain its own projection of a matrix {shape}")
    reached = projected.sparsity()
    if abs(reached - fraction) > slack:
        raise UserError(
            f"the constraint {name} breaks its budget: {fraction:.4g} of a matrix {shape} was to be zero, "
            f"{reached:.4g} of its projection is"
        )


def check_result(result: object, problem: Any, solver: object, parts: Sequence[Part]) -> None:
    """Checks the result of a solver: a finite point in the constraint, with the target sparsity.

    Args:
        parts: the rows of the problem's matrix; if there are none the constraint is not checked.

    Raises:
        UserError: a check fails; the message names the solver and the constraint.
    """
    name = title_of(solver) if isinstance(solver, type) else title_of(type(solver))
    who = f"the solver {name}"
    if not isinstance(result, Result):
        raise UserError(f"{who} returned {_kind(result)}, not an admm_prune.Result")
    _check_point(f"the solution of {who}", result.solution, problem.initial())
    status: Any = result.status
    if not isinstance(status, Status):
        raise UserError(f"the result of {who} has the status {status!r}, not an admm_prune.Status")
    objective: Any = result.objective
    if not isinstance(objective, int | float) or not math.isfinite(objective):
        raise UserError(f"the result of {who} has the objective {objective!r}, not a finite number")
    if result.bound is not None and not result.bound <= result.objective + 1e-6 * abs(result.objective):
        raise UserError(f"the result of {who} has the bound {result.bound!r} above its objective {result.objective!r}")
    weights: Sequence[Tensor] = result.solution["weight"].split([part.rows for part in parts]) if parts else ()
    for part, weight in zip(parts, weights, strict=True):
        point, constraint = Point(weight=weight), part.constraint
        with explained_parts(constraint=type(constraint)):
            inside = bool(constraint.contains(point))
            slack = _slack(constraint, (weight.shape[0], weight.shape[1]))
        if not inside:
            raise UserError(
                f"the solution of {who} is not in its set {constraint}: {point.sparsity():.4g} of it is zero, "
                f"{part.fraction:.4g} was the target"
            )
        if point.sparsity() < part.fraction - slack:
            raise UserError(
                f"{who} and the set {constraint} break the budget: {part.fraction:.4g} was to be zero, "
                f"{point.sparsity():.4g} is"
            )


@dataclass(frozen=True)
class Checked:
    """A solver that checks the results of another one, for use inside a third solver."""

    inner: Solver

    @classmethod
    def of(cls, solver: Solver) -> Solver:
        """A third-party solver with checks; our own unchanged."""
        return cls(solver) if is_foreign(type(solver)) else solver

    def solve(self, problem: Any, *, start: Point | None = None) -> Result:
        with explained_parts(solver=type(self.inner), constraint=type(problem.constraint)):
            result = self.inner.solve(problem, start=start)
        check_result(result, problem, self.inner, ())
        if not problem.constraint.contains(result.solution):
            raise UserError(
                f"the solution of the solver {title_of(type(self.inner))} is not in its set {problem.constraint}"
            )
        return result


def _check_point(what: str, point: Any, like: Point) -> None:
    """Raises UserError unless `point` has finite tensors with the names, shapes, dtypes and devices of `like`."""
    if not isinstance(point, Point):
        raise UserError(f"{what} is {_kind(point)}, not an admm_prune.Point")
    if point.keys() != like.keys():
        raise UserError(f"{what} has the tensors {sorted(point)}, not {sorted(like)}")
    for name, expected in like.items():
        tensor: Any = point[name]
        if not isinstance(tensor, Tensor):
            raise UserError(f"{what} has {_kind(tensor)} in '{name}', not a tensor")
        for attribute in ("shape", "dtype", "device"):
            has, needs = getattr(tensor, attribute), getattr(expected, attribute)
            if has != needs:
                has, needs = (tuple(x) if attribute == "shape" else x for x in (has, needs))
                raise UserError(f"{what} has the {attribute} {has} in '{name}', not {needs}")
    if not point.is_finite():
        raise UserError(f"{what} has NaN or Inf entries")


def _slack(constraint: SparseSet, shape: tuple[int, int]) -> float:
    """The tolerated difference to a sparsity: one row or one group of columns, which a set may have to keep whole."""
    return max(_SLACK, 1 / shape[0], constraint.group_width / shape[1])


def _kind(thing: object) -> str:
    return "None" if thing is None else f"a {type(thing).__name__}"


def _first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place_of(error: BaseException) -> str:
    """The location of an error in third-party code: the innermost frame outside this package and torch."""
    inside = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "contextlib.py")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(inside[:2]) and not frame.filename.endswith(inside[2]):
            return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""
