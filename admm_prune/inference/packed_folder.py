"""Loads a model folder straight into packed layers, without ever holding the dense model.

Three kinds of folders: an archive of `admm-prune pack`; one in the format `sparse-bitmask` or `sparse-24-bitmask` of
compressed-tensors, which transformers and vLLM no longer load; any other folder of safetensors, whose zeros are dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from admm_prune.data.hub import expanded, first_line, quiet
from admm_prune.errors import UserError
from admm_prune.inference.packed_linear import (
    Values,
    check_packable,
    check_values,
    compressed,
    oriented,
    packable,
    pays,
    place_experts,
    place_linear,
)
from admm_prune.models.adapters import check_no_adapters
from admm_prune.models.archive import BITS, PACK_MANIFEST, PACKED, VALUES, unpacked_entries
from admm_prune.models.checkpoint import INDEX, SINGLE, Checkpoint, indexed, tensor_files
from admm_prune.models.loading import explained, kind_of
from admm_prune.models.stored import check_finite, check_shape, check_stored, fill_buffers, shapes
from admm_prune.models.structure import assign
from admm_prune.ops import bits, packed
from admm_prune.ops.packed import Packed
from admm_prune.prunable import LinearWeight

STRANDED = ("sparse-bitmask", "sparse-24-bitmask")
_METHOD = "compressed-tensors"
_FEW = 0.02  # of the values of a matrix
_PARTS = (".compressed", ".bitmask", ".shape", ".row_offsets")  # of a weight in those formats


def load_packed(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    values: Values | None = None,
    group: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Loads a pruned model with packed layers, one tensor at a time: the dense model is never in memory.

    Args:
        folder: an archive of `admm-prune pack`, a folder that compressed-tensors wrote with sparse bit masks, or any
            model folder with zeros in its weights. No code of compressed-tensors is run.
        device: where the model goes.
        dtype: of the weights; None keeps that of the config.
        values: as for `pack_model`.
        group: as for `pack_model`.
        trust_remote_code: allow running code that comes with the model.

    Returns:
        A causal language model of transformers in evaluation mode, without gradients.

    Raises:
        UserError: no such folder; weights that are missing, damaged, quantized, of another model than the config, or
            not finite in the dtype; a dtype that cannot be packed.
    """
    check_values(values, group)
    named: Any = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named is not None:
        check_packable(named)
    path, source = expanded(str(folder)), str(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{source}: not a model folder: it has no config.json")
    check_no_adapters(source, path)
    checkpoint = _open(source, path, torch.device(device))
    with explained(source, path), quiet():
        from transformers import GenerationConfig

        config, kind = kind_of(path, trust_remote_code)
        if hasattr(config, "quantization_config"):  # of masks alone: `_open` has checked it
            del config.quantization_config
        config_dtype = named or getattr(config, "dtype", None) or torch.float32
        model = shapes(kind, config, config_dtype, trust_remote_code=trust_remote_code)
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        checkpoint.adapt(model)
        check_stored(source, model, checkpoint)
    _fill(source, model, checkpoint, values, group)
    _fill_buffers(source, model, checkpoint, torch.device(device))
    with quiet():
        model.tie_weights(recompute_mapping=False)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Masked:
    """Where a matrix is stored as a mask and values: the names of both in a file, and its shape."""

    file: Path
    bits: str
    values: str
    shape: tuple[int, ...]


class _MaskedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are stored as a mask and values."""

    def __init__(
        self, source: str, folder: Path, device: torch.device, files: dict[str, Path], masked: dict[str, _Masked]
    ) -> None:
        super().__init__(folder, device, files)
        self._source, self._masked = source, masked

    def packed(self, name: str) -> Packed | None:
        """A matrix as it is stored, without unpacking it; None where the files have it in another form."""
        stored = self.sources(name)
        masked = self._masked.get(stored[0]) if len(stored) == 1 and not self.is_converted(name) else None
        if masked is None or len(masked.shape) != 2 or masked.shape[1] % 8:
            return None
        mask, values = self._parts_of(masked)
        # Negative zeros, of which an archive keeps the sign, are not worth their bytes here.
        if values.dtype not in packed.FLOATS or int((values == 0).count_nonzero()) > _FEW * values.numel():
            return None
        try:
            return packed.from_parts(mask.view(masked.shape[0], -1), values.flatten(), masked.shape[1])
        except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the file
            raise
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self._source}: {stored[0]} is damaged ({first_line(error)})") from error

    def headers(self, names: Collection[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        headers = super().headers([name for name in names if name not in self._masked])
        for name in self._masked.keys() & set(names):
            masked = self._masked[name]
            with safe_open(masked.file, framework="pt") as file:
                headers[name] = masked.shape, str(file.get_slice(masked.values).get_dtype())
        return headers

    def _stored(self, name: str, rows: slice | None = None) -> Tensor:
        masked = self._masked.get(name)
        if masked is None:
            return super()._stored(name, rows)
        mask, values = self._parts_of(masked)
        leading = masked.shape[:-1] if mask.ndim > 1 else ()
        width = masked.shape[-1] if mask.ndim > 1 else math.prod(masked.shape)
        try:
            entries = bits.unpack(mask.view(*leading, -1), width)
            packed.check_counts(int(entries.count_nonzero()), values)
            dense = torch.zeros(entries.shape, dtype=values.dtype, device=values.device)
            whole = dense.masked_scatter_(entries, values).view(masked.shape)
            return whole if rows is None else whole[rows]
        except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the file
            raise
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self._source}: {name} is damaged ({first_line(error)})") from error

    def _equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return torch.equal(self.read(one).to(dtype), self.read(other).to(dtype))

    def _parts_of(self, masked: _Masked) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(masked.file, framework="pt") as file:
                return file.get_tensor(masked.bits).to(self._device), file.get_tensor(masked.values).to(self._device)
        except SafetensorError as error:
            raise UserError(f"{masked.file}: the weights are damaged or cut short ({first_line(error)})") from error


def _open(source: str, folder: Path, device: torch.device) -> _MaskedCheckpoint:
    """The tensors of any of the three kinds of folders."""
    if (folder / PACK_MANIFEST).is_file():
        files, masked = _archive(folder)
        return _MaskedCheckpoint(source, folder, device, files, masked)
    files = tensor_files(folder)
    kind = _stranded_format(source, folder)
    masked = {} if kind is None else _stranded(files)
    parts = {f"{name.removesuffix('.weight')}{suffix}" for name in masked for suffix in _PARTS}
    files = {name: file for name, file in files.items() if name not in parts}
    files |= {name: matrix.file for name, matrix in masked.items()}
    return _MaskedCheckpoint(source, folder, device, files, masked)


def _archive(folder: Path) -> tuple[dict[str, Path], dict[str, _Masked]]:
    """The tensors of an archive: the file of each, and those that are packed."""
    names = sorted(path.name.removesuffix(PACKED) for path in folder.glob(f"*.safetensors{PACKED}"))
    if SINGLE in names:
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        names = indexed(folder)
    files: dict[str, Path] = {}
    masked: dict[str, _Masked] = {}
    for name in names:
        path = folder / f"{name}{PACKED}"
        entries = unpacked_entries(path)
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
        for entry in entries:
            files[entry.name] = path
            if entry.name not in stored:
                parts = entry.name + BITS, entry.name + VALUES
                if not stored.issuperset(parts):
                    raise UserError(f"{path} lacks the tensor {entry.name}: it is damaged")
                masked[entry.name] = _Masked(path, *parts, tuple(entry.shape))
    if not files:
        raise UserError(f"{folder} contains no packed weights")
    return files, masked


def _stranded_format(source: str, folder: Path) -> str | None:
    """The sparse format that compressed-tensors wrote; None of a folder of floats.

    Raises:
        UserError: the weights are quantized.
    """
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise UserError(f"{source}: config.json cannot be read ({first_line(error)})") from error
    settings = content.get("quantization_config") or content.get("compression_config")
    if not settings:
        return None
    method = settings.get("quant_method", _METHOD)
    if method != _METHOD:
        raise UserError(f"{source}: its weights are quantized ({method}): only floats can be packed")
    sparsity = settings.get("sparsity_config") or {}
    kind = sparsity.get("format") or settings.get("format")
    if settings.get("config_groups") or kind not in (*STRANDED, "dense", None):
        raise UserError(f"{source}: its weights are quantized, or in the format {kind}: only floats can be packed")
    return kind if kind in STRANDED else None


def _stranded(files: dict[str, Path]) -> dict[str, _Masked]:
    """The matrices stored as masks: NAME.weight as NAME.compressed, NAME.bitmask and NAME.shape."""
    masked = {}
    for stored, path in files.items():
        name = stored.removesuffix(".compressed")
        if name == stored or f"{name}.bitmask" not in files:
            continue
        shape_file = files.get(f"{name}.shape")
        if shape_file is None or files[f"{name}.bitmask"] != path:
            raise UserError(f"{path}: the parts of {name} are missing, or in several files")
        with safe_open(shape_file, framework="pt") as file:
            shape = tuple(int(size) for size in file.get_tensor(f"{name}.shape").flatten())
        masked[f"{name}.weight"] = _Masked(path, f"{name}.bitmask", stored, shape)
    return masked


def _fill(source: str, model: Any, checkpoint: _MaskedCheckpoint, values: Values | None, group: int | None) -> None:
    """Loads every parameter: packed where that is smaller, else dense."""
    layers: dict[int, list[LinearWeight]] = {}
    for weight in packable(model):
        layers.setdefault(id(weight.parameter), []).append(weight)
    ties = getattr(model, "all_tied_weights_keys", {})
    for name in list(dict.fromkeys(ties.get(name, name) for name, _ in model.named_parameters())):
        parameter = model.get_parameter(name)
        weights = layers.get(id(parameter), [])
        matrix = checkpoint.packed(name) if weights and not weights[0].transposed and not weights[0].stacked else None
        if matrix is not None and values is None and pays(parameter, [matrix]):
            _check(source, name, matrix.values, parameter, (matrix.rows, matrix.width))
            _place(model, weights, [replace(matrix, values=matrix.values.to(parameter.dtype))])
            continue
        dense = checkpoint.read(name)
        _check(source, name, dense, parameter, dense.shape)
        dense = dense.to(parameter.dtype)
        if weights:
            stack = dense if weights[0].stacked else dense[None]
            parts = [compressed(oriented(one, weights[0].transposed), values, group) for one in stack]
            if pays(dense, parts):
                _place(model, weights, parts)
                continue
        assign(model, name, nn.Parameter(dense, requires_grad=False))


def _place(model: nn.Module, weights: Sequence[LinearWeight], parts: Sequence[Packed]) -> None:
    for weight in weights:
        if weight.stacked:
            place_experts(weight, parts)
        else:
            place_linear(model, weight, parts[0])


def _check(source: str, name: str, x: Tensor, parameter: Tensor, shape: Sequence[int]) -> None:
    check_shape(source, name, shape, parameter.shape)  # of a converted weight: `check_stored` sees its parts
    check_finite(source, name, x, parameter.dtype)


def _fill_buffers(source: str, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    uncomputed = fill_buffers(model, checkpoint, device)
    if uncomputed:
        raise UserError(f"{source}: {uncomputed[0]} is neither in the files nor computed by the model's class")
