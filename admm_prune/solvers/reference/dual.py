"""Lower bounds of whole layers, as data: multipliers from which anyone recomputes the bound.

With D = Diag(d) >= 0, A - D positive semidefinite, any S, E = V - W and Q = S (A - D),

    tr(E A E^T) = tr(E (A - D) E^T) + tr(E D E^T) >= 2 <Q, E> - <S, Q> + sum_j d_j e_j^2,

which is a sum over entries: at least -q_j^2 / d_j where v_j is kept, and d_j w_j^2 - 2 q_j w_j where v_j = 0. Its least
value over the set is a selection: (d_j w_j - q_j)^2 / d_j is what keeping entry j takes off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from admm_prune.ops import precision
from admm_prune.solvers.reference.bounds import Bound
from admm_prune.solvers.reference.cells import Cells, cells_of
from admm_prune.solvers.reference.perspective_dual import Multipliers, maximize_dual
from admm_prune.solvers.reference.rigorous import UNDERFLOW, UNIT, Array, gamma, rounded_down_sum, total_bound
from admm_prune.solvers.reference.rows import floor_of, quadratic, scaled_hessian, to_array

KIND = "perspective dual"
_LEAVES = 4096  # whose bounds are computed at a time
STEPS_BACK = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)  # of the diagonal of A, where D is a little too large
LEAST_EIGENVALUE = 1e-10  # of a unit diagonal: a smaller eigenvalue leaves no D worth a bound


@dataclass(frozen=True, eq=False)
class DualCertificate:
    """A bound and the multipliers that prove it, in the coordinates of the problem.

    Args:
        bound: of the problem's value.
        diagonal: D (g, in), each with A - Diag(D) positive semidefinite.
        diagonal_of_row: (out,) which of them belongs to each row.
        shift: S (out, in).
        row_losses: (out,) bounds of the rows' losses above the unconstrained minimum, in case each has its own budget.
    """

    bound: Bound
    diagonal: Array
    diagonal_of_row: np.ndarray[tuple[int], np.dtype[np.int64]]
    shift: Array
    row_losses: Array | None

    def tensors(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64] | np.dtype[np.int64]]]:
        """By name, as a certificate file of the layer collection holds them."""
        return {"diagonal": self.diagonal, "diagonal_of_row": self.diagonal_of_row, "shift": self.shift}


@precision.full()
def dual_bound(
    candidate: object,
    objective: float | None = None,
    *,
    diagonals: Literal["shared", "row"] = "shared",
    rounds: int = 6,
    iterations: int = 40,
) -> DualCertificate | None:
    """The dual of the perspective relaxation, with a diagonal D chosen for it, by first-order methods.

    For every set of this package: rows, one budget over the matrix, N:M, tiles and column groups. The multipliers come
    from `maximize_dual` in float64, on the device of the minimizer; the bound is computed from them on the CPU and
    lowered by bounds of all rounding, so that nothing depends on how far the method got. A round costs `iterations`
    products of W with A and about 50 factorizations of A; memory is about ten times that of W in float64.

    Args:
        candidate: a Quadratic problem.
        objective: the value of a feasible point, to compare with.
        diagonals: one D for all rows, or one for each row, which is tighter and takes as many factorizations of A as
            there are rows, and their memory.
        rounds: diagonals that are tried.
        iterations: of ADMM for each.

    Returns:
        None where float64 does not prove that A is positive definite: then f has no bound. The bound is f(minimizer)
        where no more is proved.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: supports of an unknown kind, a Hessian that is not positive definite, or options out of range.

    Sources: see `maximize_dual`.
    """
    if diagonals not in ("shared", "row"):
        raise ValueError(f"dual_bound knows the diagonals 'shared' and 'row', not '{diagonals}'")
    if rounds < 1 or iterations < 1:
        raise ValueError(f"dual_bound needs at least one round and one iteration, not {rounds} and {iterations}")
    problem = quadratic("dual_bound", candidate)
    form, scale = scaled_hessian("dual_bound", problem)
    target = to_array(problem.minimizer) * scale
    parts = cells_of("dual_bound", problem.constraint, (target.shape[0], target.shape[1]))
    if not form.definite or not np.isfinite(target).all():
        return None
    # A matrix that differs from its transpose stands for any between: A' >= A - doubt Diag(A).
    hessian = torch.from_numpy(form.hessian).clone()
    hessian.diagonal().mul_(1 - form.doubt * (1 + 4 * UNIT) - (4 * UNIT if form.doubt else 0.0))
    multipliers, losses, row_losses = [], [], []
    for rows, cells in parts:
        w = torch.from_numpy(target)[rows]
        blocks = 1 if diagonals == "shared" else len(w)
        stacked = hessian.expand(blocks, -1, -1)
        proved = maximized(
            stacked,
            w.view(blocks, -1, form.width),
            cells,
            device=problem.minimizer.device,
            rounds=rounds,
            iterations=iterations,
        )
        whole, each = proved_loss(stacked, proved, w.view(blocks, -1, form.width), cells)
        multipliers.append(proved)
        losses.append(whole)
        row_losses.append(each)
    floor = floor_of(problem, scale)
    value = total_bound(form, floor, rounded_down_sum(losses))
    if value is None:
        return None
    order = torch.cat([rows for rows, _ in parts]).argsort()
    counts = [len(one.diagonal) for one in multipliers]
    index = torch.cat(
        [
            (torch.zeros(len(rows)) if count == 1 else torch.arange(count)) + sum(counts[:i])
            for i, ((rows, _), count) in enumerate(zip(parts, counts, strict=True))
        ]
    )
    shift = torch.cat([one.shift.reshape(-1, form.width) for one in multipliers])[order]
    each_row = [one for one in row_losses if one is not None]
    return DualCertificate(
        bound=Bound.above(floor.value, value, KIND, objective),
        diagonal=torch.cat([one.diagonal for one in multipliers]).numpy() * scale**2,
        diagonal_of_row=index[order].long().numpy(),
        shift=shift.numpy() / scale,
        row_losses=torch.cat(each_row)[order].numpy() if len(each_row) == len(parts) else None,
    )


def maximized(
    hessian: Tensor, target: Tensor, cells: Cells, *, device: torch.device | str, rounds: int, iterations: int
) -> Multipliers:
    """The multipliers of `maximize_dual` on the CPU, each D with A - Diag(D) proved semidefinite.

    Zeros, which prove a bound of 0, for those of the batch where A is too close to singular, or no proof is found.

    Args:
        hessian: A (batch, in, in), float64, on the CPU, with a positive diagonal of about 1.
        target: W (batch, rows, in).
        cells: of the matrix (batch * rows, in).
        device: where to compute.
    """
    # By powers of two, which round nothing: the method starts from penalties that fit entries of about 1.
    largest = target.abs().amax((1, 2) if cells.by_row else (0, 1, 2), keepdim=True)
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    scaled = torch.ldexp(target, -exponent)
    diagonal, shift = torch.zeros_like(target[:, 0]), torch.zeros_like(target)
    definite = _least_eigenvalues(hessian) > LEAST_EIGENVALUE
    worth = definite & (target != 0).any((1, 2)) if cells.by_row else definite
    if bool(worth.all()) and bool((target != 0).any()):
        multipliers = maximize_dual(
            hessian.to(device), scaled.to(device), cells, rounds=rounds, iterations=iterations, last=2 * iterations
        )
        diagonal, shift = multipliers.diagonal.cpu(), torch.ldexp(multipliers.shift.cpu(), exponent)
    elif bool(worth.any()) and cells.by_row:
        some = cells.of_rows(worth.repeat_interleave(target.shape[1]))
        part = maximized(hessian[worth], target[worth], some, device=device, rounds=rounds, iterations=iterations)
        diagonal[worth], shift[worth] = part.diagonal, part.shift
    return _proved(hessian, diagonal, shift)


def _least_eigenvalues(hessian: Tensor) -> Tensor:
    """(batch,) of A with a unit diagonal; computed once where the batch is a view of one matrix."""
    one = hessian[:1] if hessian.stride(0) == 0 else hessian
    root = one.diagonal(dim1=-2, dim2=-1).sqrt()
    values: Tensor = torch.linalg.eigvalsh(one / root[..., None] / root[..., None, :])[:, 0]
    return values.expand(len(hessian))


def _proved(hessian: Tensor, diagonal: Tensor, shift: Tensor) -> Multipliers:
    """D stepped back until A - Diag(D) is proved semidefinite; zeros for those of the batch where it is not."""
    proved = diagonal.clone()
    done = torch.zeros(len(diagonal), dtype=torch.bool)
    for back in STEPS_BACK:
        trial = (diagonal - back * hessian.diagonal(dim1=-2, dim2=-1)).clamp_min(0)
        fits = ~done & semidefinite(hessian, trial) & shift.isfinite().all(2).all(1)
        proved[fits] = trial[fits]
        done |= fits
        if bool(done.all()):
            break
    return Multipliers(torch.where(done[:, None], proved, 0.0), torch.where(done[:, None, None], shift, 0.0))


def semidefinite(hessian: Tensor, diagonal: Tensor) -> Tensor:
    """(batch,) whether A - Diag(D) is proved to be positive semidefinite.

    A Cholesky factorization of B that runs to its end is that of a matrix within phi sqrt(b_i b_j) of B, with
    phi = gamma_(n+1) / (1 - gamma_(n+1)) (Higham, theorem 10.5, after Demmel), so that B + n phi Diag(B) is
    semidefinite. B is A - Diag(D) with its diagonal b lowered to (1 - 2 n phi) b, which covers its own rounding.
    """
    n = diagonal.shape[-1]
    room = hessian.diagonal(dim1=-2, dim2=-1) - diagonal
    phi = gamma(n + 8) / (1 - gamma(n + 8))
    lowered = hessian.clone()
    lowered.diagonal(dim1=-2, dim2=-1).copy_(room * (1 - 2 * n * phi) - UNDERFLOW)
    factor, failed = torch.linalg.cholesky_ex(lowered)
    inside = (room > 0).all(-1) & (diagonal >= 0).all(-1) & factor.isfinite().flatten(-2).all(-1)
    proved: Tensor = inside & (failed == 0)
    return proved


def proved_loss(hessian: Tensor, multipliers: Multipliers, target: Tensor, cells: Cells) -> tuple[float, Tensor | None]:
    """(a lower bound of tr(E A E^T) over the set, one for each row where rows share no budget), never below 0.

    q is known within r = gamma_(n+4) (|A| + Diag(D)) |s|: an entry that is kept costs at least -(|q| + r)^2 / d, one
    that is removed d w^2 - 2 q w - 2 r |w|, each within 8 u of its terms; sums are exact, or within gamma_(2n+16) of
    the sum of the magnitudes.
    """
    removed, keeping, constant = _costs(hessian, multipliers.diagonal[:, None, :], multipliers.shift, target)
    n = target.shape[-1]
    flat = [x.reshape(cells.shape) for x in (removed, keeping, constant)]
    gains = (cells.table((flat[0] - flat[1]).clamp_min(0)).sum(-1)) * (1 + gamma(cells.tile[0] * cells.tile[1] + 4))
    largest = cells.largest(gains)
    if not cells.by_row:
        parts = [_exact_sum(flat[0]), -_exact_sum(largest), -_exact_sum(flat[2])]
        value = math.fsum(parts) - 8 * UNIT * math.fsum(abs(part) for part in parts)
        return (max(0.0, value) if math.isfinite(value) else 0.0), None
    largest = largest.reshape(cells.shape[0], -1)
    plain = flat[0].sum(1) - largest.sum(1) - flat[2].sum(1)
    rounding = gamma(2 * n + 16) * (flat[0].abs().sum(1) + largest.sum(1) + flat[2].abs().sum(1))
    rows = plain - rounding
    rows = torch.where(rows.isfinite(), rows, 0.0).clamp_min(0)
    return rounded_down_sum(rows.tolist()), rows


def proved_leaves(
    hessian: Tensor, diagonal: Tensor, target: Tensor, keep: Tensor, row: Tensor, fixed: Tensor, shift: Tensor
) -> Tensor:
    """A lower bound of the loss on each leaf (leaves,), 0 or above, as `proved_loss` of a row with entries fixed.

    Args:
        hessian: A (rows, in, in).
        diagonal: D (rows, in), proved.
        target: W (rows, in).
        keep: (rows,).
        row: (leaves,) of each leaf.
        fixed: (leaves, in): 1 kept, -1 removed, 0 open.
        shift: S (leaves, in).
    """
    n = target.shape[1]
    parts = []
    for some in torch.arange(len(row)).split(_LEAVES):
        i, held = row[some], fixed[some]
        costs = _costs(hessian[i], diagonal[i][:, None], shift[some][:, None], target[i][:, None])
        removed, keeping, constant = (x[:, 0] for x in costs)
        base = torch.where(held > 0, torch.minimum(keeping, removed), removed)
        gains = torch.where(held == 0, (removed - keeping).clamp_min(0) * (1 + 4 * UNIT), 0.0)
        left = (keep[i] - (held > 0).sum(1)).clamp_min(0)
        chosen = torch.where(torch.arange(n) < left[:, None], gains.sort(1, descending=True).values, 0.0)
        plain = base.sum(1) - chosen.sum(1) - constant.sum(1)
        rounding = gamma(2 * n + 16) * (base.abs().sum(1) + chosen.sum(1) + constant.abs().sum(1))
        bound = plain - rounding
        parts.append(torch.where(bound.isfinite(), bound, 0.0).clamp_min(0))
    return torch.cat(parts)


def _costs(hessian: Tensor, d: Tensor, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the cost of removing each entry, of keeping it, the constant by entries), rounded to the safe side."""
    n = w.shape[-1]
    pull = s @ hessian - s * d
    reach = gamma(n + 4) * (s.abs() @ hessian.abs() + s.abs() * d) * (1 + 4 * UNIT) + UNDERFLOW * (s != 0).any(
        -1, keepdim=True
    )
    sizes = pull.abs() + reach
    keeping = -(sizes.square() / d) * (1 + 8 * UNIT) - UNDERFLOW
    keeping = torch.where(sizes == 0, 0.0, torch.where(d > 0, keeping, -torch.inf))
    terms = d * w.square() + 2 * sizes * w.abs()
    removed = d * w.square() - 2 * pull * w - 2 * reach * w.abs() - 16 * UNIT * terms - UNDERFLOW
    constant = s * pull + s.abs() * reach
    constant = constant + 8 * UNIT * (s * pull).abs() + UNDERFLOW
    return removed, keeping, constant


def _exact_sum(terms: Tensor) -> float:
    return math.fsum(terms.flatten().tolist())
