"""Loads and saves causal language models in the `save_pretrained` format; checks those that are passed as modules."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from admm_prune.data.durable import give_default_mode, raising_os_errors
from admm_prune.data.hub import check_hub, expanded, fetch, first_line, is_repository, quiet
from admm_prune.errors import RemoteCodeError, UserError, named_extra
from admm_prune.models.adapters import check_no_adapters
from admm_prune.models.archive import PACK_MANIFEST
from admm_prune.models.checkpoint import FLOATS, INDEX, SINGLE, Checkpoint, indexed
from admm_prune.models.checks import check_causal, check_vocabulary, embedding_rows
from admm_prune.models.families import per_layer_class
from admm_prune.models.gguf_file import check_all_read, check_gguf, dequantized, is_gguf, place_of
from admm_prune.models.stored import check_finite, check_stored, dequantizer, shapes
from admm_prune.models.streaming import IN_MEMORY, ModelOnDisk, Offloading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
_WEIGHTS = (".gguf", ".safetensors")  # a name with such an ending is a file, not a Hub id
METADATA_KEY = "admm_prune"
_FOLDER = "give the model's folder and out=, with stream=True where it does not fit in memory"
_DESCRIBING = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")  # of the config, the tokenizer, the license


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode without gradients, its tokenizer, and where they come from.

    `revision` is the commit of the Hub repository, None for a local folder. `offloading` is where the weights are.
    `notes` are on tensors of its files that the model does not use.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    revision: str | None = None
    offloading: Offloading = IN_MEMORY
    notes: tuple[str, ...] = ()


def load(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a model and its tokenizer from safetensors, or from a GGUF file, whose weights are dequantized.

    Args:
        source: "embedded" (the model that comes with this package), a folder, a Hub id, or a .gguf file.
        device: where the model goes.
        dtype: of the weights; None keeps them as stored, and in float32 where they were quantized to GGUF.
        trust_remote_code: allow running code that comes with the model.

    Raises:
        UserError: there is no such model, or it is incomplete, broken, not causal, or has NaN or Inf entries.
    """
    folder, revision = _folder_of(source, trust_remote_code)
    model, notes = _load_model(source, folder, dtype, trust_remote_code)
    tokenizer = load_tokenizer(source, folder, trust_remote_code)
    check_vocabulary(source, tokenizer, model)
    # A buffer may hold minus infinity, as masks do.
    for name, tensor in model.named_parameters():
        check_finite(source, name, tensor)
    model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    check_causal(source, model)
    return LoadedModel(model, tokenizer, source, revision, notes=notes)


def from_module(model: Any, tokenizer: Any) -> LoadedModel:
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
        raise UserError(f"{kind} is not a model of transformers: pass a causal language model, a folder or a Hub id")
    if any(module.training for module in model.modules()):
        raise UserError("the model is in training mode, where it drops activations at random: call model.eval() first")
    _check_weights(kind, model)
    _check_head(kind, model)
    check_vocabulary(kind, tokenizer, model)
    check_causal(kind, model)
    return LoadedModel(cast("PreTrainedModel", model), tokenizer, kind, None)


def open_on_disk(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model whose weights are read from disk on demand, and its tokenizer.

    Args:
        source, device, dtype, trust_remote_code: as for `load`. A Hub id is downloaded into the local cache.

    Raises:
        UserError: as `load`.
    """
    folder, revision = _folder_of(source, trust_remote_code)
    if is_gguf(folder):
        raise UserError(f"{source}: a GGUF file is dequantized as a whole and cannot be streamed")
    with explained(source, folder), quiet():
        config, kind = kind_of(folder, trust_remote_code)
    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with explained(source, folder):
        on_disk = ModelOnDisk(folder, kind, config, device, named, source=source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, folder, trust_remote_code)
    check_vocabulary(source, tokenizer, on_disk.model)
    check_causal(source, on_disk.model, on_disk)
    return LoadedModel(on_disk.model, tokenizer, source, revision, on_disk, on_disk.notes)


def fingerprint(loaded: LoadedModel) -> str:
    """sha256 over the config and the `state_dict`, the same in memory and on disk."""
    offloading = loaded.offloading
    tensors = offloading.tensors() if isinstance(offloading, ModelOnDisk) else loaded.model.state_dict().items()
    digest = hashlib.sha256(loaded.model.config.to_json_string(use_diff=False).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(loaded: LoadedModel, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes a folder that standard `from_pretrained` loads: safetensors, zeros stored dense, dtype kept.

    Args:
        folder: made where it is missing; files of a model in it are overwritten.
        metadata: JSON values for the key "admm_prune" of `config.json`.

    Raises:
        OSError: it cannot be written.
    """
    config = loaded.model.config
    missing = object()
    before = config.__dict__.get(METADATA_KEY, missing)
    setattr(config, METADATA_KEY, metadata)
    try:
        with quiet(), raising_os_errors():
            if isinstance(loaded.offloading, ModelOnDisk):
                loaded.offloading.save(folder)
            else:
                for parameter in loaded.model.parameters():  # transformers can save no others that are tied
                    parameter.data = parameter.data.contiguous()
                loaded.model.save_pretrained(folder)
                for path in folder.glob("*.safetensors"):
                    give_default_mode(path)
            loaded.tokenizer.save_pretrained(folder)
    finally:  # the caller's model keeps its own metadata
        if before is missing:
            delattr(config, METADATA_KEY)
        else:
            setattr(config, METADATA_KEY, before)


def locate(source: str, *, weights: bool = True) -> Path | str:
    """The source of a model: a folder that looks like one, a GGUF file, or a Hub id.

    Args:
        weights: refuse a folder without any; else a config.json is enough.

    Raises:
        UserError: there is no such model, or it has an adapter.
    """
    if not source.strip():
        raise UserError("the name of the model is empty")
    folder = Path(str(files("admm_prune") / "assets" / EMBEDDED)) if source == EMBEDDED else expanded(source)
    if not folder.is_dir():
        if is_gguf(folder) and folder.is_file():
            check_gguf(source, folder)
            return folder
        if folder.exists():
            raise UserError(f"{source}: a file, not a model folder")
        if folder.suffix.lower() in _WEIGHTS:
            raise UserError(f"{source}: there is no such file")
        if source == EMBEDDED or not is_repository(source):
            raise UserError(f"{source}: there is no such model folder")
        _check_reachable(source)
        return source
    check_no_adapters(source, folder)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{source}: not a model folder: it has no config.json")
    try:
        if not isinstance(json.loads(config.read_bytes()), dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise UserError(f"{source}: config.json cannot be read ({first_line(error)})") from error
    if (folder / PACK_MANIFEST).is_file():
        raise UserError(f"{source}: an archive, not a model folder: restore it with 'admm-prune unpack {source} OUT'")
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(f"{source}: no safetensors weights in the folder (other formats can run code and are not read)")
    return folder


def _folder_of(source: str, trust_remote_code: bool) -> tuple[Path, str | None]:
    """The folder or GGUF file that a model is read from, and the commit of its Hub repository, None of a local one."""
    location = locate(source)
    if isinstance(location, Path):
        return location, None
    folder = _fetched(source, trust_remote_code)
    return folder, folder.name


def _fetched(source: str, trust_remote_code: bool) -> Path:
    """The folder of a Hub id in the local cache, with all that is read of it, and nothing that can run code.

    Raises:
        UserError: there is no such model, or it has no safetensors weights.
    """
    code = ["*.py"] if trust_remote_code else []
    with explained(source, source), quiet():
        folder = fetch(source, [*_DESCRIBING, *code])
        check_no_adapters(source, folder)
        names = indexed(folder) if (folder / INDEX).is_file() else [SINGLE]
        names = [name for name in names if Path(name).suffix == ".safetensors"]
        folder = fetch(source, names, folder.name)
    absent = [name for name in names if not (folder / name).is_file()] or ([] if names else [SINGLE])
    if absent:
        raise UserError(
            f"{source}: {absent[0]} is neither in the local cache nor on the Hub (other formats can run code and are "
            "not read)"
        )
    return folder


def _check_reachable(source: str) -> None:
    """Raises UserError where a Hub id is not in the local cache and the Hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    try:
        check_hub(source, "model")
    except ConnectionError as error:
        raise UserError(
            f"{source}: no such folder here, and as a Hub id it cannot be loaded: no connection to the Hub ({error})"
        ) from error


def _load_gguf(source: str, file: Path, dtype: torch.dtype | str | None) -> tuple[PreTrainedModel, tuple[str, ...]]:
    with explained(source, file), quiet():
        model, information = dequantized(file, dtype)
        _complete(source, model, information)
        notes = check_all_read(source, file, model, information)
    return model, notes


def _complete(source: str, model: Any, information: dict[str, Any]) -> PreTrainedModel:
    """The model; a UserError where its file lacks a weight."""
    absent = sorted(information["missing_keys"])  # tied parameters are not among them
    if absent:
        raise UserError(f"{source}: incomplete: the weights lack {absent[0]} ({len(absent)} missing in all)")
    loaded: PreTrainedModel = model
    return loaded


def _load_model(
    source: str, folder: Path, dtype: torch.dtype | str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and notes on its files."""
    if is_gguf(folder):
        return _load_gguf(source, folder, dtype)
    with explained(source, folder), quiet():
        config, kind = kind_of(folder, trust_remote_code)
        quantizer = dequantizer(source, config)
        checkpoint = Checkpoint(folder, torch.device("cpu"))
        outline = shapes(kind, config, trust_remote_code=trust_remote_code)
        checkpoint.adapt(outline, quantizer)
        notes = check_stored(source, outline, checkpoint, dequantized=quantizer is not None)
        remote_code = {} if kind.__module__.startswith("admm_prune") else {"trust_remote_code": trust_remote_code}
        # The declared type of from_pretrained does not know that output_loading_info makes it a pair.
        result: Any = kind.from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **remote_code
        )
    model: Any = result[0]
    if quantizer is not None:
        model._weight_conversions = None  # it is saved without quantizing it again
    return _complete(source, model, result[1]), notes


def kind_of(location: Path | str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The config, and what builds the model that it is of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place, option = place_of(location)
    config: Any = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **option)
    # A model with different widths per block uses a class of this package: the file saved with it is not run.
    architectures = getattr(config, "architectures", None) or [""]
    kind = per_layer_class(architectures[0]) if architectures[0].startswith("PerLayer") else None
    return config, kind or AutoModelForCausalLM


@contextmanager
def explained(source: str, location: Path | str) -> Generator[None]:
    """Turns any failure to load a model into a UserError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"{source}: the safetensors weights are damaged or cut short ({first_line(error)}): download them again"
        ) from error
    except (
        OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, ImportError, struct.error,
        StrictDataclassError,
    ) as error:  # fmt: skip
        missing = named_extra(error) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None:
            raise missing from error
        if "trust_remote_code" in str(error):
            raise RemoteCodeError(source) from error
        # All errors of a wrong config, an unsupported architecture, mismatched shapes or a missing repository.
        # The error of a config's validation names the field, and its cause the reason.
        why = first_line(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)
        where = "" if isinstance(location, Path) else "no such folder here, and as a Hub id it "
        raise UserError(f"{source}: {where}cannot be loaded as a causal language model ({why})") from error


def load_tokenizer(source: str, location: Path | str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with quiet():
            place, option = place_of(location)
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **option)
    except Exception as error:  # the tokenizers library raises plain exceptions
        if "trust_remote_code" in str(error):
            raise RemoteCodeError(source) from error
        if isinstance(location, Path) and any(location.glob("tokenizer*")):
            raise UserError(
                f"{source}: no tokenizer could be read from the files there ({first_line(error)})"
            ) from error
        raise UserError(f"{source}: no tokenizer could be read: save the model's tokenizer beside it") from error


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
        plain = type(parameter.data) is Tensor
        if not plain or parameter.dtype not in FLOATS.values():
            form = parameter.dtype if plain else type(parameter.data).__name__
            raise UserError(
                f"{kind}: the weight {name} is quantized or not a float of 16 bits or more ({form}), and cannot be "
                "pruned: load the model without quantization, or call model.dequantize() first"
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
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the model
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        logits = None
    vocabulary_sizes = {embedding_rows(model), getattr(model.config.get_text_config(), "vocab_size", None)} - {None}
    if (
        logits is None
        or logits.ndim != 3
        or logits.shape[:2] != ids.shape
        or (vocabulary_sizes and logits.shape[-1] not in vocabulary_sizes)
    ):
        raise UserError(
            f"{kind} gives no logits for the next token: load the model with AutoModelForCausalLM.from_pretrained"
        )
