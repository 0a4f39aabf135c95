"""Activations between blocks, and replaying the blocks on them.

Each block is called exactly as the model calls it. Activations are held on the host, and past a limit in files that are
mapped into memory when they are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from admm_prune.data.durable import writing
from admm_prune.data.sequences import Batch
from admm_prune.errors import UserError
from admm_prune.models.streaming import Offloading
from admm_prune.models.structure import Block, replaced_forward

Call = tuple[tuple[Any, ...], dict[str, Any]]
Wrap = Callable[[Tensor], Any]  # hidden states in the form in which a block returns them


class ActivationStore:
    """Stores tensors by name off the device.

    A tensor that would exceed the memory limit is written to a file. Reading it maps the file, so that pages are loaded
    on use and freed with the tensor; writes to the mapped tensor stay in memory.

    Args:
        limit: bytes held in memory; None for no limit.
        folder: the parent of a temporary folder for the files, deleted with the store; None for the system's default.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._held: dict[str, Tensor] = {}
        self._filed: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Stores a tensor under a name, replacing an earlier one.

        Raises:
            WriteError: the file cannot be written.
        """
        self._held.pop(name, None)
        if self._filed.pop(name, None) is not None:  # a new file, because the earlier one may still be mapped
            self._path(name).unlink(missing_ok=True)
        tensor = tensor.detach().cpu()
        if self._limit is None or self.held_bytes + tensor.nbytes <= self._limit:
            self._held[name] = tensor
            return
        # Written, not mapped: a full disk is then an error, where a mapped page would kill the process.
        path = self._path(name)
        with writing(path.parent), path.open("wb") as file:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._filed[name] = (tensor.shape, tensor.dtype)

    def get(self, name: str) -> Tensor:
        """The tensor, on the host."""
        if name in self._held:
            return self._held[name]
        shape, dtype = self._filed[name]
        stored = torch.from_file(str(self._path(name)), shared=False, size=shape.numel(), dtype=dtype)
        return stored.view(shape)

    def another(self) -> ActivationStore:
        """An empty store with the same limit and folder."""
        return ActivationStore(self._limit, self._folder)

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def _path(self, name: str) -> Path:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="activations-", dir=self._folder)
        return Path(self._files.name) / name.replace("/", "-")


class BatchState:
    """One batch on its way through the model.

    Attributes:
        name: of its hidden states in the store.
        mask: (b, L) bool, its real tokens, on the device.
        lengths: the number of them in each row.
        calls: every block's arguments other than the hidden states.
    """

    def __init__(
        self, name: str, activation_store: ActivationStore, hidden: Tensor, batch: Batch, calls: list[Call]
    ) -> None:
        self.name, self.calls = name, calls
        self.mask, self.lengths = batch.mask.to(hidden.device), batch.lengths.tolist()
        self._activation_store, self._device = activation_store, hidden.device
        self.hidden = hidden

    @property
    def hidden(self) -> Tensor:
        """The present hidden states (b, L, d), on the device."""
        return self.stored.to(self._device)

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self._activation_store.put(self.name, hidden)

    @property
    def stored(self) -> Tensor:
        """The present hidden states, on the host."""
        return self._activation_store.get(self.name)

    @property
    def shares_state(self) -> bool:
        """Whether several blocks are called with one mapping, to which they may write, such as shared keys and values:
        what a block computes then depends on the blocks that ran before, not on their outputs alone."""
        mappings = [
            id(value)
            for args, kwargs in self.calls
            for value in (*args, *kwargs.values())
            if isinstance(value, MutableMapping)
        ]
        return len(set(mappings)) < len(mappings)

    def replay(self, block: Block, index: int, *, finite: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """The hidden states that `block` computes from the present ones.

        Args:
            dtype: to which all floating-point arguments are converted, where the block is `in_dtype`.

        Raises:
            UserError: they are not finite although required to be.
        """
        args, kwargs = self.calls[index]
        hidden = self.hidden
        if dtype is not None and hidden.dtype != dtype:
            hidden, args, kwargs = tree_map(partial(_converted, dtype=dtype), (hidden, args, kwargs))
        output = block.module(hidden, *args, **kwargs)
        outputs: Tensor = output[0] if isinstance(output, tuple | list) else output
        if finite:
            check_finite(outputs, f"the outputs of {block.name}")
        return outputs


@torch.no_grad()
def record(
    model: nn.Module,
    blocks: list[Block],
    batches: Iterable[tuple[str, Batch]],
    device: torch.device,
    *,
    offloading: Offloading,
    wrap: Wrap,
    activation_store: ActivationStore,
    finite: bool = True,
) -> list[BatchState]:
    """Calls the model on every batch, to record how it calls its blocks.

    No block is computed: each returns its input, because its other arguments do not depend on what blocks compute:
    `check_causal` refuses models where they do.

    Args:
        batches: with the names of their hidden states.
        device: on which the model computes.
        wrap: from `returned_form`.
        finite: require finite inputs of the first block.

    Raises:
        UserError: blocks are called out of order or never, or the inputs of the first are not finite.
    """
    with offloading.outside(), passed_by(blocks, wrap):
        return [_record(model, blocks, name, batch, device, activation_store, finite) for name, batch in batches]


@torch.no_grad()
def returned_form(model: nn.Module, blocks: list[Block], device: torch.device, offloading: Offloading) -> Wrap:
    """The form in which blocks return hidden states, alone or in a tuple, found by calling the first block."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with offloading.outside(), offloading.block(0):
        returned = block_output(model, blocks[0], ids)
    if isinstance(returned, tuple | list):
        form, others = type(returned), returned[1:]
        return lambda hidden: form([hidden, *others])
    return lambda hidden: hidden


def block_output(model: nn.Module, block: Block, ids: Tensor) -> Any:
    """What a block returns in a forward pass, which ends there.

    Raises:
        UserError: the model never calls the block.
    """
    returned: list[Any] = []

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        returned.append(output)
        raise StopForwardError

    with block.module.register_forward_hook(hook), suppress(StopForwardError):
        model(input_ids=ids, use_cache=False)
    if not returned:
        raise UserError(f"the model never calls {block.name}: it cannot be pruned")
    return returned[0]


@contextmanager
def passed_by(blocks: list[Block], wrap: Wrap, last: Tensor | None = None) -> Generator[None]:
    """Makes blocks return their inputs; the first returns `last` instead, if given."""
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block.module, _passing(wrap, last if number == 0 else None)))
        yield


@contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype) -> Generator[None]:
    """Within it, all floating-point parameters and buffers of a module are copies in another dtype; the others are
    those of before, and so is all of it afterwards."""
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point() and x.dtype != dtype]
    before = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(dtype)
        yield
    finally:
        for x, data in zip(tensors, before, strict=True):
            x.data = data


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def check_finite(values: Tensor, what: str) -> None:
    """Raises UserError where an entry is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{what} are not finite: load the model in another dtype, or look for damaged weights")


def without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Splits a block's arguments into the hidden states, given first or by name, and the others."""
    if args:
        return args[0], (args[1:], kwargs)
    others = dict(kwargs)
    return others.pop("hidden_states"), ((), others)


class StopForwardError(Exception):
    """Ends a forward pass in a hook: later computations are not needed."""


def _record(
    model: nn.Module,
    blocks: list[Block],
    name: str,
    batch: Batch,
    device: torch.device,
    activation_store: ActivationStore,
    finite: bool,
) -> BatchState:
    entering: list[Tensor] = []
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not blocks[len(calls)].module:
            raise UserError(f"the model calls its blocks out of order: {blocks[len(calls)].name} was expected")
        hidden, call = without_hidden(args, kwargs)
        if not calls:
            entering.append(hidden)
        calls.append(call)
        if len(calls) == len(blocks):
            raise StopForwardError

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        stack.enter_context(suppress(StopForwardError))
        model(input_ids=batch.input_ids.to(device), use_cache=False)
    if len(calls) < len(blocks):
        raise UserError(f"the model never calls {blocks[len(calls)].name}: it cannot be pruned")
    if finite:
        check_finite(entering[0], f"the hidden states that enter {blocks[0].name}")
    return BatchState(name, activation_store, entering[0], batch, calls)


def _passing(wrap: Wrap, last: Tensor | None) -> Callable[..., Any]:
    return lambda *args, **kwargs: wrap(without_hidden(args, kwargs)[0] if last is None else last)
