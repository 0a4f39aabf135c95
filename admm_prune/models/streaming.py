"""A model that does not fit in memory: on disk, one block resident at a time, in and out as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from admm_prune.data.hub import quiet
from admm_prune.errors import UserError
from admm_prune.models.structure import Block, decoder_blocks

_INDEX = "model.safetensors.index.json"


class Residence:
    """Where the blocks of a model are: here, all in memory, always. A subclass brings them in and takes them out."""

    hollow = False  # whether a block that was not entered has no weights

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """While a block is at work on."""
        yield


class ModelOnDisk(Residence):
    """A model folder whose blocks are read when they are entered, and dropped or written elsewhere when they are left.

    What is outside of the blocks (embeddings, the last norm, the head) stays in memory.

    Args:
        folder: with config.json and safetensors.
        device: where weights go.

    Attributes:
        model: of the right class; its blocks have no weights unless they are entered.
        output: where blocks go when they are left; None drops them.

    Raises:
        UserError: no such folder, a class that cannot be built without weights, or weights that are missing.
    """

    hollow = True

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._folder, self._device = folder, device
        self._files = _tensor_files(folder)
        with quiet(), torch.device("meta"):
            config: Any = AutoConfig.from_pretrained(folder)
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None))
        self.model.eval().requires_grad_(False)
        self.blocks: list[Block] = decoder_blocks(self.model)
        inside = {id(module) for block in self.blocks for module in block.module.modules()}
        for name, module in self.model.named_modules():
            if id(module) not in inside:
                self._settle(name, module, config)
        self.model.tie_weights()
        blocks = {f"{block.name}.{name}" for block in self.blocks for name, _ in block.module.named_parameters()}
        self._outside = [name for name, _ in self.model.named_parameters() if name not in blocks]
        for name in self._outside:
            if self.model.get_parameter(name).is_meta:
                raise UserError(f"{folder}: the weights lack {name}")
        self.output: Path | None = None
        self._written: dict[str, str] = {}

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        block = self.blocks[index]
        for name, parameter in list(block.module.named_parameters()):
            _put(block.module, name, self._read(f"{block.name}.{name}").to(parameter.dtype))
        yield
        if self.output is not None:
            weights = {f"{block.name}.{name}": p for name, p in block.module.named_parameters()}
            self._write(f"block-{index:05d}.safetensors", weights)
        for name, parameter in list(block.module.named_parameters()):
            _put(block.module, name, torch.empty_like(parameter, device="meta"))

    def finish(self) -> None:
        """Writes what is outside of the blocks, the index, and the config, after the last block has left.

        The folder is then one that `from_pretrained` loads.
        """
        from transformers.dynamic_module_utils import custom_object_save

        assert self.output is not None
        self._write("outside.safetensors", {name: self.model.get_parameter(name) for name in self._outside})
        index = {"metadata": {}, "weight_map": self._written}
        (self.output / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.model.config.architectures = [type(self.model).__name__]
        if type(self.model)._auto_class is not None:
            custom_object_save(self.model, self.output, config=self.model.config)
        self.model.config.save_pretrained(self.output)

    def _settle(self, name: str, module: nn.Module, config: Any) -> None:
        """Weights of one module outside of the blocks; buffers that no file holds are made anew with their module."""
        prefix = f"{name}." if name else ""
        for own, parameter in list(module.named_parameters(recurse=False)):
            if f"{prefix}{own}" in self._files:
                _put(module, own, self._read(f"{prefix}{own}").to(parameter.dtype))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, own = name.rpartition(".")
            try:
                made = type(module)(config)
            except TypeError as error:
                raise UserError(f"{self._folder}: {name} cannot be built without its weights") from error
            setattr(self.model.get_submodule(parent), own, made.to(self._device))

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self._folder}: the weights lack {name}")
        with safe_open(self._folder / self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(self._device)

    def _write(self, file: str, weights: dict[str, Any]) -> None:
        assert self.output is not None
        tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(tensors, self.output / file, {"format": "pt"})
        self._written |= dict.fromkeys(tensors, file)


def _tensor_files(folder: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths or not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder: it has no config.json or no safetensors weights")
    found: dict[str, str] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
