"""What there is by name, and which solver fits which problem: tried out, not written down."""

from __future__ import annotations

from typing import Any

import torch

from admm_prune.problems import constraints
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.catalogue import LOCAL_METHODS


def capabilities() -> dict[str, Any]:
    """Methods, constraints, and every solver tried on a tiny problem of every kind."""
    sets = [constraints.Unstructured, constraints.RowWise, constraints.NofM, constraints.Blocks, constraints.Product]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    problem = LayerReconstruction(torch.randn(3, 4, generator=generator), inputs.T @ inputs, constraints.NofM(2, 4))
    fits = []
    for method in LOCAL_METHODS.values():
        try:
            method.make().solve(problem)
            fits.append({"solver": method.name, "problem": type(problem).__name__, "fits": True, "why": ""})
        except TypeError as error:
            fits.append({"solver": method.name, "problem": type(problem).__name__, "fits": False, "why": str(error)})
    return {
        "methods": [{"name": method.name, "summary": method.summary} for method in LOCAL_METHODS.values()],
        "problems": [{"name": "LayerReconstruction", "summary": _summary(LayerReconstruction)}],
        "constraints": [{"name": kind.__name__, "summary": _summary(kind)} for kind in sets],
        "fits": fits,
    }


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
