"""Observes mixtures of experts: the rows that every expert's matrices read in the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from admm_prune.errors import UserError
from admm_prune.models.structure import WeightView, replaced_forward

_LINEAR = torch.nn.functional.linear
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)

Observe = Callable[[int, Tensor], None]
_Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def routed(
    views: Mapping[int, WeightView], observe: Observe, mask: Callable[[], Tensor], *, everything: bool
) -> Generator[None]:
    """Within it, `observe(number, rows)` is called with the inputs of the matrices of experts: rows (n, in).

    The experts' own forward runs, one expert after the other: the inputs of products with an expert's matrix are
    observed. It is called with real tokens only, so that no pad is ever routed; pads get zeros. On the meta device
    nothing is routed: every expert gets an equal share of the tokens.

    Args:
        views: matrices of experts, by number.
        mask: the real tokens (b * L,) of the current batch.
        everything: every token goes to all of these experts, wherever the router would have sent it.

    Raises:
        UserError: a module (named in the message) does not receive the router's assignment of tokens.
    """
    modules: dict[nn.Module, list[int]] = {}
    for view in views.values():
        of_module = modules.setdefault(view.module, [])
        if view.expert is not None and view.expert not in of_module:
            of_module.append(view.expert)
    names = {view.module: view.parameter_name.rpartition(".")[0] for view in views.values()}
    with ExitStack() as stack:
        for module, experts in modules.items():
            if next(module.parameters()).is_meta:
                module_views = {number: view for number, view in views.items() if view.module is module}
                stack.enter_context(_in_shares(module, module_views, observe, experts if everything else None))
                continue
            gate = _Gate(names[module], mask, experts if everything else None)
            stack.enter_context(_one_by_one(module))
            stack.enter_context(module.register_forward_pre_hook(gate.enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(gate.leave))
        stored = {number: view for number, view in views.items() if not view.parameter.is_meta}
        stack.enter_context(_Products(stored, observe))
        yield


class _Products(TorchFunctionMode):
    """Observes every product with a matrix of an expert, identified by its memory."""

    def __init__(self, views: Mapping[int, WeightView], observe: Observe) -> None:
        super().__init__()
        self._observe = observe
        self._numbers: dict[tuple[int, tuple[int, ...], bool], int] = {}
        for number, view in views.items():
            stored = view.read().T if view.transposed else view.read()
            self._numbers[stored.data_ptr(), tuple(stored.shape), view.transposed] = number

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (func is _LINEAR or func in _PRODUCTS) and len(args) > 1 and isinstance(args[1], Tensor):
            key = (args[1].data_ptr(), tuple(args[1].shape), func is not _LINEAR)
            number = self._numbers.get(key)
            if number is not None:
                self._observe(number, args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_shares(
    module: Any, views: Mapping[int, WeightView], observe: Observe, everything: list[int] | None
) -> Generator[None]:
    """Runs the experts' forward on empty rows, as many for each as with uniform routing."""
    forward = module.forward

    def in_shares(x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        count = module.num_experts if everything is None else len(everything)
        rows = len(x) if everything is not None else -(-choices.numel() // count)
        for _ in range(count):
            forward(x[:rows], choices[:rows, :1], weights[:rows, :1])
        for number, view in views.items():
            observe(number, x.new_empty(rows, view.shape[1]))
        return torch.empty_like(x)

    with replaced_forward(module, in_shares):
        yield


class _Gate:
    """Removes the pads from the inputs of a module of experts, and inserts zeros for them in its outputs."""

    def __init__(self, name: str, mask: Callable[[], Tensor], everything: list[int] | None) -> None:
        self._name, self._mask, self._everything = name, mask, everything

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        mask = self._mask()
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        choices = [x for x in given if not x.is_floating_point() and x.ndim == 2 and len(x) == len(mask)]
        if len(choices) != 1 or any(len(x) != len(mask) for x in given):
            raise UserError(f"{self._name}: it does not receive the tokens of each expert: it cannot be pruned")
        taken = {id(x): x[mask] for x in given}
        if self._everything is not None:
            choice, count = choices[0], len(taken[id(choices[0])])
            chosen = torch.tensor(self._everything, dtype=choice.dtype, device=choice.device)
            for x in given[1:]:
                if x.shape == choice.shape:
                    taken[id(x)] = x.new_zeros(count, len(chosen))
            taken[id(choice)] = chosen.expand(count, -1)
        swapped = [taken[id(x)] if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
        return tuple(swapped[: len(args)]), dict(zip(kwargs, swapped[len(args) :], strict=True))

    def leave(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(len(self._mask()), *output.shape[1:])
        whole[self._mask()] = output
        return whole


@contextmanager
def _one_by_one(module: Any) -> Generator[None]:
    """The experts' forward as its family writes it, one expert after the other, in place of a fused kernel."""
    config = getattr(module, "config", None)
    kernel = getattr(config, "_experts_implementation", None)
    if config is None or kernel is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = kernel
