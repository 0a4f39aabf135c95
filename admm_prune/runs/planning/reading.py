"""What reading and tokenizing the text takes: tried out on a piece of it, with the model's tokenizer."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from admm_prune.data.sources import Document
from admm_prune.data.tokens import GROUP, encode
from admm_prune.models.loading import load_tokenizer, locate
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


def read(text: TextSettings, model: str, *, stream: bool) -> Reading | None:
    """Reads the text that a run would, and encodes a piece as large as is encoded at once.

    Args:
        text: as of a run; None is given back where it is not on this disk.
        model: whose tokenizer encodes.
        stream: the run gives back what is freed, as runs that stream do.

    Raises:
        UserError: the text or the tokenizer cannot be used.
    """
    if not is_local(text):
        return None
    tokenizer = load_tokenizer(model, locate(model, weights=False), False)
    corpora = read_corpora(text, tokenizer)
    documents = [document for corpus in corpora for document in corpus.documents]
    encode([documents[0][:1000]], tokenizer)  # what only the first call takes
    whole = sum(map(len, documents))
    at_once = min(whole, max(GROUP, *map(len, documents)))
    piece = _piece(documents, min(at_once, 2 * GROUP))
    size = sum(map(len, piece))
    before, began = resident_bytes(), time.perf_counter()
    with PeakMemory() as memory:
        tokens = sum(len(document.ids) for document in encode(piece, tokenizer))
    seconds = time.perf_counter() - began
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
