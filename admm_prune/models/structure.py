"""The prunable weights of a decoder, found by its structure, not by names."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.prunable import matrices


@dataclass(frozen=True, eq=False)
class WeightView:
    """One matrix W (out, in) of y = W x + b, whatever the storage of its module.

    Attributes:
        name: of the parameter, dotted from the model's root; with the number of the expert, where it is one's.
        module: its `nn.Linear`, the `Conv1D` of transformers, which stores the transpose, or the experts of a mixture,
            which keep their matrices in one parameter of three dimensions.
        transposed: whether the module stores W^T.
        attribute: the parameter's name in its module.
        expert: whose matrix it is, in a parameter of three dimensions.
        part: (first, last, of): W is those of its rows in equal parts, where several matrices are stored as one.
    """

    name: str
    module: nn.Module
    transposed: bool = False
    attribute: str = "weight"
    expert: int | None = None
    part: tuple[int, int, int] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter: the matrix, or several in one tensor."""
        return self.module.get_parameter(self.attribute)

    @property
    def parameter_name(self) -> str:
        """Dotted from the model's root."""
        return self.name if self.expert is None else self.name.removesuffix(f".{self.expert}")

    @property
    def module_name(self) -> str:
        """The name of its module; the matrix of an expert that is a part of a parameter has its own name."""
        return self.name.removesuffix(f".{self.attribute}")

    @property
    def bias(self) -> Tensor | None:
        """b (out,), sharing memory with its parameter."""
        bias = None if self.expert is not None else dict(self.module.named_parameters(recurse=False)).get("bias")
        return bias if bias is None or self.part is None else bias[self.rows]

    @property
    def rows(self) -> slice:
        """The rows of the stored matrix (out, in) that W consists of."""
        total = self.parameter.shape[-1 if self.transposed else -2]
        first, last, of = self.part or (0, 1, 1)
        return slice(total * first // of, total * last // of)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.read().shape
        return (rows, columns)

    def read(self) -> Tensor:
        """W (out, in), detached; it shares memory with the parameter."""
        return self.within(self.parameter.detach())

    def within(self, stored: Tensor) -> Tensor:
        """The matrix (out, in) in a tensor that is stored as the parameter is, such as its gradient; a view of it."""
        matrix = stored if self.expert is None else stored[self.expert]
        return (matrix.T if self.transposed else matrix)[self.rows]

    def write(self, weight: Tensor) -> None:
        """Writes W (out, in) to the parameter, in the parameter's dtype; zeros stay exact zeros.

        Raises:
            ValueError: another shape, or an entry that is not finite in the parameter's dtype.
        """
        if weight.shape != self.shape:
            raise ValueError(f"{self.name} has shape {self.shape}, not {tuple(weight.shape)}")
        cast = weight.detach().to(self.parameter)
        if not bool(cast.isfinite().all()):
            raise ValueError(f"{self.name}: the new weight has entries that are not finite in {cast.dtype}")
        self.read().copy_(cast)

    def write_bias(self, bias: Tensor) -> None:
        """Writes b (out,) to its parameter, in the parameter's dtype.

        Raises:
            ValueError: there is no bias, it has another shape, or an entry is not finite in the parameter's dtype.
        """
        stored = self.bias
        if stored is None or bias.shape != stored.shape:
            raise ValueError(f"{self.name} has no bias of shape {tuple(bias.shape)}")
        cast = bias.detach().to(stored)
        if not bool(cast.isfinite().all()):
            raise ValueError(f"{self.name}: the new bias has entries that are not finite in {cast.dtype}")
        stored.detach().copy_(cast)

    def fits(self, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Whether all entries of W, and of b if it is given, are finite in the parameter's dtype."""
        given = [weight] if bias is None else [weight, bias]
        return all(bool(x.detach().to(self.parameter).isfinite().all()) for x in given)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: its name ("model.layers.0"), its module, its prunable weights in the order of the module."""

    name: str
    module: nn.Module
    weights: tuple[WeightView, ...]


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the outermost `ModuleList` that holds the most parameters.

    The weights are all `prunable.matrices` in it which no module outside of the blocks shares; of experts, one each.
    Depthwise convolutions are not pruned: see `notes_on`.

    Raises:
        UserError: there is no such list, or a block has no such matrix, or keeps weights in another form (a
            convolution over several channels, or most of its entries in plain parameters), which would stay dense
            unnoticed; the model has an encoder, or reads more than text. The message names the model's class, and the
            first block that cannot be read.
    """
    kind = type(model).__name__
    _check_decoder(model)
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
        everything = _views(module, name)
        known = {id(view.parameter) for view in everything}
        unread = _in_another_form(module, known)
        if unread is not None:
            form = f"{name}.{unread} {tuple(module.get_parameter(unread).shape)}"
            raise UserError(
                f"{kind}: cannot read block {name}: {form} is not the matrix of a Linear or Conv1D, nor of experts"
            )
        views = [view for view in everything if id(view.parameter) not in taken]
        if not views:
            raise UserError(f"{kind}: cannot read block {name}: it has no Linear, Conv1D or expert matrix of its own")
        taken |= {id(view.parameter) for view in views}
        blocks.append(Block(name, module, tuple(views)))
    return blocks


def _in_another_form(block: nn.Module, known: set[int]) -> str | None:
    """The name of a parameter of a block that should be pruned and is in no form that can be; None without one.

    Routers, state matrices and the like are small beside the matrices of a block: plain parameters of two dimensions
    are such weights where they hold more entries than all that can be pruned, such as the stacked experts of DBRX.

    Args:
        known: the `id` of every parameter that can be pruned.
    """
    plain: dict[str, int] = {}
    for name, parameter in block.named_parameters():
        is_vector = sum(size > 1 for size in parameter.shape) <= 1
        if is_vector or id(parameter) in known or _is_depthwise(block, name):
            continue
        if parameter.ndim > 2:
            return name
        if not isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Linear | nn.Embedding):
            plain[name] = parameter.numel()
    read = sum(parameter.numel() for parameter in block.parameters() if id(parameter) in known)
    return max(plain, key=lambda name: plain[name]) if sum(plain.values()) > read > 0 else None


def assign(root: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of a module below `root`, by its dotted name."""
    owner, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(owner), attribute, value)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Within it a module's forward is another function; its hooks are called as before."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def notes_on(model: nn.Module) -> tuple[str, ...]:
    """Notes on weights in the blocks of hybrid models that no method prunes, or that several blocks share."""
    convolutions, steps, shared = [], [], []
    owned: set[int] = set()
    for block in decoder_blocks(model):
        pruned = {id(view.parameter) for view in block.weights}
        shared += [view.name for view in _views(block.module, block.name) if id(view.parameter) in owned]
        owned |= pruned
        for name, parameter in block.module.named_parameters():
            if parameter.ndim > 2 and _is_depthwise(block.module, name):
                convolutions.append(f"{block.name}.{name}")
            elif name.endswith("dt_proj.weight") and id(parameter) not in pruned:
                steps.append(f"{block.name}.{name}")
    kinds = {"depthwise convolutions": convolutions, "projections of time steps": steps}
    notes = [f"{len(names)} {kind} stay dense, such as {names[0]}" for kind, names in kinds.items() if names]
    if shared:
        notes.append(
            f"{len(shared)} matrices, such as {shared[0]}, are those of an earlier block: they are pruned there, on "
            "the inputs of that block alone"
        )
    return tuple(notes)


def _is_depthwise(block: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a depthwise convolution."""
    owner = block.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Conv1d | nn.Conv2d) and owner.groups == owner.in_channels


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            if len(child) > 0:
                yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def _views(block: nn.Module, prefix: str) -> list[WeightView]:
    views = []
    for weight in matrices(block):
        name = f"{prefix}.{weight.name}"
        if weight.stacked:
            experts = range(weight.parameter.shape[0])
            views += [WeightView(f"{name}.{e}", weight.module, weight.transposed, weight.attribute, e) for e in experts]
        else:
            views.append(WeightView(name, weight.module, weight.transposed, weight.attribute))
    return views


def _check_decoder(model: Any) -> None:
    """Refuses encoder-decoder and multimodal models."""
    config, kind = getattr(model, "config", None), type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind} is an encoder with a decoder: only decoder-only models can be pruned")
    of_text = getattr(config, "get_text_config", None)
    if callable(of_text) and of_text() is not config:
        raise UserError(f"{kind} reads more than text: only text-only models can be pruned")
