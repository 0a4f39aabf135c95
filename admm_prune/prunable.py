"""The prunable parameters of a model, the matrices of its linear layers and experts, selected by name; and the number
of their entries that a sparsity keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from admm_prune.errors import UserError

HEADS = ("*lm_head*",)  # names of the output head in models without get_output_embeddings


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A matrix W (out, in) of y = W x, or the matrices of all experts of a mixture (experts, out, in) in one parameter.

    Attributes:
        name: of the parameter, dotted from the root, without the wrappers of `torch.compile`.
        module, attribute: the module that holds the parameter, and its name there.
        transposed: whether W^T is stored, as in `Conv1D` of transformers.
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.attribute)

    @property
    def stacked(self) -> bool:
        """Whether the parameter has one matrix for each expert."""
        return self.parameter.ndim == 3


def kept_count(sparsity: float, total: int) -> int:
    """round((1 - sparsity) * total), with halves rounded to even: the rule of all sets, targets and optimizers."""
    return round((1.0 - sparsity) * total)


def matrices(root: nn.Module) -> Iterator[LinearWeight]:
    """The weights of all `nn.Linear`, `Conv1D` and mixtures of experts under `root`, in the order of the modules.

    A module of experts has `num_experts` and parameters (num_experts, ., .), as in transformers. Routers are excluded:
    they are linear layers next to experts with one output or one for each expert, or in a module next to experts that
    ends in such a layer. So is the projection of the time step in a state space model (`dt_proj` next to `A_log`),
    because its mixer uses the weight without calling it.
    """
    excluded: set[nn.Module] = set()
    for module in root.modules():
        projection = dict(module.named_children()).get("dt_proj")
        if isinstance(projection, nn.Linear) and "A_log" in dict(module.named_parameters(recurse=False)):
            excluded.add(projection)
        counts = {count for child in module.children() if (count := _experts(child)) is not None}
        for child in module.children() if counts else ():
            excluded |= _router(child, counts)
    for name, module in root.named_modules():
        prefix = uncompiled(f"{name}." if name else "")
        if isinstance(module, nn.Linear) or _stores_inputs_first(module):
            if module not in excluded:
                yield LinearWeight(f"{prefix}weight", module, "weight", _stores_inputs_first(module))
        elif (count := _experts(module)) is not None:
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.shape[0] == count:
                    transposed = bool(getattr(module, "is_transposed", False))
                    yield LinearWeight(f"{prefix}{attribute}", module, attribute, transposed)


def _router(module: nn.Module, experts: set[int]) -> set[nn.Module]:
    """The linear layers of a module beside the experts of a mixture, if it is their router; else none.

    Args:
        experts: numbers of experts.
    """
    if isinstance(module, nn.Linear):
        return {module} if module.out_features in experts | {1} else set()
    linears = [inner for inner in module.modules() if isinstance(inner, nn.Linear)]
    # An attention or a shared expert gives as many outputs as it has inputs.
    if not linears or linears[-1].out_features == linears[0].in_features:
        return set()
    return set(linears) if linears[-1].out_features in experts else set()


def uncompiled(name: str) -> str:
    """The name of a parameter or module without the wrappers of `torch.compile`."""
    return name.replace("_orig_mod.", "")


def linear_weights(
    model: nn.Module, *, targets: Sequence[str] = ("*",), ignore: Sequence[str] = HEADS
) -> list[LinearWeight]:
    """The `matrices` of a model, selected by name.

    The output head (`get_output_embeddings`) is left out, and so is every parameter that a module of another kind
    shares, such as an embedding. A weight that several linear layers share is listed once.

    Args:
        targets: shell patterns of parameter names ("*.mlp.*"); a weight must match one of them.
        ignore: patterns of names to leave out.

    Raises:
        UserError: a target matches no weight.
    """
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if callable(output_embeddings) else None
    listed = [weight for weight in matrices(model) if weight.module is not head]
    taken = parameters_elsewhere(model, listed)
    selected = []
    for weight in listed:
        if id(weight.parameter) not in taken and not _matches(weight.name, ignore):
            taken.add(id(weight.parameter))
            selected.append(weight)
    for target in targets:
        if not any(fnmatchcase(weight.name, target) for weight in selected):
            raise UserError(
                f"{type(model).__name__} has no linear weight that matches {target!r}: nothing to prune there"
            )
    return [weight for weight in selected if _matches(weight.name, targets)]


def parameters_elsewhere(model: nn.Module, weights: Sequence[LinearWeight]) -> set[int]:
    """The ids of all parameters that modules hold in other places than these weights, such as an embedding that shares
    one of them."""
    listed = {(id(weight.module), weight.attribute) for weight in weights}
    return {
        id(parameter)
        for module in model.modules()
        for attribute, parameter in module.named_parameters(recurse=False)
        if (id(module), attribute) not in listed
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _stores_inputs_first(module: nn.Module) -> bool:
    # Conv1D of transformers, recognized by its attribute, because this module must not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _experts(module: nn.Module) -> int | None:
    """The number of experts that a module holds as stacked matrices; None if it holds none."""
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or isinstance(module, nn.Linear):
        return None
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return count if any(len(shape) == 3 and shape[0] == count for shape in shapes) else None
