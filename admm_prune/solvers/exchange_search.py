"""Local search by exact exchanges: one kept weight, tile or column for a pruned one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from admm_prune.errors import check_at_least
from admm_prune.ops import precision
from admm_prune.ops.quadratic import unit_diagonal
from admm_prune.ops.sweep import Swept
from admm_prune.point import Point
from admm_prune.problem import Quadratic, StripConstraint, Strips, checked_constraint, require
from admm_prune.result import Result
from admm_prune.solvers.base import Solver, search_result, search_start

_ENTRIES = 1 << 24  # of the swept matrices that are held together
_LEAST = 1e-9  # gain of a swap that is made, relative to f of its strip


@dataclass(frozen=True)
class ExchangeSearch:
    """Lowers f monotonically by exchanging kept tiles for pruned ones, by the exact change of f.

    A tile is a single weight or, in `Blocks` and `Groups`, several rows of a group of columns. All rows of a strip (a
    row of tiles) have the same support S. With V its least-squares weights, R = (W - V) A, M = (A_SS)^-1 and C = A -
    A_:S M A_S:, exchanging the group a in S for b outside lowers f by exactly

        tr(R'_b (C'_bb)^-1 R'_b^T) - tr(V_a (M_aa)^-1 V_a^T),
        P = (M_aa)^-1 M_aS A_Sb,    R'_b = R_b + V_a P,    C'_bb = C_bb + (M_aS A_Sb)^T P.

    Each round every strip makes the swap with the largest gain, and all of these matrices are updated by two sweeps of
    the pivots a and b, O(in^2) operations each. Where several strips have one budget, a group is dropped in one and
    added in another if that lowers f. Everything is in float64: 8 in^2 bytes for each strip, of which at least one is
    held, and a factorization of A_SS for each at the start and after a transfer. `LocalSearch`, whose gains are
    estimates, is for large layers of many rows.

    Args:
        inner: finds the start; None to begin from `start`, or from the projection in the metric diag(A).
        rounds: the most swaps of a strip, before the first and after each transfer between strips.
        candidates: groups, the cheapest to drop, that are tried against every pruned one; None for all.
        transfers: the most times that groups are moved between strips.

    Returns (solve):
        SOLVED if no exchange with the candidates lowers f; MAX_ITERATIONS otherwise; NONFINITE, with the start, if
        numbers overflowed. The notes say how many swaps and transfers were made.

    Raises:
        UserError: a setting out of range.

    Raises (solve):
        NonFiniteError: the value at the start is not finite.
        TypeError: the problem is not Quadratic, or its constraint has no strips.
        torch.linalg.LinAlgError: A_SS is singular in float64.

    Sources: the sweep operator is from Beaton, The Use of Special Matrix Operators in Statistical Calculus, 1964; the
    search is ours.
    """

    inner: Solver | None = None
    rounds: int = 64
    candidates: int | None = 16
    transfers: int = 4

    def __post_init__(self) -> None:
        check_at_least(self, rounds=0, transfers=0)
        if self.candidates is not None:
            check_at_least(self, candidates=1)

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "its gains are those of a quadratic")
        began = time.perf_counter()
        constraint = checked_constraint(self, problem, StripConstraint, "it exchanges tiles")
        parts = constraint.strips((problem.minimizer.shape[0], problem.minimizer.shape[1]))
        if parts is None:
            raise TypeError(
                f"ExchangeSearch needs a set made of tiles; {type(constraint).__name__} of {type(problem).__name__} "
                "is not"
            )
        point, notes = search_start(problem, self.inner, start)
        support = constraint.select(point.map(torch.abs))["weight"]
        hessian, scale = unit_diagonal(problem.hessian.double())
        target = problem.minimizer.double() * scale
        sizes = [part.rows for part in parts]
        pieces = zip(target.split(sizes), support.split(sizes), parts, strict=True)
        counts = _Counts()
        v = torch.cat([self._search(hessian, *piece, counts) for piece in pieces])
        improved = Point(weight=(v / scale).to(problem.minimizer))
        result = search_result(problem, point, improved, began, iterations=counts.rounds, unfinished=counts.unfinished)
        made = f"{counts.swaps} swaps, {counts.transfers} transfers between strips"
        note = f"exchange search: {made if result.best_iteration else 'nothing improved the start'}"
        return replace(result, notes=(*notes, note))

    def _search(self, hessian: Tensor, target: Tensor, support: Tensor, strips: Strips, counts: _Counts) -> Tensor:
        """The rows (out, in) of one budget after the search."""
        targets = target.unflatten(0, (-1, strips.height))
        tiles = support[:: strips.height, :: strips.width].clone()
        v = torch.zeros_like(targets)
        drops, adds = _Offers.none(tiles), _Offers.none(tiles)
        changed = torch.arange(len(tiles), device=tiles.device)
        for step in range(self.transfers + 1):
            for some in changed.split(max(1, _ENTRIES // hessian.numel())):
                swept = Swept.at(hessian, targets[some], tiles[some], strips.width)
                tiles[some], v[some] = self._swapped(swept, strips, counts)
                if strips.span is None:
                    drops.put(some, swept.losses().min(1))
                    adds.put(some, swept.gains().max(1))
            moves = list(_transfers(drops.values, adds.values))
            if not moves:
                break
            if step == self.transfers:
                counts.unfinished = True
                break
            donors, receivers = (torch.tensor(x, device=tiles.device) for x in zip(*moves, strict=True))
            tiles[donors, drops.groups[donors]] = False
            tiles[receivers, adds.groups[receivers]] = True
            counts.transfers += len(moves)
            changed = torch.cat([donors, receivers])
        return v.flatten(0, 1)

    def _swapped(self, swept: Swept, strips: Strips, counts: _Counts) -> tuple[Tensor, Tensor]:
        """Makes the best swap of each strip in every round; returns the supports and the weights."""
        least = _LEAST * swept.values()
        span = None if strips.span is None else strips.span // strips.width
        active = torch.arange(len(least), device=least.device)
        for step in range(self.rounds + 1):
            gain, drop, add = swept.best_swaps(active, self.candidates, span)
            better = gain > least[active]
            active = active[better]
            if not len(active):
                break
            if step == self.rounds:
                counts.unfinished = True
                break
            swept.sweep(active, drop[better])
            swept.sweep(active, add[better])
            counts.swaps += len(active)
            counts.rounds = max(counts.rounds, step + 1)
        return swept.support, swept.weights()


@dataclass
class _Counts:
    swaps: int = 0
    transfers: int = 0
    rounds: int = 1  # the first includes least squares on the support of the start
    unfinished: bool = False


@dataclass
class _Offers:
    """For each strip, the least loss of a dropped group, or the largest gain of an added one, and the group."""

    values: Tensor
    groups: Tensor

    @classmethod
    def none(cls, tiles: Tensor) -> Self:
        return cls(torch.zeros(len(tiles), dtype=torch.float64, device=tiles.device), tiles.long()[:, 0])

    def put(self, strips: Tensor, best: torch.return_types.min | torch.return_types.max) -> None:
        self.values[strips], self.groups[strips] = best.values, best.indices


def _transfers(losses: Tensor, gains: Tensor) -> Iterator[tuple[int, int]]:
    """Pairs (donor, receiver) of strips: the cheapest drop with the largest gain, while that lowers f; each strip
    takes part once."""
    donors, receivers = losses.argsort().tolist(), gains.argsort(descending=True).tolist()
    loss, gain = losses.tolist(), gains.tolist()
    used: set[int] = set()
    while donors and receivers:
        donor, receiver = donors[0], receivers[0]
        if donor in used:
            donors.pop(0)
        elif receiver in used or receiver == donor:
            receivers.pop(0)
        elif gain[receiver] > loss[donor] * (1 + _LEAST):
            used |= {donor, receiver}
            yield donor, receiver
        else:
            return
