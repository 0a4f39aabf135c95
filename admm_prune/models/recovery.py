"""Training after pruning that preserves the zeros: any torch optimizer under a mask, and merging of LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.adapters import adapter_parameters, saved_modules, tuner_layers
from admm_prune.models.structure import assign
from admm_prune.ops import bits
from admm_prune.prunable import uncompiled


class _Masked:
    """A pruned parameter and its mask, one bit per weight.

    The parameter is looked up where it was, in all modules that share it: `load_state_dict(assign=True)` replaces it,
    in each of them by another one.

    Its methods are the hooks of a module's `state_dict`: a deep copy or a pickle of the module copies them too, and
    they then refer to the copy's own parameter.
    """

    def __init__(self, name: str, parameter: nn.Parameter, places: list[tuple[nn.Module, str]]) -> None:
        self.name, self.places, self._parameter = name, places, parameter
        self.shape = parameter.shape
        self._mask_bits = bits.pack(parameter.detach().flatten() != 0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are there now; the first one where none is, because another module holds it by now."""
        present = [dict(owner.named_parameters(recurse=False)).get(attribute) for owner, attribute in self.places]
        return list({id(p): p for p in present if p is not None}.values()) or [self._parameter]

    @property
    def mask(self) -> Tensor:
        """True where a weight is kept."""
        return self._mask_on(self.parameters[0].device)

    def _mask_on(self, device: torch.device) -> Tensor:
        return bits.unpack(self._mask_bits.to(device), self.shape.numel()).view(self.shape)

    def check(self, *_: object) -> None:
        for parameter in self.parameters:
            if parameter.shape != self.shape:
                raise UserError(
                    f"{self.name}: it was replaced by a parameter of shape {tuple(parameter.shape)}, which the mask of "
                    f"shape {tuple(self.shape)} does not fit: call keep_sparsity with the new model"
                )
            alive = int((parameter.detach() != 0).logical_and_(~self._mask_on(parameter.device)).count_nonzero())
            if alive:
                raise UserError(
                    f"{self.name}: {alive} pruned weights are no longer zero: something wrote to them beside the "
                    "optimizer that keep_sparsity was given (a copy of the model needs keep_sparsity with its own "
                    "optimizer)"
                )

    def restrict_gradient(self, *_: object) -> None:
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            mask = self._mask_on(parameter.device)
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                values = gradient.values() * mask[tuple(gradient.indices())]
                parameter.grad = torch.sparse_coo_tensor(
                    gradient.indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
                )
            else:
                gradient.masked_fill_(~mask, 0)

    def restrict_weight(self) -> None:
        for parameter in self.parameters:
            if parameter.requires_grad or parameter.grad is not None:  # else no optimizer writes to it
                parameter.masked_fill_(~self._mask_on(parameter.device), 0)


class KeptSparsity:
    """Keeps the zeros of a model while an optimizer trains it; returned by `keep_sparsity`.

    As a gradient is accumulated its entries at pruned weights are set to zero, so that moments, clipping and reported
    norms are those of the kept weights; after every step of the optimizer the pruned weights are. Whenever the state
    of the model, or of a part of it, is taken (`state_dict`, and with it `save_pretrained` and a trainer's
    checkpoints) the mask is asserted. The mask takes one bit per weight. It applies to the
    parameter that is now in the place of the pruned one, such as one that `load_state_dict(assign=True)` put there; its
    gradient is masked as it is accumulated from the next step of the optimizer on, and before that at the step.

    A deep copy of the model, or one that was pickled, asserts its own mask. Copied together with the model and the
    optimizer, as `copy.deepcopy((model, optimizer, kept))`, this object holds the copies.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for owner in model.modules():
            for attribute, parameter in owner.named_parameters(recurse=False):
                places.setdefault(id(parameter), []).append((owner, attribute))
        self._masked = [_Masked(name, parameter, places[id(parameter)]) for name, parameter in _pruned(model)]
        if not self._masked:
            raise UserError("the model has no zeros to keep: prune it first")
        # Registered at the modules that own the parameter, so that it also works for wrappers and submodules.
        self._checks: list[Any] = [
            owner.register_state_dict_pre_hook(masked.check) for masked in self._masked for owner, _ in masked.places
        ]
        self._hooks: list[Any] = []
        self._on_gradients: dict[int, tuple[nn.Parameter, Any]] = {}  # by the `id` of the parameter that has the hook
        self._attach()

    @property
    def masks(self) -> dict[str, Tensor]:
        """True where a weight is kept, by parameter name."""
        return {masked.name: masked.mask for masked in self._masked}

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the matrices that are held."""
        sizes = sum(masked.shape.numel() for masked in self._masked)
        return 1 - sum(int(masked.mask.count_nonzero()) for masked in self._masked) / sizes

    def check(self) -> None:
        """Asserts the mask.

        Raises:
            UserError: a pruned weight is no longer zero, or a parameter was replaced by one of another shape; the
                message names its matrix.
        """
        for masked in self._masked:
            masked.check()

    def remove(self) -> None:
        """Removes all hooks from the model and the optimizer."""
        for hook in (*self._hooks, *self._checks, *(hook for _, hook in self._on_gradients.values())):
            hook.remove()
        self._hooks.clear()
        self._on_gradients.clear()
        self._checks.clear()

    def _attach(self) -> None:
        self._attach_to_gradients()
        self._hooks.append(self._optimizer.register_step_pre_hook(self._restrict_gradients))
        self._hooks.append(self._optimizer.register_step_post_hook(self._restrict_weights))

    def _attach_to_gradients(self) -> None:
        """Registers hooks at the parameters that are there now, and removes those of replaced ones."""
        present = {id(p): (masked, p) for masked in self._masked for p in masked.parameters if p.is_floating_point()}
        for number in self._on_gradients.keys() - present.keys():
            self._on_gradients.pop(number)[1].remove()
        for number, (masked, parameter) in present.items():
            if number not in self._on_gradients:
                self._on_gradients[number] = parameter, _after_accumulation(masked, parameter)

    def _restrict_gradients(self, *_: object) -> None:
        """For gradients that were assigned, not accumulated."""
        self._attach_to_gradients()
        for masked in self._masked:
            masked.restrict_gradient()

    @torch.no_grad()
    def _restrict_weights(self, *_: object) -> None:
        for masked in self._masked:
            masked.restrict_weight()

    # Parameters and optimizers are copied and pickled without their hooks, modules with them.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": [], "_on_gradients": {}, "attached": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        self.__dict__.update(state)
        if attached:
            self._attach()


def keep_sparsity(model: nn.Module, optimizer: torch.optim.Optimizer) -> KeptSparsity:
    """Keeps every zero of a pruned model while `optimizer` trains it: any torch optimizer, any loop or trainer.

        kept = keep_sparsity(model, optimizer)
        ...                                        # train as usual
        model.save_pretrained(out)                 # the mask is asserted

    Args:
        model: pruned. The mask covers every parameter of two dimensions or more that has zeros, except
            matrices of zeros alone, such as a new head, and PEFT adapters. If other matrices have initial zeros
            that are to be trained, pass the pruned part of the model.
        optimizer: trains the model.

    Raises:
        UserError: the model has no zeros, or its parameters are sharded or not in memory.
    """
    return KeptSparsity(model, optimizer)


def _pruned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the model with zeros among their entries, except adapters and matrices of zeros alone."""
    adapters = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in adapters:
            continue
        if parameter.is_meta or hasattr(parameter, "device_mesh"):
            raise UserError(
                f"{name}: the parameter is sharded or not in memory: SparseAdam(freeze=1) trains a model under FSDP"
            )
        if _mask_of(parameter) is not None:
            yield uncompiled(name), parameter


def _after_accumulation(masked: _Masked, parameter: nn.Parameter) -> Any:
    """Registers the hook; of a frozen parameter too, which may be trained later."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        return parameter.register_post_accumulate_grad_hook(masked.restrict_gradient)
    finally:
        parameter.requires_grad_(trained)


def _mask_of(weight: Tensor) -> Tensor | None:
    """True where a weight is not zero; None where nothing was pruned: no entry is zero, or all are."""
    mask = weight.detach() != 0
    return mask if 0 < int(mask.count_nonzero()) < mask.numel() else None


@dataclass(frozen=True)
class MergedWeight:
    """A weight merged with its adapters, or replaced by its trained copy.

    Attributes:
        sparsity: the fraction of its zeros, before and after.
        dropped: |dW off the mask|^2 / |dW|^2, the fraction of the update removed by the mask.
    """

    name: str
    sparsity: float
    dropped: float


@torch.no_grad()
def merge_lora(model: nn.Module) -> tuple[nn.Module, list[MergedWeight]]:
    """W <- W + M * (s B A) for every LoRA layer, M the non-zeros of W: pruned weights stay zero.

    A plain merge fills the zeros: W + s B A is dense. Updates of pruned weights are dropped, and
    `dropped` reports their fraction. Weights of linear layers, embeddings, convolutions and stacked experts
    (`target_parameters`) are merged; trained copies (`modules_to_save`) replace their originals, under the mask too. A
    weight of zeros alone, or without any, has no mask. Adapters that are not active are left out, as by
    `merge_and_unload`. Where an embedding and a head share a weight and only one of them was adapted, they are
    separated, and the config says so.

    Args:
        model: of peft, with plain LoRA adapters on weights that are not quantized; changed in place.

    Returns:
        The model without its adapters, and every weight that changed.

    Raises:
        UserError: no LoRA layers; adapters that are disabled or merged already, that are no plain sum (DoRA) or come
            with a bias; other adapters than LoRA. Nothing was merged then. Or a merged weight overflows in its dtype:
            those before it, in the order of the modules, are changed.
    """
    layers = list(tuner_layers(model))
    if not layers:
        raise UserError("the model has no LoRA layers: pass the model returned by peft.get_peft_model")
    for name, layer in layers:
        _check_plain(_plain_name(name), layer)
    if not any(_active(layer) for _, layer in layers):
        raise UserError("none of the model's adapters is active: choose one with model.set_adapter(name)")
    tied = _untied(model, [layer for _, layer in layers if _active(layer)])
    merged = [_merge(_plain_name(name), layer) for name, layer in layers if _active(layer)]
    merged += [one for name, wrapper in saved_modules(model) for one in _restrict_copy(_plain_name(name), wrapper)]
    for owner, attribute, other in tied:
        if _alike(getattr(owner, attribute), other):
            setattr(owner, attribute, other)
    return _unloaded(model), merged


def _active(layer: Any) -> list[str]:
    """The adapters of a LoRA layer that take part in its output."""
    adapters = {*layer.lora_A, *layer.lora_embedding_A}
    return [adapter for adapter in layer.active_adapters if adapter in adapters]


def _plain_name(name: str) -> str:
    """The name that a module has in the model without adapters."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
    return ".".join(parts)


def _weight_name(layer: Any) -> str:
    return getattr(layer, "parameter_name", "weight")  # of a layer that adapts a parameter, not a module


def _check_plain(name: str, layer: Any) -> None:
    if not hasattr(layer, "lora_embedding_A") or not hasattr(layer, "get_delta_weight"):
        kind = f"{type(layer).__module__.split('.')[-2]}.{type(layer).__name__}"
        raise UserError(f"{name}: an adapter of the kind {kind} cannot be merged here, only LoRA can")
    if getattr(layer, "merged", False):
        raise UserError(f"{name}: its adapters are merged already: merge_lora needs them unmerged")
    if layer.disable_adapters:
        raise UserError(f"{name}: its adapters are disabled: call enable_adapter_layers() of the model first")
    for adapter in _active(layer):
        if adapter in layer.lora_variant or layer.use_dora.get(adapter) or layer.lora_bias.get(adapter):
            raise UserError(
                f"{name}: DoRA and LoRA with a bias are no plain sum of matrices, nor are other variants: they cannot "
                "be merged here"
            )
    weight = getattr(layer.get_base_layer(), _weight_name(layer), None)
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or not weight.is_floating_point():
        raise UserError(f"{name}: its weight is quantized: load the model in float32, bfloat16 or float16")
    if weight.is_meta:
        raise UserError(f"{name}: its weight is not in memory: load the model without offloading")


def _merge(name: str, layer: Any) -> MergedWeight:
    """W <- W + M * change, rounded once."""
    weight: nn.Parameter = getattr(layer.get_base_layer(), _weight_name(layer))
    change = torch.zeros_like(weight, dtype=torch.float32)
    for adapter in _active(layer):
        change += layer.get_delta_weight(adapter).to(change)
    mask, dropped = _mask_of(weight), 0.0
    if mask is not None:
        dropped = _energy_off(mask, change)
        change.masked_fill_(~mask, 0)
    merged = (weight.float() + change).to(weight.dtype)
    if bool(change.isfinite().all()) and not bool(merged.isfinite().all()):
        raise UserError(
            f"{name}: the merged weight is beyond the range of {merged.dtype}: load the model in another dtype and "
            "merge there"
        )
    weight.copy_(merged)
    return MergedWeight(f"{name}.{_weight_name(layer)}", _sparsity(mask), dropped)


def _restrict_copy(name: str, wrapper: Any) -> Iterator[MergedWeight]:
    """Applies the mask of the original to the trained copy of a module."""
    if not wrapper.active_adapters:
        return
    copy: nn.Module = wrapper.modules_to_save[wrapper.active_adapter]
    trained = dict(copy.named_parameters())
    for parameter_name, original in wrapper.original_module.named_parameters():
        weight = trained.get(parameter_name)
        if weight is None or weight.ndim < 2:
            continue
        mask, dropped = _mask_of(original), 0.0
        if mask is not None:
            dropped = _energy_off(mask, weight.float() - original.float())
            weight.masked_fill_(~mask, 0)
        yield MergedWeight(f"{name}.{parameter_name}", _sparsity(mask), dropped)


def _sparsity(mask: Tensor | None) -> float:
    return 0.0 if mask is None else 1 - int(mask.count_nonzero()) / mask.numel()


def _energy_off(mask: Tensor, change: Tensor) -> float:
    """The fraction of |change|^2 off the mask."""
    whole, off = (float(x.square().sum(dtype=torch.float64)) for x in (change, change.masked_fill(mask, 0)))
    return 0.0 if whole == 0 else off / whole  # NaN stays NaN


def _untied(model: nn.Module, layers: list[Any]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Copies every adapted weight that is shared with other modules.

    Returns:
        (module, name, the weight as the others have it) of each.
    """
    untied = []
    for layer in layers:
        owner, attribute = layer.get_base_layer(), _weight_name(layer)
        weight: nn.Parameter = getattr(owner, attribute)
        places = {
            (id(module), name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter is weight
        }
        if len(places) > 1:
            setattr(owner, attribute, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            untied.append((owner, attribute, weight))
    return untied


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: tied adapters give their products in another order of the factors."""
    return float((a.float() - b.float()).abs().max()) <= 8 * torch.finfo(a.dtype).eps * float(b.abs().max())


def _unloaded(model: nn.Module) -> nn.Module:
    """The model without adapters, and a config that says whether its embedding and head are still one."""
    unload = getattr(model, "unload", None)
    plain: nn.Module = model if unload is None else unload()
    if unload is None:  # adapters that were injected into a plain model
        for name, layer in reversed([*tuner_layers(model), *saved_modules(model)]):
            unload_layer = getattr(layer, "unload_and_optionally_merge_module", partial(_base_of, layer))
            assign(model, name, unload_layer(merge=False, safe_merge=False, adapter_names=None))
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(attribute, None)
    _record_ties(plain)
    return plain


def _base_of(layer: Any, **_: object) -> nn.Module:
    base: nn.Module = layer.get_base_layer()
    return base


def _record_ties(model: Any) -> None:
    """Updates in the config whether the embedding and the head still share a weight."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = (
        getattr(one, "weight", None) for one in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head is not None and embedding is not None and head is not embedding:
        for one in (config, config.get_text_config()):
            if getattr(one, "tie_word_embeddings", False):
                one.tie_word_embeddings = False
