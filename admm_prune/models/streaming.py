"""A model that does not fit in memory: on disk, one block resident at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from admm_prune.data.hub import quiet
from admm_prune.errors import UserError
from admm_prune.models.archive import Lazy, write_tensors
from admm_prune.models.checkpoint import INDEX, Checkpoint
from admm_prune.models.stored import check_finite, check_shape, check_stored, dequantizer, fill_buffers, shapes
from admm_prune.models.structure import Block, assign, decoder_blocks

_OUTSIDE = "outside.safetensors"


class Offloading:
    """The location of a model's weights: in this class, always in memory. A subclass loads and unloads them."""

    is_offloaded = False  # whether modules that are not entered have no weights
    keeps_changes = True  # whether changes of weights made in a context outlast it

    def device(self, model: nn.Module) -> torch.device:
        """The device on which the model runs."""
        return next(model.parameters()).device

    @contextmanager
    def outside(self) -> Generator[None]:
        """Context in which the modules outside the blocks are loaded: embeddings, the last norm, the head."""
        yield

    @contextmanager
    def block(self, index: int) -> Generator[None]:
        """Context in which a block is loaded."""
        yield

    def read(self, model: nn.Module, name: str, rows: slice | None = None) -> Tensor:
        """A parameter of the model, or some of its rows, detached; it may share memory with the parameter.

        Raises:
            UserError: it cannot be read, or has NaN or Inf entries.
        """
        parameter = model.get_parameter(name).detach()
        return parameter if rows is None else parameter[rows]

    def restore(self, index: int, block: Block, file: Path) -> None:
        """Loads the weights, and their shapes, from the file written when the block was finished."""
        device = self.device(block.module)
        for name, tensor in load_file(file).items():
            _put(block.module, name.removeprefix(f"{block.name}."), tensor.to(device, copy=True))


IN_MEMORY = Offloading()


class ModelOnDisk(Offloading):
    """A model folder whose weights are read on demand and dropped afterwards.

    Args:
        folder: with config.json and safetensors.
        kind: the model's class, or an auto class.
        config: the folder's.
        device: where weights go.
        dtype: of the weights; None keeps that of the config, else of the files.
        source: as the user named the model; the folder by default.
        trust_remote_code: run code that comes with the model.

    Attributes:
        model: of the right class; its parameters are on the meta device unless they are entered.
        outside_names: of the parameters outside the blocks; of tied ones the one that the others are tied to.
        notes: on tensors of the files that the model does not use.

    Raises:
        UserError: a class that cannot be built without weights, weights that are missing or damaged, or parameters of
            a block that are shared with other blocks or with modules outside the blocks.
    """

    is_offloaded = True
    keeps_changes = False

    def __init__(
        self,
        folder: Path,
        kind: Any,
        config: Any,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        source: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import GenerationConfig

        self._source, self._device = source or str(folder), torch.device(device)
        self._checkpoint = Checkpoint(folder, self._device)
        quantizer = dequantizer(self._source, config)
        if quantizer is not None:
            del config.quantization_config  # the saved weights are floats
        dtype = dtype or getattr(config, "dtype", None) or self._checkpoint.dtype()
        dtype = dtype if quantizer is None else quantizer.update_dtype(dtype)
        with quiet():
            self.model: Any = shapes(kind, config, dtype, trust_remote_code=trust_remote_code)
            if (folder / "generation_config.json").is_file():
                self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self._checkpoint.adapt(self.model, quantizer)
        self.notes = check_stored(self._source, self.model, self._checkpoint, dequantized=quantizer is not None)
        self.blocks: list[Block] = decoder_blocks(self.model)
        self._check_unshared()
        self._settle_buffers()
        inside = tuple(f"{block.name}." for block in self.blocks)
        # Whichever comes first in the model.
        ties = getattr(self.model, "all_tied_weights_keys", {})
        names = list(dict.fromkeys(ties.get(name, name) for name, _ in self.model.named_parameters()))
        self._finished: dict[int, Path] = {}
        self.outside_names = [name for name in names if not name.startswith(inside)]
        held = self.model.state_dict()
        self._buffers = [name for name, _ in self.model.named_buffers() if name in held]  # those that are saved
        self._entered = 0

    def device(self, model: nn.Module) -> torch.device:
        return self._device

    @contextmanager
    def outside(self) -> Generator[None]:
        if self._entered == 0:
            self._fill("", self.outside_names)
            self._tie()
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1
            if self._entered == 0:
                self._empty("", self.outside_names)
                self._tie()

    @contextmanager
    def block(self, index: int) -> Generator[None]:
        block = self.blocks[index]
        names = [name for name, _ in block.module.named_parameters()]
        self._fill(f"{block.name}.", names)
        try:
            yield
        finally:
            self._empty(f"{block.name}.", names)

    def restore(self, index: int, block: Block, file: Path) -> None:
        self._finished[index] = file
        self.replace(file)

    def replace(self, file: Path) -> None:
        """Reads the parameters that are in a file, under their own names, from there from now on."""
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                self._checkpoint.replace(name, file)
                shape = tensors.get_slice(name).get_shape()
                meta = torch.empty(shape, dtype=self.model.get_parameter(name).dtype, device="meta")
                _put(self.model, name, meta)

    def tensors(self) -> Generator[tuple[str, Tensor]]:
        """The entries of the model's `state_dict`, read one at a time."""
        for name in self.model.state_dict():
            yield name, self._tensor(name)

    def save(self, folder: Path) -> None:
        """Writes a folder that `from_pretrained` loads, after every block was finished: their files are linked to it.

        Raises:
            OSError: it cannot be written.
        """
        from transformers.dynamic_module_utils import custom_object_save

        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, str] = {}
        for index, block in enumerate(self.blocks):
            name = f"block-{index:05d}.safetensors"
            files |= dict.fromkeys(self._write_block(index, block, folder / name), name)
        files |= dict.fromkeys(self._write_outside(folder / _OUTSIDE), _OUTSIDE)
        sizes = sum((folder / name).stat().st_size for name in set(files.values()))
        index_content = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index_content, indent=2) + "\n", encoding="utf-8")
        self.model.config.architectures = [type(self.model).__name__]
        if type(self.model)._auto_class is not None:
            custom_object_save(self.model, folder, config=self.model.config)
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)

    def _write_block(self, index: int, block: Block, path: Path) -> list[str]:
        """A finished block; returns the names in the file."""
        if not self._checkpoint.renames:
            _link(self._finished[index], path)
            return [f"{block.name}.{name}" for name, _ in block.module.named_parameters()]
        stored = self._checkpoint.as_stored(load_file(self._finished[index]))
        write_tensors(path, stored)
        return list(stored)

    def _write_outside(self, path: Path) -> list[str]:
        """Writes the modules outside the blocks, and all buffers, one stored tensor at a time; returns their names."""
        saved = [*self.outside_names, *self._buffers]
        if not self._checkpoint.renames:
            write_tensors(path, Lazy(saved, self._tensor))
            return saved
        groups: dict[str, list[str]] = {}  # a stored tensor -> the parameters that it is made of, together
        for name in saved:
            for stored in self._checkpoint.as_stored({name: self.model.get_parameter_or_buffer(name)}):
                groups.setdefault(stored, []).append(name)

        @lru_cache(maxsize=1)  # several stored tensors may be made of one parameter
        def as_stored(*names: str) -> dict[str, Tensor]:
            return self._checkpoint.as_stored({name: self._tensor(name) for name in names})

        write_tensors(path, Lazy(list(groups), lambda stored: as_stored(*groups[stored])[stored]))
        return list(groups)

    def _tie(self) -> None:
        # The mapping resolved by the checkpoint: the config may tie parameters that the files store separately.
        self.model.tie_weights(recompute_mapping=False)

    def _fill(self, prefix: str, names: list[str]) -> None:
        for name in names:
            _put(self.model, f"{prefix}{name}", self._tensor(f"{prefix}{name}"))

    def read(self, model: nn.Module, name: str, rows: slice | None = None) -> Tensor:
        return self._tensor(name, rows)

    def _empty(self, prefix: str, names: list[str]) -> None:
        for name in names:
            parameter = self.model.get_parameter(f"{prefix}{name}")
            _put(self.model, f"{prefix}{name}", torch.empty_like(parameter, device="meta"))

    def _tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A parameter, or some of its rows, or a buffer, in the model's dtype and shape."""
        if name in self._buffers:  # they are in memory
            buffer: Tensor = self.model.get_buffer(name)
            return buffer
        if rows is not None and self._checkpoint.is_converted(name):  # made of all its stored tensors
            return self._tensor(name)[rows]
        parameter = self.model.get_parameter(name)
        tensor = self._checkpoint.read(name, rows)
        # The files may keep it in parts, or under another name.
        check_shape(self._source, name, tensor.shape, (parameter if rows is None else parameter[rows]).shape)
        check_finite(self._source, name, tensor, parameter.dtype)
        return tensor.to(parameter.dtype)

    def _check_unshared(self) -> None:
        """Raises UserError for a parameter of a block that is also used elsewhere: a block is loaded by itself."""
        owners: dict[nn.Parameter, str] = {}  # the block in which a parameter is used first; "" outside the blocks
        blocks = {f"{block.name}.": block.name for block in self.blocks}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = next((block for prefix, block in blocks.items() if name.startswith(prefix)), "")
            first = owners.setdefault(parameter, owner)
            if first != owner:
                raise UserError(
                    f"{self._source}: {name} is shared with {first or 'modules outside the blocks'}, and cannot be "
                    "streamed: use --no-stream"
                )

    def _settle_buffers(self) -> None:
        """Loads buffers, or initializes them by the model's class if they are not in the files."""
        uncomputed = fill_buffers(self.model, self._checkpoint, self._device)
        if uncomputed:
            raise UserError(
                f"{self._source}: {uncomputed[0]} cannot be made without the model: use run with --no-stream"
            )


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    assign(module, name, nn.Parameter(tensor, requires_grad=False))


def _link(file: Path, name: Path) -> None:
    """The same bytes under another name; copied where the disk has no links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
