"""Layer problems from their definition, and exact optima of small ones, with numpy in float64 only.

Shares the formulas with `problems/layer.py` and no code with it, nor with any solver or kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, product
from math import comb

import numpy as np
from numpy.typing import NDArray

from admm_prune.data.layer_file import LayerFile
from admm_prune.methods.target import Target

_MOST_WORK = 1 << 29  # multiplications, about: seconds
_AT_ONCE = 1 << 22  # entries of the matrices of one batch
_EPSILON = float(np.finfo(np.float64).eps)
Array = NDArray[np.float64]
_DEAD = 1e-12  # a channel is dead when its H_jj is at most this multiple of the median of the others
_SLACK = 8.0  # roundings of the solver's precision that a claimed value may carry


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
    """The number of weights that each row may keep."""
    total = round((1.0 - (budget.target.sparsity or 0.0)) * rows * width)
    keep, longer = divmod(total, rows)
    return [keep + (row < longer) for row in range(rows)]


def _work(rows: int, width: int, budget: Budget) -> float:
    """Multiplications, about: a factorization for every support and a solve for every row."""
    if budget.target.pattern is not None:
        keep, group = budget.target.pattern
        counts = {width - keep * (width // group): float(comb(group, keep)) ** (width // group)}
    elif budget.cell == "row":
        counts = {width - keep: float(comb(width, keep)) for keep in set(_keeps(rows, width, budget))}
    else:
        counts = {count: float(comb(width, count)) for count in range(width + 1)}
    return sum(number * (count**3 + rows * count**2) for count, number in counts.items())


def _removals(width: int, count: int) -> NDArray[np.intp]:
    """All sets of `count` columns (sets, count)."""
    return np.array(list(combinations(range(width), count)), dtype=np.intp).reshape(comb(width, count), count)


def _group_removals(width: int, keep: int, group: int) -> NDArray[np.intp]:
    """All sets of columns that leave `kept` of every `group`."""
    one = list(combinations(range(group), group - keep))
    several = product(*([tuple(start + j for j in chosen) for chosen in one] for start in range(0, width, group)))
    sets = [[j for part in parts for j in part] for parts in several]
    return np.array(sets, dtype=np.intp).reshape(len(sets), (group - keep) * (width // group))


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
    """The least total loss of the rows (out, width + 1) for each number of weights removed from all rows together."""
    total = np.full(removed + 1, np.inf)
    total[0] = 0.0
    for curve in curves:
        shifted = np.full((len(curve), removed + 1), np.inf)
        for count in range(min(len(curve), removed + 1)):
            shifted[count, count:] = total[: removed + 1 - count] + curve[count]
        total = shifted.min(0)
    return float(total[removed])


@dataclass(frozen=True)
class Budget:
    """The number of weights that may be kept, and the scope of the budget.

    Args:
        target: the fraction pruned, or N kept of every M.
        cell: "matrix", "row" or "group".
    """

    target: Target
    cell: str

    def cells(self, x: Array) -> list[tuple[Array, int]]:
        """The entries of a matrix (out, in) as cells (cells, entries), each with the number it may keep."""
        if self.target.pattern is not None:
            keep, group = self.target.pattern
            return [(x.reshape(-1, group), keep)]
        total = round((1.0 - (self.target.sparsity or 0.0)) * x.size)
        if self.cell == "matrix" and total > 0:  # if everything is pruned, rows share no budget
            return [(x.reshape(1, -1), total)]
        keep, longer = divmod(total, len(x))
        return [(part, k) for part, k in ((x[:longer], keep + 1), (x[longer:], keep)) if len(part)]

    def describe_excess(self, weight: Array) -> str | None:
        """A description of how a matrix exceeds the budget; None if it does not."""
        nonzero = (weight != 0).astype(np.float64)
        row = 0
        for cells, keep in self.cells(nonzero):
            counts = cells.sum(1)
            over = np.flatnonzero(counts > keep)
            if len(over):
                first, count = int(over[0]), int(counts[over[0]])
                if self.target.pattern is not None:
                    r, start = divmod(first * cells.shape[1], weight.shape[1])
                    return (
                        f"{self.target.label} keeps at most {keep} of every {cells.shape[1]}: {len(over)} groups keep "
                        f"more, the first, of row {r} from column {start}, {count}"
                    )
                if cells.size == weight.size and len(cells) == 1:
                    return f"{self.target.label} leaves at most {keep} of {weight.size} weights, found {count}"
                return (
                    f"{self.target.label} of every row leaves at most {keep} of {weight.shape[1]} weights: "
                    f"{len(over)} rows keep more, the first, row {row + first}, {count}"
                )
            row += len(cells)
        return None


@dataclass(frozen=True)
class Definition:
    """f(V) = tr((V - W') A (V - W')^T) + least, with A = H + ridge diag(H) + damping mean(diag H) I.

    Attributes:
        weight: W (out, in), as the solver saw it.
        gram: H (in, in), undamped.
        hessian: A (in, in), dead channels cut out.
        minimizer: W' (out, in).
        least: f(W').
        cross: X0^T X (in, in) and ||Y||^2, where the target came from other inputs. Claims of such a layer are computed
            in float64, because their terms cancel.
        rounding: unit roundoff of the dtype that the solver worked in.
    """

    weight: Array
    gram: Array
    hessian: Array
    minimizer: Array
    least: float
    cross: tuple[Array, float] | None
    rounding: float

    @property
    def scale(self) -> Array:
        """sqrt(diag A) (in,), which gives A a unit diagonal."""
        return np.sqrt(np.diagonal(self.hessian))

    def objective(self, v: Array) -> tuple[float, float]:
        """f(V), and the possible rounding error of a claim.

        With another target, f(V) = |V|_A^2 - 2 <V, W' A> + const: its terms, of which W' A carries a residual of
        n eps |W'| |A| after any backward stable solve, are added up in float64.
        """
        away = v - self.minimizer
        if self.cross is not None:
            value, doubt = energy(away, self.hessian)
            sizes, matrix = np.abs(v) + np.abs(self.minimizer), np.abs(self.hessian)
            terms = self.cross[1] + abs(self.least) + float(((sizes @ matrix) * sizes).sum())
            return value + self.least, doubt + _SLACK * len(matrix) * _EPSILON * terms
        value, doubt = energy(away, self.hessian, self.rounding)
        size = float((away * away * np.diagonal(self.hessian)).sum())
        return value + self.least, _SLACK * self.rounding * size + doubt

    def solver_rounding(self, v: Array) -> float:
        """The rounding error of f(V) in the solver's precision; for claims of solvers only."""
        away = v - self.minimizer
        diagonal = np.diagonal(self.hessian)
        size = float((away * away * diagonal).sum())
        if self.cross is not None:
            size += self.cross[1] + float(((v * v + self.minimizer**2) * diagonal).sum())
        return _SLACK * self.rounding * size + energy(away, self.hessian, self.rounding)[1]

    def floor_doubt(self) -> float:
        """The rounding error of f(W') in float64: 0 for the layer's own target."""
        return self.objective(self.minimizer)[1]

    def doubt(self) -> float:
        """The relative error that rounding in float64 leaves in a bound, which divides by the spectrum of A."""
        scale = self.scale
        spectrum = np.linalg.eigvalsh(self.hessian / scale / scale[:, None])
        return relative_doubt(spectrum.astype(np.float64))

    def relative_error(self, v: Array) -> tuple[float, float]:
        """||X V^T - Y||^2 / ||Y||^2, undamped, and the possible rounding error of a claim; where Y is zero, 0 or
        infinite."""
        if self.cross is None:
            return relative_error(v, self.weight, self.gram, self.rounding)
        cross, target_energy = self.cross
        products = v * (self.weight @ cross)
        value, doubt = energy(v, self.gram)
        sizes = float((np.abs(v) * (np.abs(self.weight) @ np.abs(cross))).sum())
        doubt += _SLACK * len(cross) * _EPSILON * (sizes + target_energy)
        error = value - 2 * float(products.sum()) + target_energy
        if target_energy <= 0:
            return _relative_to_nothing(error, self.rounding * sizes + doubt), 0.0
        return error / target_energy, doubt / target_energy


def define(layer: LayerFile, ridge: float, damping: float) -> Definition:
    """The damped problem of a layer file."""
    diagonal = layer.gram.diagonal().numpy()  # in the file's own precision, which defines dead channels
    alive = np.sort(diagonal[diagonal > 0])
    dead = diagonal <= (_DEAD * alive[(len(alive) - 1) // 2] if len(alive) else 0.0)
    gram: Array = layer.gram.double().numpy()
    weight: Array = layer.weight.to(layer.gram.dtype).double().numpy()
    hessian = gram.copy()
    anchor = ridge * np.diagonal(gram) + damping * np.diagonal(gram).mean()
    if dead.any():
        hessian[dead] = 0
        hessian[:, dead] = 0
        rest = np.sort(np.diagonal(gram)[~dead])
        anchor[dead] = rest[(len(rest) - 1) // 2] * _DEAD if len(rest) else 1.0
    hessian[np.diag_indices_from(hessian)] += anchor
    rounding = float(np.finfo(diagonal.dtype).eps)
    if layer.cross_gram is None or layer.target_energy is None:
        return Definition(weight, gram, hessian, weight, 0.0, None, rounding)
    cross: Array = layer.cross_gram.to(layer.gram.dtype).double().numpy()
    target = np.where(dead, 0.0, weight @ cross) + weight * anchor
    scale = np.sqrt(np.diagonal(hessian))
    minimizer = np.linalg.solve(hessian / scale / scale[:, None], (target / scale).T).T / scale
    least = layer.target_energy + float((weight * weight * anchor).sum()) - energy(minimizer, hessian)[0]
    return Definition(weight, gram, hessian, minimizer, least, (cross, layer.target_energy), rounding)


def energy(deviation: Array, matrix: Array, rounding: float = 0.0) -> tuple[float, float]:
    """tr(E A E^T), and how far off a claim may be: by float64 added up in another order, by an E that was rounded."""
    size, product = np.abs(deviation), deviation @ matrix
    whole = float(((size @ np.abs(matrix)) * size).sum())
    doubt = (2 * _SLACK * _EPSILON + rounding**2) * whole + 2 * rounding * float((np.abs(product) * size).sum())
    return float((product * deviation).sum()), doubt


def relative_error(v: Array, weight: Array, gram: Array, rounding: float) -> tuple[float, float]:
    """tr((V - W) H (V - W)^T) / tr(W H W^T), and its doubt; 0 or infinite where the output of the layer is zero."""
    whole, _ = energy(weight, gram)
    error, doubt = energy(v - weight, gram, rounding)
    return (error / whole, doubt / whole) if whole > 0 else (_relative_to_nothing(error, doubt), 0.0)


def _relative_to_nothing(error: float, doubt: float) -> float:
    """The relative error where the target is zero: 0 if rounding explains the error, otherwise infinite."""
    return 0.0 if error <= doubt else math.inf


def relative_doubt(spectrum: Array) -> float:
    """16 n eps cond of a matrix with a unit diagonal, whose eigenvalues are given in ascending order; at most 1."""
    rounding = 2 * _SLACK * len(spectrum) * _EPSILON * float(spectrum[-1])
    return min(1.0, rounding / float(spectrum[0])) if spectrum[0] > 0 else 1.0


def cheap_bounds(problem: Definition, budget: Budget) -> tuple[dict[str, float], float]:
    """Lower bounds on f over the sparse set by name, and the relative doubt that rounding in float64 leaves.

    With K = Ã^-1 in coordinates where A has a unit diagonal, w = W' there, R what a support removes:

        removal            loss(R) >= max_{j in R} w_j^2 / K_jj,
        Hessian diagonal   loss(R) >= lambda_min(Ã) sum_{j in R} w_j^2,
        inverse diagonal   loss(R) >= sum_{j in R} w_j^2 / K_jj / lambda_max(K with a unit diagonal).

    No bounds, and a doubt of 1, where A is singular to working precision.
    """
    scale = problem.scale
    hessian = problem.hessian / scale / scale[:, None]
    hessian = (hessian + hessian.T) / 2
    squares = (problem.minimizer * scale) ** 2
    spectrum, basis = np.linalg.eigh(hessian)
    rounding = len(spectrum) * _EPSILON * float(spectrum[-1])
    if spectrum[0] <= rounding:
        return {}, 1.0
    inverse = (basis / spectrum) @ basis.T
    variance = np.diagonal(inverse)
    spread = float(np.linalg.eigvalsh(inverse / np.sqrt(variance) / np.sqrt(variance)[:, None])[-1])
    removals = squares / variance
    losses = {
        "removal": _least_removal(removals, budget),
        "Hessian diagonal": float(spectrum[0]) * _least_sum(squares, budget),
        "inverse diagonal": _least_sum(removals, budget) / spread,
    }
    return {name: problem.least + loss for name, loss in losses.items()}, relative_doubt(spectrum)


def _least_sum(terms: Array, budget: Budget) -> float:
    """The least sum of the terms of removed weights under the budget."""
    return sum(float(np.sort(cells, 1)[:, : cells.shape[1] - keep].sum()) for cells, keep in budget.cells(terms))


def _least_removal(terms: Array, budget: Budget) -> float:
    """The least sum over rows of the largest removed term; a single largest term if rows share a budget."""
    total = 0.0
    for cells, keep in budget.cells(terms):
        if keep == cells.shape[1]:
            continue
        last = np.sort(cells, 1)[:, cells.shape[1] - keep - 1]
        if budget.target.pattern is not None:
            last = last.reshape(len(terms), -1).max(1)
        total += float(last.sum())
    return total
