"""Tokenized documents with character offsets, and batches of token sequences.

A sequence knows which of its tokens are scored, and how many characters they stand for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from admm_prune.data.conversations import ChatText
from admm_prune.data.sources import Corpus, Document
from admm_prune.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Packing = Literal["auto", "documents", "windows", "segments"]

PAD = 0
GROUP = 2**19  # characters encoded at once: the tokenizer's lists take a hundred times the memory of the text


@dataclass(frozen=True)
class Row:
    """One sequence: its tokens (n,), the characters of its scored tokens, the number of tokens cut off at its end."""

    ids: Tensor
    characters: int
    truncated: int = 0


@dataclass(frozen=True)
class Batch:
    """Sequences of like length, padded on the right.

    Right padding without an attention mask is exact for a causal decoder: no real token sees a pad, and positions
    count from the left. Pads need only be left out of statistics and losses, which `mask` and `scored` do.

    Attributes:
        input_ids: (b, L) int64; pads are token 0, a token like any other.
        lengths: (b,) int64, the real tokens of each row.
        bos: the token that begins a text, given to the model but never scored; None without one.
    """

    input_ids: Tensor
    lengths: Tensor
    bos: int | None = None

    @property
    def mask(self) -> Tensor:
        """(b, L) bool: the real tokens, BOS included."""
        return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]

    @property
    def scored(self) -> Tensor:
        """(b, L) bool: the tokens a model is scored on, given those before them: all but the first and BOS."""
        scored = self.mask
        scored[:, 0] = False
        return scored if self.bos is None else scored & (self.input_ids != self.bos)


@dataclass(frozen=True)
class Sequences:
    """Packed text: the sequences of a corpus, or a sample of them, in batches.

    Attributes:
        rows: the sequences, in the order of the batches, which is that of their lengths.
        packing: "documents", "windows" or "segments".
        length: the tokens of a full sequence.
        bos: as in `Batch`.
        batch_size: sequences per batch.
        dropped_sequences: sequences that the packing left out, because they hold no token to score or are a last,
            shorter window where only full ones are used.
    """

    rows: tuple[Row, ...]
    packing: str
    length: int
    bos: int | None
    batch_size: int
    dropped_sequences: int = 0

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        starts = range(0, len(self.rows), self.batch_size)
        return tuple(self.batch([row.ids for row in self.rows[i : i + self.batch_size]]) for i in starts)

    def batch(self, rows: list[Tensor]) -> Batch:
        """Some sequences, padded to the longest."""
        ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
        return Batch(ids, torch.tensor([len(row) for row in rows]), self.bos)

    @cached_property
    def tokens(self) -> int:
        """Real tokens, BOS included."""
        return sum(len(row.ids) for row in self.rows)

    @cached_property
    def scored_tokens(self) -> int:
        return sum(int(batch.scored.sum()) for batch in self.batches)

    @property
    def characters(self) -> int:
        """Characters of the text that the scored tokens stand for."""
        return sum(row.characters for row in self.rows)

    @property
    def truncated_tokens(self) -> int:
        """Tokens lost because their document is longer than a sequence."""
        return sum(row.truncated for row in self.rows)

    @cached_property
    def token_hash(self) -> str:
        """sha256 over the tokens of every sequence, each after its length."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row.ids).to_bytes(8, "little"))
            digest.update(row.ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, fraction: float) -> tuple[Sequences, Sequences]:
        """Cuts `fraction` of the sequences off: (the others, those cut off).

        They are taken at even distances, because sequences are ordered by length: the last ones would be the longest.
        Neither part is empty, unless there is only one sequence; it stays in the first part. `dropped_sequences`
        counts for the whole and stays with the first part.
        """
        count = len(self.rows)
        held_out = min(max(1, round(count * fraction)), count - 1)
        cut_off = {(2 * i + 1) * count // (2 * held_out) for i in range(held_out)}
        remaining = tuple(row for i, row in enumerate(self.rows) if i not in cut_off)
        taken = tuple(row for i, row in enumerate(self.rows) if i in cut_off)
        return replace(self, rows=remaining), replace(self, rows=taken, dropped_sequences=0)


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    packing: Packing = "auto",
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Sequences:
    """The corpus in sequences of at most `length` tokens: all of it to evaluate, a sample to calibrate.

    "documents": BOS, where the tokenizer has one, and one document a sequence, cut at `length`.
    "windows": all documents one after the other, BOS between them, cut into windows of `length` tokens. A window
    begins with a token that is given, not scored (BOS, else the last token of the window before), so that every token
    of the text is scored exactly once, but the very first where there is no BOS.
    "segments": the protocol of the code of GPTQ, SparseGPT and Wanda: all documents joined by blank lines and encoded
    at once, BOS before the first where the tokenizer puts one, cut into segments of `length` tokens; the shorter last
    one is dropped. The first token of a segment is given, so that one token in `length` is never scored.
    "auto": documents where their mean length fits in a sequence, else windows.

    Args:
        length: tokens of a full sequence, BOS included; at least 2.
        samples: this many sequences, drawn without replacement (fewer where the text has fewer), full windows only.
            None takes all, the shorter last window too.
        seed: of the draw.

    Raises:
        UserError: the text is shorter than one sequence (if a sample is requested) or has nothing to score, a
            number is out of range, or the tokenizer cannot tell where its tokens lie in the text.
    """
    if length < 2:
        raise UserError(f"a sequence of {length} tokens has nothing to predict: use a length of at least 2")
    if samples is not None and samples < 1:
        raise UserError(f"samples must be at least 1, not {samples}")
    bos = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else None
    documents = encode(corpus.documents, tokenizer)
    tokens = sum(len(document.ids) + (bos is not None) for document in documents)
    if samples is not None and tokens < length:
        raise UserError(
            f"{corpus.name}: the text is shorter than one sequence ({tokens} tokens found, {length} needed): "
            "give more text or a smaller --length"
        )
    if packing == "auto":
        packing = "documents" if tokens <= length * len(documents) else "windows"
    if packing == "segments":
        rows = _segments(joined(corpus.documents, tokenizer), _first_token(tokenizer), bos, length)
        usable = [row for row in rows if len(row.ids) == length]
    elif packing == "documents":
        rows = [_document(document, bos, length) for document in documents]
        usable = [row for row in rows if len(row.ids) > 1]
    else:
        rows = _windows(documents, bos, length)
        usable = [row for row in rows if samples is None or len(row.ids) == length]
    if not usable:
        raise UserError(f"{corpus.name}: no document has a token to score ({tokens} tokens found): give more text")
    if samples is not None:
        draw = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))[:samples]
        chosen = [usable[i] for i in draw.tolist()]
    else:
        chosen = usable
    return Sequences(
        rows=tuple(sorted(chosen, key=lambda row: len(row.ids))),  # like lengths in one batch: little padding
        packing=packing,
        length=length,
        bos=bos,
        batch_size=batch_size,
        dropped_sequences=len(rows) - len(usable),
    )


def _document(document: EncodedDocument, bos: int | None, length: int) -> Row:
    given = 0 if bos is not None else 1  # tokens of the text that are given, not scored
    end = min(len(document.ids), length - 1 + given)
    ids = document.ids[:end] if bos is None else torch.cat([torch.tensor([bos]), document.ids[:end]])
    characters = _scored_characters(document, min(given, end), end, bos)
    return Row(ids, characters, truncated=len(document.ids) - end)


def _scored_characters(document: EncodedDocument, start: int, end: int, bos: int | None) -> int:
    """The characters that tokens start to end stand for, without those that a BOS in the text spells: it is not scored,
    as in the turns of a conversation or between documents that were joined before they came here."""
    shares = document.bounds[start : end + 1].diff()
    return int(shares.sum() if bos is None else shares[document.ids[start:end] != bos].sum())


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS if the tokenizer adds it to a text."""
    ids = tokenizer("a")["input_ids"]
    return int(ids[0]) if len(ids) > 0 and ids[0] == tokenizer.bos_token_id else None


def _segments(document: EncodedDocument, first: int | None, bos: int | None, length: int) -> list[Row]:
    if first is not None:
        document = EncodedDocument(
            torch.cat([torch.tensor([first]), document.ids]), torch.cat([torch.tensor([0]), document.bounds])
        )
    rows = []
    for start in range(0, len(document.ids), length):
        end = min(start + length, len(document.ids))
        rows.append(Row(document.ids[start:end], _scored_characters(document, min(start + 1, end), end, bos)))
    return rows


def _windows(documents: list[EncodedDocument], bos: int | None, length: int) -> list[Row]:
    documents = [document for document in documents if len(document.ids) > 0]
    if not documents:
        return []
    stream = _stream(documents, bos)
    ids = stream.ids
    step = length - 1  # tokens scored in a full window
    rows = []
    for start in range(0 if bos is not None else 1, len(ids), step):
        end = min(start + step, len(ids))
        given = ids[start - 1 : start] if bos is None else torch.tensor([bos])
        rows.append(Row(torch.cat([given, ids[start:end]]), _scored_characters(stream, start, end, bos)))
    return rows


def _stream(documents: list[EncodedDocument], bos: int | None) -> EncodedDocument:
    """All documents as one, BOS between them; the bounds are in the characters of all documents."""
    ids: list[Tensor] = []
    bounds: list[Tensor] = []
    characters = 0
    for document in documents:
        if bos is not None and ids:  # the first document has the BOS of its window
            ids.append(torch.tensor([bos]))
            bounds.append(torch.tensor([characters]))
        ids.append(document.ids)
        bounds.append(document.bounds[:-1] + characters)
        characters += int(document.bounds[-1])
    return EncodedDocument(torch.cat(ids), torch.cat([*bounds, torch.tensor([characters])]))


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
            bounds[0] = 0  # characters skipped before the first token belong to that token
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
    ids = list(document[1:] if document[:1] == (tokenizer.bos_token_id,) else document)
    stream = DecodeStream(skip_special_tokens=False)
    backend = cast("Tokenizer", tokenizer.backend_tokenizer)
    bounds = [0]
    try:
        for token in ids:
            bounds.append(bounds[-1] + len(stream.step(backend, token) or ""))
        whole = len(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        bounds[-1] = max(whole, bounds[-1])  # a character that the last token leaves incomplete
    except Exception:  # the decoder is not Python and raises plain exceptions
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
