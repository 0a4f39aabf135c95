"""A model from its config alone, on the meta device: its parts, and the cost of reading and tokenizing the text.

To examine its class, one block at a time is given random weights.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.data.hub import quiet
from admm_prune.data.sequences import GROUP, Row, Sequences, encode
from admm_prune.data.sources import Document
from admm_prune.methods.target import Target
from admm_prune.models.adapters import check_repository
from admm_prune.models.checkpoint import Checkpoint
from admm_prune.models.checks import check_causal, check_ids, check_vocabulary
from admm_prune.models.families import sequence_length
from admm_prune.models.loading import explained, kind_of, load_tokenizer, locate
from admm_prune.models.stored import check_stored, compute_buffers, dequantizer, shapes
from admm_prune.models.streaming import Offloading
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.runs.machine import PeakMemory, resident_bytes, return_freed_memory
from admm_prune.runs.texts import is_local, read_corpora
from admm_prune.settings import TextSettings

BATCH = 8  # as `data.sequences.pack` makes them
_MIB = 2**20
_IDS = 16  # bytes of a token and of where it ends, both int64
_ROWS = 64  # of large embeddings that are drawn: no id beyond is tried out
_LARGE = 1 << 24  # entries of an embedding: 64 MiB
_MOST = 1 << 27  # entries of a block: 512 MiB
_SCALE = 0.02


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model without weights.

    Attributes:
        source: as the user named it.
        model: in evaluation mode, on the meta device.
        blocks: of it.
        notes: on tensors of its files that the model does not use.
        renames: as that of `Checkpoint`; False where there are no files.
    """

    source: str
    model: Any
    blocks: list[Block]
    notes: tuple[str, ...] = ()
    renames: bool = False

    @classmethod
    def of(cls, source: str, dtype: str | None = None, *, trust_remote_code: bool = False) -> Anatomy:
        """Builds the model that a config describes.

        Args:
            source: "embedded", a folder with a config.json, or a Hub id.
            dtype: instead of the config's.
            trust_remote_code: allow running code that comes with the model.

        Raises:
            UserError: there is no such model, or it has no decoder blocks that can be read.
        """
        location = locate(source, weights=False)
        with explained(source, location), quiet():
            if isinstance(location, str):
                check_repository(location)
            config, kind = kind_of(location, trust_remote_code)
            weight_dtype = getattr(torch, dtype) if dtype else getattr(config, "dtype", None) or torch.float32
            quantizer = dequantizer(source, config)
            if quantizer is not None:
                del config.quantization_config
                weight_dtype = quantizer.update_dtype(weight_dtype)
            model = shapes(kind, config, weight_dtype, trust_remote_code=trust_remote_code)
            notes: tuple[str, ...] = ()
            renames = False
            if isinstance(location, Path) and any(location.glob("*.safetensors")):
                checkpoint = Checkpoint(location, torch.device("cpu"))
                checkpoint.adapt(model, quantizer)
                renames = checkpoint.renames
                notes = check_stored(source, model, checkpoint, dequantized=quantizer is not None)
        blocks = decoder_blocks(model)
        random_weights = RandomWeights(model)
        if random_weights.fits:
            check_causal(source, random_weights.model, random_weights)
        return cls(source, model, blocks, notes, renames)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def outside_bytes(self) -> int:
        """Bytes of the weights outside the blocks: embeddings, the last norm, the head."""
        return self.weight_bytes - sum(map(block_bytes, self.blocks))

    @property
    def largest(self) -> Tensor:
        """The largest single weight."""
        weight: Tensor = max(self.model.parameters(), key=lambda p: p.numel())
        return weight

    def kinds(self, target: Target) -> Iterator[tuple[int, int]]:
        """(first block, count) of every kind of block: those with weights of the same shapes and targets."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, block in enumerate(self.blocks):
            targets = (target.at(view.name) for view in block.weights)
            kinds.setdefault((*(p.shape for p in block.module.parameters()), *targets), []).append(index)
        return ((members[0], len(members)) for members in kinds.values())

    def sequences(self, count: int, length: int | None) -> Sequences:
        """`count` full sequences of a length, by default that of a run.

        Raises:
            UserError: the length is beyond the model's context.
        """
        length = sequence_length(self.model.config, length)
        row = Row(torch.zeros(length, dtype=torch.long), length)
        return Sequences((row,) * count, "windows", length, None, BATCH)


def block_bytes(block: Block) -> int:
    """Bytes of all of its weights."""
    return sum(p.nbytes for p in block.module.parameters())


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The text of a run.

    Attributes:
        characters, validation: of the whole text; of the evaluation part.
        held: bytes of the text.
        lists: bytes of a tokenizer's lists for as much as it encodes at once.
        left: bytes that remain allocated afterwards.
        tokens: of all of the text.
        rate: characters tokenized a second.
    """

    characters: int
    validation: int
    held: int
    lists: int
    left: int
    tokens: int
    rate: float

    @property
    def validation_tokens(self) -> int:
        return round(self.tokens * self.validation / self.characters)

    @property
    def peak(self) -> int:
        """Bytes while the last piece is encoded, beside the text."""
        return self.lists + _IDS * self.tokens


def check_tokenizer(source: str, model: Any, *, required: bool, trust_remote_code: bool = False) -> None:
    """Refuses a tokenizer with ids for which the model has no embedding, as a run does.

    Args:
        source: as the user named the model: of a folder, the tokenizer in it.
        model: its shapes.
        required: whether the plan needs a tokenizer, so that a folder without one is refused.
        trust_remote_code: allow running code that comes with the model.

    Raises:
        UserError: it does not fit the model, or cannot be read.
    """
    location = locate(source, weights=False)
    if required or (isinstance(location, Path) and any(location.glob("*token*"))):
        check_vocabulary(source, load_tokenizer(source, location, trust_remote_code), model)


def read(
    text: TextSettings, source: str, model: Any, *, stream: bool, trust_remote_code: bool = False
) -> Reading | None:
    """Reads the text of a run, and encodes a piece of the size that is encoded at once.

    Args:
        text: as of a run; None is returned if it is not on this disk.
        source, model, trust_remote_code: as `check_tokenizer`.
        stream: the run returns freed memory to the system, as streaming runs do.

    Raises:
        UserError: the text or the tokenizer cannot be used.
    """
    if not is_local(text):
        return None
    tokenizer = load_tokenizer(source, locate(source, weights=False), trust_remote_code)
    corpora = read_corpora(text, tokenizer)
    documents = [document for corpus in corpora for document in corpus.documents]
    encode([documents[0][:1000]], tokenizer)  # costs of the first call only
    whole = sum(map(len, documents))
    at_once = min(whole, max(GROUP, *map(len, documents)))
    piece = _piece(documents, min(at_once, 2 * GROUP))
    size = sum(map(len, piece))
    before, began = resident_bytes(), time.perf_counter()
    with PeakMemory() as memory:
        encoded = [document.ids for document in encode(piece, tokenizer)]
        tokens = sum(map(len, encoded))
    seconds = time.perf_counter() - began
    check_ids(source, encoded, model)
    del encoded
    if stream:
        return_freed_memory()
    return Reading(
        characters=whole,
        validation=corpora[1].characters,
        held=sum(map(sys.getsizeof, documents)),
        lists=round(memory.extra_mib * _MIB * at_once / size),
        left=max(0, resident_bytes() - before),
        tokens=round(tokens * whole / size),
        rate=size / seconds,
    )


def _piece(documents: list[Document], characters: int) -> list[Document]:
    piece: list[Document] = []
    for document in documents:
        piece.append(document[:characters])
        characters -= len(piece[-1])
        if characters <= 0:
            break
    return piece


class RandomWeights(Offloading):
    """Random weights for a model on the meta device; large embeddings have their first rows alone.

    Args:
        model: of shapes alone; it is copied.

    Attributes:
        model: the copy.
        fits: whether its largest block is small enough to be allocated.
    """

    is_offloaded = True

    def __init__(self, model: Any) -> None:
        self.model: Any = copy.deepcopy(model)
        self.blocks = decoder_blocks(self.model)
        self.fits = max(sum(p.numel() for p in block.module.parameters()) for block in self.blocks) <= _MOST
        self._generator = torch.Generator().manual_seed(0)
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        self._outside = {
            module: names
            for module in self.model.modules()
            if (names := [name for name, p in module.named_parameters(recurse=False) if id(p) not in inside])
        }
        if self.fits:
            unset = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_meta}
            compute_buffers(self.model, unset, torch.device("cpu"))
            for module, names in self._outside.items():
                self._draw(module, names)

    def device(self, model: nn.Module) -> torch.device:
        return torch.device("cpu")

    @contextmanager
    def block(self, index: int) -> Generator[None]:
        modules = list(self.blocks[index].module.modules())
        before = [dict(module.named_parameters(recurse=False)) for module in modules]
        for module, parameters in zip(modules, before, strict=True):
            self._draw(module, list(parameters))
        try:
            yield
        finally:
            for module, parameters in zip(modules, before, strict=True):
                for name, parameter in parameters.items():
                    setattr(module, name, parameter)

    def _draw(self, module: nn.Module, names: list[str]) -> None:
        for name in names:
            meta = module.get_parameter(name)
            shape = list(meta.shape)
            if isinstance(module, nn.Embedding) and meta.numel() > _LARGE:
                shape[0] = min(shape[0], _ROWS)
                module.padding_idx = None
            elif meta.numel() > _MOST:  # a head, which is never called
                continue
            values = torch.randn(shape, generator=self._generator) * _SCALE
            values = values + 1.0 if meta.ndim == 1 and name == "weight" else values  # of a norm
            setattr(module, name, nn.Parameter(values.to(torch.float32), requires_grad=False))
