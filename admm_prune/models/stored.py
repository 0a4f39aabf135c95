"""Compares safetensors files with the model of their config, by their headers.

Quantized weights are dequantized while they are read, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from inspect import signature
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from admm_prune.data.hub import first_line, quiet
from admm_prune.errors import UserError
from admm_prune.models.checkpoint import FLOATS, Checkpoint
from admm_prune.models.structure import Block, assign, decoder_blocks

_WHOLE = ("I", "U", "BOOL")  # prefixes of the names of dtypes that are not floats
_MASKED = ".masked_bias"  # the constant -1e4 of causal masks, saved with GPT-2, GPT-Neo and GPT-J by early releases


def shapes(kind: Any, config: Any, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model of a config on the meta device, in evaluation mode: all of its shapes, no weights.

    Args:
        kind: its class, or an auto class.
        dtype: of the weights; None takes the config's, as `from_pretrained(dtype="auto")` does.
    """
    auto = hasattr(kind, "from_config")
    build = kind.from_config if auto else kind._from_config
    code = {"trust_remote_code": trust_remote_code} if auto else {}
    with torch.device("meta"):
        model = build(config, dtype=dtype or config.dtype, **code).eval().requires_grad_(False)
    _keep_precision(model)
    return model


def _keep_precision(model: Any) -> None:
    """Casts to float32 the modules that a class keeps in float32 in half precision, as `from_pretrained` does."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(model.config.dtype or model.dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    parameters = dict(model.named_parameters())
    for name, tensor in {**parameters, **dict(model.named_buffers())}.items():
        if pattern.search(name) and tensor.is_floating_point():
            replacement = torch.empty_like(tensor, dtype=torch.float32)
            assign(model, name, nn.Parameter(replacement, False) if name in parameters else replacement)


def compute_buffers(model: Any, unset: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Initializes buffers that are not in the files with the values of the model's class, as `from_pretrained` does.

    Args:
        model: of transformers; its parameters and other buffers are left as they are.
        unset: its buffers without values, by name.

    Returns:
        The names of those that the class does not initialize.
    """
    from transformers import PreTrainedModel

    if not unset:
        return []
    held = {name: buffer for name, buffer in model.named_buffers() if name not in unset}
    for tensor in (*model.parameters(), *held.values()):
        tensor._is_hf_initialized = True  # of transformers: not to be initialized
    made: list[dict[str, Tensor]] = []
    for value in (0, 1):  # the computed values do not depend on the previous ones
        for name, buffer in unset.items():
            assign(model, name, torch.full_like(buffer, value, device=device))
        owners: dict[str, Any] = {}  # the innermost model that a module is part of, which initializes it
        for name, module in model.named_modules():
            outer = owners.get(name.rpartition(".")[0], model)
            owners[name] = module if isinstance(module, PreTrainedModel) else outer
        for name, module in reversed(list(model.named_modules())):  # a model sets some buffers of its parts
            owners[name]._init_weights(module)
        made.append({name: model.get_buffer(name) for name in unset})
    return [name for name in unset if not torch.equal(made[0][name], made[1][name])]


def fill_buffers(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> list[str]:
    """Loads buffers, or computes those on the meta device by the model's class if they are not in the files.

    Returns:
        The names of those that are neither.
    """
    unset: dict[str, Tensor] = {}
    for name, buffer in list(model.named_buffers()):
        if name in checkpoint:
            assign(model, name, checkpoint.read(name).to(buffer.dtype))
        elif buffer.is_meta:
            unset[name] = buffer
    return compute_buffers(model, unset, device)


def check_shape(source: str, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raises UserError where a stored weight has not the shape of the model's."""
    if tuple(shape) != tuple(expected):
        raise UserError(f"{source}: the weight {name} has shape {tuple(shape)}, config.json asks for {tuple(expected)}")


def check_finite(source: str, name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises UserError where a weight has NaN or Inf entries, or would have them in a dtype; makes no copy of it."""
    if not x.numel():
        return
    extremes = torch.stack(x.aminmax())  # NaN is both the least and the greatest
    if not bool(extremes.isfinite().all()):
        remedy = "the file is damaged, download it again"
        if x.dtype == torch.float16:
            remedy = f"they are beyond the range of float16, choose bfloat16 or float32; or {remedy}"
        raise UserError(f"{source}: the weight {name} has NaN or Inf entries: {remedy}")
    if dtype is not None and not bool(extremes.to(dtype).isfinite().all()):  # rounding is monotone
        largest, kind = float(extremes.abs().max()), str(dtype).removeprefix("torch.")
        raise UserError(
            f"{source}: the weight {name} has entries up to {largest:.3g}, too large for {kind}: "
            "choose bfloat16 or float32"
        )


def check_stored(source: str, model: Any, checkpoint: Checkpoint, *, dequantized: bool = False) -> tuple[str, ...]:
    """Refuses files whose weights differ from the model's: missing or extra ones in blocks, other shapes, no floats.

    Args:
        source: as the user named the model.
        model: its shapes; no weights are needed.
        checkpoint: adapted to the model.
        dequantized: the files hold quantized weights, which the checkpoint converts to floats.

    Returns:
        A note where the files hold weights outside of the blocks that the model does not use.

    Raises:
        UserError: the message names the weight.
    """
    expected = model.state_dict()
    headers = checkpoint.headers({stored for name in expected for stored in checkpoint.sources(name)})
    for name, tensor in sorted(expected.items()):
        for stored in checkpoint.sources(name):
            shape, dtype = headers[stored]
            if tensor.is_floating_point() and dtype not in FLOATS and not dequantized:
                form = "as integers" if dtype.startswith(_WHOLE) else "quantized"
                raise UserError(
                    f"{source}: the weight {stored} is stored {form} ({dtype}), not as floats of 16 bits or more"
                )
            if shape != tuple(tensor.shape) and not checkpoint.is_converted(name):
                raise UserError(
                    f"{source}: the weight {stored} has shape {shape}, config.json asks for {tuple(tensor.shape)}"
                )
    # Buffers that the class computes may be missing; a parameter would be drawn at random.
    optional = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ()) or "(?!)"
    computed = {name for name, _ in model.named_buffers() if re.search(optional, name)}
    absent = sorted(name for name in expected if name not in checkpoint and name not in computed)
    if absent:
        raise UserError(f"{source}: incomplete: the weights lack {absent[0]} ({len(absent)} missing in all)")
    return _check_surplus(source, model, checkpoint, dequantized=dequantized)


def _check_surplus(source: str, model: Any, checkpoint: Checkpoint, *, dequantized: bool) -> tuple[str, ...]:
    """Refuses tensors of blocks that the model has no place for: without them it is another model.

    Passed over are those that `from_pretrained` passes over without a warning, such as the extra prediction layer of
    DeepSeek-V3 (`_keys_to_ignore_on_load_unexpected`) and rotary frequencies; buffers that the class computes; and
    what quantized weights are stored with. Integers and `masked_bias`, which are of causal masks, are not refused.

    Returns:
        A note on the tensors that are not refused and not passed over.
    """
    unexpected = SimpleNamespace(missing_keys=set(), unexpected_keys=set(checkpoint.surplus.values()))
    model._adjust_missing_and_unexpected_keys(unexpected)
    known = {name for name, _ in model.named_buffers()}
    surplus = {stored: name for stored, name in checkpoint.surplus.items() if name in unexpected.unexpected_keys}
    surplus = {stored: name for stored, name in surplus.items() if name not in known}
    if dequantized:
        surplus = {stored: name for stored, name in surplus.items() if name.endswith(("weight", "bias"))}
    blocks: list[Block] = []
    with suppress(UserError):  # the command that prunes it reports the reason
        blocks = decoder_blocks(model)
    path = blocks[0].name.rpartition(".")[0] if blocks else None
    headers = checkpoint.headers(surplus)
    inside: list[str] = []
    for stored, name in surplus.items() if path else ():
        prefixes = (f"{path}.", f"{path}.".removeprefix(f"{model.base_model_prefix}."))
        number = next((name.removeprefix(p).partition(".")[0] for p in prefixes if name.startswith(p)), "")
        if not number.isdecimal():
            continue
        if int(number) >= len(blocks):
            raise UserError(f"{source}: the weights hold {stored}, but config.json asks for {len(blocks)} blocks only")
        if not headers[stored][1].startswith(_WHOLE) and not name.endswith(_MASKED):
            inside.append(stored)
    if inside:
        raise UserError(
            f"{source}: the weights hold {min(inside)}, for which the model of config.json has no place "
            f"({len(inside)} such in all): config.json is of another model than the weights"
        )
    if not surplus:
        return ()
    return (f"{len(surplus)} tensors of the checkpoint are not used by the model, nor saved, such as {min(surplus)}",)


def dequantizer(source: str, config: Any) -> Any:
    """The quantizer that dequantizes the weights of a checkpoint while they are read; None if they are floats.

    The config is changed accordingly: `from_pretrained` then dequantizes too, on every device.

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
    method = str(getattr(method, "value", method))
    refusal = f"{source}: its weights are quantized ({method})"
    remedy = "prune the original model, or dequantize them and save the result"
    if _stays_quantized(method):  # before transformers asks for a package that would not help
        raise UserError(f"{refusal}, and only floats can be pruned: {remedy}")
    settings["dequantize"] = True
    try:
        with quiet():
            # Its members beyond the base class depend on the method and are not typed in transformers.
            quantizer = cast("Any", AutoHfQuantizer.from_config(settings, pre_quantized=True))
            quantizer.validate_environment()
    except (ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{refusal}, which cannot be read here ({first_line(error)}): {remedy}") from error
    if "dequantize" not in quantizer.get_load_operations() or not quantizer.quantization_config.dequantize:
        raise UserError(f"{refusal}, and only floats can be pruned: {remedy}")
    config.quantization_config = settings
    return quantizer


def _stays_quantized(method: str) -> bool:
    """Whether transformers knows a method, and cannot dequantize its weights while it loads."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KINDS

    kind = KINDS.get(method, KINDS.get(f"{method}_4bit"))  # bitsandbytes has two names for one method
    return kind is not None and "dequantize" not in signature(kind).parameters
