"""Published perplexities of pruned models as ratios to SparseGPT, from the committed `references/perplexity.csv`."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "references" / "perplexity.csv"
REFERENCE = "SparseGPT"

# A paper's rows that are compared with another paper's SparseGPT, which spreads by about 4 % at 50 % between papers.
_REFERENCE_SOURCE = {"SparseLLM": "D2Prune"}


class Figure(NamedTuple):
    """A perplexity as published, and its ratio to that of SparseGPT on the same model and target."""

    model: str
    target: str
    method: str
    source: str
    protocol: str
    perplexity: float
    ratio: float


@cache
def figures() -> tuple[Figure, ...]:
    """Every published perplexity but SparseGPT's, in the order of the file.

    Raises:
        KeyError: the file has no perplexity of SparseGPT on that model and target from the same source.
    """
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    references = {
        (row["model"], row["target"], row["source"]): float(row["perplexity"])
        for row in rows
        if row["method"] == REFERENCE
    }
    return tuple(
        Figure(
            **{name: row[name] for name in ("model", "target", "method", "source", "protocol")},
            perplexity=float(row["perplexity"]),
            ratio=float(row["perplexity"])
            / references[row["model"], row["target"], _REFERENCE_SOURCE.get(row["source"], row["source"])],
        )
        for row in rows
        if row["method"] != REFERENCE
    )


def ratios(model: str) -> dict[str, dict[str, float]]:
    """Ratios to SparseGPT on one model, by method and target."""
    result: dict[str, dict[str, float]] = {}
    for figure in figures():
        if figure.model == model:
            result.setdefault(figure.method, {})[figure.target] = figure.ratio
    return result
