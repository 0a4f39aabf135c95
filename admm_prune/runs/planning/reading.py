"""What reading and tokenizing the text takes: tried out on a piece of it, with the model's tokenizer."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admm_prune.data.sources import Document
from admm_prune.data.tokens import GROUP, encode
from admm_prune.models.loading import load_tokenizer, locate
from admm_prune.models.vocabulary import check_ids, check_vocabulary
from admm_prune.runs.memory import PeakMemory, resident_bytes, return_freed_memory
from admm_prune.runs.texts import TextSettings, is_local, read_corpora

_MIB = 2**20
_IDS = 16  # bytes of a token and of where it ends, both int64


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The text of a run.

    Attributes:
        characters, judging: of all of it; of the part that judges.
        held: bytes of the text.
        lists: bytes of a tokenizer's lists for as much as it encodes at once.
        left: bytes that the process keeps of them.
        tokens: of all of the text.
        rate: characters tokenized a second.
    """

    characters: int
    judging: int
    held: int
    lists: int
    left: int
    tokens: int
    rate: float

    @property
    def judging_tokens(self) -> int:
        return round(self.tokens * self.judging / self.characters)

    @property
    def peak(self) -> int:
        """Bytes while the last piece is encoded, beside the text."""
        return self.lists + _IDS * self.tokens


def check_tokenizer(source: str, model: Any, *, required: bool) -> None:
    """Refuses a tokenizer with ids for which the model has no embedding, as a run does.

    Args:
        source: as the user named the model: of a folder, the tokenizer in it.
        model: its shapes.
        required: whether the plan needs a tokenizer, so that a folder without one is refused.

    Raises:
        UserError: it does not fit the model, or cannot be read.
    """
    location = locate(source, weights=False)
    if required or (isinstance(location, Path) and any(location.glob("*token*"))):
        check_vocabulary(source, load_tokenizer(source, location, False), model)


def read(text: TextSettings, source: str, model: Any, *, stream: bool) -> Reading | None:
    """Reads the text that a run would, and encodes a piece as large as is encoded at once.

    Args:
        text: as of a run; None is given back where it is not on this disk.
        source, model: as `check_tokenizer`.
        stream: the run gives back what is freed, as runs that stream do.

    Raises:
        UserError: the text or the tokenizer cannot be used.
    """
    if not is_local(text):
        return None
    tokenizer = load_tokenizer(source, locate(source, weights=False), False)
    corpora = read_corpora(text, tokenizer)
    documents = [document for corpus in corpora for document in corpus.documents]
    encode([documents[0][:1000]], tokenizer)  # what only the first call takes
    whole = sum(map(len, documents))
    at_once = min(whole, max(GROUP, *map(len, documents)))
    piece = _piece(documents, min(at_once, 2 * GROUP))
    size = sum(map(len, piece))
    before, began = resident_bytes(), time.perf_counter()
    with PeakMemory() as memory:
        encoded = [document.ids for document in encode(piece, tokenizer)]
        tokens = sum(map(len, encoded))
    seconds = time.perf_counter() - began
    check_ids(source, encoded, model)
    del encoded
    if stream:
        return_freed_memory()
    return Reading(
        characters=whole,
        judging=corpora[1].characters,
        held=sum(map(sys.getsizeof, documents)),
        lists=round(memory.extra_mib * _MIB * at_once / size),
        left=max(0, resident_bytes() - before),
        tokens=round(tokens * whole / size),
        rate=size / seconds,
    )


def _piece(documents: list[Document], characters: int) -> list[Document]:
    piece: list[Document] = []
    for document in documents:
        piece.append(document[:characters])
        characters -= len(piece[-1])
        if characters <= 0:
            break
    return piece
