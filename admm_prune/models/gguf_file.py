"""GGUF files: dequantized by transformers, and checked for what it would leave out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from admm_prune.errors import UserError

_FREQUENCIES = "rope_freqs.weight"  # factors of the rotary frequencies, as of Llama 3.1


def is_gguf(path: Path) -> bool:
    """True where the name of a file ends as that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def check_gguf(source: str, file: Path) -> None:
    """Raises UserError where a file does not begin as GGUF does, or the package that reads it is missing."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{source}: not a GGUF file")
    if find_spec("gguf") is None:
        raise UserError(f"{source}: reading GGUF needs the package gguf: pip install 'admm-prune[gguf]'")


def place_of(location: Path | str) -> tuple[Path | str, dict[str, str]]:
    """The folder or Hub id for a `from_pretrained` of transformers, and its option that names a GGUF file."""
    if isinstance(location, Path) and is_gguf(location):
        return location.parent, {"gguf_file": location.name}
    return location, {}


def dequantized(file: Path, dtype: torch.dtype | str | None) -> tuple[Any, dict[str, Any]]:
    """The model of a GGUF file, its weights dequantized, and what transformers says of its loading."""
    import transformers

    place, option = place_of(file)
    # Releases that can leave the weights quantized have this class.
    kind: Any = getattr(transformers, "GgufConfig", None)
    how = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    result: Any = transformers.AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype or torch.float32, output_loading_info=True, **how, **option
    )
    model, information = result
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)  # the weights are dequantized, and saved as they are
    return model, information


def check_all_read(source: str, file: Path, model: Any, information: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuses a GGUF file of whose blocks, or of whose positions, transformers leaves something out.

    Args:
        model, information: from `dequantized`.

    Returns:
        A note on other tensors that are not used.

    Raises:
        UserError: the message names a tensor, or the kind of scaling of the positions.
    """
    from gguf import GGUFReader

    reader: Any = GGUFReader(file)
    architecture = _metadata(reader, "general.architecture")
    scaling = _scaling(reader, architecture)
    if scaling is not None and _rope_type(model) == "default":
        raise UserError(
            f"{source}: its positions are scaled ({scaling}), which transformers does not read from GGUF: every figure "
            "would be of another model; take the original model"
        )
    unread = _unread(model, architecture, [tensor.name for tensor in reader.tensors], information) - {_FREQUENCIES}
    blocks = sorted(name for name in unread if name.startswith(("blk.", "model.layers.")))
    if blocks:
        raise UserError(
            f"{source}: transformers has no place for {blocks[0]} ({len(blocks)} such in all): every figure would be "
            "of another model; take the original model"
        )
    if not unread:
        return ()
    return (f"{len(unread)} tensors of the file are not used by the model, nor saved, such as {min(unread)}",)


def _unread(model: Any, architecture: str, names: list[str], information: Mapping[str, Any]) -> set[str]:
    """The tensors, of these names, that transformers did not load; by its own names where it tells them itself."""
    from transformers import modeling_gguf_pytorch_utils as loader

    if _reports_unread(architecture):
        return set(information["unexpected_keys"])
    kind: Any = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)
    known: Any = loader.get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    # Stacked experts are known without the ending.
    return {name for name in names if name not in known and name.removesuffix(".weight") not in known}


def _reports_unread(architecture: str) -> bool:
    """Whether transformers reads an architecture in the newer of its two ways, which tells what it leaves out."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:  # an earlier release
        return False
    return is_gguf_arch_supported(architecture)


def _metadata(reader: Any, name: str) -> Any:
    """A value of a file's metadata; None without it."""
    from transformers.modeling_gguf_pytorch_utils import read_field

    return next(iter(read_field(reader, name)), None)


def _scaling(reader: Any, architecture: str) -> str | None:
    """How a file scales the rotary frequencies; None where it does not."""
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _FREQUENCIES), np.ones(1))
    if not np.all(factors == 1):
        return _FREQUENCIES
    kind = _metadata(reader, f"{architecture}.rope.scaling.type")
    factor = _metadata(reader, f"{architecture}.rope.scaling.factor")
    return None if kind in (None, "none") or factor == 1 else f"rope.scaling.type {kind}"


def _rope_type(model: Any) -> str:
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))
