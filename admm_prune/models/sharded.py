"""A model sharded over several processes: each holds its rows of every parameter, and gathers one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from admm_prune.data.durable import writing
from admm_prune.models.archive import write_tensors
from admm_prune.models.parallel import World, communicating
from admm_prune.models.streaming import ModelOnDisk, Offloading
from admm_prune.models.structure import assign, decoder_blocks
from admm_prune.ops.sharding import full_tensor, local


class ShardedModel(Offloading):
    """A copy of a model, with parameters sharded by rows over the processes (FSDP2), block by block.

    It is built on the meta device, and every process reads its own rows alone. The copy is used in two forms:
    `sharded` computes with gradients, and FSDP2 gathers each block while it runs; `model` is a plain module for
    everything else, whose parameters are on the meta device unless they are entered. Within `block` and `outside` they
    are gathered, and may be changed in place, alike in all processes: the shards then receive the changes. All
    processes enter the same contexts in the same order.

    Args:
        model: the original; it may be on the meta device.
        offloading: where its weights are read from.
        world: the processes.

    Attributes:
        model: the plain module.
        sharded: the FSDP2 module: all processes call it together.

    Raises:
        UserError: a weight cannot be read in one of the processes.
    """

    is_offloaded = True

    def __init__(self, model: nn.Module, offloading: Offloading, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._device, self._world = offloading.device(model), world
        self._mesh = init_device_mesh(self._device.type, (world.size,))
        on_meta = {id(p): _on_meta(p, p.requires_grad) for p in model.parameters()}
        self.model: nn.Module = copy.deepcopy(model, on_meta)
        self.blocks = decoder_blocks(self.model)
        # All names of each parameter: tied ones have several.
        aliases: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            aliases.setdefault(parameter, []).append(name)
        self._aliases = {names[0]: names for names in aliases.values()}
        inside = tuple(f"{block.name}." for block in self.blocks)
        self._outside = [name for name in self._aliases if not name.startswith(inside)]
        self._entered = 0
        self.sharded = self._empty()

        def read_shards() -> None:
            for name, parameter in self.sharded.named_parameters():
                local(parameter.detach()).copy_(offloading.read(model, name, self._rows(parameter)))

        world.in_all(read_shards)

    def device(self, model: nn.Module) -> torch.device:
        return self._device

    @contextmanager
    def outside(self) -> Generator[None]:
        with self._unsharded(() if self._entered else self._outside):
            self._entered += 1
            try:
                yield
            finally:
                self._entered -= 1

    @contextmanager
    def block(self, index: int) -> Generator[None]:
        with self._unsharded(self._of_block(index)):
            yield

    def copy(self, dtype: torch.dtype) -> nn.Module:
        """Another sharded module with the same parameters in another dtype, without gradients. Buffers keep their
        dtypes: rotary frequencies in 16 bits would turn distant positions by other angles."""
        other = self._empty(dtype).requires_grad_(False)
        for parameter, source in zip(other.parameters(), self.sharded.parameters(), strict=True):
            local(parameter).copy_(local(source.detach()))
        return other

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copies all parameters into the original in memory, in every process."""
        for name in self._aliases:
            model.get_parameter(name).copy_(self._whole(name))

    def write_to(self, on_disk: ModelOnDisk, folder: Path, dtypes: Mapping[str, torch.dtype]) -> None:
        """Writes all parameters to files, one block at a time, from which the original on disk reads from now on.

        Args:
            folder: that all processes can read.
            dtypes: in which they are written, by name.

        Raises:
            WriteError: it cannot be written.
        """
        for index, block in enumerate(on_disk.blocks):
            path = folder / f"block-{index:05d}.safetensors"
            on_disk.restore(index, block, self._write(self._of_block(index), path, dtypes))
        on_disk.replace(self._write(on_disk.outside_names, folder / "outside.safetensors", dtypes))

    def _write(self, names: list[str], path: Path, dtypes: Mapping[str, torch.dtype]) -> Path:
        """Gathers some parameters; the first process writes them."""
        tensors = {name: self._whole(name).to(dtypes.get(name)) for name in names}

        def write() -> None:
            with writing(path.parent):
                write_tensors(path, tensors)

        self._world.broadcast_from_rank0(write)
        return path

    def _empty(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A sharded module, with the buffers of `model` and parameters that are allocated, but not initialized."""
        from torch.distributed.fsdp import fully_shard

        sharded = copy.deepcopy(self.model)
        for parameter in sharded.parameters() if dtype is not None else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for block in decoder_blocks(sharded):
            fully_shard(block.module, mesh=self._mesh)
        # Also the root, which FSDP would leave unsharded after an evaluation.
        fully_shard(sharded, mesh=self._mesh, reshard_after_forward=True)
        sharded.to_empty(device=self._device)
        for name, buffer in self.model.named_buffers():
            sharded.get_buffer(name).copy_(buffer)
        return sharded

    def _of_block(self, index: int) -> list[str]:
        block = self.blocks[index]
        return [f"{block.name}.{name}" for name, _ in block.module.named_parameters()]

    @contextmanager
    def _unsharded(self, names: Iterable[str]) -> Generator[None]:
        """Context in which some parameters of `model` are gathered."""
        names = list(names)
        for name in names:
            self._set(name, nn.Parameter(self._whole(name), requires_grad=False))
        try:
            yield
            for name in names:
                parameter = self.sharded.get_parameter(name)
                local(parameter.detach()).copy_(self.model.get_parameter(name)[self._rows(parameter)])
        finally:
            for name in names:
                self._set(name, _on_meta(self.model.get_parameter(name), requires_grad=False))

    def _whole(self, name: str) -> Tensor:
        """A parameter, gathered from all processes."""
        parameter = self.sharded.get_parameter(name).detach()
        with communicating():
            return full_tensor(parameter)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for alias in self._aliases[name]:
            assign(self.model, alias, parameter)

    def _rows(self, parameter: Tensor) -> slice:
        """Those in this process, as `Shard(0)` divides them."""
        count = -(-len(parameter) // self._world.size)
        return slice(count * self._world.rank, count * (self._world.rank + 1))


def _on_meta(parameter: nn.Parameter, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad)
