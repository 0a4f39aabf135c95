"""Names that other installed packages give to parts of their own, as entry points; loads nothing heavy.

    [project.entry-points."admm_prune.solvers"]
    projected-gradient = "their_package:ProjectedGradient"

The groups are `admm_prune.solvers` (called without arguments; see `recipes.local_methods`), `admm_prune.problems`
(a subclass of `LayerReconstruction`, called as that is) and `admm_prune.constraints` (a `SparseSet`, called with the
fraction of the weights to go). Declaring is all: nothing is imported before its name is asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from admm_prune.errors import UserError

Kind = Literal["solvers", "problems", "constraints"]


def declared(kind: Kind) -> dict[str, EntryPoint]:
    """What installed packages declare, by name."""
    return {point.name: point for point in entry_points(group=f"admm_prune.{kind}")}


def all_declared() -> list[dict[str, str]]:
    """Every plug-in of every kind: its name, what it is, where it lives, and the package it comes from."""
    return [
        {
            "kind": kind,
            "name": name,
            "object": point.value,
            "package": "" if point.dist is None else f"{point.dist.name} {point.dist.version}",
        }
        for kind in get_args(Kind)
        for name, point in sorted(declared(kind).items())
    ]


def check_no_clash(kind: Kind, name: str, ours: Collection[str]) -> None:
    """Refuses a name that stands for two parts.

    Raises:
        UserError: a package declares what is a name of this package, or two packages declare it.
    """
    found = {point.value: point for point in entry_points(group=f"admm_prune.{kind}") if point.name == name}
    who = " and ".join(f"{_package(point)} ({point.value})" for point in found.values())
    if found and name in ours:
        raise UserError(f"the name '{name}' is built in, and declared by {who}: that package has to choose another")
    if len(found) > 1:
        raise UserError(f"the name '{name}' is declared by {who}: one of them has to choose another")


def _package(point: EntryPoint) -> str:
    return "a package" if point.dist is None else point.dist.name


def load_declared(kind: Kind, name: str) -> Any:
    """The object behind a declared name.

    Raises:
        UserError: its package cannot be imported, or lacks it.
    """
    point = declared(kind)[name]
    try:
        return point.load()
    except Exception as error:  # whatever another package's import may raise
        whose = "" if point.dist is None else f" of {point.dist.name}"
        raise UserError(
            f"the plug-in '{name}'{whose} ({point.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
