"""The branches of a decoder block and their units, which can go: neurons, and heads that share a key and a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.kernels.groups import columns_of
from admm_prune.models.structure import Block, WeightView

Kind = Literal["neurons", "heads"]
# Attributes that modules of transformers read in their forward, and that count units of the branch.
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim")


@dataclass(frozen=True, eq=False)
class Branch:
    """The feed-forward part or the attention of a block, as units that reach its outputs by their own columns alone.

    A unit is a neuron, or a key head with its value head and all query heads that read them. The rows of each inner
    matrix, and the columns of the output matrix, belong to the units in equal consecutive parts.

    Attributes:
        name: of the module, dotted from the model's root.
        module: the attention, the feed-forward part, or the block itself where this holds the matrices (OPT).
        inner: the matrices (rows, d) that read the residual stream.
        output: the matrix (d, columns) that writes to it.
    """

    name: str
    kind: Kind
    module: nn.Module
    inner: tuple[WeightView, ...]
    output: WeightView
    size: int  # of a unit, in rows of its smallest inner matrix: 1, or that of a head

    @property
    def count(self) -> int:
        """Units that are there now."""
        return min(view.shape[0] for view in self.inner) // self.size

    @property
    def width(self) -> int:
        """Columns of the output matrix that belong to a unit."""
        return self.output.shape[1] // self.count

    @property
    def queries(self) -> int:
        """Query heads of a unit; 1 for a neuron."""
        return self.width // self.size

    @property
    def unit_weights(self) -> int:
        """Entries of all matrices that belong to a unit."""
        return sum(view.parameter.numel() for view in (*self.inner, self.output)) // self.count


def branches(block: Block) -> tuple[Branch, ...]:
    """Attention and feed-forward part of a block, found by the shapes of the matrices that one module holds.

    The last of them writes to the residual stream, all others read it. Three others beside it, in a module that says
    how large a head is, are queries, keys and values; one or two others are a feed-forward part.

    Raises:
        UserError: matrices of another form (queries, keys and values in one); the message names the module.
    """
    found = []
    for name, views in _by_module(block).items():
        *inner, output = views
        module = block.module.get_submodule(name.removeprefix(block.name).removeprefix("."))
        width, columns = output.shape
        rows = [view.shape[0] for view in inner]
        size = getattr(module, "head_dim", None) if len(inner) == 3 else 1
        readable = 1 <= len(inner) <= 3 and all(view.shape[1] == width for view in inner) and isinstance(size, int)
        if not readable or max(rows) != columns or any(r % size or columns % r for r in rows):  # type: ignore[operator]
            shapes = ", ".join(f"{view.name.rpartition('.')[0].rpartition('.')[2]} {view.shape}" for view in views)
            raise UserError(
                f"cannot read the units of {name}: {shapes} are neither attention nor feed-forward matrices"
            )
        kind: Kind = "heads" if len(inner) == 3 else "neurons"
        found.append(Branch(name, kind, module, tuple(inner), output, int(size or 1)))
    return tuple(found)


def _by_module(block: Block) -> dict[str, list[WeightView]]:
    """The matrices by the name of the module that holds them, in the order of the block."""
    grouped: dict[str, list[WeightView]] = {}
    for view in block.weights:
        grouped.setdefault(view.name.removesuffix(".weight").rpartition(".")[0], []).append(view)
    return grouped


def keep_units(branch: Branch, kept: Tensor) -> None:
    """Slices all matrices of a branch to some of its units, in place: rows of the inner ones, columns of the output.

    Args:
        kept: (k,), ascending indices of the units that stay; at least one.
    """
    share, width = len(kept) / branch.count, branch.width
    rows = [view.shape[0] // branch.count for view in branch.inner]
    for view, each in zip(branch.inner, rows, strict=True):
        chosen = columns_of(kept, each)
        bias = None if view.bias is None else view.bias[chosen]
        _replace(view, view.read()[chosen], bias)
    _replace(branch.output, branch.output.read()[:, columns_of(kept, width)], branch.output.bias)
    _rescale(branch, share)


def pad_units(branch: Branch, count: int) -> None:
    """Adds units of zeros at the end of a branch until it has `count`, in place: its outputs stay what they are."""
    share, missing, width = count / branch.count, count - branch.count, branch.width
    rows = [view.shape[0] // branch.count for view in branch.inner]
    for view, each in zip(branch.inner, rows, strict=True):
        bias = None if view.bias is None else nn.functional.pad(view.bias, (0, missing * each))
        _replace(view, nn.functional.pad(view.read(), (0, 0, 0, missing * each)), bias)
    _replace(branch.output, nn.functional.pad(branch.output.read(), (0, missing * width)), branch.output.bias)
    _rescale(branch, share)


def _replace(view: WeightView, weight: Tensor, bias: Tensor | None) -> None:
    """Puts matrices of another shape into a linear layer."""
    module: Any = view.module
    stored = weight.T if view.transposed else weight
    module.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    if view.transposed:
        module.nx, module.nf = weight.shape[1], weight.shape[0]
    else:
        module.out_features, module.in_features = weight.shape


def _rescale(branch: Branch, share: float) -> None:
    for name in _COUNTS:
        count = getattr(branch.module, name, None)
        if isinstance(count, int):
            setattr(branch.module, name, round(count * share))
