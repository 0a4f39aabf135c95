"""Exports a model after structured pruning in a form that `save_pretrained` writes and `from_pretrained` loads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from admm_prune.errors import UserError
from admm_prune.models.families import KEY_HEADS, NEURONS, per_layer_class
from admm_prune.models.sublayers import Sublayer, pad_groups

Form = Literal["per-layer", "padded"]


def export(model: nn.Module, blocks: Sequence[Sequence[Sublayer]], form: Form = "per-layer") -> str:
    """Updates the config with the widths of the blocks, in place.

    If all blocks have equal widths that the family's config can express, the standard class loads the model. Otherwise:
    "per-layer" keeps the width of every block, with a class of `modeling_per_layer`, whose file `save_pretrained`
    writes beside the weights (`trust_remote_code=True` to load it without this package); "padded" pads every sublayer
    to the widest with zeros, so that the standard class loads it: the outputs are the same, the savings partly lost.

    Args:
        blocks: the sublayers of every block, as they are now.

    Returns:
        "stock", "per-layer" or "padded".

    Raises:
        UserError: blocks differ, and there is no class for this family.
    """
    config: Any = model.config
    if _is_stock(config, blocks):
        _settle(model, blocks[0])
        return "stock"
    if form == "per-layer":
        check_exportable(model, form)
        _per_layer(model, blocks)
        return form
    for kind in ("heads", "neurons"):
        alike = [sublayer for block in blocks for sublayer in block if sublayer.kind == kind]
        if not alike:
            continue
        widest = max(sublayer.count for sublayer in alike)
        while not admits(config, alike[0], widest):
            widest += 1  # the dense number is admitted
        for sublayer in alike:
            pad_groups(sublayer, widest)
    _settle(model, blocks[0])
    return form


def check_exportable(model: nn.Module, form: Form) -> None:
    """Refuses a form in which blocks of different widths cannot be saved.

    Raises:
        UserError: "per-layer" of a family that has no class for it.
    """
    name = type(model).__name__
    if form == "per-layer" and per_layer_class(name) is None:
        raise UserError(f"{name}: its blocks must have equal widths: use struprune-uniform or struprune-padded")


def groups_by_block(blocks: Sequence[Sequence[Sublayer]]) -> list[dict[str, int]]:
    """The number of groups of the sublayers of every block, by kind."""
    return [{sublayer.kind: sublayer.count for sublayer in block} for block in blocks]


def admits(config: Any, sublayer: Sublayer, count: int) -> bool:
    """Whether the standard class of a config supports this number of groups of a kind."""
    if sublayer.kind == "heads":
        return admits_heads(config, count * sublayer.queries, sublayer.size)
    return admits_neurons(config, count)


def admits_heads(config: Any, heads: int, size: int) -> bool:
    """Whether the standard class of a config supports this number of query heads of this size.

    Where a config does not say how large a head is, it follows from their number; Llama's number must divide its width.
    """
    if not _says_head_size(config):
        return bool(heads * size == config.hidden_size)
    candidate = copy.deepcopy(config)
    candidate.per_layer_config = None
    candidate.num_attention_heads = heads
    try:
        candidate.validate()
    except StrictDataclassError:
        return False
    return True


def admits_neurons(config: Any, count: int) -> bool:
    """Whether the standard class of a config supports this number of neurons; Bloom has four times its width."""
    return any(hasattr(config, name) for name in NEURONS) or bool(count == 4 * config.hidden_size)


def _is_stock(config: Any, blocks: Sequence[Sequence[Sublayer]]) -> bool:
    groups = groups_by_block(blocks)
    if any(other != groups[0] for other in groups):
        return False
    return all(admits(config, sublayer, sublayer.count) for sublayer in blocks[0])


def _says_head_size(config: Any) -> bool:
    """Whether the config stores the size of a head; if it is a property, it is derived from other numbers."""
    return hasattr(config, "head_dim") and not isinstance(getattr(type(config), "head_dim", None), property)


def _widths(config: Any, block: Sequence[Sublayer]) -> dict[str, int]:
    """The attributes of the config for the widths of a block."""
    widths: dict[str, int] = {}
    for sublayer in block:
        if sublayer.kind == "neurons":
            widths[next((name for name in NEURONS if hasattr(config, name)), NEURONS[0])] = sublayer.count
        else:
            widths["num_attention_heads"] = sublayer.count * sublayer.queries
            for name in KEY_HEADS:
                if hasattr(config, name):
                    widths[name] = sublayer.count
    return widths


def _settle(model: Any, block: Sequence[Sublayer]) -> None:
    """The standard class, with all blocks as wide as this one."""
    config = model.config
    if per_layer_class(type(model).__name__) is type(model):  # it was pruned before
        config.per_layer_config = None
        config.__dict__.pop("auto_map", None)
        model.__class__ = type(model).__bases__[-1]
    _keep_head_size(config, block)
    for name, width in _widths(config, block).items():
        setattr(config, name, width)


def _keep_head_size(config: Any, block: Sequence[Sublayer]) -> None:
    """Sets the head size: if a config omits it, it is derived from the number of heads, which changes."""
    sizes = [sublayer.size for sublayer in block if sublayer.kind == "heads"]
    if sizes and _says_head_size(config):
        config.head_dim = sizes[0]


def _per_layer(model: Any, blocks: Sequence[Sequence[Sublayer]]) -> None:
    """Keeps the config's attributes: the standard class builds all blocks by them, and ours then slices each block."""
    config = model.config
    _keep_head_size(config, blocks[0])
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = None
    config.per_layer_config = {i: _widths(config, block) for i, block in enumerate(blocks)}
    # The subclass differs only in its constructor, so that the model needs no copy.
    model.__class__ = per_layer_class(type(model).__name__)
    model._weight_conversions = []  # older names (GPT-NeoX's head) are not known to a class beside the weights
    model.__class__.register_for_auto_class("AutoModelForCausalLM")
