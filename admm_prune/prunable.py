"""Which parameters of a model are pruned: the matrices of its linear layers, narrowed down by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from admm_prune.errors import UserError

HEADS = ("*lm_head*",)  # of models that do not say which module gives their logits


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A matrix W of y = W x; `transposed` where the module stores W^T (in, out), as transformers' `Conv1D` does."""

    name: str
    parameter: nn.Parameter
    transposed: bool


def linear_weights(
    model: nn.Module, *, targets: Sequence[str] = ("*",), ignore: Sequence[str] = HEADS
) -> list[LinearWeight]:
    """The weights of all `nn.Linear` and `Conv1D` in the order of the modules.

    Left out are the module that gives the logits (`get_output_embeddings`) and every parameter that a module of
    another kind shares, such as an embedding. A weight shared by several linear layers is listed once.

    Args:
        targets: shell patterns of parameter names ("*.mlp.*"); a weight must match one of them.
        ignore: patterns of names to leave out.

    Raises:
        UserError: no weight is left; a target matches none.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    give_logits = getattr(model, "get_output_embeddings", None)
    head = give_logits() if callable(give_logits) else None
    taken = {
        id(parameter)
        for module in model.modules()
        if module is head or not _is_linear(module)
        for parameter in module.parameters(recurse=False)
    }
    found = []
    for name, module in linear.items():
        weight = LinearWeight(
            f"{name}.weight" if name else "weight", module.get_parameter("weight"), _stores_inputs_first(module)
        )
        if id(weight.parameter) not in taken and not _matches(weight.name, ignore):
            taken.add(id(weight.parameter))
            found.append(weight)
    for target in targets:
        if not any(fnmatchcase(weight.name, target) for weight in found):
            raise UserError(
                f"{type(model).__name__} has no linear weight that matches {target!r}: nothing to prune there"
            )
    return [weight for weight in found if _matches(weight.name, targets)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _stores_inputs_first(module)


def _stores_inputs_first(module: nn.Module) -> bool:
    # transformers' Conv1D, told by its attribute: this module must not load transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
