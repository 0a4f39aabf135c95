"""What there is by name, and which solver fits which problem: tried out, not written down."""

from __future__ import annotations

from typing import Any

import torch

from admm_prune.problems import constraints
from admm_prune.problems.feed_forward import FeedForward
from admm_prune.problems.gated import GatedFeedForward
from admm_prune.problems.groups import GroupReconstruction
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.problems.surrogate_free import SurrogateFree
from admm_prune.recipes.catalogue import RECIPES
from admm_prune.recipes.local_methods import LOCAL_METHODS, REFERENCES, Method

PROBLEMS = (LayerReconstruction, GroupReconstruction, FeedForward, GatedFeedForward, NetworkOutput, SurrogateFree)


def capabilities() -> dict[str, Any]:
    """Methods, constraints, and every solver tried on a tiny problem of every kind."""
    sets = [
        constraints.Unstructured,
        constraints.RowWise,
        constraints.NofM,
        constraints.Blocks,
        constraints.Groups,
        constraints.Product,
    ]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    weight, gram = torch.randn(3, 4, generator=generator), inputs.T @ inputs
    tried = [
        constraints.Unstructured(0.5),
        constraints.RowWise(0.5),
        constraints.NofM(2, 4),
        constraints.Blocks(0.5, 1, 2),
        constraints.Groups(0.5, 2),
    ]
    fits = []
    for method in (*LOCAL_METHODS.values(), *REFERENCES.values()):
        for constraint in tried:
            why = _why_not(method, LayerReconstruction(weight, gram, constraint))
            names = {"solver": method.name, "problem": "LayerReconstruction", "constraint": type(constraint).__name__}
            fits.append({**names, "fits": not why, "why": why})
    return {
        "methods": [{"name": recipe.name, "summary": recipe.summary} for recipe in RECIPES.values()],
        "references": [{"name": method.name, "summary": method.summary} for method in REFERENCES.values()],
        "problems": [{"name": kind.__name__, "summary": _summary(kind)} for kind in PROBLEMS],
        "constraints": [{"name": kind.__name__, "summary": _summary(kind)} for kind in sets],
        "fits": fits,
    }


def _why_not(method: Method, problem: LayerReconstruction) -> str:
    """Why the method refuses the problem; empty where it solves it."""
    try:
        method.make().solve(problem)
    except (TypeError, ValueError, ImportError) as error:
        return str(error)
    return ""


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
