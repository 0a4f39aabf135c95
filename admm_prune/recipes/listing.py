"""What there is by name, and which solver fits which problem: tried out, and written down for whoever only reads.

`admm-prune list` and the docs show the written catalogue (`assets/catalogue.json`), which costs no import of torch;
`make catalogue` tries everything anew, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from admm_prune.kernels.activations import ACTIVATIONS
from admm_prune.point import Point
from admm_prune.problems import constraints
from admm_prune.problems.feed_forward import FeedForward, Network
from admm_prune.problems.gated import GatedFeedForward
from admm_prune.problems.groups import GroupReconstruction
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.problems.surrogate_free import SurrogateFree
from admm_prune.recipes.catalogue import RECIPES
from admm_prune.recipes.local_methods import LOCAL_METHODS, REFERENCES
from admm_prune.recipes.parts import LAYER_PROBLEMS, SETS
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.base import Solver
from admm_prune.solvers.closed_form import Magnitude, Wanda
from admm_prune.solvers.group_mask import GroupMask
from admm_prune.solvers.group_obs import GroupOBS
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.polish import Polish
from admm_prune.solvers.stochastic_admm import StochasticADMM
from admm_prune.solvers.support_descent import SupportDescent

_SETS = (
    constraints.Unstructured(0.5),
    constraints.RowWise(0.5),
    constraints.NofM(2, 4),
    constraints.Blocks(0.5, 1, 2),
    constraints.Groups(0.5, 2),
)
_KINDS = (*map(type, _SETS), constraints.Product)

_SOLVERS: Mapping[str, Callable[[], Solver]] = {
    "Magnitude": Magnitude,
    "Wanda": Wanda,
    "SparseGPT": SparseGPT,
    "ADMM": ADMM,
    "LocalSearch": lambda: LocalSearch(ADMM()),
    "Polish": lambda: Polish(Magnitude()),
    "GroupOBS": GroupOBS,
    "GroupMask": GroupMask,
    "Alternating": lambda: Alternating(inner=ADMM.fast(), max_iterations=1),
    "SupportDescent": lambda: SupportDescent(max_iterations=2),
    "StochasticADMM": lambda: StochasticADMM(max_iterations=2),
}


def capabilities() -> dict[str, Any]:
    """Methods, problems, constraints; every method tried on every set, every solver on every kind of problem."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    weight, gram = torch.randn(3, 4, generator=generator), inputs.T @ inputs
    fits = [
        {
            "solver": method.name,
            "problem": LayerReconstruction.__name__,
            "constraint": type(constraint).__name__,
            **_tried(method.make, partial(LayerReconstruction, weight, gram, constraint)),
        }
        for method in (*LOCAL_METHODS.values(), *REFERENCES.values())
        for constraint in _SETS
    ]
    pairs = [
        {"solver": solver, "problem": problem.__name__, **_tried(make, build)}
        for solver, make in _SOLVERS.items()
        for problem, build in _problems().items()
    ]
    named = {kind: name for name, kind in {**LAYER_PROBLEMS, **SETS}.items()}
    return {
        "methods": [{"name": recipe.name, "summary": recipe.summary} for recipe in RECIPES.values()],
        "references": [{"name": method.name, "summary": method.summary} for method in REFERENCES.values()],
        "problems": [_described(kind, named) for kind in _problems()],
        "constraints": [_described(kind, named) for kind in _KINDS],
        "fits": fits,
        "pairs": pairs,
    }


def _problems() -> dict[type, Callable[[], Any]]:
    """A tiny problem of every kind."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=g)
    weight = torch.randn(3, 4, generator=g)
    weights = {"up": (8, 4), "gate": (8, 4), "down": (4, 8)}
    drawn = {name: torch.randn(*shape, generator=g) / 2 for name, shape in weights.items()}
    half = constraints.Unstructured(0.5)
    plain = Network(ACTIVATIONS["relu"], Point({name: drawn[name] for name in ("up", "down")}))
    gated = Network(ACTIVATIONS["silu"], Point(drawn))

    def outputs(network: Network) -> torch.Tensor:
        return network.linear("down", network.weights, network.hidden(network.weights, inputs))

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch), batch)

    def linear() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        return model

    return {
        LayerReconstruction: lambda: LayerReconstruction(weight, inputs.T @ inputs, half),
        GroupReconstruction: lambda: GroupReconstruction(weight, inputs.T @ inputs, constraints.Groups(0.5, 2)),
        FeedForward: lambda: FeedForward(plain, inputs, outputs(plain), dict.fromkeys(plain.weights, half)),
        GatedFeedForward: lambda: GatedFeedForward(gated, inputs, outputs(gated), dict.fromkeys(gated.weights, half)),
        NetworkOutput: lambda: NetworkOutput(gated, (inputs, outputs(gated)), dict.fromkeys(gated.weights, half)),
        SurrogateFree: lambda: SurrogateFree(linear(), loss, [inputs], [inputs], half),
    }


def _tried(make: Callable[[], Solver], build: Callable[[], Any]) -> dict[str, Any]:
    """Whether the solver takes the problem, and why not."""
    problem = build()
    try:
        make().solve(problem)
    except (TypeError, ValueError, ImportError) as error:
        return {"fits": False, "why": str(error)}
    return {"fits": True, "why": ""}


def _described(kind: type, named: Mapping[Any, str]) -> dict[str, str]:
    """A class, its first line, and its name on the command line where it has one."""
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    return {"name": kind.__name__, "option": named.get(kind, ""), "summary": summary}
