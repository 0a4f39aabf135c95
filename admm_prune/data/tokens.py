"""Documents as tokens that know where they lie in the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from admm_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP = 2**19  # characters encoded at once: the tokenizer's lists take a hundred times the memory of the text


@dataclass(frozen=True)
class EncodedDocument:
    """The tokens of a document and their share of its characters.

    Attributes:
        ids: (n,) int64, no special tokens.
        bounds: (n + 1,) int64. Token i stands for the characters bounds[i] to bounds[i + 1]: from its own start to the
            start of the next, so that the shares add up to the document whatever the tokenizer skips or splits.
    """

    ids: Tensor
    bounds: Tensor


def encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[EncodedDocument]:
    """Encodes documents without special tokens; text that spells one, like "<s>", stays text.

    Raises:
        UserError: the tokenizer cannot tell where its tokens lie in the text.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no offsets: convert it to a fast tokenizer (tokenizer.json)")
    encoded = []
    for group in _groups(documents):
        output = tokenizer(
            group,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document longer than the model's context is what packing is for
        )
        for document, ids, offsets in zip(group, output["input_ids"], output["offset_mapping"], strict=True):
            bounds = torch.tensor([*(begin for begin, _ in offsets), len(document)])
            bounds[0] = 0  # what the tokenizer skips before its first token belongs to that token
            encoded.append(EncodedDocument(torch.tensor(ids, dtype=torch.int64), bounds))
    return encoded


def _groups(documents: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document)
        if characters >= GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group
