"""The structured methods by name: one recipe in several configurations."""

from __future__ import annotations

from dataclasses import replace

from admm_prune.errors import UserError
from admm_prune.models.budgets import UNITS
from admm_prune.problems.allocation import EqualSlope, Uniform
from admm_prune.recipes.recipe import Recipe
from admm_prune.recipes.struprune import StruPrune

STRUCTURED: tuple[StruPrune, ...] = (
    StruPrune(),
    StruPrune(
        name="struprune-uniform",
        summary="struprune with all blocks alike: a stock model",
        uniform=True,
    ),
    StruPrune(
        name="struprune-padded",
        summary="struprune, filled up to the widest block by zeros: a stock model",
        form="padded",
    ),
    StruPrune(
        name="structured-global",
        summary="baseline: all statistics of the dense model at once, one greedy choice over all of it",
        allocator=EqualSlope(),
        inputs="dense",
    ),
    StruPrune(
        name="structured-wanda",
        summary="baseline: the same fraction of every branch by Wanda's score of its units, nothing answers",
        selector="mask",
        compensate=False,
        fold_bias=False,
        allocator=Uniform(),
        ridge=0.0,
    ),
)


def configured(recipe: Recipe, unit: str | None = None, multiple: int | None = None) -> Recipe:
    """The recipe with its budget in another unit, and its neurons in multiples, where either is asked for.

    Raises:
        UserError: the recipe is not structured; no such unit; a multiple below 1.
    """
    if unit is None and multiple is None:
        return recipe
    if not isinstance(recipe, StruPrune):
        names = ", ".join(known.name for known in STRUCTURED)
        raise UserError(f"{recipe.name} removes no units: --unit and --multiple are for {names}")
    if unit is not None and unit not in UNITS:
        raise UserError(f"unit must be {', '.join(UNITS[:-1])} or {UNITS[-1]}, not '{unit}'")
    if multiple is not None and multiple < 1:
        raise UserError(f"multiple must be at least 1, not {multiple}")
    return replace(recipe, unit=unit or recipe.unit, multiple=multiple or recipe.multiple)
