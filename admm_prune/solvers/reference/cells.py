"""Budgets of a matrix as tables: what is kept or removed as one, and how much of each group may be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Constraint, GroupConstraint, SupportConstraint, fits
from admm_prune.solvers.reference.rows import recognise


@dataclass(frozen=True, eq=False)
class Cells:
    """The supports of a matrix (out, in) that keep at most keep_g of the tiles of every group g.

    Args:
        shape: (out, in).
        group: tiles of a group, which are consecutive, row-major.
        keep: (groups,) whole numbers.
        tile: (height, width), which divide the shape.
    """

    shape: tuple[int, int]
    group: int
    keep: Tensor
    tile: tuple[int, int] = (1, 1)

    @classmethod
    def per_row(cls, shape: tuple[int, int], keep: Sequence[int], group: int | None = None) -> Cells:
        """keep_i of every `group` consecutive entries of row i; of the whole row by default."""
        width = shape[1] if group is None else group
        return cls(shape, width, torch.tensor(keep).repeat_interleave(shape[1] // width))

    @classmethod
    def whole(cls, shape: tuple[int, int], keep: int, tile: tuple[int, int] = (1, 1)) -> Cells:
        """`keep` tiles of the matrix."""
        return cls(shape, shape[0] * shape[1] // (tile[0] * tile[1]), torch.tensor([keep]), tile)

    @property
    def by_row(self) -> bool:
        """Whether no budget is shared by several rows."""
        return self.tile == (1, 1) and self.shape[1] % self.group == 0

    def of_rows(self, rows: Tensor) -> Cells:
        """Of some rows (out,), boolean, where no budget is shared by several."""
        per_row = self.shape[1] // self.group
        count = int(rows.sum())
        return Cells((count, self.shape[1]), self.group, self.keep.view(-1, per_row)[rows].flatten())

    def table(self, x: Tensor) -> Tensor:
        """(out, in) -> (groups, tiles, height * width)."""
        height, width = self.tile
        grid = x.reshape(self.shape[0] // height, height, self.shape[1] // width, width)
        return grid.transpose(1, 2).reshape(-1, self.group, height * width)

    def matrix(self, table: Tensor) -> Tensor:
        """The inverse of `table`."""
        height, width = self.tile
        grid = table.reshape(self.shape[0] // height, self.shape[1] // width, height, width)
        return grid.transpose(1, 2).reshape(self.shape)

    def largest(self, totals: Tensor) -> Tensor:
        """(groups, most) the largest keep_g of each row of the totals (groups, tiles); zeros where fewer are kept."""
        most = int(self.keep.max())
        if most == 0:
            return totals[:, :0]
        first = totals.topk(most, dim=1).values
        keep = self.keep.to(totals.device)
        if bool((keep == most).all()):
            return first
        return first * (torch.arange(most, device=totals.device) < keep[:, None])


def cells_of(owner: str, constraint: Constraint, shape: tuple[int, int]) -> list[tuple[Tensor, Cells]]:
    """The rows of a matrix in parts that share no budget, each with its cells.

    Rows and N:M groups and one budget over the matrix are recognised as by `recognise`; tiles from three selections.

    Args:
        owner: the caller, for the messages.

    Raises:
        TypeError: the constraint is not a SupportConstraint.
        ValueError: its supports are of an unknown kind.
    """
    try:
        supports = recognise(owner, constraint, shape)
    except ValueError as error:
        tiles = _tiles(constraint, shape)
        if tiles is None:
            raise ValueError(str(error).replace(" and one budget", ", tiles and one budget")) from None
        return [(torch.arange(shape[0]), tiles)]
    if supports.rows is None:
        return [(torch.arange(shape[0]), Cells.whole(shape, supports.total))]
    parts = []
    for group in dict.fromkeys(width for width, _ in supports.rows):
        rows = [i for i, (width, _) in enumerate(supports.rows) if width == group]
        keep = [supports.rows[i][1] for i in rows]
        parts.append((torch.tensor(rows), Cells.per_row((len(rows), shape[1]), keep, group)))
    return parts


def _tiles(constraint: Constraint, shape: tuple[int, int]) -> Cells | None:
    """One budget over tiles, where three selections show it."""
    if not isinstance(constraint, SupportConstraint):
        return None
    out, width = shape
    if fits(constraint, GroupConstraint):
        return Cells.whole(shape, constraint.budget(width), (out, constraint.width))
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for _ in range(3)]
    masks = [constraint.select(Point(weight=score))["weight"] for score in scores]
    sizes = [
        (height, across)
        for height in range(1, out + 1)
        if out % height == 0
        for across in range(1, width + 1)
        if width % across == 0
    ]
    for tile in sorted(sizes, key=lambda size: -size[0] * size[1]):
        table = Cells.whole(shape, 0, tile).table(masks[0])[0]
        keep = int(table[:, 0].sum())
        cells = Cells.whole(shape, keep, tile)
        if all(_selects(cells, score, mask) for score, mask in zip(scores, masks, strict=True)):
            return cells
    return None


def _selects(cells: Cells, score: Tensor, mask: Tensor) -> bool:
    """Whether a mask keeps the tiles of the largest sums of squared scores."""
    masked = cells.table(mask)[0]
    if not torch.equal(masked.all(1), masked.any(1)):
        return False
    chosen = torch.zeros(len(masked), dtype=torch.bool)
    chosen[cells.table(score)[0].square().sum(1).topk(int(cells.keep[0])).indices] = True
    return torch.equal(masked.all(1), chosen)
