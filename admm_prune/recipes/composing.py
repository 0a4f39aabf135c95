"""Recipes put together from objects: another solver, objective or sparse set in place of a method's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from admm_prune.errors import UserError
from admm_prune.problems.constraints import NofM, SparseSet
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.catalogue import recipe_named
from admm_prune.recipes.elsa import Elsa
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.local_methods import LOCAL_METHODS, Method, method_named, with_parts
from admm_prune.recipes.recipe import Recipe
from admm_prune.recipes.sparsellm import SparseLLM
from admm_prune.recipes.targets import Target
from admm_prune.solvers.base import Solver

Objective = Callable[..., LayerReconstruction]
DEFAULT = "admm"


@dataclass(frozen=True)
class Composed(Method):
    """A method with an objective or a sparse set that are given as they are.

    Attributes:
        kind: builds the layer problem, as `LayerReconstruction` does.
        shape: a sparse set like those aimed at: other targets give sets of its kind and with its other settings.
    """

    kind: Objective | None = None
    shape: SparseSet | None = None

    @property
    def objective(self) -> Objective:
        return self.kind or super().objective

    def constraint(self, target: Target) -> SparseSet:
        """The sparse set that this method aims at for a target.

        Raises:
            UserError: the set given has no such target.
        """
        if self.shape is None:
            return super().constraint(target)
        if target == target_of(self.shape):
            return self.shape
        if target.pattern is not None:
            return NofM(*target.pattern)
        return _with_sparsity(self.shape, target.fraction)


def composed(
    method: str | None,
    *,
    steps: int | None = None,
    solver: str | Solver | None = None,
    problem: str | Objective | None = None,
    constraint: str | SparseSet | type[SparseSet] | None = None,
) -> Recipe:
    """The recipe of a method, with another solver, objective or sparse set inside.

    Args:
        method: a name; None for going layer by layer with the solver, or with `admm` where there is none either.
        solver: an object, or the name of a local method, whose ridge, damping and budget come with it.
        problem: a class derived from `LayerReconstruction`, or what builds one from the same arguments; or a name.
        constraint: a set, or its class where a sparsity alone makes one; or a name.

    Raises:
        UserError: there is no such method, or it has no part of this kind.
    """
    if solver is None and problem is None and constraint is None:
        return recipe_named(method or DEFAULT, steps)
    if getattr(constraint, "keep", None) is not None:
        raise UserError(f"{constraint} counts weights, which is for one matrix: give a sparsity")
    if method is None and solver is not None:
        return Layerwise(_parts(_method_of(solver), None, problem, constraint))
    recipe = recipe_named(method or DEFAULT, steps)
    given = " and ".join(
        name
        for name, part in (("solver", solver), ("problem", problem), ("constraint", constraint))
        if part is not None
    )
    if isinstance(recipe, Layerwise):
        if solver is not None:
            raise UserError(f"{recipe.name} is a solver itself: give either a method or a solver")
        return replace(recipe, method=_parts(recipe.method, solver, problem, constraint))
    if isinstance(recipe, SparseLLM) and problem is None:
        return replace(recipe, method=_parts(recipe.method, solver, problem, constraint))
    if isinstance(recipe, Elsa) and constraint is None:
        return replace(recipe, projection=_parts(recipe.projection, solver, problem, constraint))
    raise UserError(f"{recipe.name} takes no {given}: it is for methods that go layer by layer")


def target_of(constraint: SparseSet) -> Target | None:
    """What a set asks for, where it says so; None for one that has neither a sparsity nor N of M."""
    if isinstance(constraint, NofM):
        return Target(pattern=(constraint.n, constraint.m))
    sparsity = getattr(constraint, "sparsity", None)
    return None if sparsity is None else Target(sparsity=float(sparsity))


def described(part: object) -> str | None:
    """What a manifest says of a part: its name, or the settings that it was built with; None where there is none."""
    if part is None or isinstance(part, str):
        return part
    if isinstance(part, type) or callable(part):
        return f"{part.__module__}.{getattr(part, '__qualname__', type(part).__name__)}"
    return repr(part) if is_dataclass(part) else f"{type(part).__module__}.{type(part).__qualname__}"


def _method_of(solver: str | Solver) -> Method:
    """The method of a solver: the ridge, damping and budget of ours of the same class, defaults for others."""
    if isinstance(solver, str):
        return method_named(solver)
    if isinstance(solver, type) or not callable(getattr(solver, "solve", None)):
        raise UserError(f"solver must be a name or an object with a method solve, such as ADMM(), not {solver!r}")
    kind = type(solver)
    like = next((known for known in LOCAL_METHODS.values() if type(known.make()) is kind), None)
    if like is not None:
        return replace(like, name=like.name, summary=f"{like.name} with other settings", make=lambda: solver)
    return Method(kind.__name__, (kind.__doc__ or "").strip().partition("\n")[0], lambda: solver)


def _parts(
    method: Method,
    solver: str | Solver | None,
    problem: str | Objective | None,
    constraint: str | SparseSet | type[SparseSet] | None,
) -> Method:
    if solver is not None:
        method = _method_of(solver)
    if isinstance(problem, str) or isinstance(constraint, str):
        method = with_parts(
            method,
            problem if isinstance(problem, str) else None,
            constraint if isinstance(constraint, str) else None,
        )
        problem = None if isinstance(problem, str) else problem
        constraint = None if isinstance(constraint, str) else constraint
    if problem is None and constraint is None:
        return method
    values: dict[str, Any] = {field.name: getattr(method, field.name) for field in fields(method)}
    shape = _with_sparsity(constraint, 0.5) if isinstance(constraint, type) else constraint
    return Composed(**values, kind=problem, shape=shape)


def _with_sparsity(shape: SparseSet | type[SparseSet], sparsity: float) -> SparseSet:
    given: Any = shape
    kind: Any = shape if isinstance(shape, type) else type(shape)
    try:
        made: SparseSet = kind(sparsity) if kind is given else replace(given, sparsity=sparsity)
        return made
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__} is not made from a sparsity alone ({error}): give the set itself") from error
