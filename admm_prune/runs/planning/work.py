"""Operations, of the kinds that a machine has a rate for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KINDS = (
    "products_float64",
    "products_float32",
    "products_half",
    "factor_float64",
    "factor_float32",
    "select",
    "traffic",
    "disk_read",
    "disk_write",
    "hash",
    "tokenize",
    "calls",
)


@dataclass(frozen=True)
class Work:
    """Counts by kind.

    products_*: operations of matrix products and attention, two for a multiplication and its addition, by the dtype
    that is multiplied; factor_*: of Cholesky factorizations, their inverses and triangular solves; select: entries that
    a sort or a selection looks at; traffic: bytes that everything else reads and writes; disk_*, hash: bytes; tokenize:
    characters; calls: of operators, each with its own overhead.
    """

    counts: Counter[str] = field(default_factory=Counter[str])

    @classmethod
    def of(cls, **counts: float) -> Work:
        return cls(Counter(counts))

    def __add__(self, other: Work) -> Work:
        total = Counter(self.counts)
        total.update(other.counts)
        return Work(total)

    def __mul__(self, factor: float) -> Work:
        return Work(Counter({kind: factor * count for kind, count in self.counts.items()}))

    def scaled(self, scale: float) -> Work:
        """That of a problem `scale` times as large in all of its dimensions, as many calls.

        Products and factorizations grow with the cube, what touches every entry once with the square.
        """
        cubic = ("products", "factor")
        power = {kind: 3 if kind.startswith(cubic) else 0 if kind == "calls" else 2 for kind in self.counts}
        return Work(Counter({kind: count * scale ** power[kind] for kind, count in self.counts.items()}))

    @property
    def operations(self) -> float:
        """All of products and factorizations."""
        return sum(count for kind, count in self.counts.items() if kind.startswith(("products", "factor")))
