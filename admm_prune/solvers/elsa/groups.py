"""From what a user hands to the optimizer to its parameter groups, and the supports that those may have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.problem import SupportConstraint
from admm_prune.prunable import linear_weights
from admm_prune.solvers.elsa.supports import Budget, Groups, Support, Within

_TARGETS = ("sparsity", "pattern", "constraint")


@dataclass(frozen=True)
class Target:
    """How much is to go: one of the three, or none for parameters that stay dense."""

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    constraint: SupportConstraint | None = None
    scope: Literal["matrix", "model"] = "matrix"

    def support(self) -> Support | None:
        """Raises UserError where more than one is given, or one is out of range."""
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"give one target, not {' and '.join(given)}")
        if self.constraint is not None:
            if not isinstance(self.constraint, SupportConstraint):
                raise UserError(
                    f"{type(self.constraint).__name__} is no SupportConstraint: it lacks select or tightened"
                )
            return Within(self.constraint)
        if self.pattern is not None:
            return Groups(*self.pattern)
        return None if self.sparsity is None else Budget(self.sparsity, self.scope)


@dataclass
class ParameterGroups:
    """Groups as torch takes them, the support of each that is pruned by its number, and how weights are stored."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    supports: dict[int, Support] = field(default_factory=dict)
    transposed: set[int] = field(default_factory=set)  # ids of parameters
    stacked: set[int] = field(default_factory=set)  # of those that hold a matrix for every expert


def parameter_groups(
    params: nn.Module | Iterable[Any], target: Target, *, targets: Sequence[str], ignore: Sequence[str]
) -> ParameterGroups:
    """The groups of a model, or of what is given in place of one.

    Args:
        targets, ignore: of the names of a model's weights.
    """
    if isinstance(params, nn.Module):
        return _of_model(params, target, targets=targets, ignore=ignore)
    return _of_parameters(params, target)


def _of_model(model: nn.Module, target: Target, *, targets: Sequence[str], ignore: Sequence[str]) -> ParameterGroups:
    """Two groups: the linear weights that are pruned, and all other parameters that require a gradient.

    Raises:
        UserError: there is no weight to prune, one of them requires no gradient, or no target is given.
    """
    weights = linear_weights(model, targets=targets, ignore=ignore)
    fixed = [weight.name for weight in weights if not weight.parameter.requires_grad]
    if fixed:
        raise UserError(f"{fixed[0]} requires no gradient, as do {len(fixed)} in all: call model.requires_grad_(True)")
    pruned = {id(weight.parameter) for weight in weights}
    others = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in pruned]
    result = ParameterGroups([{"params": [(weight.name, weight.parameter) for weight in weights]}])
    if others:
        result.groups.append({"params": others})
    result.supports[0] = _required(target)
    result.transposed = {id(weight.parameter) for weight in weights if weight.transposed}
    result.stacked = {id(weight.parameter) for weight in weights if weight.stacked}
    return result


def _of_parameters(params: Iterable[Any], target: Target) -> ParameterGroups:
    """The groups given; one that names a target of its own, or None, takes that in place of `target`.

    Raises:
        UserError: no group has a target; a sparsity or a pattern is asked of parameters that are no matrices.
    """
    items = list(params)
    given = items if items and isinstance(items[0], dict) else [{"params": items}]
    result = ParameterGroups()
    for number, original in enumerate(given):
        group: dict[str, Any] = dict(original)
        own: dict[str, Any] = {name: group.pop(name) for name in _TARGETS if name in group}
        support = (Target(**own, scope=target.scope) if own else target).support()
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        result.groups.append(group)
        if support is not None:
            result.supports[number] = support
            _only_matrices(group["params"], support)
    if not result.supports:
        _required(target)
    return result


def _required(target: Target) -> Support:
    support = target.support()
    if support is None:
        raise UserError("nothing to prune: give a sparsity such as 0.9, a pattern such as (2, 4), or a constraint")
    return support


def _only_matrices(parameters: Iterable[Any], support: Support) -> None:
    if isinstance(support, Within):
        return  # it knows which shapes it admits
    for parameter in parameters:
        tensor = parameter[1] if isinstance(parameter, tuple) else parameter
        if tensor.ndim < 2:
            raise UserError(
                f"a vector of {tensor.numel()} entries is among the parameters to prune: put norms and biases into a "
                "group with constraint=None, or give the model itself"
            )
