"""The pruning methods by name, and methods composed of objects: another solver, objective or sparse set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from admm_prune.errors import UserError, unknown
from admm_prune.methods.base import Recipe
from admm_prune.methods.elsa.elsa import TRAINED
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.joint import Joint
from admm_prune.methods.layerwise import Layerwise
from admm_prune.methods.local import LOCAL_METHODS, Method, method_named, method_names, with_parts
from admm_prune.methods.parts import ProblemLike, SetLike, check_no_clash
from admm_prune.methods.sparsellm import SPARSELLM
from admm_prune.methods.struprune.struprune import STRUCTURED
from admm_prune.solvers.base import Solver

DEFAULT = "admm"
_RECIPES: tuple[Recipe, ...] = (*map(Layerwise, LOCAL_METHODS.values()), *SPARSELLM, *STRUCTURED, *TRAINED)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
# Baselines of the methods that train, so that the gain of training is not attributed to pruning.
_BASELINES = ("tuned-dense", "admm-finetuned", "gradual", "staged")
_ENGINE = Engine()
_COMPARED = ("elsa", "elsa-l", "elsa-published")


def composed(
    method: str | None,
    *,
    steps: int | None = None,
    distillation: float | None = None,
    engine: Engine = _ENGINE,
    solver: str | Solver | None = None,
    problem: ProblemLike = None,
    constraint: SetLike = None,
    joint: Joint | None = None,
) -> Recipe:
    """The recipe of a method, with another solver, objective or sparse set inside.

    Args:
        method: a name; None for layer-wise pruning with the solver, or with `admm` if there is none.
        steps, distillation, engine: as in `recipe_named`.
        solver: an object, or the name of a layer method, whose ridge, damping and budget are used too.
        problem: a class derived from `LayerReconstruction`, a function with the same arguments, or a name.
        constraint: an object, a class that takes a sparsity, or a name.
        joint: steps on several matrices of a block together.

    Raises:
        UserError: there is no such method, or it has no part of this kind.
    """
    if joint:
        alone = composed(
            method,
            steps=steps,
            distillation=distillation,
            engine=engine,
            solver=solver,
            problem=problem,
            constraint=constraint,
        )
        return with_joint(alone, joint)
    parts = {"solver": solver, "problem": problem, "constraint": constraint}
    given = " and ".join(name for name, part in parts.items() if part is not None)
    if not given:
        return recipe_named(DEFAULT if method is None else method, steps, engine, distillation)
    if getattr(constraint, "keep", None) is not None:
        raise UserError(f"{constraint} counts weights, which is for one matrix: give a sparsity")
    if method is None and solver is not None:
        return Layerwise(with_parts(_method_of(solver), problem, constraint))
    recipe = recipe_named(DEFAULT if method is None else method, steps, engine, distillation)
    made = recipe.with_parts(None if solver is None else _method_of(solver), problem, constraint)
    if made is None:
        raise UserError(f"{recipe.name} takes no {given}: it is for layer-wise methods")
    return made


def with_joint(recipe: Recipe, joint: Joint) -> Recipe:
    """The recipe with steps on several matrices of a block together.

    Raises:
        UserError: it takes none.
    """
    if not joint:
        return recipe
    made = recipe.with_joint(joint)
    if made is None:
        raise UserError(f"{recipe.name} takes no {joint.label}: it is for methods that prune block by block")
    return made


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


def recipe_named(
    name: str, steps: int | None = None, engine: Engine = _ENGINE, distillation: float | None = None
) -> Recipe:
    """The recipe of this name; solvers of layer problems are applied layer by layer.

    Args:
        steps, distillation: of a recipe that trains, in place of its own.
        engine: of a recipe that trains.

    Raises:
        UserError: no such recipe; the message lists those there are. It does not train, and has none of these.
    """
    check_no_clash("solvers", name, RECIPES)
    if name not in RECIPES and name not in method_names():
        raise unknown("method", name, dict.fromkeys([*RECIPES, *method_names()]))
    recipe = RECIPES[name] if name in RECIPES else Layerwise(method_named(name))
    replaced = {name: x for name, x in (("steps", steps), ("distillation", distillation)) if x is not None}
    given = [*replaced, *engine.changed()]
    if not given:
        return recipe
    if not isinstance(recipe, Trained):
        flag = given[0].replace("_", "-")
        raise UserError(f"{name} does not train: --{flag} is for {', '.join(trained.name for trained in TRAINED)}")
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    changes: dict[str, Any] = {**replaced, "engine": engine}
    return replace(recipe, **changes)


def with_baselines(names: Iterable[str]) -> list[str]:
    """The names without duplicates, and those of the baselines of methods that train."""
    unique = list(dict.fromkeys(names))
    return list(dict.fromkeys([*unique, *(_BASELINES if set(unique) & set(_COMPARED) else ())]))
