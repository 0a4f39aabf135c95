"""Documents as tokens that know where they lie in the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from admm_prune.data.conversations import ChatText
from admm_prune.data.sources import Document
from admm_prune.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
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


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[EncodedDocument]:
    """Encodes documents without special tokens.

    Text that spells a special token, like "<s>", stays text, except where a chat template wrote it. Documents that are
    ids of tokens are taken as they are, without a BOS at their beginning.

    Raises:
        UserError: the tokenizer cannot tell where its tokens lie in the text.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no offsets: convert it to a fast tokenizer (tokenizer.json)")
    encoded: list[EncodedDocument] = []
    for group in _groups(documents):
        if not isinstance(group[0], str):
            encoded += [_located(ids, tokenizer) for ids in group if not isinstance(ids, str)]
            continue
        output = tokenizer(
            [str(document) for document in group],
            add_special_tokens=False,
            split_special_tokens=not isinstance(group[0], ChatText),
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


def joined(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> EncodedDocument:
    """All documents as one, with blank lines between them; ids of tokens one after the other.

    Raises:
        UserError: as `encode`.
    """
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        parts = encode(documents, tokenizer)
        starts = torch.tensor([0, *(part.bounds[-1] for part in parts)]).cumsum(0)
        bounds = [part.bounds[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return EncodedDocument(torch.cat([part.ids for part in parts]), torch.cat([*bounds, starts[-1:]]))
    text = "\n\n".join(texts)
    return encode([ChatText(text) if any(isinstance(t, ChatText) for t in texts) else text], tokenizer)[0]


def _located(document: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> EncodedDocument:
    """Ids with the characters that each adds to the decoded text; a tokenizer that decodes a token in other ways beside
    others gives every token an equal share."""
    ids = list(document[1:] if document[0] == tokenizer.bos_token_id else document)
    stream = DecodeStream(skip_special_tokens=False)
    backend = cast("Tokenizer", tokenizer.backend_tokenizer)
    bounds = [0]
    try:
        for token in ids:
            bounds.append(bounds[-1] + len(stream.step(backend, token) or ""))
        whole = len(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        bounds[-1] = max(whole, bounds[-1])  # a character that the last token leaves incomplete
    except Exception:  # of the decoder, which is not Python and has no classes of its own
        whole = len(tokenizer.decode(ids))
        bounds = [whole * i // max(1, len(ids)) for i in range(len(ids) + 1)]
    return EncodedDocument(torch.tensor(ids, dtype=torch.int64), torch.tensor(bounds))


def _groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents of one type that are encoded at once."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        if group and type(document) is not type(group[0]):
            yield group
            group, characters = [], 0
        group.append(document)
        characters += len(document)
        if characters >= GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group
