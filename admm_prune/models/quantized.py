"""Checkpoints of quantized weights: dequantized while they are read, or refused before anything is."""

from __future__ import annotations

from typing import Any, cast

from admm_prune.data.hub import first_line, quiet
from admm_prune.errors import UserError


def dequantizer(source: str, config: Any) -> Any:
    """What turns the quantized weights of a checkpoint into floats as they are read; None where they are floats.

    The config is changed to say so: `from_pretrained` then dequantizes too, on every device.

    Args:
        source: as the user named the model.
        config: of the model.

    Returns:
        A quantizer of transformers, or None.

    Raises:
        UserError: transformers cannot dequantize this kind while it loads; the message names the kind.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = dict(settings if isinstance(settings, dict) else settings.to_dict())
    method = settings.get("quant_method") or "unknown method"
    refusal = f"{source}: its weights are quantized ({getattr(method, 'value', method)})"
    remedy = "prune the model that they were made of, or dequantize them and save the result"
    settings["dequantize"] = True
    try:
        with quiet():
            # What it has beyond its base class depends on the method, which no type of transformers says.
            quantizer = cast("Any", AutoHfQuantizer.from_config(settings, pre_quantized=True))
            quantizer.validate_environment()
    except (ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{refusal}, which cannot be read here ({first_line(error)}): {remedy}") from error
    if "dequantize" not in quantizer.get_load_operations() or not quantizer.quantization_config.dequantize:
        raise UserError(f"{refusal}, and only floats can be pruned: {remedy}")
    config.quantization_config = settings
    return quantizer
