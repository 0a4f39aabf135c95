"""The ways to prune a whole model, by name."""

from __future__ import annotations

from collections.abc import Mapping

from admm_prune.errors import UserError
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.local_methods import LOCAL_METHODS, method_named, method_names
from admm_prune.recipes.recipe import Recipe

_RECIPES: tuple[Recipe, ...] = (*map(Layerwise, LOCAL_METHODS.values()),)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def recipe_named(name: str) -> Recipe:
    """The recipe of this name; any solver of layer problems, a reference or another package's too, goes layer by layer.

    Raises:
        UserError: no such recipe; the message lists those there are.
    """
    if name in RECIPES:
        return RECIPES[name]
    local = method_names()
    if name in local:
        return Layerwise(method_named(name))
    known = ", ".join(dict.fromkeys([*RECIPES, *local]))
    raise UserError(f"unknown method '{name}': choose one of {known}")
