"""What a model is made of, from its config alone: built on the meta device, where weights have shapes and no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from admm_prune.data.hub import quiet
from admm_prune.data.sequences import Row, Sequences, default_length
from admm_prune.errors import UserError
from admm_prune.models.adapters import check_repository
from admm_prune.models.causality import check_causal
from admm_prune.models.checkpoint import Checkpoint
from admm_prune.models.loading import explained, kind_of, locate
from admm_prune.models.quantized import dequantizer
from admm_prune.models.stored import check_stored, shapes
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.runs.planning.drawn import Drawn

BATCH = 8  # as `data.sequences.pack` makes them


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model without weights.

    Attributes:
        source: as the user named it.
        model: in evaluation mode, on the meta device.
        blocks: of it.
    """

    source: str
    model: Any
    blocks: list[Block]

    @classmethod
    def of(cls, source: str, dtype: str | None = None) -> Anatomy:
        """Builds the model that a config describes.

        Args:
            source: "embedded", a folder with a config.json, or a Hub id.
            dtype: in place of the config's.

        Raises:
            UserError: there is no such model, or it has no decoder blocks that can be read.
        """
        location = locate(source, weights=False)
        with explained(source, location), quiet():
            if isinstance(location, str):
                check_repository(location)
            config, kind = kind_of(location, trust_remote_code=False)
            wanted = getattr(torch, dtype) if dtype else getattr(config, "dtype", None) or torch.float32
            quantizer = dequantizer(source, config)
            if quantizer is not None:
                del config.quantization_config
                wanted = quantizer.update_dtype(wanted)
            model = shapes(kind, config, wanted)
            if isinstance(location, Path) and any(location.glob("*.safetensors")):
                checkpoint = Checkpoint(location, torch.device("cpu"))
                checkpoint.adapt(model, quantizer)
                check_stored(source, model, checkpoint, dequantized=quantizer is not None)
        blocks = decoder_blocks(model)
        drawn = Drawn(model)
        if drawn.fits:
            check_causal(source, drawn.model, drawn)
        return cls(source, model, blocks)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def outside_bytes(self) -> int:
        """Of the weights that are in no block: embeddings, the last norm, the head."""
        return self.weight_bytes - sum(map(block_bytes, self.blocks))

    @property
    def largest(self) -> Tensor:
        """The largest single weight."""
        weight: Tensor = max(self.model.parameters(), key=lambda p: p.numel())
        return weight

    def kinds(self) -> Iterator[tuple[int, int]]:
        """(the first block, how many) of every kind of block: those with weights of the same shapes."""
        kinds: dict[tuple[torch.Size, ...], list[int]] = {}
        for index, block in enumerate(self.blocks):
            kinds.setdefault(tuple(p.shape for p in block.module.parameters()), []).append(index)
        return ((members[0], len(members)) for members in kinds.values())

    def sequences(self, count: int, length: int | None) -> Sequences:
        """So many full sequences of a length, by default that of a run.

        Raises:
            UserError: the length is beyond the model's context.
        """
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if length is not None and context is not None and length > context:
            raise UserError(f"length {length} is beyond the model's context of {context} tokens")
        length = length or default_length(self.model.config)
        row = Row(torch.zeros(length, dtype=torch.long), length)
        return Sequences((row,) * count, "windows", length, None, BATCH)


def block_bytes(block: Block) -> int:
    """Of all of its weights."""
    return sum(p.nbytes for p in block.module.parameters())
