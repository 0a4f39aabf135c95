"""A model of a config with random weights, one block of it in memory at a time: to try out what its class does."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from admm_prune.models.stored import compute_buffers
from admm_prune.models.streaming import Residence
from admm_prune.models.structure import decoder_blocks

_ROWS = 64  # of large embeddings that are drawn: no id beyond is tried out
_LARGE = 1 << 24  # entries of an embedding: 64 MiB
_MOST = 1 << 27  # entries of a block: 512 MiB
_SCALE = 0.02


class Drawn(Residence):
    """Random weights for a model on the meta device; large embeddings have their first rows alone.

    Args:
        model: of shapes alone; it is copied.

    Attributes:
        model: the copy.
        fits: whether its largest block is small enough to be drawn.
    """

    hollow = True

    def __init__(self, model: Any) -> None:
        self.model: Any = copy.deepcopy(model)
        self.blocks = decoder_blocks(self.model)
        self.fits = max(sum(p.numel() for p in block.module.parameters()) for block in self.blocks) <= _MOST
        self._generator = torch.Generator().manual_seed(0)
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        self._outside = {
            module: own
            for module in self.model.modules()
            if (own := [name for name, p in module.named_parameters(recurse=False) if id(p) not in inside])
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
        for module, own in zip(modules, before, strict=True):
            self._draw(module, list(own))
        try:
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                for name, parameter in own.items():
                    setattr(module, name, parameter)

    def _draw(self, module: nn.Module, names: list[str]) -> None:
        for name in names:
            meta = module.get_parameter(name)
            shape = list(meta.shape)
            if isinstance(module, nn.Embedding) and meta.numel() > _LARGE:
                shape[0] = min(shape[0], _ROWS)
                module.padding_idx = None
            elif meta.numel() > _MOST:  # a head, which is never run
                continue
            values = torch.randn(shape, generator=self._generator) * _SCALE
            values = values + 1.0 if meta.ndim == 1 and name == "weight" else values  # of a norm
            setattr(module, name, nn.Parameter(values.to(torch.float32), requires_grad=False))
