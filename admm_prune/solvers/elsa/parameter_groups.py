"""The optimizer's parameter groups, from the user's arguments, and their supports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.problem import SupportConstraint
from admm_prune.prunable import linear_weights, uncompiled
from admm_prune.solvers.elsa.supports import Budget, Pattern, Scope, Support, Within

_TARGETS = ("sparsity", "pattern", "constraint")
_SHARED = (
    "scope", "targets", "ignore", "masks", "clip", "clip_penalty", "penalty", "score", "interval", "first_update",
    "total_steps", "freeze", "ramp", "final", "anchor", "rounding", "moments", "seed",
)  # fmt: skip
_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")  # of torch's AdamW


@dataclass(frozen=True)
class GroupTarget:
    """The pruning target: one of the three, or none for parameters that stay dense."""

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    constraint: SupportConstraint | None = None
    scope: Scope = "matrix"

    def support(self) -> Support | None:
        """Raises UserError where more than one is given, or one is out of range."""
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"give one target, not {' and '.join(given)}")
        if self.constraint is not None:
            if not isinstance(self.constraint, SupportConstraint):
                raise UserError(
                    f"{type(self.constraint).__name__} is no SupportConstraint: derive it from "
                    "admm_prune.problems.constraints.SparseSet"
                )
            return Within(self.constraint)
        if self.pattern is not None:
            return Pattern(*self.pattern)
        return None if self.sparsity is None else Budget(self.sparsity, self.scope)


@dataclass
class ParameterGroups:
    """Groups as torch takes them, the support of each that is pruned by its number, and how weights are stored.

    Weights are known by name: FSDP2 under accelerate exchanges the parameters of the groups.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    supports: dict[int, Support] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    stacked: set[str] = field(default_factory=set)  # those that hold a matrix for every expert


def parameter_groups(
    params: nn.Module | Iterable[Any], target: GroupTarget, *, targets: Sequence[str], ignore: Sequence[str]
) -> ParameterGroups:
    """The groups of a model, or of given parameters.

    Args:
        targets, ignore: of the names of a model's weights.
    """
    if isinstance(params, nn.Module):
        return _of_model(params, target, targets=targets, ignore=ignore)
    return _of_parameters(params, target)


def _of_model(
    model: nn.Module, target: GroupTarget, *, targets: Sequence[str], ignore: Sequence[str]
) -> ParameterGroups:
    """Two groups: the linear weights that are pruned, and all other parameters that require a gradient.

    Raises:
        UserError: there is no weight to prune, one of them requires no gradient, or no target is given.
    """
    weights = linear_weights(model, targets=targets, ignore=ignore)
    fixed = [weight.name for weight in weights if not weight.parameter.requires_grad]
    if fixed:
        raise UserError(f"{fixed[0]} requires no gradient, as do {len(fixed)} in all: call model.requires_grad_(True)")
    pruned = {id(weight.parameter) for weight in weights}
    named = model.named_parameters()
    others = [(uncompiled(name), p) for name, p in named if p.requires_grad and id(p) not in pruned]
    result = ParameterGroups([{"params": [(weight.name, weight.parameter) for weight in weights]}])
    if others:
        result.groups.append({"params": others})
    result.supports[0] = _required(target)
    result.transposed = {weight.name for weight in weights if weight.transposed}
    result.stacked = {weight.name for weight in weights if weight.stacked}
    _check_prunable([weight.parameter for weight in weights], result.supports[0])
    return result


def _of_parameters(params: Iterable[Any], target: GroupTarget) -> ParameterGroups:
    """The groups given; a group's own target, or None, overrides `target`.

    Raises:
        UserError: no group has a target; a sparsity or a pattern for parameters that are not matrices.
        TypeError: `params` is a tensor.
    """
    if isinstance(params, Tensor):
        raise TypeError(f"params must be a model, or a list of parameters or groups, not a {type(params).__name__}")
    items = list(params)
    if not items:
        raise UserError("SparseAdam got an empty parameter list: give a model or its parameters")
    given = items if isinstance(items[0], dict) else [{"params": items}]
    result = ParameterGroups()
    for number, original in enumerate(given):
        group, support = group_of(original, target)
        result.groups.append(group)
        if support is not None:
            result.supports[number] = support
    if not result.supports:
        _required(target)
    return result


def group_of(given: Mapping[str, Any], target: GroupTarget) -> tuple[dict[str, Any], Support | None]:
    """A group as torch takes it, and the support of its parameters: of its own target, or else of `target`.

    Raises:
        UserError: two targets; a sparsity or a pattern for parameters that are not matrices; an option of torch's AdamW
            that SparseAdam lacks; a setting that all groups share.
    """
    group = dict(given)
    if shared := [name for name in _SHARED if name in group]:
        raise UserError(f"{shared[0]} is one setting for all groups: give it to SparseAdam itself")
    if "params" not in group:
        raise UserError(f"a parameter group needs 'params' beside {', '.join(map(str, group)) or 'nothing'}")
    wrong = [name for name in _UNSUPPORTED if group.get(name)]
    if wrong:
        raise UserError(f"SparseAdam does not support {wrong[0]}={group[wrong[0]]}: leave it out")
    overrides: dict[str, Any] = {name: group.pop(name) for name in _TARGETS if name in group}
    support = (GroupTarget(**overrides, scope=target.scope) if overrides else target).support()
    parameters = group["params"]
    if not isinstance(parameters, set):  # which torch refuses
        group["params"] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if support is not None:
        _check_prunable(group["params"], support)
    return group, support


def _required(target: GroupTarget) -> Support:
    support = target.support()
    if support is None:
        raise UserError("nothing to prune: give a sparsity such as 0.9, a pattern such as (2, 4), or a constraint")
    return support


def _check_prunable(parameters: Iterable[Any], support: Support) -> None:
    for parameter in parameters:
        tensor = parameter[1] if isinstance(parameter, tuple) else parameter
        if not isinstance(tensor, Tensor):
            return  # torch refuses it
        if tensor.is_complex():
            raise UserError(
                f"a complex parameter of shape {tuple(tensor.shape)} is among those to prune: put it into a group with "
                "constraint=None, where it is trained as by AdamW"
            )
        if tensor.ndim == 0:
            raise UserError("a scalar is among the parameters to prune: put it into a group with constraint=None")
        if tensor.ndim < 2 and not isinstance(support, Within):  # a constraint knows which shapes it admits
            raise UserError(
                f"a vector of {tensor.numel()} entries is among the parameters to prune: put norms and biases into a "
                "group with constraint=None, or give the model itself"
            )


def names_of(group: Mapping[str, Any], number: int) -> list[str]:
    """The names of the parameters of group `number`: their own, or generated ones."""
    return list(group.get("param_names") or (f"{number}.{i}" for i in range(len(group["params"]))))


def unify_names(group: dict[str, Any], number: int, others: Sequence[dict[str, Any]]) -> None:
    """Names the parameters of a group, or of the others, where only the other side has names: torch takes no mixture.

    Args:
        group: not yet torch's; named parameters are pairs.
        number: that it will have.
    """
    if not all("param_names" in other for other in others) and any(isinstance(p, tuple) for p in group["params"]):
        for i, other in enumerate(others):
            other["param_names"] = names_of(other, i)
    elif "param_names" in others[0] and not any(isinstance(p, tuple) for p in group["params"]):
        group["params"] = list(zip(names_of(group, number), group["params"], strict=True))
