"""Keeping a part of a local text for judging."""

from __future__ import annotations

from dataclasses import replace

from admm_prune.data.conversations import ChatText
from admm_prune.data.sources import Corpus, Document


def hold_out(corpus: Corpus, fraction: float = 0.1) -> tuple[Corpus, Corpus]:
    """Cuts the last documents off, about `fraction` of them and at least one: (the others, those cut off).

    A text of one document is cut at the last line break before its last `fraction`; one of tokens anywhere.
    """
    name, documents = corpus.name, corpus.documents
    if len(documents) == 1:
        at, cut = _cut(documents[0], fraction), 1
        documents = (_part(documents[0], 0, at), _part(documents[0], at, None))
    else:
        cut = len(documents) - max(1, round(len(documents) * fraction))
    first, last = documents[:cut], documents[cut:]
    return (
        replace(corpus, name=f"{name} (all but the last {fraction:.0%})", documents=first),
        replace(corpus, name=f"{name} (last {fraction:.0%})", documents=last),
    )


def _cut(document: Document, fraction: float) -> int:
    at = max(1, round(len(document) * (1 - fraction)))
    if isinstance(document, str):
        return document.rfind("\n", 0, at) + 1 or at
    return at


def _part(document: Document, start: int, end: int | None) -> Document:
    part = document[start:end]
    return ChatText(part) if isinstance(document, ChatText) and isinstance(part, str) else part
