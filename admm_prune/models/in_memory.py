"""Models passed as modules: unwraps them, and refuses those that cannot be pruned in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from admm_prune.errors import UserError
from admm_prune.models.checks import check_causal, check_vocabulary, embedding_rows
from admm_prune.models.loading import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER = "give the model's folder and out=, with stream=True where it does not fit in memory"


def given(model: Any, tokenizer: Any) -> LoadedModel:
    """Checks a causal language model of transformers that is in memory.

    A model under `torch.compile`, `DataParallel` or `DistributedDataParallel` is taken out of it: it is the same
    module, whose weights the wrapper shares.

    Raises:
        UserError: it has no tokenizer, is no causal language model with a head, is in training mode, or has weights
            that are not in memory, quantized, or spread over devices.
    """
    model = unwrapped(model)
    kind = type(model).__name__
    if tokenizer is None:
        raise UserError("a model given as a module needs its tokenizer beside it")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UserError(f"{kind} is no model of transformers: give a causal language model, its folder or its Hub id")
    if any(module.training for module in model.modules()):
        raise UserError("the model is in training mode, where it drops activations at random: call model.eval() first")
    _check_weights(kind, model)
    _check_head(kind, model)
    check_vocabulary(kind, tokenizer, model)
    check_causal(kind, model)
    return LoadedModel(cast("PreTrainedModel", model), tokenizer, kind, None)


def unwrapped(model: Any) -> Any:
    """The module inside `torch.compile` and wrappers for several devices."""
    while True:
        if hasattr(model, "_orig_mod"):  # of torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _check_weights(kind: str, model: Any) -> None:
    from torch.distributed.tensor import DTensor

    if any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules()):
        raise UserError(f"{kind}: its weights are sharded over processes: {_FOLDER}")
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise UserError(
            f"{kind}: its weights are quantized ({getattr(method, 'value', method)}), and only floats can be pruned: "
            "load it without quantization, or call model.dequantize() first"
        )
    devices = set()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UserError(f"{kind}: the weight {name} is sharded over processes: {_FOLDER}")
        if parameter.is_meta:
            raise UserError(
                f"{kind}: the weight {name} is not in memory but offloaded or on the meta device: {_FOLDER}"
            )
        devices.add(parameter.device)
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(f"{kind}: its weights are on several devices ({names}): load it on one of them, or {_FOLDER}")


@torch.no_grad()
def _check_head(kind: str, model: Any) -> None:
    """Raises UserError where a model does not give a logit for every token id at every token."""
    if getattr(model.config, "is_encoder_decoder", False):
        return  # refused later, with its blocks
    device = next(model.parameters()).device
    ids = torch.tensor([[2, 3]], device=device)
    try:
        logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        logits = None
    vocabulary_sizes = {embedding_rows(model), getattr(model.config.get_text_config(), "vocab_size", None)} - {None}
    if logits is None or logits.ndim != 3 or (vocabulary_sizes and logits.shape[-1] not in vocabulary_sizes):
        raise UserError(
            f"{kind} gives no logits for the next token: load the model with AutoModelForCausalLM.from_pretrained"
        )
