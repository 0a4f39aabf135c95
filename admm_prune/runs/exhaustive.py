"""The exact optimum of a small layer, by trying every support: numpy and float64, no code of the solvers."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
from numpy.typing import NDArray

from admm_prune.runs.recomputation import Array, Budget, Definition

_MOST_WORK = 1 << 29  # multiplications, about: seconds
_AT_ONCE = 1 << 22  # entries of the matrices of one batch
_EPSILON = float(np.finfo(np.float64).eps)


def least_loss(problem: Definition, budget: Budget) -> tuple[float, float] | None:
    """min f over the sparse set less f(W'), and the relative error that rounding may leave: 8 n eps cond(A).

    Removing the entries R of a row w of the minimizer costs w_R^T (K_RR)^-1 w_R, with K = A^-1 in coordinates where A
    has a unit diagonal.

    Returns:
        None where there are too many supports, or A is singular to working precision.
    """
    rows, width = problem.weight.shape
    if _work(rows, width, budget) > _MOST_WORK:
        return None
    scale = problem.scale
    hessian = problem.hessian / scale / scale[:, None]
    spectrum, basis = np.linalg.eigh((hessian + hessian.T) / 2)
    doubt = 8 * width * _EPSILON * spectrum[-1] / spectrum[0] if spectrum[0] > 0 else 1.0
    if doubt >= 1.0:
        return None
    inverse = (basis / spectrum) @ basis.T
    target = problem.minimizer * scale
    if budget.target.pattern is not None:
        loss = float(_cheapest(inverse, target, _group_removals(width, *budget.target.pattern)).sum())
    elif budget.cell == "row":
        keeps = _keeps(rows, width, budget)
        costs = {keep: _cheapest(inverse, target, _removals(width, width - keep)) for keep in set(keeps)}
        loss = float(sum(costs[keep][row] for row, keep in enumerate(keeps)))
    else:
        removed = rows * width - round((1.0 - (budget.target.sparsity or 0.0)) * rows * width)
        curves = np.stack([_cheapest(inverse, target, _removals(width, count)) for count in range(width + 1)], axis=1)
        loss = _allocated(curves, removed)
    return loss, float(doubt)


def _keeps(rows: int, width: int, budget: Budget) -> list[int]:
    """How many weights each row may keep."""
    total = round((1.0 - (budget.target.sparsity or 0.0)) * rows * width)
    keep, longer = divmod(total, rows)
    return [keep + (row < longer) for row in range(rows)]


def _work(rows: int, width: int, budget: Budget) -> float:
    """Multiplications, about: a factorization for every support and a solve for every row."""
    if budget.target.pattern is not None:
        kept, group = budget.target.pattern
        counts = {width - kept * (width // group): float(comb(group, kept)) ** (width // group)}
    elif budget.cell == "row":
        counts = {width - keep: float(comb(width, keep)) for keep in set(_keeps(rows, width, budget))}
    else:
        counts = {count: float(comb(width, count)) for count in range(width + 1)}
    return sum(number * (count**3 + rows * count**2) for count, number in counts.items())


def _removals(width: int, count: int) -> NDArray[np.intp]:
    """All sets of `count` columns (sets, count)."""
    return np.array(list(combinations(range(width), count)), dtype=np.intp).reshape(comb(width, count), count)


def _group_removals(width: int, kept: int, group: int) -> NDArray[np.intp]:
    """All sets of columns that leave `kept` of every `group`."""
    one = list(combinations(range(group), group - kept))
    several = product(*([tuple(start + j for j in chosen) for chosen in one] for start in range(0, width, group)))
    sets = [[j for part in parts for j in part] for parts in several]
    return np.array(sets, dtype=np.intp).reshape(len(sets), (group - kept) * (width // group))


def _cheapest(inverse: Array, target: Array, removals: NDArray[np.intp]) -> Array:
    """The least loss of every row (out,) over the sets of columns to remove (sets, count)."""
    count = removals.shape[1]
    best = np.full(len(target), np.inf if count else 0.0)
    step = max(1, _AT_ONCE // max(1, count * (count + len(target))))
    for start in range(0, len(removals) if count else 0, step):
        sets = removals[start : start + step]
        matrices = inverse[sets[:, :, None], sets[:, None, :]]
        removed = np.moveaxis(target[:, sets], 0, 2)  # (sets, count, out)
        losses = (removed * np.linalg.solve(matrices, removed)).sum(1)
        best = np.minimum(best, losses.min(0))
    return best


def _allocated(curves: Array, removed: int) -> float:
    """The least total of the rows' losses (out, width + 1) where so many weights go from all rows together."""
    total = np.full(removed + 1, np.inf)
    total[0] = 0.0
    for curve in curves:
        shifted = np.full((len(curve), removed + 1), np.inf)
        for count in range(min(len(curve), removed + 1)):
            shifted[count, count:] = total[: removed + 1 - count] + curve[count]
        total = shifted.min(0)
    return float(total[removed])
