"""The tensors of a model folder by the names of the model's parameters, independent of the names in the files."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from admm_prune.data.hub import first_line
from admm_prune.errors import UserError
from admm_prune.models.archive import DTYPE_NAMES
from admm_prune.models.structure import assign

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
_PIECE = 1 << 24  # entries compared at once


class Checkpoint:
    """The tensors that `from_pretrained` would load from a folder, one at a time.

    Files may hold a parameter under another name, or in parts (the experts of a mixture one by one): transformers
    defines for each model how to merge and split them.

    Args:
        folder: with config.json and safetensors.
        device: where tensors go.
        files: the file of every tensor; by default those that `from_pretrained` reads.

    Attributes:
        files: the file of every tensor, by its stored name.
        surplus: stored names that belong to no parameter, with the names the model would use.
        renames: whether any parameter has another name in the files, or is kept in parts.

    Raises:
        UserError: no model folder, or files that are damaged.
    """

    def __init__(self, folder: Path, device: torch.device, files: Mapping[str, Path] | None = None) -> None:
        self.folder, self._device = folder, device
        self.files = tensor_files(folder) if files is None else dict(files)
        self._parts: dict[str, list[tuple[str, str | None]]] = {}  # of a parameter: (stored name, matched pattern)
        self._converted_as: dict[str, str] = {}  # a parameter -> the first of those that one conversion makes
        self._tied: dict[str, str] = {}  # a parameter that no file holds -> the one it is tied to
        self.surplus: dict[str, str] = {}
        self._converters: dict[str, Any] = {}
        self.renames = False
        self._model: Any = None

    def adapt(self, model: Any, quantizer: Any = None) -> None:
        """Maps the parameters of a model to the names and parts in the files, and resolves ties.

        Two parameters that the config ties, but of which the files hold different values, are untied, as
        `from_pretrained` does; one missing from the files is read from the parameter it is tied to.

        Args:
            model: without weights, as `stored.shapes` makes it.
            quantizer: transformers', where the files are to be dequantized.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model, None, quantizer)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._model = model
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        known = model.state_dict()
        parts: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for stored in self.files:
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
            if name not in known and stored in known:
                name, pattern = stored, None
            if name not in known:
                self.surplus[stored] = name
            elif (name, pattern) != (stored, None):
                parts[name].append((stored, pattern))
                targets = [] if pattern is None else self._converters[pattern].target_patterns
                others = {name.replace(targets[0], target) for target in targets[1:]}
                self._converted_as |= dict.fromkeys(others, name)
        self._parts, self.renames = dict(parts), bool(parts)
        # The conversions reverted when the model is saved, as set by from_pretrained; nothing is quantized again.
        model._weight_conversions = None if quantizer else [one for one in transforms if one.was_used()]
        self._settle_ties(model)

    def __contains__(self, name: str) -> bool:
        name = self._tied.get(name, name)
        return name in self.files or self._converted_as.get(name, name) in self._parts

    def sources(self, name: str) -> list[str]:
        """The stored names of the tensors that a parameter is read from."""
        name = self._tied.get(name, name)
        if name in self._parts or name in self._converted_as:
            return [stored for stored, _ in self._parts[self._converted_as.get(name, name)]]
        return [name] if name in self.files else []

    def is_converted(self, name: str) -> bool:
        """Whether a parameter is merged from several tensors, so that its shape is not that of a stored one."""
        parts = self._parts.get(self._converted_as.get(name, name), [])
        return any(pattern is not None for _, pattern in parts)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A parameter.

        Args:
            rows: read these alone, of a parameter that is not converted.

        Raises:
            UserError: its file is damaged.
        """
        name = self._tied.get(name, name)
        first = self._converted_as.get(name, name)
        if first not in self._parts:
            return self._stored(name, rows)
        parts = self._parts[first]
        if len(parts) == 1 and parts[0][1] is None:
            return self._stored(parts[0][0], rows)
        from transformers.core_model_loading import dot_natural_key

        converter = copy.deepcopy(self._converters[parts[0][1] or ""])
        for stored, pattern in sorted(parts, key=lambda part: dot_natural_key(part[0])):
            converter.add_tensor(first, stored, pattern, self._stored(stored))
        made = converter.convert(first, model=self._model, config=self._model.config)[name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by the names, and in the parts, that `save_pretrained` gives them."""
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return reverted

    def replace(self, name: str, file: Path) -> None:
        """Redirects a parameter to another file, which stores it under its own name."""
        self.files[name] = file
        self._parts.pop(name, None)
        self._converted_as.pop(name, None)
        self._tied.pop(name, None)

    def dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point tensor of the first file with one, as `from_pretrained` takes it."""
        for name, path in sorted(self.files.items(), key=lambda item: (item[1], item[0])):
            with safe_open(path, framework="pt") as file:
                stored = str(file.get_slice(name).get_dtype())
            if stored in FLOATS:
                return FLOATS[stored]
        return None

    def _settle_ties(self, model: Any) -> None:
        """Ties a model's parameters as `PreTrainedModel.tie_weights` does while it loads: depending on the content of
        the files."""
        ties = list(getattr(model, "all_tied_weights_keys", {}).items())
        for target, source in ties:
            if target in self and source in self:
                if not self._equal(target, source, model.get_parameter(source).dtype):
                    model.all_tied_weights_keys.pop(target)
                    assign(model, target, nn.Parameter(torch.empty_like(model.get_parameter(target)), False))
                continue
            present = [name for name in (target, source) if name in self]
            present += [other for other, same in ties if same == source and other in self]
            if present:
                self._tied |= {name: present[0] for name in (target, source) if name not in self}

    def _equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        """Whether two parameters are the same numbers in a dtype; compared in pieces, since embeddings are large."""
        names = [self.sources(name) for name in (one, other)]
        if any(map(self.is_converted, (one, other))) or any(len(stored) != 1 for stored in names):
            return torch.equal(self.read(one).to(dtype), self.read(other).to(dtype))
        (first,), (second,) = names
        with (
            safe_open(self.files[first], framework="pt") as file_one,
            safe_open(self.files[second], framework="pt") as file_two,
        ):
            a, b = file_one.get_slice(first), file_two.get_slice(second)
            shape = a.get_shape()
            if shape != b.get_shape():
                return False
            rows = max(1, _PIECE // max(1, math.prod(shape[1:])))
            return all(
                torch.equal(a[at : at + rows].to(dtype), b[at : at + rows].to(dtype)) for at in range(0, shape[0], rows)
            )

    def _stored(self, name: str, rows: slice | None = None) -> Tensor:
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
                return tensor.to(self._device)
        except SafetensorError as error:
            raise UserError(_damaged(self.files[name], error)) from error


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder that `from_pretrained` reads; 0 where there is none."""
    return sum((folder / name).stat().st_size for name in _weight_names(folder) if (folder / name).is_file())


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor, of those that `from_pretrained` reads.

    Raises:
        UserError: there is none, the index cannot be read, or a file is missing or damaged.
    """
    names = _weight_names(folder)
    if not names or not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder: it has no config.json or no safetensors weights")
    files: dict[str, Path] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), folder / name)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(folder / name, error)) from error
    return files


def _weight_names(folder: Path) -> list[str]:
    """The safetensors files of a folder that `from_pretrained` reads; others, such as `consolidated.safetensors`, may
    hold the same weights once more."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in names:
        return [SINGLE]
    return indexed(folder) if names and (folder / INDEX).is_file() else names


def indexed(folder: Path) -> list[str]:
    """The files that the index of a folder names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: {INDEX} cannot be read ({first_line(error)})") from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: the safetensors weights are damaged or cut short ({first_line(error)}): download them again"
