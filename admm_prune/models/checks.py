"""Checks of a loaded model: it is causal, calls each block once, hands hidden states alone from block to block, and has
an embedding for every token id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from admm_prune.data.hub import first_line
from admm_prune.errors import UserError
from admm_prune.models.activation_store import Call, Wrap, block_output, passed_by, returned_form, without_hidden
from admm_prune.models.streaming import IN_MEMORY, Offloading
from admm_prune.models.structure import Block, WeightView, decoder_blocks

_IDS = (2, 3, 4, 5, 6)
_LEAST = 1e-5  # smaller relative differences are rounding


def check_causal(source: str, model: Any, offloading: Offloading = IN_MEMORY) -> None:
    """Refuses a model in which a token's representation depends on later tokens, such as an encoder.

    The last of a few tokens is replaced. The outputs of one block of every kind (class, and kind of attention) at the
    preceding tokens must not change, up to rounding: a mixture may sum the tokens of an expert in another order. The
    other blocks are skipped. Refused too are models that cannot be replayed block by block: one that calls a block
    several times in a forward pass, of which only the first call would be seen, and one whose blocks are called with
    what earlier blocks computed beside the hidden states, or that changes the hidden states between them. A mapping
    that all blocks share and write to, such as that of shared keys and values, is allowed: replayed blocks write to it.

    Args:
        source: as the user named the model.
        offloading: of the blocks: one of each kind is loaded.

    Raises:
        UserError: tokens see later ones, the blocks cannot be replayed, the model cannot run on token ids alone, or it
            has matrices in its blocks that it does not use then, such as the cross-attention of a decoder without its
            encoder.
    """
    kind = type(model).__name__
    try:
        blocks = decoder_blocks(model)
    except UserError:  # the command that needs the blocks reports the reason
        return
    try:
        with offloading.outside():
            wrap = returned_form(model, blocks, offloading.device(model), offloading)
            device = offloading.device(model)
            passed = _entries(model, blocks, wrap, device)
            repeated, count = Counter(entry.name for entry in passed).most_common(1)[0]
            if count > 1:
                raise UserError(
                    f"{source}: {kind} calls {repeated} {count} times in a forward pass: a model with repeated blocks "
                    "cannot be pruned"
                )
            _check_between(f"{source}: {kind}", passed)
            for index in _of_each_kind(model, blocks):
                block, others = blocks[index], [*blocks[:index], *blocks[index + 1 :]]
                with offloading.block(index), passed_by(others, wrap):
                    why = _try(model, block, device)
                    if why is not None:
                        raise UserError(f"{source}: {why}")
                    if _differs(passed, _entries(model, blocks, None, device)):
                        raise UserError(
                            f"{source}: {kind} calls blocks with what {block.name} computes beside the hidden states: "
                            "a model whose blocks share a state cannot be pruned block by block"
                        )
    except UserError:
        raise
    except Exception as error:  # the code of a model may raise anything
        raise UserError(f"{source}: {kind} does not run on a sequence of token ids ({first_line(error)})") from error


class _Entry(NamedTuple):
    """A call of a block: its name, the hidden states, and the other arguments."""

    name: str
    hidden: Tensor
    call: Call

    @property
    def others(self) -> tuple[Any, ...]:
        args, kwargs = self.call
        return (*args, *kwargs.values())


@torch.no_grad()
def _entries(model: nn.Module, blocks: list[Block], wrap: Wrap | None, device: torch.device) -> list[_Entry]:
    """The calls of blocks in a forward pass, in order; given `wrap`, blocks return their inputs."""
    entries: list[_Entry] = []
    with ExitStack() as stack:
        if wrap is not None:
            stack.enter_context(passed_by(blocks, wrap))
        for block in blocks:

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = block.name) -> None:
                entries.append(_Entry(name, *without_hidden(args, kwargs)))

            stack.enter_context(block.module.register_forward_pre_hook(enter, with_kwargs=True))
        model(input_ids=_token_ids(model, device), use_cache=False)
    return entries


def _check_between(what: str, passed: list[_Entry]) -> None:
    """Refuses a model in which a block does not read what the block before returned, here its input."""
    for before, after in pairwise(passed):
        if not _same(before.hidden, after.hidden):
            raise UserError(
                f"{what} changes the hidden states between {before.name} and {after.name}: such a model cannot be "
                "pruned block by block"
            )


def _differs(passed: list[_Entry], computed: list[_Entry]) -> bool:
    """Whether the arguments of a block depend on what a block computes.

    Args:
        passed, computed: the calls where blocks return their inputs, and where one of them computes.
    """
    return [entry.name for entry in passed] != [entry.name for entry in computed] or any(
        len(without) != len(having) or not all(map(_same, without, having))
        for without, having in zip(_leaves(passed), _leaves(computed), strict=True)
    )


def _leaves(entries: list[_Entry]) -> list[list[Any]]:
    """The arguments of every call, without those of the first: these were there before any block computed."""
    first = {id(value) for value in entries[0].others}
    return [tree_leaves([value for value in entry.others if id(value) not in first]) for entry in entries]


def _same(one: Any, other: Any) -> bool:
    """Equal tensors or numbers; of objects of other kinds, such as caches, only the class is compared."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, bool | int | float | str):
        return bool(one == other)
    return type(one) is type(other)


def _token_ids(model: nn.Module, device: torch.device, last: int = _IDS[-1]) -> Tensor:
    """A few token ids (1, n) that the model has embeddings for."""
    ids, rows = torch.tensor([[*_IDS[:-1], last]], device=device), embedding_rows(model)
    return ids if rows is None else ids % rows


def _of_each_kind(model: Any, blocks: list[Block]) -> Iterator[int]:
    """The index of the first block of every class, kind of attention and set of modules."""
    layers = getattr(model.config, "layer_types", None) or ()
    kinds = list(layers) if len(layers) == len(blocks) else [None] * len(blocks)
    first: dict[tuple[type, Any, tuple[str, ...]], int] = {}
    for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        names = tuple(name for name, _ in block.module.named_children())
        first.setdefault((type(block.module), kind, names), index)
    return iter(first.values())


@torch.no_grad()
def _try(model: Any, block: Block, device: torch.device) -> str | None:
    """Runs the model up to a block on two sequences that differ in the last token; returns the fault, or None."""
    leaving: list[Tensor] = []
    for last in (_IDS[-1], _IDS[-1] + 1):
        hidden, used = _output(model, block, _token_ids(model, device, last))
        leaving.append(hidden[:, :-1].double())
        unused = [view.name for view in block.weights if view.module not in used and not _is_chosen(block, view)]
        if unused:
            return f"{unused[0]} is never used by {type(model).__name__} on text alone: it cannot be pruned"
    first, second = leaving
    routed = any(_is_chosen(block, view) for view in block.weights)
    rounding = torch.finfo(next(block.module.parameters()).dtype).eps if routed else 0.0
    bound = max(_LEAST, 2 * rounding)
    if bool((first - second).norm() > bound * first.norm()):
        return (
            f"{type(model).__name__} is no causal language model: in {block.name} tokens see later ones, so that a "
            "perplexity would be meaningless"
        )
    return None


def _is_chosen(block: Block, view: WeightView) -> bool:
    """Whether a router decides on a matrix: it is an expert's, in a stack or in a list of modules."""
    path = view.name.removeprefix(f"{block.name}.").split(".")
    return view.expert is not None or any(name.isdecimal() for name in path)


def _output(model: nn.Module, block: Block, ids: Tensor) -> tuple[Tensor, set[nn.Module]]:
    """The hidden states (1, n, ...) that a block returns, and the modules in it that were called."""
    used: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in {view.module for view in block.weights}:
            stack.enter_context(module.register_forward_pre_hook(lambda called, _: used.add(called)))
        output = block_output(model, block, ids)
    return output[0] if isinstance(output, tuple | list) else output, used


def check_vocabulary(source: str, tokenizer: Any, model: Any) -> None:
    """Refuses a tokenizer whose vocabulary has ids for which the model has no embedding.

    Tokens added to it later, such as a padding token, may have higher ids: `check_ids` checks a text for them.

    Raises:
        UserError: the message has both numbers.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    begin = getattr(tokenizer, "bos_token_id", None) or 0  # which sequences begin with
    highest = max((number for number in tokenizer.get_vocab().values() if number not in added), default=0)
    _check_highest(source, max(highest, begin), model)


def check_ids(source: str, ids: Iterable[Tensor], model: Any) -> None:
    """Refuses a tokenized text with ids for which the model has no embedding.

    Raises:
        UserError: the message has both numbers.
    """
    _check_highest(source, max((int(tokens.max()) for tokens in ids if tokens.numel()), default=0), model)


def _check_highest(source: str, highest: int, model: Any) -> None:
    rows = embedding_rows(model)
    if rows is not None and highest >= rows:
        raise UserError(
            f"{source}: its tokenizer has {highest + 1} token ids, but the model has embeddings for {rows}: take the "
            "tokenizer that the model was trained with"
        )


def embedding_rows(model: Any) -> int | None:
    """The number of token ids that a model has embeddings for; None if it does not name its embedding module."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return None if weight is None else int(weight.shape[0])
