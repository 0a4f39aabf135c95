"""Which supports a constraint admits, found out by asking it: a reference knows no constraint's class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Constraint, SupportConstraint

_RANDOM_PROBES = 4
_MANY = 1 << 16
_EXACT = 1 << 24  # float32 holds every integer up to here


@dataclass(frozen=True)
class Supports:
    """The supports of full size of a matrix (out, in).

    Args:
        total: how many entries are kept in all.
        rows: (group, keep) of every row: `keep` of every `group` consecutive entries, group = in for one budget over
            the row. None where one budget is shared by the whole matrix.
    """

    total: int
    rows: tuple[tuple[int, int], ...] | None


def recognise(owner: str, constraint: Constraint, shape: tuple[int, int]) -> Supports:
    """Recognises budgets per row (N:M groups among them, each row its own) and one budget over the matrix.

    The constraint is asked for the best support of a few scorings: random ones, and some that rise or fall along rows
    or columns. Cells of entries that always keep the same number, and always the largest scores, are its structure. A
    set of another kind (tiles, say) betrays itself on the first scoring.

    Args:
        owner: who asks, for the message.

    Raises:
        TypeError: the constraint is not a SupportConstraint.
        ValueError: it selects supports of another kind; the message names both sides.
    """
    if not isinstance(constraint, SupportConstraint):
        kind = type(constraint).__name__
        raise TypeError(f"{owner} needs a SupportConstraint, a family of supports to search; {kind} is none")
    count, width = shape
    # A guess cuts each row into groups of equal width; the finest guess that survives is taken.
    groups = {group: _Cells(count) for group in range(1, width + 1) if width % group == 0}
    whole = _Cells(1)
    total = 0
    for score in _scorings(count, width):
        kept = constraint.select(Point(weight=score))["weight"]
        total = int(kept.sum())
        whole.test(score.reshape(1, 1, -1), kept.reshape(1, 1, -1))
        for group, cells in groups.items():
            if bool(cells.alive.any()):
                cells.test(score.unflatten(1, (-1, group)), kept.unflatten(1, (-1, group)))
    if bool(torch.stack([cells.alive for cells in groups.values()]).any(0).all()):
        finest = [next(group for group, cells in groups.items() if cells.alive[i]) for i in range(count)]
        return Supports(total, tuple((group, int(groups[group].keep[i])) for i, group in enumerate(finest)))
    if bool(whole.alive):
        return Supports(total, None)
    raise ValueError(
        f"{owner} knows budgets per row, N:M groups and one budget over a matrix; "
        f"{type(constraint).__name__} selects supports of another kind"
    )


class _Cells:
    """A guess at the structure of every row: equal cells that each keep the same number of entries.

    Attributes:
        alive: (rows,) whether the guess reproduced every selection so far.
        keep: (rows,) the number kept in each cell; -1 before the first selection.
    """

    def __init__(self, rows: int) -> None:
        self.alive = torch.ones(rows, dtype=torch.bool)
        self.keep = torch.full((rows,), -1, dtype=torch.int32)

    def test(self, score: Tensor, kept: Tensor) -> None:
        """Compares with a selection: score and kept are (rows, cells, entries); scores have no ties."""
        counts = kept.sum(2, dtype=torch.int32)
        self.keep = torch.where(self.keep < 0, counts[:, 0], self.keep)
        self.alive &= (counts == self.keep[:, None]).all(1)
        if bool(self.alive.any()):  # the dearer test only where the cheap one left something
            least_kept = torch.where(kept, score, torch.inf).amin(2)
            most_dropped = torch.where(kept, 0, score).amax(2)
            self.alive &= (least_kept > most_dropped).all(1)


def _scorings(count: int, width: int) -> Iterator[Tensor]:
    """Positive scores without ties, each (out, in). A large matrix has so many cells that three of them are enough."""
    total = count * width
    dtype = torch.float32 if total < _EXACT else torch.float64
    rising = torch.arange(1, total + 1, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    few = total > _MANY
    for _ in range(1 if few else _RANDOM_PROBES):
        yield torch.randperm(total, generator=generator, dtype=dtype).add_(1).view(count, width)
    yield rising.view(count, width)
    yield rising.view(width, count).T.contiguous()
    if not few:
        yield rising.flip(0).view(count, width)
        yield rising.flip(0).view(width, count).T.contiguous()
