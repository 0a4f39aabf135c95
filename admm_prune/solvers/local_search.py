"""Local search: one kept weight for one pruned weight of the same row, for all rows at once."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from admm_prune.errors import check_at_least
from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Quadratic, StripConstraint, SupportConstraint, checked_constraint, require
from admm_prune.result import Result
from admm_prune.solvers.base import Solver, search_result, search_start
from admm_prune.solvers.exchange_search import ExchangeSearch

_ROWS = 1024  # rows searched together
_TABLE = 1 << 22  # entries of a table of gains
_Table = tuple[Tensor, Tensor, Tensor]  # of gains: the gain, what is dropped, what is added


@dataclass(frozen=True)
class LocalSearch:
    """Lowers f monotonically by swaps in the support of each row, with a refit after each round.

    In coordinates where diag(A) = 1, with S the support of a row, v its least-squares weights and r = (W - V) A its
    residual, exchanging i in S for j outside lowers f by gain_ij = (r_j + c_ij v_i)^2 / s_j - s_i v_i^2, where
    [[s_i, c_ij], [c_ij, s_j]] is the Schur complement of A on {i, j} given S without i. For a random S of k columns it
    is close to (B_{ij,ij})^-1 - g I with B = (A + g I)^-1 and tr(A B) = k: one inverse serves all rows. Each round a
    row makes the disjoint swaps with the largest estimated gains, refits by a few conjugate gradients, and takes the
    result if f decreased; otherwise it reverts them and halves the number of swaps. A row stops when no swap has an
    estimated gain, or after `patience` consecutive single swaps without the estimated gain.

    The swaps stay within a row, and within a group where the set has groups, so that all budgets remain satisfied. In
    sets of larger tiles or column groups these are exchanged, by `ExchangeSearch(inner)`.

    Args:
        inner: finds the start; None to begin from `start`, or from the projection in the metric diag(A).
        rounds: the most rounds.
        swaps: of a row in its first round; doubled by each success.
        candidates: kept weights, the cheapest to drop, that are tried against every pruned one.
        refits: conjugate-gradient steps of a round: a product of the rows that still search with A each.
        patience: how many single swaps in a row may fail.

    Returns (solve):
        SOLVED if every row has stopped; NONFINITE, with the start, if numbers overflowed. The notes say how many swaps
        were made, at how many products (out, in) x (in, in), besides some 5 to 10 inverses of A + g I.

    Raises:
        UserError: a setting out of range.

    Raises (solve):
        NonFiniteError: the value at the start is not finite.
        TypeError: the problem is not Quadratic, its constraint is no SupportConstraint, or swaps within a row, or a
            group of it, violate its constraint, and it is not made of tiles.

    Sources: the exact gain, from (A_SS)^-1 of each row, is in `solvers.reference.rows`; its estimate from one resolvent
    is ours, and tested against least squares.
    """

    inner: Solver | None = None
    rounds: int = 16
    swaps: int = 4
    candidates: int = 8
    refits: int = 6
    patience: int = 3

    def __post_init__(self) -> None:
        check_at_least(self, rounds=0, swaps=1, candidates=1, refits=0, patience=1)

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        require(self, problem, Quadratic, "its gains are those of a quadratic")
        if _has_tiles(problem):
            return ExchangeSearch(self.inner).solve(problem, start=start)
        began = time.perf_counter()
        point, notes = search_start(problem, self.inner, start)
        support, group = self._support(problem, point)
        scale = problem.hessian.diagonal().sqrt()
        hessian = (problem.hessian / scale).div_(scale[:, None])
        target = problem.minimizer * scale
        support_size = int(support.sum())
        done, improved = _Count(), None
        if 0 < support_size < support.numel():
            gains = Gains(hessian, support_size / len(support), group, self.candidates)
            scaled = point["weight"] * scale
            parts = zip(target.split(_ROWS), scaled.split(_ROWS), support.split(_ROWS), strict=True)
            v = torch.cat([self._search(gains, *rows, done=done) for rows in parts])
            improved = Point(weight=v / scale)
        result = search_result(problem, point, improved, began, iterations=done.rounds, unfinished=done.unfinished)
        cost = f"{done.swaps} swaps, {done.products / len(support):.1f} products"
        note = f"local search: {cost if result.best_iteration else 'no swap improved the start'}"
        return replace(result, notes=(*notes, note))

    def _support(self, problem: Quadratic, point: Point) -> tuple[Tensor, int]:
        """The full admissible support that holds the point's, and the width of the groups that swaps stay in."""
        constraint = checked_constraint(self, problem, SupportConstraint, "it moves supports")
        support = constraint.select(point.map(torch.abs))["weight"]
        group = constraint.group_width
        cells = support.unflatten(1, (-1, group if group > 1 else support.shape[1]))
        sorted_cells = cells.int().sort(dim=2, descending=True).values  # the most one-sided support reachable by swaps
        sorted_cells[1::2] = sorted_cells[1::2].flip(2)
        moved = Point(weight=sorted_cells.flatten(1).to(point["weight"].dtype))
        whole = group > 1 and bool(support.any()) and bool((cells.all(2) == cells.any(2)).all() & ~support.all())
        if whole or not constraint.contains(moved):
            raise TypeError(
                f"LocalSearch needs a set whose support may swap entries within "
                f"{f'a group of {group} of a row' if group > 1 else 'a row'}; {type(constraint).__name__} of "
                f"{type(problem).__name__} does not allow that"
            )
        return support, group

    def _search(self, gains: Gains, target: Tensor, start: Tensor, support: Tensor, *, done: _Count) -> Tensor:
        """The rows of V (out, in) after the search."""
        all_rows = Rows.at(start.clone(), target, support.clone(), gains.hessian)
        done.products += 2 * len(target)  # the residual, here and at the end
        all_rows.put(slice(None), all_rows.refitted(gains.hessian, self.refits + 2, done), target)
        active = torch.arange(len(target), device=target.device)
        size = torch.full_like(active, self.swaps)
        failures = torch.zeros_like(active)
        tabu = torch.zeros_like(support)
        taken = 0
        for step in range(self.rounds):
            rows = all_rows.take(active)
            drop, add, entry, use = gains.propose(rows, tabu[active], size[active])
            hopeful = use.any(1)
            if not bool(hopeful.all()):
                active, drop, add, entry, use = (x[hopeful] for x in (active, drop, add, entry, use))
                rows = rows.take(hopeful)
            if not len(active):
                break
            done.rounds = max(done.rounds, step + 1)
            trial = rows.swapped(gains.hessian, drop, add, entry, use).refitted(gains.hessian, self.refits, done)
            better = all_rows.put(active, trial, target)
            taken += int(use[better].sum())
            single = use.sum(1) == 1
            dropped = torch.zeros_like(rows.v).scatter_add_(1, drop, use.to(rows.v.dtype)) > 0
            tabu[active] = (tabu[active] | (dropped & single[:, None])) & ~better[:, None]
            failures[active] = torch.where(better, 0, failures[active] + single)
            size[active] = torch.where(better, use.sum(1) * 2, use.sum(1) // 2).clamp(1, self.candidates)
            active = active[failures[active] < self.patience]
        else:
            done.unfinished |= bool(len(active))
        done.swaps += taken
        again = Rows.at(all_rows.v, target, all_rows.support, gains.hessian)
        again.put(slice(None), again.refitted(gains.hessian, self.refits, done), target)
        return again.v


def _has_tiles(problem: Quadratic) -> bool:
    """Whether the supports are made of tiles of more than one entry."""
    constraint, (rows, columns) = problem.constraint, problem.minimizer.shape
    strips = constraint.strips((rows, columns)) if isinstance(constraint, StripConstraint) else None
    return any(one.height > 1 or one.width > 1 for one in strips or ())


@dataclass
class _Count:
    swaps: int = 0
    rounds: int = 0
    products: int = 0  # of one row
    unfinished: bool = False


@dataclass
class Rows:
    """Some rows of a solve, in coordinates where diag(A) = 1: V, the residual (W - V) A, the support."""

    v: Tensor
    residual: Tensor
    support: Tensor
    value: Tensor  # f of each row when its residual was last compared

    @classmethod
    def at(cls, v: Tensor, target: Tensor, support: Tensor, hessian: Tensor) -> Rows:
        residual = (target - v) @ hessian
        return cls(v, residual, support, ((target - v) * residual).sum(1))

    def take(self, rows: Tensor) -> Rows:
        return Rows(
            self.v[rows], self.residual[rows], self.support[rows], self.value[rows] if len(self.value) else self.value
        )

    def put(self, rows: Tensor | slice, trial: Rows, target: Tensor) -> Tensor:
        """Accepts the trial's rows whose f = <W - V, (W - V) A> decreased; returns which did."""
        before = self.value[rows]
        value = (target[rows] - trial.v).mul_(trial.residual).sum(1)
        better = value < before * (1 - 16 * torch.finfo(value.dtype).eps)
        self.v[rows] = torch.where(better[:, None], trial.v, self.v[rows])
        self.residual[rows] = torch.where(better[:, None], trial.residual, self.residual[rows])
        self.support[rows] = torch.where(better[:, None], trial.support, self.support[rows])
        self.value[rows] = torch.where(better, value, before)
        return better

    def swapped(self, hessian: Tensor, drop: Tensor, add: Tensor, entry: Tensor, use: Tensor) -> Rows:
        """Drops and adds the entries in use, the rest of the row unchanged; without a refit."""
        columns = torch.cat([drop, add], 1)
        change = torch.cat([-self.v.gather(1, drop), entry], 1) * torch.cat([use, use], 1)
        moved = embedding_bag(columns, hessian, mode="sum", per_sample_weights=change)  # change times rows of A
        flips = torch.zeros_like(self.v).scatter_add_(1, columns, torch.cat([use, use], 1).to(self.v.dtype))
        v = self.v.scatter_add(1, columns, change)
        return Rows(v, self.residual - moved, self.support ^ (flips > 0), self.value)

    def refitted(self, hessian: Tensor, steps: int, done: _Count) -> Rows:
        """Some conjugate-gradient steps on the support; the residual follows on all columns, one product per step."""
        v, residual = self.v.clone(), self.residual.clone()
        floor = torch.finfo(v.dtype).tiny
        direction = residual * self.support
        squared = direction.square().sum(1, keepdim=True)
        for step in range(steps):
            product = direction @ hessian
            alpha = squared / (direction * product).sum(1, keepdim=True).clamp_min(floor)
            v.addcmul_(direction, alpha)
            residual.addcmul_(product, alpha, value=-1)
            done.products += len(v)
            if step + 1 < steps:
                gradient = residual * self.support
                previous, squared = squared, gradient.square().sum(1, keepdim=True)
                direction.mul_(squared / previous.clamp_min(floor)).add_(gradient)
        return Rows(v, residual, self.support, self.value)


class Gains:
    """Estimates the gains of swaps where A has a unit diagonal and a row keeps `kept_per_row` entries on average."""

    def __init__(self, hessian: Tensor, kept_per_row: float, group: int, candidates: int) -> None:
        self.hessian, self.group = hessian, group
        self.inverse, shift = resolvent(hessian, kept_per_row)
        self.diagonal = self.inverse.diagonal().clone()
        self.schur = (1 / self.diagonal - shift).clamp_min(torch.finfo(hessian.dtype).eps)
        self.count = min(candidates, len(hessian) // group)

    def propose(self, rows: Rows, tabu: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The swaps of each row with the largest estimated gains.

        Args:
            tabu: kept entries not to be dropped.
            size: the most swaps of each row.

        Returns:
            drop, add, the value of the added entry, and which to use; (rows, count) each. No entry is used twice.
        """
        table = self._within_groups if self.group > 1 else self._across_rows
        height = max(1, _TABLE // ((self.group if self.group > 1 else self.count) * rows.v.shape[1]))
        inputs = (rows.v, rows.residual, rows.support, rows.support & ~tabu)
        pieces = [table(*part) for part in zip(*(x.split(height) for x in inputs), strict=True)]
        gain, drop, add = (torch.cat(part) for part in zip(*pieces, strict=True))
        gain, order = gain.sort(dim=1, descending=True, stable=True)
        drop, add = drop.gather(1, order), add.gather(1, order)
        rank = torch.arange(gain.shape[1], device=gain.device)
        repeated = ((add[:, :, None] == add[:, None, :]) & (rank[:, None] > rank)).any(2)
        use = (gain > 0) & (rank < size[:, None]) & ~repeated
        coupling = self._coupling(self.inverse[drop, add], drop, self.diagonal[add])
        entry = (rows.residual.gather(1, add) + coupling * rows.v.gather(1, drop)) / self.schur[add]
        return drop, add, torch.where(use, entry, 0), use

    def _coupling(self, between: Tensor, drop: Tensor, other: Tensor) -> Tensor:
        """c_ij: the entry of (B_{ij,ij})^-1 off the diagonal."""
        return -between / (self.diagonal[drop] * other - between.square())

    def _across_rows(self, v: Tensor, residual: Tensor, support: Tensor, free: Tensor) -> _Table:
        loss, drop = (v.square() * self.schur).masked_fill(~free, math.inf).topk(self.count, 1, largest=False)
        gain = self._coupling(self.inverse[drop], drop[:, :, None], self.diagonal)
        gain.mul_(v.gather(1, drop)[:, :, None]).add_(residual[:, None]).square_().div_(self.schur)
        gain, add = gain.masked_fill_(support[:, None], -math.inf).max(2)
        # Where fewer are free than candidates, a filler is no swap; its gain may be inf - inf.
        return (gain - loss).masked_fill_(loss.isinf(), -math.inf), drop, add

    def _within_groups(self, v: Tensor, residual: Tensor, support: Tensor, free: Tensor) -> _Table:
        cells = (-1, self.group)
        columns = torch.arange(v.shape[1], device=v.device).unflatten(0, cells)
        between = self.inverse[columns[:, :, None], columns[:, None, :]]
        coupling = self._coupling(between, columns[:, :, None], self.diagonal[columns][:, None, :])
        v, residual, schur = v.unflatten(1, cells), residual.unflatten(1, cells), self.schur.unflatten(0, cells)
        gain = (residual[:, :, None, :] + coupling * v[..., None]).square_().div_(schur[:, None, :])
        gain.sub_((v.square() * schur)[..., None])
        barred = ~free.unflatten(1, cells)[..., None] | support.unflatten(1, cells)[:, :, None, :]
        best, pair = gain.masked_fill_(barred, -math.inf).flatten(2).max(2)
        best, groups = best.topk(self.count, 1)
        pair = pair.gather(1, groups)
        return best, groups * self.group + pair // self.group, groups * self.group + pair % self.group


def resolvent(hessian: Tensor, kept_per_row: float) -> tuple[Tensor, float]:
    """B = (A + g I)^-1 and the g with tr(A B) = kept_per_row, by Newton's method in log g; an inverse each step."""
    width, shift, inverse = len(hessian), 1.0, hessian
    for _ in range(30):
        shifted = hessian.clone()
        shifted.diagonal().add_(shift)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted, out=shifted))
        trace, squared = float(inverse.diagonal().sum()), float(inverse.square().sum())
        degrees = width - shift * trace
        if abs(degrees - kept_per_row) <= 0.01 * min(kept_per_row, width - kept_per_row):
            break
        slope = shift * (trace - shift * squared)  # -d degrees / d log g
        shift *= math.exp(max(-2.0, min(2.0, (degrees - kept_per_row) / max(slope, 1e-12))))
    return inverse, shift
