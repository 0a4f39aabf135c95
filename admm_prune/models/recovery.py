"""Training after pruning that keeps the zeros: any torch optimizer under a mask, and LoRA merged under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.kernels import bits


class KeptSparsity:
    """Holds a model to its zeros while an optimizer trains it; made by `keep_sparsity`.

    Before each of the optimizer's steps the gradients of pruned weights are set to zero, so that moments and clipping
    know nothing of them; after it the weights are. Whenever the model's state is taken (`state_dict`, and with it
    `save_pretrained`, checkpoints of a trainer) the mask is asserted. One bit a weight is kept.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._kept = {
            name: (parameter, bits.pack(parameter.detach().flatten() != 0))
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and bool((parameter == 0).any())
        }
        if not self._kept:
            raise UserError("the model has no zeros to keep: prune it first")
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(lambda *_: self._hold_gradients()),
            optimizer.register_step_post_hook(lambda *_: self._hold_weights()),
            model.register_state_dict_pre_hook(lambda *_: self.check()),
        ]

    @property
    def masks(self) -> dict[str, Tensor]:
        """True where a weight is kept, by parameter name."""
        return {name: self._mask(parameter, packed) for name, (parameter, packed) in self._kept.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the matrices that hold any."""
        sizes = sum(parameter.numel() for parameter, _ in self._kept.values())
        kept = sum(int(self._mask(parameter, packed).count_nonzero()) for parameter, packed in self._kept.values())
        return 1 - kept / sizes

    def check(self) -> None:
        """Asserts the mask.

        Raises:
            UserError: a pruned weight is no longer zero; the message names its matrix.
        """
        for name, (parameter, packed) in self._kept.items():
            alive = int((parameter.detach() != 0).logical_and_(~self._mask(parameter, packed)).count_nonzero())
            if alive:
                raise UserError(
                    f"{name}: {alive} pruned weights are no longer zero: something wrote to them beside the optimizer "
                    "that keep_sparsity was given"
                )

    def remove(self) -> None:
        """Lets the model and the optimizer go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hold_gradients(self) -> None:
        for parameter, packed in self._kept.values():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~self._mask(parameter, packed), 0)

    @torch.no_grad()
    def _hold_weights(self) -> None:
        for parameter, packed in self._kept.values():
            parameter.masked_fill_(~self._mask(parameter, packed), 0)

    @staticmethod
    def _mask(parameter: Tensor, packed: Tensor) -> Tensor:
        return bits.unpack(packed.to(parameter.device), parameter.numel()).view(parameter.shape)


def keep_sparsity(model: nn.Module, optimizer: torch.optim.Optimizer) -> KeptSparsity:
    """Keeps every zero of a pruned model at zero while `optimizer` trains it: any torch optimizer, any loop or trainer.

        kept = keep_sparsity(model, optimizer)
        ...                                        # train as ever
        model.save_pretrained(out)                 # the mask is asserted

    Args:
        model: pruned; every parameter of two dimensions or more that holds a zero is held to its zeros.
        optimizer: whose steps train it.

    Raises:
        UserError: the model has no zeros.
    """
    return KeptSparsity(model, optimizer)


@dataclass(frozen=True)
class MergedWeight:
    """A weight that took in its adapters.

    Attributes:
        sparsity: the fraction of its zeros, before and after.
        dropped: |dW off the mask|^2 / |dW|^2, the share of the adapters' change that the mask did not let through.
    """

    name: str
    sparsity: float
    dropped: float


@torch.no_grad()
def merge_lora(model: nn.Module) -> tuple[nn.Module, list[MergedWeight]]:
    """W <- W + M * (s B A) for every LoRA layer, M the non-zeros of W: what was pruned stays pruned.

    A plain merge fills the zeros: W + s B A is dense. What an adapter learned for pruned weights is lost here, and
    `dropped` says how much that was.

    Args:
        model: of peft, with plain LoRA adapters on weights that are not quantized; changed in place.

    Returns:
        The model without its adapters, and what became of every weight.

    Raises:
        UserError: no LoRA layers; adapters that are merged already, that are no plain sum (DoRA) or come with a bias.
    """
    layers = list(_lora_layers(model))
    if not layers:
        raise UserError("the model has no LoRA layers: give the model that peft.get_peft_model made")
    for name, layer in layers:
        _check_plain(name, layer)
    merged = []
    for name, layer in layers:
        weight: nn.Parameter = layer.base_layer.weight
        kept = weight != 0
        change = torch.zeros_like(weight, dtype=torch.float32)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                change += layer.get_delta_weight(adapter).float()
        energy = float(change.square().sum())
        within = change.masked_fill_(~kept, 0)
        weight.copy_((weight.float() + within).to(weight.dtype))
        sparsity = 1 - int(kept.count_nonzero()) / kept.numel()
        dropped = 1 - float(within.square().sum()) / energy if energy > 0 else 0.0
        merged.append(MergedWeight(f"{name}.weight", sparsity, max(0.0, dropped)))
    unload: Callable[[], nn.Module] | None = getattr(model, "unload", None)
    return (model if unload is None else unload()), merged


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with LoRA adapters, told by what they have: this module must not load peft."""
    for name, module in model.named_modules():
        layer: Any = module
        if all(hasattr(layer, part) for part in ("lora_A", "get_delta_weight", "base_layer")) and len(layer.lora_A) > 0:
            yield name.removeprefix("base_model.model."), layer


def _check_plain(name: str, layer: Any) -> None:
    if getattr(layer, "merged", False):
        raise UserError(f"{name}: its adapters are merged already: merge_lora needs them apart")
    if any(getattr(layer, "use_dora", {}).values()) or any(getattr(layer, "lora_bias", {}).values()):
        raise UserError(f"{name}: DoRA and LoRA with a bias are no plain sum of matrices: they cannot be merged here")
    if not layer.base_layer.weight.is_floating_point():
        raise UserError(f"{name}: its weight is quantized: load the model in float32, bfloat16 or float16")
