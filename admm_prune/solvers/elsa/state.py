"""The state of an optimizer as `state_dict` gives it: compatibility checks and copies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from admm_prune.errors import UserError
from admm_prune.ops import bits
from admm_prune.solvers.elsa.anchors import Anchors, Weight, working_dtype
from admm_prune.solvers.elsa.duals import Splitting
from admm_prune.solvers.elsa.moments import Moments
from admm_prune.solvers.elsa.parameter_groups import names_of

_ADAM = {"step", "exp_avg", "exp_avg_sq"}


@contextmanager
def load_atomically(
    optimizer: Optimizer, check: Callable[[dict[str, Any]], None], finish: Callable[[dict[str, Any]], None]
) -> Generator[None]:
    """Context in which the optimizer loads a state atomically.

    Args:
        check: called with the state to load, after the hooks that may replace it; raises if it does not fit.
        finish: called after torch has loaded it, before the hooks that may read it.
    """
    before = dict(vars(optimizer))
    given: dict[str, Any] = {}

    def on_given(_: Optimizer, saved: dict[str, Any]) -> None:
        check(saved)
        given.update(saved)

    handles = (
        optimizer.register_load_state_dict_pre_hook(on_given),
        optimizer.register_load_state_dict_post_hook(lambda _: finish(given), prepend=True),
    )
    try:
        yield
    except BaseException:
        vars(optimizer).update({name: before[name] for name in ("state", "param_groups", "history")})
        raise
    finally:
        for handle in handles:
            handle.remove()


def check_saved(
    saved: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    weights: Sequence[Weight],
    splittings: Collection[Splitting],
) -> None:
    """Raises UserError where an optimizer cannot continue from a saved state.

    Groups of other sizes are left to torch, which refuses them.

    Args:
        groups: of the optimizer that is to continue.
        weights: that it prunes.
    """
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
        return
    if not all("steps_done" in group for group in saved["param_groups"]):
        raise UserError("the state was not saved by a SparseAdam: it does not say how many steps were done")
    frozen = bool(saved["param_groups"][0]["frozen"])
    pruned = {weight.parameter: weight for weight in weights}
    for name, parameter, state in _states(saved, groups):
        if state:
            _check_adam(name, parameter, state)
            if parameter in pruned:
                _check_pruned(pruned[parameter], state, next(iter(splittings)), frozen=frozen)
            elif "mask" in state:
                raise _unlike(f"{name} was pruned by the saved optimizer, and is dense in this one")


def copy_saved(
    saved: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    anchors: Anchors,
    moments: Moments,
) -> None:
    """Replaces the tensors that torch has loaded by copies in the working dtypes.

    torch casts every tensor to the dtype of its parameter, where masks and codes have their own, and shares the ones
    that need no cast with the saved optimizer.
    """
    for _, parameter, state in _states(saved, groups):
        floats = set() if moments.quantizes(parameter) else {"exp_avg", "exp_avg_sq"}
        floats |= {"anchor"} if anchors.format == "full" else set()
        for key, value in state.items():
            if isinstance(value, Tensor):
                loaded = states[parameter][key]
                dtype = working_dtype(parameter.dtype) if key in floats else value.dtype
                if key == "step":
                    states[parameter][key] = loaded.clone()
                else:
                    states[parameter][key] = value.detach().to(parameter.device, dtype, copy=True)


def _states(saved: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """The name of every parameter, itself, and its saved state; {} where it has none."""
    for number, (group, other) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        for name, parameter, key in zip(names_of(group, number), group["params"], other["params"], strict=True):
            yield name, parameter, saved["state"].get(key, {})


def _check_adam(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    missing = sorted(_ADAM - set(state))
    if missing:
        raise UserError(f"{name}: the saved optimizer keeps no {missing[0]}: it is not Adam")
    shape = state["exp_avg"].shape
    if shape != parameter.shape:
        raise UserError(f"{name} has shape {tuple(parameter.shape)}, and {tuple(shape)} in the saved optimizer")


def _check_pruned(weight: Weight, state: Mapping[str, Any], splitting: Splitting, *, frozen: bool) -> None:
    """Checks that the state has a support and everything a dual update needs, in this optimizer's format."""
    name, shape = weight.name, weight.parameter.shape
    if "mask" not in state:
        raise _unlike(f"{name} is to be pruned, and was dense in the saved optimizer")
    if state["mask"].shape != torch.Size((*shape[:-1], bits.packed_width(shape[-1]))):
        raise UserError(f"{name}: the support in the saved optimizer is not one of a weight of shape {tuple(shape)}")
    anchors, moments, held = splitting.anchors, splitting.moments, dict(state)
    if not (anchors.stored(held) and moments.stored(weight.parameter, held)):
        raise _unlike(f"{name}: the saved optimizer keeps anchors or moments in another format")
    if frozen:
        return
    if splitting.held and "anchor" in state:
        raise _unlike(f"{name}: the saved optimizer had a finite penalty, and this one has an infinite one")
    if not splitting.held and "anchor" not in state:
        raise _unlike(f"{name}: the saved optimizer had an infinite penalty, and this one has a finite one")
    if splitting.score.clean and "fisher" not in state:
        raise _unlike(
            f"{name}: the saved optimizer keeps no average of squared gradients, which the score of this one, "
            'Score(fisher="clean"), needs'
        )


def _unlike(difference: str) -> UserError:
    return UserError(f"{difference}: construct this optimizer with the settings of the saved one")
