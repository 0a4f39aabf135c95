"""Objectives and sparse sets of a layer by name: ours, and those that other packages declare."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from admm_prune.errors import UserError
from admm_prune.problems.constraints import Groups, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.plugins import declared, load_declared

# What a fraction alone describes; N:M is asked for by a pattern.
SETS: Mapping[str, Callable[[float], SparseSet]] = {
    "unstructured": Unstructured,
    "row-wise": RowWise,
    "groups": Groups,
}
LAYER = "layer"
LAYER_PROBLEMS: Mapping[str, type[LayerReconstruction]] = {LAYER: LayerReconstruction}


def layer_problem_named(name: str) -> type[LayerReconstruction]:
    """The objective of this name, ours or a plug-in.

    Raises:
        UserError: there is none, or it is no subclass of `LayerReconstruction`.
    """
    if name in LAYER_PROBLEMS:
        return LAYER_PROBLEMS[name]
    if name not in declared("problems"):
        raise _unknown("problem", name, [*LAYER_PROBLEMS, *declared("problems")])
    kind = load_declared("problems", name)
    if not (inspect.isclass(kind) and issubclass(kind, LayerReconstruction)):
        raise UserError(
            f"the plug-in '{name}' is {_described(kind)}: a problem with a name on the command line derives from "
            "admm_prune.LayerReconstruction; any other is solved from Python"
        )
    return kind


def sparse_set_named(name: str, sparsity: float) -> SparseSet:
    """The set of this name, ours or a plug-in, that prunes a fraction.

    Raises:
        UserError: there is none, or what it gives is no `SparseSet`.
    """
    if name in SETS:
        return SETS[name](sparsity)
    if name not in declared("constraints"):
        raise _unknown("constraint", name, [*SETS, *declared("constraints")])
    kind = load_declared("constraints", name)
    made = kind(sparsity) if callable(kind) else kind
    if not isinstance(made, SparseSet):
        raise UserError(
            f"the plug-in '{name}' gives {_described(made)}: a constraint with a name on the command line derives "
            "from admm_prune.problems.constraints.SparseSet"
        )
    return made


def _unknown(what: str, name: str, known: list[str]) -> UserError:
    return UserError(f"unknown {what} '{name}': choose one of {', '.join(known)}")


def _described(thing: object) -> str:
    return f"the class {thing.__name__}" if inspect.isclass(thing) else f"a {type(thing).__name__}"
