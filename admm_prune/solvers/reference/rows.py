"""The normal form of every reference: independent rows, Jacobi-scaled, in float64, each with its own supports.

With A = S Ã S, S the powers of two next to sqrt(diag A), and W' = minimizer S, which rounds nothing, a problem with the
Hessian A on every row splits as

    f(V) = f(minimizer) + sum_i loss_i(R_i),    loss(R) = w_R^T (K_RR)^-1 w_R,    K = Ã^-1,

where R_i are the entries removed from row i. loss is monotone: R in R' implies loss(R) <= loss(R').

The supports of a constraint are inferred from its selections: a reference does not know the class of a constraint.

A heuristic for one row, the incumbent of the references: greedy elimination, 1-swaps, and a few kicks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import comb, prod

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Constraint, Fitted, Quadratic, SupportConstraint, fits
from admm_prune.result import Result, Status
from admm_prune.solvers.base import checked_start
from admm_prune.solvers.reference.rigorous import (
    Array,
    Floor,
    Form,
    Mask,
    gamma,
    least_losses,
    refit_steps,
    rounded_down_sum,
    scaled_form,
    total_bound,
)

_RANDOM_PROBES = 4
_MANY = 1 << 16
_EXACT = 1 << 24  # float32 holds every integer up to here
Indices = NDArray[np.intp]
_LEAST_GAIN = 1e-10  # of a swap, relative to the loss: smaller ones may be rounding
_KICKED = 3  # pairs exchanged by a kick


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

    The constraint selects the best support for a few scorings: random ones, and some that rise or fall along rows
    or columns. Cells of entries that always keep the same number, and always the largest scores, are its structure. A
    constraint of another kind (such as tiles) is detected on the first scoring.

    Args:
        owner: the caller, for the message.

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
        mask = constraint.select(Point(weight=score))["weight"]
        total = int(mask.sum())
        whole.test(score.reshape(1, 1, -1), mask.reshape(1, 1, -1))
        for group, cells in groups.items():
            if bool(cells.alive.any()):
                cells.test(score.unflatten(1, (-1, group)), mask.unflatten(1, (-1, group)))
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

    def test(self, score: Tensor, mask: Tensor) -> None:
        """Compares with a selection: score and kept are (rows, cells, entries); scores have no ties."""
        counts = mask.sum(2, dtype=torch.int32)
        self.keep = torch.where(self.keep < 0, counts[:, 0], self.keep)
        self.alive &= (counts == self.keep[:, None]).all(1)
        if bool(self.alive.any()):  # the expensive test only after the inexpensive one
            least_kept = torch.where(mask, score, torch.inf).amin(2)
            most_dropped = torch.where(mask, 0, score).amax(2)
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


@dataclass(frozen=True, eq=False)
class Row:
    """One independent row: loss(R) = w_R^T (K_RR)^-1 w_R over the supports that keep `keep` of every `group` entries.

    Args:
        form: of Ã (n, n), diagonal in [1/2, 2), positive definite.
        target: w (n,), the unconstrained minimum.
        group: divides n; n for one budget over the whole row.
        keep: entries kept in every group of consecutive entries.
    """

    form: Form
    target: Array
    group: int
    keep: int

    @property
    def hessian(self) -> Array:
        """Ã (n, n)."""
        return self.form.hessian

    @property
    def inverse(self) -> Array:
        """K = Ã^-1 (n, n)."""
        return self.form.inverse

    @property
    def width(self) -> int:
        return len(self.target)

    @property
    def removals(self) -> int:
        """The number of entries removed by every support of full size."""
        return self.width // self.group * (self.group - self.keep)

    @property
    def supports(self) -> int:
        """The number of supports of full size."""
        return int(prod([comb(self.group, self.keep)] * (self.width // self.group)))

    def completed(self, support: Mask) -> Mask:
        """The support of full size nearest to `support`: its entries first, larger |w| first."""
        size = np.abs(self.target)
        score = (size / (1 + size.max()) + support).reshape(-1, self.group)
        full = np.zeros_like(score, dtype=np.bool_)
        np.put_along_axis(full, np.argsort(-score, axis=1, kind="stable")[:, : self.keep], True, axis=1)
        return full.reshape(-1)

    def loss(self, support: Mask) -> float:
        """loss(R) for R = the entries not kept."""
        removed = ~support
        target = self.target[removed]
        return float(target @ np.linalg.solve(self.inverse[np.ix_(removed, removed)], target))

    def refit(self, support: Mask) -> Array:
        """argmin_v (v - w)^T Ã (v - w) over the v that vanish off the support S: v_S = w_S + Ã_SS^-1 Ã_SR w_R."""
        fitted = np.zeros_like(self.target)
        if support.any():
            pull = self.hessian[np.ix_(support, ~support)] @ self.target[~support]
            factor = scipy.linalg.cho_factor(self.hessian[np.ix_(support, support)])
            fitted[support] = self.target[support] + scipy.linalg.cho_solve(factor, pull)
        return fitted

    def least(self, supports: Mask) -> tuple[int, float]:
        """(which of some supports of one size has the least loss, a proved lower bound of the losses of all)."""
        losses, bounds = least_losses(self.form, self.target, supports, refit_steps(self.form, self.target, supports))
        return int(np.argmin(losses)), float(bounds.min())


@dataclass(frozen=True, eq=False)
class Separated:
    """A Quadratic problem in normal form.

    Args:
        problem: the problem itself.
        form: of the Hessian that the rows of the matrix share.
        target: the scaled minimizer (out, in).
        rows: its independent rows. One budget over a whole matrix makes it a single row of out * in entries, with the
            Hessian I kron Ã.
        scale: S (in,), powers of two.
    """

    problem: Quadratic
    form: Form
    target: Array
    rows: tuple[Row, ...]
    scale: Array

    @cached_property
    def floor(self) -> float:
        """f at the unconstrained minimum: a lower bound for every support."""
        return self.problem.value(Point(weight=self.problem.minimizer))

    def point(self, supports: Sequence[Mask]) -> Point:
        """The least-squares weights on the supports of all rows, unscaled, in the problem's dtype."""
        minimizer = self.problem.minimizer
        fitted = np.stack([row.refit(support) for row, support in zip(self.rows, supports, strict=True)])
        weight = torch.from_numpy(fitted.reshape(minimizer.shape) / self.scale).to(minimizer)
        # A matrix row that loses nothing is returned bitwise unchanged.
        untouched = torch.from_numpy(np.stack(supports).reshape(minimizer.shape).all(1)).to(minimizer.device)
        return Point(weight=torch.where(untouched[:, None], minimizer, weight))

    def starts(self, start: Point | None) -> list[tuple[Row, tuple[Mask, ...]]]:
        """Every row with the support of a feasible start, in a tuple; an empty tuple without one."""
        start = checked_start(self.problem, start)
        if start is None or not self.problem.constraint.contains(start):
            return [(row, ()) for row in self.rows]
        masks = (to_array(start["weight"]) != 0).reshape(len(self.rows), -1)
        return [(row, (mask,)) for row, mask in zip(self.rows, masks, strict=True)]

    def result(
        self,
        supports: Sequence[Mask],
        row_bounds: Sequence[float] | None,
        *,
        start: Point | None = None,
        status: Status = Status.CLOSED_FORM,
        iterations: int = 0,
        seconds: float = 0.0,
        notes: tuple[str, ...] = (),
    ) -> Result:
        """The refitted point with its value, or the start's projection where that is better.

        Args:
            row_bounds: proved lower bounds of the losses of the rows.

        Returns:
            Its status is NONFINITE where the value of the refitted point is not finite.
        """
        start = checked_start(self.problem, start)
        solution = self.point(supports)
        objective = self.problem.value(solution)
        status = status if math.isfinite(objective) else Status.NONFINITE
        begin = None
        if start is not None:
            projected = self.problem.constraint.project(start)
            begin = self.problem.value(projected)
            if begin < objective or not math.isfinite(objective):
                solution, objective = projected, begin
        notes = (*getattr(self.problem, "notes", ()), *notes)
        result = Result(
            solution, status, objective, iterations=iterations, seconds=seconds, notes=notes, start_objective=begin
        )
        bound = None if row_bounds is None else self.bound(row_bounds)
        return replace(result, bound=None if bound is None or math.isnan(objective) else min(objective, bound))

    def bound(self, row_bounds: Sequence[float]) -> float | None:
        """A lower bound of f from proved ones of the rows' losses; None where nothing is proved."""
        return total_bound(self.form, floor_of(self.problem, self.scale), rounded_down_sum(list(row_bounds)))


def log10_supports(entries: int, keep: int, groups: int = 1) -> float:
    """log10 of the number of supports that keep `keep` of the entries of each of some groups, which may be too large
    for a float."""
    keep = min(keep, entries)
    single = math.lgamma(entries + 1) - math.lgamma(keep + 1) - math.lgamma(entries - keep + 1)
    return groups * single / math.log(10)


def check_few(log10: float, most: int, message: str) -> None:
    """Raises ValueError where 10^log10 is above `most`; the message has a place for it."""
    if most < 1 or log10 > math.log10(most) + 1e-9:
        raise ValueError(message.format(f"{10 ** (log10 % 1):.2f}e{math.floor(log10)}"))


def separate(owner: str, candidate: object, max_width: int | None = None, max_supports: int | None = None) -> Separated:
    """The normal form of a problem.

    Args:
        owner: the caller, for the messages.
        max_width: the widest row accepted.
        max_supports: the most supports of a row; both are checked before anything large is computed.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: its supports are of an unknown kind, its Hessian is not positive definite, or its rows are too wide
            or have too many supports.
    """
    problem = quadratic(owner, candidate)
    form, scale = scaled_hessian(owner, problem)
    target = to_array(problem.minimizer) * scale
    count, width = target.shape
    supports = recognise(owner, problem.constraint, (count, width))
    widest = width if supports.rows is not None else count * width
    if max_width is not None and widest > max_width:
        raise ValueError(
            f"{owner} takes rows of at most {max_width} entries; {type(problem.constraint).__name__} on "
            f"{type(problem).__name__} makes rows of {widest}: raise max_width"
        )
    if max_supports is not None:
        if supports.rows is None:
            most = log10_supports(count * width, supports.total)
        else:
            most = max(log10_supports(group, keep, width // group) for group, keep in set(supports.rows))
        check_few(
            most,
            max_supports,
            f"{owner} tries at most {max_supports} supports; {type(problem.constraint).__name__} on "
            f"{type(problem).__name__} has {{}} for one budget: raise max_supports, or use branch-and-bound",
        )
    if supports.rows is None:
        stacked = np.asarray(np.kron(np.eye(count), form.hessian), dtype=np.float64)
        whole = Row(Form(stacked, form.doubt), target.reshape(-1), count * width, supports.total)
        return Separated(problem, form, target, (whole,), scale)
    rows = tuple(Row(form, w, group, keep) for w, (group, keep) in zip(target, supports.rows, strict=True))
    return Separated(problem, form, target, rows, scale)


def floor_of(problem: Quadratic, scale: Array) -> Floor:
    """f at the minimizer of a problem, with the rounding of both."""
    value = problem.value(Point(weight=problem.minimizer))
    residual_terms = problem.minimizer_residual() if fits(problem, Fitted) else None
    if residual_terms is None:
        return Floor(value)
    residual, sizes = (np.abs(to_array(x)) / scale for x in residual_terms[:2])
    return Floor(value, residual + gamma(len(scale) + 4) * sizes, residual_terms[2])


def quadratic(owner: str, problem: object) -> Quadratic:
    """The problem itself; raises TypeError, naming both sides and what is missing, where it is not Quadratic."""
    if fits(problem, Quadratic):
        return problem
    missing = ", ".join(name for name in ("hessian", "linear", "minimizer", "value") if not hasattr(problem, name))
    raise TypeError(f"{owner} needs a Quadratic problem; {type(problem).__name__} lacks {missing}")


def scaled_hessian(owner: str, problem: Quadratic) -> tuple[Form, Array]:
    """The form of Ã and S (in,), powers of two, A = S Ã S, the diagonal of Ã in [1/2, 2).

    Raises:
        ValueError: A is not finite or not positive definite.
    """
    hessian = to_array(problem.hessian)
    diagonal = hessian.diagonal()
    names = f"{owner} needs a positive definite Hessian; that of {type(problem).__name__}"
    if not np.isfinite(hessian).all():
        raise ValueError(f"{names} contains NaN or Inf")
    if not (diagonal > 0).all():
        raise ValueError(f"{names} has {int((diagonal <= 0).sum())} diagonal entries <= 0: cut these channels out")
    form, exponents = scaled_form(hessian)
    if int(torch.linalg.cholesky_ex(torch.from_numpy(form.hessian)).info):
        raise ValueError(f"{names} is not: raise the ridge")
    return form, np.ldexp(1.0, exponents.astype(np.int32))


def to_array(x: Tensor) -> Array:
    return np.asarray(x.detach().double().cpu().numpy(), dtype=np.float64)


def search(row: Row, starts: Iterable[Mask] = (), kicks: int = 0) -> tuple[Mask, float]:
    """The best support found and its loss: local minima for 1-swaps from greedy elimination and from each start.

    Args:
        starts: supports; one that is not of full size is completed with the largest entries, or thinned to them.
        kicks: exchanges of random pairs from the best support, each followed by swaps (iterated local search).
    """
    candidates = [_greedy_elimination(row), *(row.completed(start) for start in starts)]
    best, loss = min((_swap_descent(row, support) for support in candidates), key=lambda candidate: candidate[1])
    generator = np.random.default_rng(0)
    for _ in range(kicks if 0 < row.removals < row.width else 0):
        support, value = _swap_descent(row, _perturbed(row, best, generator))
        if value < loss:
            best, loss = support, value
    return best, loss


def _greedy_elimination(row: Row) -> Mask:
    """Removes the entry of the least increment w_j^2 / K_jj until the support has its size, K and w downdated."""
    inverse, target = row.inverse.copy(), row.target.copy()
    support = np.ones(row.width, dtype=np.bool_)
    for _ in range(row.removals):
        increments = target**2 / np.maximum(inverse.diagonal(), np.finfo(np.float64).tiny)
        full = support.reshape(-1, row.group).sum(1) <= row.keep
        increments[~support | full.repeat(row.group)] = np.inf
        j = int(np.argmin(increments))
        column = inverse[:, j] / inverse[j, j]
        target = target - column * target[j]
        inverse = inverse - np.outer(column, inverse[j])
        support[j] = False
    return support


def _perturbed(row: Row, support: Mask, generator: np.random.Generator) -> Mask:
    kicked = support.copy().reshape(-1, row.group)
    for _ in range(_KICKED):
        cell = kicked[generator.integers(len(kicked))]
        cell[generator.choice(np.flatnonzero(cell))] = False
        cell[generator.choice(np.flatnonzero(~cell))] = True
    return kicked.reshape(-1)


def _swap_descent(row: Row, support: Mask) -> tuple[Mask, float]:
    """Takes the best swap within a group until none lowers the loss; (support, loss)."""
    support = support.copy()
    loss = row.loss(support)
    if not 0 < row.removals < row.width:
        return support, loss
    group = np.arange(row.width) // row.group
    while True:
        inside, outside = np.flatnonzero(support), np.flatnonzero(~support)
        gains = swap_gains(row.hessian, row.target, inside, outside)
        gains[group[inside][:, None] != group[outside]] = -np.inf
        i, j = np.unravel_index(int(np.argmax(gains)), gains.shape)
        if gains[i, j] == -np.inf:  # no swap is within a group and of independent columns
            return support, loss
        swapped = support.copy()
        swapped[inside[i]], swapped[outside[j]] = False, True
        value = row.loss(swapped)
        if not value < loss * (1 - _LEAST_GAIN):
            return support, loss
        support, loss = swapped, value


def swap_gains(hessian: Array, target: Array, inside: Indices, outside: Indices) -> Array:
    """gain_ij = r_j^2 / s_j - (v_i - T_ij r_j / s_j)^2 / (K_ii + T_ij^2 / s_j): the decrease of the loss by a swap.

    Kept i is removed, removed j is added; exact for every pair. With S = inside, K = Ã_SS^-1, v = the refitted weights,
    r = Ã (w - v), T = K Ã_S: and s_j = Ã_jj - Ã_jS T_j.

    Returns:
        (len(inside), len(outside)).

    Source: ours, from the inverses of bordered matrices; `tests/solvers/reference` compares it with refits.
    """
    block, cross = hessian[np.ix_(inside, inside)], hessian[np.ix_(inside, outside)]
    factor = scipy.linalg.cho_factor(block)
    inverse_diagonal = scipy.linalg.cho_solve(factor, np.eye(len(inside))).diagonal()
    pull = scipy.linalg.cho_solve(factor, cross)  # T
    schur = hessian.diagonal()[outside] - np.einsum("ij,ij->j", cross, pull)
    weights = target[inside] + pull @ target[outside]
    residual = hessian[np.ix_(outside, outside)] @ target[outside] - cross.T @ (weights - target[inside])
    with np.errstate(divide="ignore", invalid="ignore"):
        step = residual / schur
        dropped = (weights[:, None] - pull * step) ** 2 / (inverse_diagonal[:, None] + pull**2 / schur)
        gains: Array = residual * step - dropped
    # s_j is zero where column j depends on the columns kept: adding it does not lower the loss.
    gains[~np.isfinite(gains)] = -np.inf
    return gains
