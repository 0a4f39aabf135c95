"""Adapters of PEFT in a model or in a folder, recognised without importing peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from admm_prune.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"  # what `PeftModel.save_pretrained` writes

# PEFT's modules hold the adapted module, or full copies of it, under these names; everything else is an adapter.
_ADAPTED = {"base_layer", "base_model", "lora_model", "model", "modules_to_save", "original_module", "token_adapter"}


def check_no_adapters(source: str, what: nn.Module | Path) -> None:
    """Refuses a model, or a folder, that has adapters beside its weights.

    Adapters are not matrices of the model and would be lost.

    Raises:
        UserError: it has adapters; the message says how to merge them.
    """
    if isinstance(what, nn.Module):
        adapter = next(
            (name or type(module).__name__ for name, module in what.named_modules() if _is_peft(module)), None
        )
        if adapter is not None:
            raise UserError(
                f"{source}: the model has PEFT adapters ({adapter}): merge them first, with "
                "admm_prune.merge_lora(model) under the zeros of a pruned model, or with model.merge_and_unload()"
            )
    elif (what / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{source}: there is a PEFT adapter in it ({ADAPTER_CONFIG}), which would be lost: load model and adapter "
            "with peft.PeftModel.from_pretrained, merge them with admm_prune.merge_lora(model) or "
            "model.merge_and_unload(), and save the merged model to a new folder"
        )


def check_repository(source: str) -> None:
    """Refuses a Hub repository with an adapter, where only the config is read.

    Raises:
        UserError: as `check_no_adapters`.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    config_file = find_adapter_config_file(source)
    if config_file is not None:
        check_no_adapters(source, Path(config_file).parent)


def adapter_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter that belongs to an adapter alone, of any of PEFT's methods."""
    inside: set[int] = set()
    for module in model.modules():
        if _is_peft(module):
            inside |= {id(parameter) for parameter in module.parameters(recurse=False)}
            for name, child in module.named_children():
                if name not in _ADAPTED:
                    inside |= {id(parameter) for parameter in child.parameters()}
    return inside - {id(parameter) for parameter in _adapted(model)}


def _adapted(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are reached without entering an adapter."""
    peft = _is_peft(module)
    if not peft:
        yield from module.parameters(recurse=False)
    for name, child in module.named_children():
        if not peft or name in _ADAPTED:
            yield from _adapted(child)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every module in which PEFT adapts another, such as `lora.Linear`."""
    for name, module in model.named_modules():
        layer: Any = module
        if _is_peft(module) and hasattr(layer, "get_base_layer"):
            yield name, layer


def saved_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, wrapper) of every module that PEFT trains a full copy of (`modules_to_save`)."""
    for name, module in model.named_modules():
        if _is_peft(module) and isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            yield name, module


def _is_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)
