"""The sublayers of a decoder block and their structured groups: neurons, and heads that share a key and a value.

The savings by removing groups, in each unit of the budget.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.families import GROUP_COUNTS, GROUPED_BY_KEY_HEAD, HEAD_SIZE
from admm_prune.models.parallel import World
from admm_prune.models.structure import Block, WeightView
from admm_prune.ops.group_compensation import columns_of

Kind = Literal["neurons", "heads"]
Unit = Literal["parameters", "bytes", "kv-cache", "flops", "latency"]
UNITS: tuple[Unit, ...] = get_args(Unit)
NO_KEYS = "has no keys and values of its own, it reads those of another block"
_WIDTHS, _REPEATS = 9, 5  # widths whose time is measured, and repeats; interpolated in between


@dataclass(frozen=True, eq=False)
class Sublayer:
    """The feed-forward part or the attention of a block, as groups that reach its outputs only by their own columns.

    A group is a neuron, or a key head with its value head and all query heads that read them. The rows of each inner
    matrix, and the columns of the output matrix, belong to the groups in equal consecutive parts.

    Attributes:
        name: of the module, dotted from the model's root.
        module: the attention, the feed-forward part, or the block itself where this holds the matrices (OPT).
        inner: the matrices (rows, d) that read the residual stream; gate and up may be the halves of one weight.
        output: the matrix (d, columns) that writes to it.
        size: of a head; 1 for a neuron.
        queries: query heads of a group; 1 for a neuron.
    """

    name: str
    kind: Kind
    module: nn.Module
    inner: tuple[WeightView, ...]
    output: WeightView
    size: int
    queries: int

    @property
    def count(self) -> int:
        """The current number of groups."""
        return self.output.shape[1] // self.width

    @property
    def width(self) -> int:
        """Columns of the output matrix that belong to a group."""
        return self.queries * self.size

    @property
    def group_weights(self) -> int:
        """Entries of all matrices that belong to a group."""
        return sum(view.read().numel() for view in (*self.inner, self.output)) // self.count


def sublayers(block: Block) -> tuple[Sublayer, ...]:
    """The prunable sublayers of a block, found by the shapes of the matrices in one module.

    One or two matrices that read the residual stream and a last one that writes to it are a feed-forward part; a first
    one of twice as many rows is gate and up in one. Queries, keys, values and the output, in a module that says how
    large a head is, are an attention. Heads that cannot be removed without changing the others are kept: see
    `heads_stay`.

    Raises:
        UserError: matrices of another form, or experts; the message names the module.
    """
    return tuple(part for part in _read(block) if isinstance(part, Sublayer))


def feed_forward_part(block: Block) -> Sublayer | None:
    """The first feed-forward part of a block, whatever its other modules are; None if it has none."""
    for name, views in by_module(block).items():
        module = module_named(block, name)
        part = _neurons(name, module, views) if head_size(module) is None else None
        if part is not None:
            return part
    return None


def heads_stay(block: Block) -> str | None:
    """Why the heads of a block cannot be removed, in words; None if they can."""
    return next((part for part in _read(block) if isinstance(part, str)), None)


def _read(block: Block) -> list[Sublayer | str]:
    parts: list[Sublayer | str] = []
    for name, views in by_module(block).items():
        module = module_named(block, name)
        if any(view.expert is not None for view in views):
            raise UserError(
                f"{name} is a mixture of experts, which has no structured groups: use a method that prunes weights"
            )
        size = head_size(module)
        if size is None:
            read: Sublayer | str | None = _neurons(name, module, views)
            if read is not None and module is not block.module:
                _check_no_other_entries(name, module, views)
        else:
            read = _heads(name, module, views, size)
        if read is None:
            shapes = ", ".join(f"{view.name.rpartition('.')[0].rpartition('.')[2]} {view.shape}" for view in views)
            raise UserError(
                f"cannot read the structured groups of {name}: {shapes} are neither attention nor feed-forward matrices"
            )
        parts.append(read)
    return parts


def module_named(block: Block, name: str) -> nn.Module:
    """The module of a block by its full name."""
    return block.module.get_submodule(name.removeprefix(block.name).removeprefix("."))


def head_size(module: nn.Module) -> int | None:
    """The size of a head, as an attention has it; None for other modules."""
    sizes = (getattr(module, attribute, None) for attribute in HEAD_SIZE)
    return next((size for size in sizes if isinstance(size, int)), None)


def by_module(block: Block) -> dict[str, list[WeightView]]:
    """The matrices by the name of the module that holds them, in the order of the block."""
    grouped: dict[str, list[WeightView]] = {}
    for view in block.weights:
        owner = view.parameter_name.removesuffix(f".{view.attribute}")
        grouped.setdefault(owner if view.expert is not None else owner.rpartition(".")[0], []).append(view)
    return grouped


def _neurons(name: str, module: nn.Module, views: list[WeightView]) -> Sublayer | None:
    *inner, output = views
    width, columns = output.shape
    if len(inner) == 1 and inner[0].shape[0] == 2 * columns:
        inner = [replace(inner[0], part=(i, i + 1, 2)) for i in range(2)]
    if not 1 <= len(inner) <= 2 or any(view.shape != (columns, width) for view in inner):
        return None
    return Sublayer(name, "neurons", module, tuple(inner), output, 1, 1)


def _check_no_other_entries(name: str, module: nn.Module, views: list[WeightView]) -> None:
    """Refuses a feed-forward part in which something beside its matrices belongs to neurons."""
    known = {id(p) for view in views for p in view.module.parameters(recurse=False)}
    for other, parameter in module.named_parameters():
        if id(parameter) not in known and views[-1].shape[1] in parameter.shape:
            raise UserError(f"cannot read the structured groups of {name}: {other} has an entry for every neuron")


def _heads(name: str, module: Any, views: list[WeightView], size: int) -> Sublayer | str | None:
    *inner, output = views
    columns = output.shape[1]
    if len(inner) not in (1, 3):
        return None
    if len(inner) == 1:
        if "A_log" in dict(module.named_parameters(recurse=False)):
            return f"{name} is a state space model"
        if inner[0].shape == output.shape[::-1]:
            return f"{name} {NO_KEYS}"
        if type(module).__name__ not in GROUPED_BY_KEY_HEAD:
            return f"{name} keeps queries, keys and values in one matrix"
        keys = (inner[0].shape[0] - columns) // 2 // size
    else:
        keys = min(view.shape[0] for view in inner) // size
    rows = [view.shape[0] for view in inner]
    if keys < 1 or any(r % (keys * size) for r in (*rows, columns)) or sum(rows) != columns + 2 * keys * size:
        return None
    if getattr(getattr(module, "config", None), "alibi", False):
        return f"{name} gives every head its own slope (ALiBi)"
    matrices = {view.module for view in views}
    norms = [m for m in module.modules() if m not in matrices and next(m.parameters(recurse=False), None) is not None]
    if any(m is module for m in norms):
        return f"{name} has parameters beside its matrices"
    if len(norms) > 2 or any(len(p) != size for norm in norms for p in norm.parameters(recurse=False)):
        return f"{name} has norms for single heads, or over all of them"
    return Sublayer(name, "heads", module, tuple(inner), output, size, columns // size // keys)


def keep_groups(sublayer: Sublayer, indices: Tensor) -> None:
    """Slices all matrices of a sublayer to some of its groups, in place: rows of the inner ones, columns of the output.

    Args:
        indices: (k,), ascending, of the groups to keep; at least one.
    """
    count, width = sublayer.count, sublayer.width
    for whole, parts in _stored(sublayer):
        rows = torch.cat([view.rows.start + columns_of(indices, view.shape[0] // count) for view in parts])
        _replace(whole, whole.read()[rows], None if whole.bias is None else whole.bias[rows])
    _replace(sublayer.output, sublayer.output.read()[:, columns_of(indices, width)], sublayer.output.bias)
    _rescale(sublayer, len(indices) / count)


def pad_groups(sublayer: Sublayer, count: int) -> None:
    """Appends groups of zeros to a sublayer until it has `count`, in place; its outputs do not change."""
    now, width = sublayer.count, sublayer.width
    pad = nn.functional.pad
    for whole, parts in _stored(sublayer):
        missing = [(count - now) * (view.shape[0] // now) for view in parts]
        weight = torch.cat([pad(view.read(), (0, 0, 0, n)) for view, n in zip(parts, missing, strict=True)])
        biases = [pad(view.bias, (0, n)) for view, n in zip(parts, missing, strict=True) if view.bias is not None]
        _replace(whole, weight, torch.cat(biases) if biases else None)
    _replace(sublayer.output, pad(sublayer.output.read(), (0, (count - now) * width)), sublayer.output.bias)
    _rescale(sublayer, count / now)


def _stored(sublayer: Sublayer) -> list[tuple[WeightView, list[WeightView]]]:
    """The inner matrices as they are stored, each with the views that are parts of it, in the order of their rows."""
    parts: dict[nn.Module, list[WeightView]] = {}
    for view in sublayer.inner:
        parts.setdefault(view.module, []).append(view)
    return [(replace(views[0], part=None), sorted(views, key=lambda v: v.rows.start)) for views in parts.values()]


def _replace(view: WeightView, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces the matrices of a linear layer by ones of another shape."""
    module: Any = view.module
    stored = weight.T if view.transposed else weight
    module.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    if view.transposed:
        module.nx, module.nf = weight.shape[1], weight.shape[0]
    else:
        module.out_features, module.in_features = weight.shape


def _rescale(sublayer: Sublayer, share: float) -> None:
    for name in GROUP_COUNTS:
        count = getattr(sublayer.module, name, None)
        if isinstance(count, int):
            setattr(sublayer.module, name, round(count * share))


def savings(sublayer: Sublayer, unit: Unit, *, tokens: int = 2048) -> Tensor:
    """The savings of removing k = 0..n groups of a sublayer: (n + 1,), float64, nondecreasing.

    Args:
        unit: "parameters", entries of the matrices; "bytes", of these; "kv-cache", bytes per token of keys and values;
            "flops", per token, of the matrices and of attention over half of the context; "latency", seconds that the
            products of the matrices with `tokens` inputs take less on this machine, measured: where the weights are, or
            on the GPU if there is one and they are on disk; of several processes, by the first one, so that all of them
            decide alike.
        tokens: of the context.

    Raises:
        UserError: no such unit.
    """
    k = torch.arange(sublayer.count + 1, dtype=torch.float64)
    element = sublayer.output.parameter.element_size()
    if unit == "parameters":
        return k * sublayer.group_weights
    if unit == "bytes":
        return k * sublayer.group_weights * element
    if unit == "kv-cache":
        return k * (2 * sublayer.size * element if sublayer.kind == "heads" else 0)
    if unit == "flops":
        attention = 4 * sublayer.width * tokens / 2 if sublayer.kind == "heads" else 0
        return k * (2 * sublayer.group_weights + attention)
    if unit == "latency":
        shapes = tuple((view.shape[0] // sublayer.count, view.shape[1]) for view in sublayer.inner)
        weight = sublayer.output.parameter
        on_disk = "cuda" if torch.cuda.is_available() else "cpu"
        device = on_disk if weight.is_meta else str(weight.device)
        return _seconds_saved(sublayer.count, shapes, sublayer.width, tokens, weight.dtype, device)
    raise UserError(f"a budget is in {', '.join(UNITS[:-1])} or {UNITS[-1]}, not in '{unit}'")


@lru_cache(maxsize=64)  # blocks have equal shapes
def _seconds_saved(
    count: int, inner: tuple[tuple[int, int], ...], width: int, tokens: int, dtype: torch.dtype, device: str
) -> Tensor:
    points = sorted({round(count * i / (_WIDTHS - 1)) for i in range(_WIDTHS)})
    times = World.current().broadcast_from_rank0(
        lambda: [_seconds(groups, inner, width, tokens, dtype, device) for groups in points]
    )
    # Fewer groups are never slower: measurements to the contrary are noise.
    times = torch.tensor(times, dtype=torch.float64).cummax(0).values.tolist()
    remaining = torch.arange(count, -1, -1, dtype=torch.float64)
    at = torch.tensor(points, dtype=torch.float64)
    right = torch.searchsorted(at, remaining).clamp(1, len(points) - 1)
    share = (remaining - at[right - 1]) / (at[right] - at[right - 1])
    t = torch.tensor(times, dtype=torch.float64)
    taken = t[right - 1] + share * (t[right] - t[right - 1])
    return (taken[0] - taken).clamp_min(0).cummax(0).values


def _seconds(
    groups: int, inner: tuple[tuple[int, int], ...], width: int, tokens: int, dtype: torch.dtype, device: str
) -> float:
    """The least time of the products of a sublayer with this many groups."""
    if groups == 0:
        return 0.0
    residual = inner[0][1]
    x = torch.randn(tokens, residual, dtype=dtype, device=device)
    weights = [torch.randn(groups * rows, columns, dtype=dtype, device=device) for rows, columns in inner]
    output = torch.randn(residual, groups * width, dtype=dtype, device=device)
    a = torch.randn(tokens, groups * width, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(a, output)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
