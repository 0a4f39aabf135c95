"""The pruning methods by name, and methods composed of other solvers, objectives or constraints."""

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
    """The recipe of a method with other parts: a solver, an objective, a constraint, or joint steps.

    Args:
        method: its name; None for layer-wise pruning with `solver`, or with `admm` if that is None too.
        steps, distillation, engine: as in `recipe_named`.
        solver: an object, or the name of a layer method, whose ridge, damping and budget are used too.
        problem: a class derived from `LayerReconstruction`, a function with the same arguments, or a name.
        constraint: an object, a class that is called with a sparsity, or a name.
        joint: joint steps on several matrices of a block.

    Raises:
        UserError: there is no such method or part, or the method has no part of this kind.
    """
    parts = {"solver": solver, "problem": problem, "constraint": constraint}
    given = " and ".join(name for name, part in parts.items() if part is not None)
    if getattr(constraint, "keep", None) is not None:
        raise UserError(f"{constraint} counts weights, which is for one matrix: give a sparsity")
    if method is None and solver is not None:
        return with_joint(Layerwise(with_parts(_method_of(solver), problem, constraint)), joint)
    recipe = recipe_named(DEFAULT if method is None else method, steps=steps, distillation=distillation, engine=engine)
    if not given:
        return with_joint(recipe, joint)
    made = recipe.with_parts(None if solver is None else _method_of(solver), problem, constraint)
    if made is None:
        raise UserError(f"{recipe.name} takes no {given}: it is for layer-wise methods")
    return with_joint(made, joint)


def with_joint(recipe: Recipe, joint: Joint | None) -> Recipe:
    """The recipe with joint steps on several matrices of a block, if there are any.

    Raises:
        UserError: the recipe does not support them.
    """
    if not joint:
        return recipe
    made = recipe.with_joint(joint)
    if made is None:
        raise UserError(f"{recipe.name} takes no {joint.label}: it is for methods that prune block by block")
    return made


def _method_of(solver: str | Solver) -> Method:
    """The method of a solver: with the ridge, damping and budget of the built-in method of the same class, if there is
    one, otherwise with the defaults."""
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
    name: str, *, steps: int | None = None, distillation: float | None = None, engine: Engine = _ENGINE
) -> Recipe:
    """The recipe of this name. Layer methods are applied to a model layer by layer.

    Args:
        steps, distillation, engine: settings that replace those of a recipe that trains.

    Raises:
        UserError: there is no such recipe (the message lists the known ones), or it does not train and has none of
            these settings.
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
    """The names without duplicates, followed by the baselines of methods that train, if one of them is named."""
    unique = list(dict.fromkeys(names))
    return list(dict.fromkeys([*unique, *(_BASELINES if set(unique) & set(_COMPARED) else ())]))
