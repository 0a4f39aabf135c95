"""Solvers, schedules, allocators and methods refuse numbers of a wrong type or out of range when they are built."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

import pytest

import admm_prune
from admm_prune.errors import UserError
from admm_prune.methods.allocation.rules import AllocationRule
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import recipe_named
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.one_shot import Magnitude
from admm_prune.solvers.schedules import Constant

PACKAGES = ("solvers", "problems", "methods")
WITH_ARGUMENTS = (
    Alternating(inner=Magnitude()),
    Constant(1.0),
    LOCAL_METHODS["admm"],
    recipe_named("admm"),
    recipe_named("sparsellm"),
    AllocationRule("search"),
)
NEGATIVE = {("Alternating", "tolerance")}
INTERNAL = ("GroupTarget", "Runtime", "Target")  # made from settings that were checked, or checked where they are used


def public_classes() -> Iterator[tuple[str, Any]]:
    """(name, class) for every public class of the packages, from the module that defines it."""
    for package in PACKAGES:
        root = import_module(f"{admm_prune.__name__}.{package}")
        for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            for name, one in vars(import_module(found.name)).items():
                if inspect.isclass(one) and one.__module__ == found.name and not name.startswith("_"):
                    yield name, one


def configurations() -> Iterator[Any]:
    """The default of every public frozen dataclass, and of those that need arguments."""
    for name, one in public_classes():
        if name in INTERNAL or not is_dataclass(one) or not one.__dataclass_params__.frozen or inspect.isabstract(one):
            continue
        try:
            yield one()
        except TypeError:  # it needs arguments
            continue
    yield from WITH_ARGUMENTS


CONFIGURATIONS = list(configurations())


def wrong() -> Iterator[Any]:
    for configuration in CONFIGURATIONS:
        name = type(configuration).__name__
        for one in fields(configuration):
            kind = str(one.type).removesuffix(" | None")
            if kind in ("int", "float"):
                values = [math.nan, 1.5 if kind == "int" else "1"] + [-1] * ((name, one.name) not in NEGATIVE)
                for given in values:
                    yield pytest.param(configuration, one.name, given, id=f"{name}-{one.name}-{given!r}")


def test_the_configurations_are_found() -> None:
    names = {type(one).__name__ for one in CONFIGURATIONS}
    assert names >= {"ADMM", "Refit", "BranchAndBound", "EqualSlope", "Knapsack", "Elsa", "Timeline", "Engine"}
    assert len(names) >= 35


@pytest.mark.parametrize(("configuration", "name", "given"), list(wrong()))
def test_a_number_of_a_wrong_type_or_out_of_range_is_refused(configuration: Any, name: str, given: object) -> None:
    with pytest.raises(UserError, match=rf"\b{name}\b") as refusal:
        replace(configuration, **{name: given})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [True, None])
def test_a_setting_that_is_not_a_number_is_refused(value: object) -> None:
    for configuration, name in ((admm_prune.ADMM(), "max_iterations"), (Constant(1.0), "value")):
        with pytest.raises(UserError, match=f"{name} of {type(configuration).__name__} must be"):
            replace(configuration, **{name: value})
