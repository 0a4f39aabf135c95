"""Recipes put together from objects: another solver, objective or sparse set in place of a method's own."""

from __future__ import annotations

from dataclasses import replace

from admm_prune.errors import UserError
from admm_prune.problems.constraints import SparseSet
from admm_prune.recipes.catalogue import recipe_named
from admm_prune.recipes.elsa import Elsa
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.local_methods import LOCAL_METHODS, Method, method_named, with_parts
from admm_prune.recipes.parts import Objective
from admm_prune.recipes.recipe import Recipe
from admm_prune.recipes.sparsellm import SparseLLM
from admm_prune.solvers.base import Solver

DEFAULT = "admm"


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
        return Layerwise(with_parts(_method_of(solver), problem, constraint))
    recipe = recipe_named(method or DEFAULT, steps)
    given = " and ".join(
        name
        for name, part in (("solver", solver), ("problem", problem), ("constraint", constraint))
        if part is not None
    )
    if isinstance(recipe, Layerwise):
        if solver is not None:
            raise UserError(f"{recipe.name} is a solver itself: give either a method or a solver")
        return replace(recipe, method=with_parts(recipe.method, problem, constraint))
    if isinstance(recipe, SparseLLM) and problem is None:
        inner = recipe.method if solver is None else _method_of(solver)
        return replace(recipe, method=with_parts(inner, None, constraint))
    if isinstance(recipe, Elsa) and constraint is None:
        inner = recipe.projection if solver is None else _method_of(solver)
        return replace(recipe, projection=with_parts(inner, problem))
    raise UserError(f"{recipe.name} takes no {given}: it is for methods that go layer by layer")


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
