"""The tensors of a model folder by the names of the model's parameters, whatever its files call them."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from admm_prune.data.hub import first_line
from admm_prune.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """What `from_pretrained` would read of a folder, one tensor at a time.

    Files may hold a parameter under another name, or in parts (the experts of a mixture one by one): transformers knows
    of each of its models how to put them together and to take them apart again.

    Args:
        folder: with config.json and safetensors.
        device: where tensors go.

    Raises:
        UserError: no model folder, or files that are damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self._device = folder, device
        self._files = tensor_files(folder)
        self._parts: dict[str, list[tuple[str, str | None]]] = {}  # of a parameter: (stored name, matched pattern)
        self._converters: dict[str, Any] = {}
        self._model: Any = None

    def adapt(self, model: Any) -> None:
        """Learns by which names, and in which parts, the files hold the parameters of a model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._model = model
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        parts: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for stored in self._files:
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
            if (name, pattern) != (stored, None):
                parts[name].append((stored, pattern))
        self._parts = dict(parts)

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._parts

    @property
    def files(self) -> Mapping[str, Path]:
        """The file of every tensor, by its stored name."""
        return self._files

    @property
    def renames(self) -> bool:
        """Whether any parameter has another name in the files, or is kept in parts."""
        return bool(self._parts)

    def read(self, name: str) -> Tensor:
        """A parameter.

        Raises:
            UserError: its file is damaged.
        """
        if name in self._files:
            return self._stored(name)
        parts = self._parts[name]
        if len(parts) == 1 and parts[0][1] is None:
            return self._stored(parts[0][0])
        from transformers.core_model_loading import dot_natural_key

        converter = copy.deepcopy(self._converters[parts[0][1] or ""])
        for stored, pattern in sorted(parts, key=lambda part: dot_natural_key(part[0])):
            converter.add_tensor(name, stored, pattern, self._stored(stored))
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by the names, and in the parts, that `save_pretrained` gives them."""
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return reverted

    def replace(self, name: str, file: Path) -> None:
        """A parameter is read from another file from now on."""
        self._files[name] = file

    def first(self) -> Tensor:
        """Any of the tensors."""
        return self._stored(next(iter(self._files)))

    def tensors(self) -> Generator[tuple[str, Tensor]]:
        """All that the files hold, one after the other, by name."""
        for name in sorted(self._files):
            yield name, self._stored(name)

    def _stored(self, name: str) -> Tensor:
        try:
            with safe_open(self._files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor.to(self._device)
        except SafetensorError as error:
            raise UserError(_damaged(self._files[name], error)) from error


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files of a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor, of those that `from_pretrained` reads.

    Raises:
        UserError: there is none, the index cannot be read, or a file is missing or damaged.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names or not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder: it has no config.json or no safetensors weights")
    if SINGLE in names:
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        names = indexed(folder)
    found: dict[str, Path] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), folder / name)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(folder / name, error)) from error
    return found


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
    return f"{path}: the safetensors weights are damaged or cut short ({first_line(error)})"
