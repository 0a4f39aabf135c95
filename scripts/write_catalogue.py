"""Tries every solver on every problem and set, and writes down what was found: for `admm-prune list` and the docs.

python scripts/write_catalogue.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from admm_prune.methods.local import LOCAL_METHODS, REFERENCES
from admm_prune.methods.parts import LAYER_PROBLEMS, SETS
from admm_prune.methods.registry import RECIPES
from admm_prune.ops.activations import ACTIVATIONS
from admm_prune.point import Point
from admm_prune.problems import constraints
from admm_prune.problems.feed_forward import FeedForward, GatedFeedForward, Network
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.problems.surrogate_free import SurrogateFree
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.base import Solver
from admm_prune.solvers.group_obs import GroupMask, GroupOBS
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.refit import Polish
from admm_prune.solvers.stochastic_admm import StochasticADMM
from admm_prune.solvers.support_descent import Magnitude, SupportDescent, Wanda

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = ROOT / "admm_prune/assets/catalogue.json"
PAGE = ROOT / "docs/reference/matrix.md"

HEAD = """# Problem x solver

Tried out by `make catalogue` on tiny problems, not written down by hand; a test holds this page to the code. A pair
that does not fit raises a `TypeError` that names both sides and what is missing; the reasons stand below each table.
"""


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


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def as_page(content: dict[str, Any]) -> str:
    """Markdown: methods, the two tables, and why not."""
    lines = [HEAD, "## Solvers and problems", ""]
    lines += _table(content["pairs"], "problem")
    lines += ["", "## Layer methods and sparse sets", "", "On a small `LayerReconstruction`.", ""]
    lines += _table(content["fits"], "constraint")
    for title, key in (("Problems", "problems"), ("Sparse sets", "constraints")):
        lines += ["", f"## {title}", "", "| class | on the command line | what it is |", "|---|---|---|"]
        lines += [f"| `{x['name']}` | {_code(x['option'])} | {_cell(x['summary'])} |" for x in content[key]]
    lines += ["", "## Methods", "", "| name | what it does |", "|---|---|"]
    lines += [f"| `{x['name']}` | {_cell(x['summary'])} |" for x in content["methods"]]
    lines += ["", "References for small layers:", "", "| name | what it does |", "|---|---|"]
    lines += [f"| `{x['name']}` | {_cell(x['summary'])} |" for x in content["references"]]
    return "\n".join(lines) + "\n"


def _table(tried: list[dict[str, Any]], column: str) -> list[str]:
    fits = {(t["solver"], t[column]): t for t in tried}
    solvers, columns = (list(dict.fromkeys(key[i] for key in fits)) for i in (0, 1))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| `{s}` | {' | '.join('yes' if fits[s, c]['fits'] else 'no' for c in columns)} |" for s in solvers]
    reasons: dict[tuple[str, str], list[str]] = {}
    for (solver, other), found in fits.items():
        if not found["fits"]:
            reasons.setdefault((solver, found["why"].replace(other, "it")), []).append(other)
    told = (f"- `{solver}`, {', '.join(others)}: {_cell(why)}" for (solver, why), others in reasons.items())
    return [*lines, "", *told]


def _cell(text: str) -> str:
    """Text that markdown leaves as it is."""
    for sign in ("\\", "|", "*", "_", "<", "[", "{"):
        text = text.replace(sign, "\\" + sign if sign != "<" else "&lt;")
    return text


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def main() -> None:
    content = capabilities()
    CATALOGUE.write_text(as_json(content), encoding="utf-8")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(as_page(content), encoding="utf-8")
    print(f"{CATALOGUE.relative_to(ROOT)} and {PAGE.relative_to(ROOT)} are written")


if __name__ == "__main__":
    main()
