"""The ways to prune a whole model, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from admm_prune.errors import UserError
from admm_prune.recipes.elsa import TRAINED
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.local_methods import LOCAL_METHODS, method_named, method_names
from admm_prune.recipes.plugins import check_no_clash
from admm_prune.recipes.recipe import Recipe
from admm_prune.recipes.sparsellm import SPARSELLM
from admm_prune.recipes.structured import STRUCTURED
from admm_prune.recipes.trained import Trained

_RECIPES: tuple[Recipe, ...] = (*map(Layerwise, LOCAL_METHODS.values()), *SPARSELLM, *STRUCTURED, *TRAINED)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}

# What a method that trains is compared with, so that no gain of mere tuning is credited to pruning.
_BASELINES = ("tuned-dense", "admm-finetuned", "gradual")
_COMPARED = ("elsa", "elsa-l", "elsa-published")


def recipe_named(name: str, steps: int | None = None) -> Recipe:
    """The recipe of this name; any solver of layer problems, a reference or another package's too, goes layer by layer.

    Args:
        steps: of a recipe that trains, in place of its own number.

    Raises:
        UserError: no such recipe; the message lists those there are. Steps are asked of one that does not train.
    """
    recipe = _named(name)
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
    check_no_clash("solvers", name, RECIPES)
    if name in RECIPES:
        return RECIPES[name]
    local = method_names()
    if name in local:
        return Layerwise(method_named(name))
    known = ", ".join(dict.fromkeys([*RECIPES, *local]))
    raise UserError(f"unknown method '{name}': choose one of {known}")
