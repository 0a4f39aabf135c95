"""The prunable weights of a decoder, found by its structure, not by names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError


@dataclass(frozen=True, eq=False)
class WeightView:
    """One matrix W (out, in) of y = W x + b, whatever the storage of its module.

    Attributes:
        name: of the parameter, dotted from the model's root.
        module: its `nn.Linear`, or the `Conv1D` of transformers, which stores the transpose.
        transposed: whether the module stores W^T.
    """

    name: str
    module: nn.Module
    transposed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The matrix as stored."""
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        return dict(self.module.named_parameters(recurse=False)).get("bias")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        """W (out, in), detached; it shares memory with the parameter."""
        stored = self.parameter.detach()
        return stored.T if self.transposed else stored

    def write(self, weight: Tensor) -> None:
        """Puts W (out, in) into the parameter, in the parameter's dtype; zeros stay exact zeros.

        Raises:
            ValueError: another shape, or an entry that is not finite in the parameter's dtype.
        """
        if weight.shape != self.shape:
            raise ValueError(f"{self.name} is of shape {self.shape}, not {tuple(weight.shape)}")
        cast = weight.detach().to(self.parameter)
        if not bool(torch.isfinite(cast).all()):
            raise ValueError(f"{self.name}: the new weight has entries that are not finite in {cast.dtype}")
        self.read().copy_(cast)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: its name ("model.layers.0"), its module, its prunable weights in the order of the module."""

    name: str
    module: nn.Module
    weights: tuple[WeightView, ...]


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the outermost `ModuleList` that holds the most parameters.

    The weights are all matrices of `nn.Linear` and `Conv1D` in it which no module outside of the blocks shares.

    Raises:
        UserError: there is no such list, or a block has no such matrix, or keeps weights in another form (the fused
            experts of a mixture), which would stay dense unnoticed. The message names the model's class.
    """
    kind = type(model).__name__
    lists = dict(_outermost_lists(model))
    if not lists:
        raise UserError(f"{kind}: no list of decoder blocks found: this kind of model cannot be pruned")
    path = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    names = {f"{path}.{i}": block for i, block in enumerate(lists[path])}
    # A parameter used in several places is listed under each name; `taken` holds those no block may change.
    taken = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{path}.")
    }
    blocks = []
    for name, module in names.items():
        for inner, parameter in module.named_parameters():
            if parameter.ndim > 2:
                form = f"{name}.{inner} {tuple(parameter.shape)}"
                raise UserError(f"{kind}: cannot read block {name}: {form} is not the matrix of a Linear or Conv1D")
        views = [view for view in _views(module, name) if id(view.parameter) not in taken]
        if not views:
            raise UserError(f"{kind}: cannot read block {name}: it has no Linear or Conv1D matrix of its own")
        taken |= {id(view.parameter) for view in views}
        blocks.append(Block(name, module, tuple(views)))
    return blocks


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            if len(child) > 0:
                yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def _views(block: nn.Module, prefix: str) -> Iterator[WeightView]:
    from transformers.pytorch_utils import Conv1D

    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield WeightView(f"{prefix}.{name}.weight", module, transposed=isinstance(module, Conv1D))
