"""The protocols between problems and solvers. A solver requires the narrowest protocol that is sufficient."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor

from admm_prune.point import Point

if TYPE_CHECKING:
    from typing_extensions import TypeIs

CapabilityT = TypeVar("CapabilityT")


@runtime_checkable
class Constraint(Protocol):
    """A closed set C with an exact projection; almost never convex."""

    def project(self, v: Point, metric: Point | None = None) -> Point:
        """argmin_{z in C} sum_i metric_i (z_i - v_i)^2, with metric_i > 0 (1 by default)."""
        ...

    def contains(self, z: Point) -> bool: ...


@runtime_checkable
class SupportConstraint(Constraint, Protocol):
    """C = {z : supp(z) in a family of supports}. Scaling an entry by a positive number never leaves C."""

    def select(self, score: Point) -> Point:
        """The admissible support of the largest total squared score, as booleans.

        Scores are not negative. The support has the full size that C admits, also where scores are zero.
        """
        ...

    @property
    def group_width(self) -> int:
        """The number of consecutive columns whose selection depends on each other: M of N:M, else 1."""
        ...

    def column_slice(self, start: int, stop: int, shape: tuple[int, int]) -> SupportConstraint:
        """The constraint on the columns start..stop of a matrix of this shape; the budgets of a partition add up."""
        ...

    def scaled_to(self, fraction: float) -> Self:
        """The set of the same kind that prunes only `fraction` of what this one prunes."""
        ...


@runtime_checkable
class BatchedConstraint(SupportConstraint, Protocol):
    def select_each(self, score: Tensor) -> Tensor:
        """`select` for several matrices (matrices, out, in), each under the whole constraint."""
        ...


@runtime_checkable
class RunConstraint(SupportConstraint, Protocol):
    def runs(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """(k, r) where `select` keeps the k largest of every r consecutive entries of a matrix, row-major, and of equal
        ones the first; None where it does something else for this shape."""
        ...


@runtime_checkable
class GroupConstraint(SupportConstraint, Protocol):
    """C = {V : at most budget(in) groups of `width` consecutive columns of V (out, in) hold a non-zero}."""

    @property
    def width(self) -> int: ...

    def budget(self, columns: int) -> int:
        """The number of groups that a matrix with `columns` columns may keep."""
        ...


@runtime_checkable
class Problem(Protocol):
    """minimize value(x) subject to x in constraint."""

    @property
    def constraint(self) -> Constraint: ...

    @property
    def curvature(self) -> float:
        """The unit of rho: half the mean diagonal of the Hessian of value; mean(diag A) of a Quadratic problem."""
        ...

    def initial(self) -> Point:
        """The dense weights."""
        ...

    def value(self, x: Point) -> float: ...


@runtime_checkable
class Quadratic(Problem, Protocol):
    """f(V) = tr(V A V^T) - 2 tr(V G^T) + c: one matrix V (out, in) whose rows share one Hessian.

    A point of such a problem holds one tensor, named "weight".
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
        """G A^-1 (out, in), the minimum of f without the constraint."""
        ...


@runtime_checkable
class Fitted(Quadratic, Protocol):
    """A Quadratic problem whose minimizer comes from a solve, and differs from G A^-1 by rounding."""

    def minimizer_residual(self) -> tuple[Tensor, Tensor, float] | None:
        """In float64: (minimizer A - G (out, in), the magnitudes that it adds up (out, in), those of the value at the
        minimizer); None where the minimizer is exact."""
        ...


@runtime_checkable
class Proximable(Problem, Protocol):
    def prox(self, v: Point, rho: float) -> Point:
        """argmin_x value(x) + rho * curvature * |x - v|^2."""
        ...


@runtime_checkable
class Differentiable(Problem, Protocol):
    def value_and_gradient(self, x: Point) -> tuple[float, Point]: ...


@runtime_checkable
class Stochastic(Problem, Protocol):
    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """Loss and gradient on the sample numbered `draw`; the same number is the same sample."""
        ...


@runtime_checkable
class Blockwise(Problem, Protocol):
    @property
    def order(self) -> tuple[str, ...]: ...

    def block(self, name: str, x: Point) -> Problem:
        """The problem in block `name` alone, with all other blocks fixed at x."""
        ...


@runtime_checkable
class Minimizable(Problem, Protocol):
    def minimize(self) -> Point:
        """argmin of value over the constraint, directly."""
        ...


@runtime_checkable
class Coordinated(Blockwise, Protocol):
    """Blocks whose points may have other names than the whole's, and a validation loss of the whole."""

    def part(self, x: Point, name: str) -> Point:
        """x as a point of its block `name`."""
        ...

    def joined(self, x: Point, name: str, block: Problem, solution: Point) -> Point:
        """x with the solution of its block `name` in place."""
        ...

    def validation_loss(self, x: Point) -> float:
        """The validation loss of the whole, on held-out data if there are any."""
        ...


@runtime_checkable
class Safeguarded(Coordinated, Protocol):
    """Blocks solved through a model of the whole, whose solution is checked against the whole itself."""

    def safeguarded(self, before: Point, after: Point, name: str) -> Point:
        """The better of two feasible points that differ in block `name`, the second improved on its support.

        It is never worse than `before`, where that is in the constraint.
        """
        ...


@runtime_checkable
class Refittable(Problem, Protocol):
    def refit(self, mask: Point) -> Point:
        """The exact minimum of value over the points that vanish wherever mask is False."""
        ...


def fits(problem: object, capability: type[CapabilityT]) -> TypeIs[CapabilityT]:
    """Whether the problem has all members of a capability; one that is None is none.

    They are looked up, not read: up to Python 3.11 `isinstance` reads each property, and `linear` costs a product.
    """
    return not _missing(problem, capability)


def require(solver: object, problem: object, capability: type, why: str) -> None:
    """Refuses a pair that does not fit.

    Raises:
        TypeError: `problem` lacks members of `capability`; the message names both sides and each missing member.
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
        TypeError: it is of another kind; the message names both sides and each missing member.
    """
    constraint = problem.constraint
    if isinstance(constraint, kind):
        return constraint
    raise TypeError(
        f"{type(solver).__name__} needs a {kind.__name__} ({why}); {type(constraint).__name__} of "
        f"{type(problem).__name__} lacks {', '.join(_missing(constraint, kind))}"
    )


def _missing(thing: object, capability: type) -> list[str]:
    """The public members of a protocol that a thing lacks, or has as None."""
    kinds = (kind for kind in capability.__mro__ if kind not in (object, Protocol, Generic))
    members = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    missing = {name for name in members if inspect.getattr_static(thing, name, None) is None}
    if missing and hasattr(type(thing), "__getattr__"):  # it may pass them on from another object
        missing = {name for name in missing if getattr(thing, name, None) is None}
    return sorted(missing)
