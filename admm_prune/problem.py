"""The protocols through which problems and solvers communicate. A solver requires the narrowest one that suffices."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor

from admm_prune.point import Point

if TYPE_CHECKING:
    from typing_extensions import TypeIs

CapabilityT = TypeVar("CapabilityT")


@runtime_checkable
class Constraint(Protocol):
    """A closed set C with an exact projection. Most sparse sets are not convex."""

    def project(self, v: Point, metric: Point | None = None) -> Point:
        """argmin_{z in C} sum_i metric_i (z_i - v_i)^2, with metric_i > 0 (1 by default)."""
        ...

    def contains(self, z: Point) -> bool:
        """Whether z lies in C."""
        ...


@runtime_checkable
class SupportConstraint(Constraint, Protocol):
    """C = {z : supp(z) in a family of supports}, so that scaling an entry by a positive number never leaves C."""

    def select(self, score: Point) -> Point:
        """The admissible support with the largest sum of squared scores, as booleans.

        Scores are non-negative. The support has the full size that C admits, even if it includes zero scores.
        """
        ...

    @property
    def group_width(self) -> int:
        """The number of consecutive columns that are selected jointly: M for N:M, otherwise 1."""
        ...

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> SupportConstraint:
        """The constraint on the columns start, ..., stop - 1 of a matrix of this shape. The budgets of slices that
        partition the matrix add up to its budget."""
        ...

    def scaled_to(self, fraction: float) -> Self:
        """The constraint of the same kind with `fraction` times this sparsity."""
        ...


@runtime_checkable
class BatchedConstraint(SupportConstraint, Protocol):
    def select_each(self, score: Tensor) -> Tensor:
        """`select` for a stack of matrices (matrices, out, in), each of which has the whole budget."""
        ...


@runtime_checkable
class RunConstraint(SupportConstraint, Protocol):
    def runs(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """(k, r) if `select` keeps the k largest of every r consecutive entries of a matrix of this shape, in row-major
        order, and the first of equal ones; otherwise None."""
        ...


@dataclass(frozen=True)
class Strips:
    """Consecutive rows of a matrix whose supports are made of tiles: all that keep a limited number of them.

    Attributes:
        rows: the number of rows: strips of `height` rows each.
        height: rows of a tile.
        width: columns of a tile.
        span: the number is limited in every `span` consecutive columns of each strip; None if it is in all strips
            together.
    """

    rows: int
    height: int
    width: int
    span: int | None = None


@runtime_checkable
class StripConstraint(SupportConstraint, Protocol):
    def strips(self, shape: tuple[int, int]) -> Sequence[Strips] | None:
        """The strips of a matrix of this shape, from the top, if its supports are those that `Strips` describes;
        otherwise None."""
        ...


@runtime_checkable
class GroupConstraint(SupportConstraint, Protocol):
    """C = {V : at most budget(in) groups of `width` consecutive columns of V (out, in) contain a non-zero}."""

    @property
    def width(self) -> int: ...

    def budget(self, columns: int) -> int:
        """The maximum number of groups that a matrix with this many columns may keep."""
        ...


@runtime_checkable
class Problem(Protocol):
    """minimize value(x) over x in constraint."""

    @property
    def constraint(self) -> Constraint: ...

    @property
    def curvature(self) -> float:
        """The unit of rho: half the mean diagonal of the Hessian of `value`; mean(diag A) of a Quadratic problem."""
        ...

    def initial(self) -> Point:
        """The dense weights."""
        ...

    def value(self, x: Point) -> float:
        """The objective at x."""
        ...


@runtime_checkable
class Quadratic(Problem, Protocol):
    """f(V) = tr(V A V^T) - 2 tr(V G^T) + c for one matrix V (out, in): all of its rows have the same Hessian.

    A point of such a problem has one tensor, named "weight".
    """

    @property
    def hessian(self) -> Tensor:
        """A (in, in), symmetric positive definite."""
        ...

    @property
    def linear(self) -> Tensor:
        """G (out, in)."""
        ...

    @property
    def minimizer(self) -> Tensor:
        """G A^-1 (out, in), the minimizer of f without the constraint."""
        ...


@runtime_checkable
class Fitted(Quadratic, Protocol):
    """A Quadratic problem whose minimizer is computed by a solve, and differs from G A^-1 by rounding."""

    def minimizer_residual(self) -> tuple[Tensor, Tensor, float] | None:
        """The residual of the minimizer, in float64; None if the minimizer is exact.

        Returns:
            minimizer A - G (out, in); the sum of the magnitudes of its terms (out, in); and that of the terms of the
            value at the minimizer.
        """
        ...


@runtime_checkable
class Proximable(Problem, Protocol):
    def prox(self, v: Point, rho: float) -> Point:
        """argmin_x value(x) + rho * curvature * |x - v|^2."""
        ...


@runtime_checkable
class Differentiable(Problem, Protocol):
    def value_and_gradient(self, x: Point) -> tuple[float, Point]:
        """The objective and its gradient at x."""
        ...


@runtime_checkable
class Stochastic(Problem, Protocol):
    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """The loss at x and its gradient on sample number `draw`; equal numbers give the same sample."""
        ...


@runtime_checkable
class Blockwise(Problem, Protocol):
    @property
    def order(self) -> tuple[str, ...]:
        """The names of the blocks, in the order in which they are minimized."""
        ...

    def block(self, name: str, x: Point) -> Problem:
        """The problem over block `name`, with all other blocks fixed at x."""
        ...


@runtime_checkable
class Minimizable(Problem, Protocol):
    def minimize(self) -> Point:
        """argmin of `value` over the constraint, in closed form."""
        ...


@runtime_checkable
class Coordinated(Blockwise, Protocol):
    """A problem whose blocks may have tensors of other names than the whole, and a validation loss of the whole."""

    def part(self, x: Point, name: str) -> Point:
        """The part of x that is a point of block `name`."""
        ...

    def joined(self, x: Point, name: str, block: Problem, solution: Point) -> Point:
        """x with its part for block `name` replaced by a solution of that block."""
        ...

    def validation_loss(self, x: Point) -> float:
        """The loss of the whole, on held-out data if there are any."""
        ...


@runtime_checkable
class Safeguarded(Coordinated, Protocol):
    """A problem whose blocks minimize a model of the whole objective, and are checked against the objective itself."""

    def safeguarded(self, before: Point, after: Point, name: str) -> Point:
        """The better one of `before` and `after`, which differs in block `name` and is first improved on its support.

        Never worse than `before`, if that is feasible.
        """
        ...


@runtime_checkable
class Refittable(Problem, Protocol):
    def refit(self, mask: Point) -> Point:
        """The exact minimizer of `value` over the points that are zero wherever mask is False."""
        ...


def fits(problem: object, capability: type[CapabilityT]) -> TypeIs[CapabilityT]:
    """Whether a problem has all members of a capability, one of the protocols above; one that is None counts as absent.

    Members are looked up without reading them: `isinstance` reads every property up to Python 3.11, and `linear`, for
    example, computes a matrix product.
    """
    return not _missing(problem, capability)


def require(solver: object, problem: object, capability: type, why: str) -> None:
    """Checks that a problem has the capability that a solver needs.

    Args:
        why: for the message, what the solver needs it for.

    Raises:
        TypeError: `problem` lacks members of `capability`; the message names the solver, the problem and each missing
            member.
    """
    missing = _missing(problem, capability)
    if missing:
        raise TypeError(
            f"{type(solver).__name__} needs a {capability.__name__} problem ({why}); "
            f"{type(problem).__name__} lacks {', '.join(missing)}"
        )


def checked_constraint(solver: object, problem: Problem, kind: type[CapabilityT], why: str) -> CapabilityT:
    """The constraint of a problem, which must be of the kind that a solver needs.

    Raises:
        TypeError: it is of another kind; the message names the solver, the problem and each missing member.
    """
    constraint = problem.constraint
    if isinstance(constraint, kind):
        return constraint
    raise TypeError(
        f"{type(solver).__name__} needs a {kind.__name__} ({why}); {type(constraint).__name__} of "
        f"{type(problem).__name__} lacks {', '.join(_missing(constraint, kind))}"
    )


def _missing(thing: object, capability: type) -> list[str]:
    """The public members of a protocol that an object lacks, or has as None."""
    kinds = (kind for kind in capability.__mro__ if kind not in (object, Protocol, Generic))
    members = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    missing = {name for name in members if inspect.getattr_static(thing, name, None) is None}
    if missing and hasattr(type(thing), "__getattr__"):  # it may pass them on from another object
        missing = {name for name in missing if getattr(thing, name, None) is None}
    return sorted(missing)
