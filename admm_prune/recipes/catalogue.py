"""The ways to prune a whole model, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from admm_prune.errors import UserError
from admm_prune.recipes.elsa import TRAINED
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.local_methods import LOCAL_METHODS, method_named, method_names, with_parts
from admm_prune.recipes.recipe import Recipe
from admm_prune.recipes.sparsellm import SPARSELLM
from admm_prune.recipes.structured import STRUCTURED
from admm_prune.recipes.trained import Trained

_RECIPES: tuple[Recipe, ...] = (*map(Layerwise, LOCAL_METHODS.values()), *SPARSELLM, *STRUCTURED, *TRAINED)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}

# What a method that trains is compared with, so that no gain of mere tuning is credited to pruning.
_BASELINES = ("tuned-dense", "admm-finetuned", "gradual")
_COMPARED = ("elsa", "elsa-l", "elsa-published")


def recipe_named(
    name: str, steps: int | None = None, problem: str | None = None, constraint: str | None = None
) -> Recipe:
    """The recipe of this name; any solver of layer problems, a reference or another package's too, goes layer by layer.

    Args:
        steps: of a recipe that trains, in place of its own number.
        problem, constraint: of a recipe that goes layer by layer, in place of its own.

    Raises:
        UserError: no such recipe; the message lists those there are. Steps are asked of one that does not train, or
            a problem or a constraint of one that does not go layer by layer.
    """
    recipe = _named(name)
    if problem is not None or constraint is not None:
        if not isinstance(recipe, Layerwise):
            option = "--problem" if problem is not None else "--constraint"
            raise UserError(f"{name} does not go layer by layer: {option} is for {', '.join(LOCAL_METHODS)}")
        recipe = replace(recipe, method=with_parts(recipe.method, problem, constraint))
    if steps is None:
        return recipe
    if not isinstance(recipe, Trained):
        raise UserError(f"{name} does not train: --steps is for {', '.join(trained.name for trained in TRAINED)}")
    if steps < 1:
        raise UserError(f"a run has at least 1 step, not {steps}")
    return replace(recipe, steps=steps)


def with_baselines(names: Iterable[str]) -> list[str]:
    """The names, once each, and those of what such methods have to be compared with."""
    asked = list(dict.fromkeys(names))
    return list(dict.fromkeys([*asked, *(_BASELINES if set(asked) & set(_COMPARED) else ())]))


def _named(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    local = method_names()
    if name in local:
        return Layerwise(method_named(name))
    known = ", ".join(dict.fromkeys([*RECIPES, *local]))
    raise UserError(f"unknown method '{name}': choose one of {known}")
