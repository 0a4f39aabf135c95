"""Keeping a part of a local text for judging."""

from __future__ import annotations

from admm_prune.data.sources import Corpus


def hold_out(corpus: Corpus, fraction: float = 0.1) -> tuple[Corpus, Corpus]:
    """Cuts the last documents off, about `fraction` of them and at least one: (the others, those cut off).

    A text of one document is cut at the last line break before its last `fraction`.
    """
    name, documents = corpus.name, corpus.documents
    if len(documents) > 1:
        cut = len(documents) - max(1, round(len(documents) * fraction))
        first, last = documents[:cut], documents[cut:]
    else:
        text = "".join(documents)
        cut = text.rfind("\n", 0, max(1, round(len(text) * (1 - fraction)))) + 1
        cut = cut or max(1, round(len(text) * (1 - fraction)))
        first, last = (text[:cut],), (text[cut:],)
    return Corpus(f"{name} (all but the last {fraction:.0%})", first), Corpus(f"{name} (last {fraction:.0%})", last)
