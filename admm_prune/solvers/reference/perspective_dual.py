"""The perspective relaxation of many rows by ADMM, and the multipliers of a lower bound that it gives.

In coordinates where the diagonal D is the identity, with M = A - I positive semidefinite, the relaxation is

    min_V,z  tr((V - W) M (V - W)^T) + sum_j (v_j^2 / z_j - 2 w_j v_j + w_j^2),   0 <= z <= 1,  sum_group z <= keep,

and for every S, with Q = S M and Y = W - Q, its optimum and that of the sparse problem are at least

    dual(S) = -<S, Q> + sum_j (2 w_j y_j - w_j^2) - (the largest sum of y_j^2 that the budgets can keep).

ADMM splits V = Z, the quadratic part from the separable one. Its V-step gives S = V - W and, without another product,
Y: every iteration costs one product with a factored matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.solvers.reference.cells import Cells

_FIRST, _FALL = 1.0, 0.2  # of the barrier, relative to the mean weight; the factor from one to the next
_NEWTON = 5  # steps at each barrier
_LIGHTEST, _HEAVIEST = 1e-3, 1e3  # of the weights, relative to their mean
_SHORTEN, _HALVINGS = 0.5, 20
_RELAXATION = 1.6
_PENALTY = 5.0  # in units of D: the first; it is balanced later
_EVERY = 10  # iterations between evaluations of the dual
_BALANCED = 20  # iterations between changes of the penalty
_MOST_CHANGED, _UNCHANGED = 5.0, 1.5  # the largest change of the penalty, and the least worth a factorization
_PRICE_STEPS = 20
_PRICE_TOLERANCE = 1e-9
_FIRST_BARRIER, _LAST_BARRIER = 0.1, 1e-3  # of the diagonals: a diagonal at the boundary overfits the first weights
_LEAST_START = 0.5  # of the least eigenvalue: the first diagonal, strictly inside


@dataclass(frozen=True, eq=False)
class Multipliers:
    """What a lower bound is computed from: D (batch, in) and S (batch, rows, in)."""

    diagonal: Tensor
    shift: Tensor


@dataclass(eq=False)
class _State:
    """Of ADMM: Z and the scaled dual variable (batch * rows, in), the price of each group, the penalty."""

    z: Tensor
    u: Tensor
    slope: Tensor
    penalty: float


def maximize_dual(
    hessian: Tensor, target: Tensor, cells: Cells, *, rounds: int = 6, iterations: int = 40, last: int = 80
) -> Multipliers:
    """Multipliers D and S of a high lower bound, by turns: S for a given D, and D for weights from the relaxation.

    For a given S the bound grows with d_j at the rate c_j = sum_rows v_j^2 (1 / z_j - 1), a supergradient of a concave
    function of D. Each round maximizes sum_j d_j times the mean of the c of all rounds (`largest_diagonal`), which is
    dual averaging; the best of all rounds is returned.

    Args:
        hessian: A (batch, in, in), positive definite, with a diagonal of about 1.
        target: W (batch, rows, in).
        cells: of the matrix (batch * rows, in).
        rounds: diagonals that are tried.
        iterations: of ADMM in each round.
        last: more of them, for the best diagonal.

    Sources: Frangioni and Gentile, SDP diagonalizations and perspective cuts, 2007; Dong, Chen and Linderoth,
    Regularization vs. relaxation, 2015; Nesterov, Primal-dual subgradient methods for convex problems, 2009.
    """
    root = hessian.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = hessian / root[..., None, :] / root[..., :, None]
    w = target * root[..., None, :]
    inside = _LEAST_START * torch.linalg.eigvalsh(unit)[..., :1].expand_as(root)
    weights = torch.ones_like(root)
    best: tuple[Tensor, Tensor, Tensor, _State | None] | None = None
    for number in range(1, rounds + 1):
        diagonal = largest_diagonal(unit, weights, inside, max(_LAST_BARRIER, _FIRST_BARRIER / number))
        values, shift, gain, state = _relaxed(unit, w, diagonal, cells, iterations, None)
        mean = gain.mean(-1, keepdim=True)
        weights = weights + torch.where(mean > 0, gain / mean, 1.0)
        if best is None:
            best = values, diagonal, shift, state
            continue
        better = values > best[0]
        if bool(better.all()):
            best = values, diagonal, shift, state
        elif bool(better.any()):
            chosen = better[:, None]
            best = (
                torch.where(better, values, best[0]),
                torch.where(chosen, diagonal, best[1]),
                torch.where(chosen[..., None], shift, best[2]),
                None,
            )
    assert best is not None
    values, diagonal, shift, warm = best
    more, moved, _, _ = _relaxed(unit, w, diagonal, cells, last, warm)
    shift = torch.where((more > values)[:, None, None], moved, shift)
    return Multipliers(diagonal * root.square(), shift / root[..., None, :])


def _relaxed(
    hessian: Tensor, target: Tensor, diagonal: Tensor, cells: Cells, iterations: int, state: _State | None
) -> tuple[Tensor, Tensor, Tensor, _State]:
    """(the dual of each of the batch, S, c, the state to continue from) for one D; A has a unit diagonal."""
    root = diagonal.sqrt()
    rest = hessian / root[..., None, :] / root[..., :, None]
    rest.diagonal(dim1=-2, dim2=-1).sub_(1)
    w = target * root[..., None, :]
    if state is None:
        state = _started(w.reshape(cells.shape), cells)
    inverse = _shifted_inverse(rest, state.penalty)
    best = torch.full((len(w),), -torch.inf, dtype=w.dtype, device=w.device)
    best_shift = torch.zeros_like(w)
    share = torch.zeros_like(cells.table(state.z)[..., 0])
    for iteration in range(1, iterations + 1):
        before = state.penalty * (state.z - state.u).view_as(w) - state.penalty * w
        shift = (w + before) @ inverse
        y = state.penalty * shift - before
        if iteration % _EVERY == 0 or iteration == iterations:
            values = dual_values(w, shift, y, cells)
            better = values > best
            best = torch.where(better, values, best)
            best_shift = torch.where(better[:, None, None], shift, best_shift)
        relaxed = _RELAXATION * (w + shift).view_as(state.z) + (1 - _RELAXATION) * state.z
        point = relaxed + state.u
        moved, share, state.slope = _shrunk(point, cells, state.penalty, state.slope)
        short = float((w.view_as(moved) + shift.view_as(moved) - moved).norm()) * state.penalty
        change = float((moved - state.z).norm()) * state.penalty
        state.z, state.u = moved, point - moved
        if iteration % _BALANCED == 0 and iteration < iterations and change > 0:
            factor = min(_MOST_CHANGED, max(1 / _MOST_CHANGED, (short / change) ** 0.5))
            if not 1 / _UNCHANGED < factor < _UNCHANGED:
                state.penalty *= factor
                state.u /= factor
                inverse = _shifted_inverse(rest, state.penalty)
    table = cells.table(state.z).square()
    gain = torch.where(share > 0, 1 / share.clamp_min(1e-12) - 1, 0.0)[..., None] * table
    gain = cells.matrix(gain).view_as(w).sum(1) / diagonal
    return best, best_shift / root[..., None, :], gain, state


def dual_values(target: Tensor, shift: Tensor, y: Tensor, cells: Cells) -> Tensor:
    """dual(S) of each of the batch (batch,), in units of D; where rows share a budget, that of the matrix, once."""
    batch = len(target)
    plain = (shift * (y - target) + 2 * target * y - target.square()).sum((1, 2))
    gains = cells.table(y.reshape(cells.shape)).square().sum(-1)
    gained = cells.largest(gains).sum(1)
    if cells.by_row:
        return plain - gained.view(batch, -1).sum(1)
    return (plain.sum() - gained.sum()).expand(batch)


def _started(target: Tensor, cells: Cells) -> _State:
    sizes = cells.table(target).norm(dim=-1)
    return _State(target.clone(), torch.zeros_like(target), _first_slope(sizes, cells), _PENALTY)


def _first_slope(sizes: Tensor, cells: Cells) -> Tensor:
    """(groups,) where the size of the last tile kept has a share of 1."""
    most = cells.largest(sizes)
    last = most.where(most > 0, torch.inf).amin(1) if most.shape[1] else torch.ones_like(sizes[:, 0])
    return (1 + 1 / _PENALTY) / last.where(last.isfinite(), 1.0)


def _shifted_inverse(rest: Tensor, penalty: float) -> Tensor:
    shifted = rest.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _shrunk(point: Tensor, cells: Cells, penalty: float, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The proximal step of the separable part: argmin_Z sum_t |Z_t|^2 / z_t + r |Z - P|^2 under the budgets.

    With the price t^2 of a tile, a tile of norm p has the share z = clamp(p / t - 1 / r, 0, 1) and the norm t z, or
    r p / (1 + r) where z = 1. The price is the one whose shares add up to the budget: the root of a piecewise linear
    function of 1 / t that does not fall, by Newton's method with bisection.

    Args:
        slope: 1 / t of each group (groups,), where the search starts.

    Returns:
        (Z (out, in), z (groups, tiles), 1 / t).
    """
    parts = cells.table(point)
    sizes = parts.abs()[..., 0] if parts.shape[-1] == 1 else parts.norm(dim=-1)
    keep = cells.keep.to(sizes)
    slope = _price(sizes, keep, penalty, slope)
    share = (sizes * slope[:, None] - 1 / penalty).clamp(0, 1)
    full = (keep >= cells.group)[:, None]
    share = torch.where(full, 1.0, torch.where((keep == 0)[:, None], 0.0, share))
    factor = torch.where(share < 1, share / (sizes * slope[:, None]).clamp_min(1e-300), penalty / (1 + penalty))
    return cells.matrix(parts * factor[..., None]), share, slope


def _price(sizes: Tensor, keep: Tensor, penalty: float, slope: Tensor) -> Tensor:
    """x (groups,) with sum_j clamp(sizes_j x - 1 / penalty, 0, 1) = keep, where there is one."""
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    # Where fewer tiles than the budget are not zero, all of them are kept at a large enough x.
    attainable = torch.minimum(keep, (sizes > 0).sum(1).to(keep))
    for _ in range(_PRICE_STEPS):
        share = sizes * slope[:, None] - 1 / penalty
        excess = share.clamp(0, 1).sum(1) - attainable
        if bool((excess.abs() <= _PRICE_TOLERANCE * attainable.clamp_min(1)).all()):
            break
        rate = torch.where((share > 0) & (share < 1), sizes, 0).sum(1)
        low, high = torch.where(excess <= 0, slope, low), torch.where(excess > 0, slope, high)
        newton = slope - excess / rate
        middle = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        slope = torch.where(newton.isfinite() & (newton > low) & (newton < high), newton, middle)
    return slope


def largest_diagonal(hessian: Tensor, weights: Tensor, start: Tensor, barrier: float = 1e-3) -> Tensor:
    """argmax_D sum_j c_j d_j + mu (log det(A - D) + sum_j log d_j), for a falling sequence of mu.

    The maximum of sum_j c_j d_j over A - D semidefinite, D >= 0 exceeds that of the result by about 2 n mu, with the
    last mu. Newton steps: with K = (A - D)^-1, the gradient is c - mu diag(K) + mu / d,
    the Hessian -mu (K o K + diag(d^-2)). One costs three factorizations of A's size.

    Args:
        hessian: A (..., n, n), positive definite, with a unit diagonal.
        weights: c (..., n), not negative; far lower and higher ones than their mean are moved to 0.001 and 1000 of it.
        start: D (..., n) with 0 < D < A.
        barrier: the last mu, relative to the mean of c.

    Returns:
        (..., n), inside as far as a factorization in the dtype of A can tell; the start where no step is.

    Source: Boyd and Vandenberghe, Convex Optimization, 2004, section 11.6, on a semidefinite program of Frangioni and
    Gentile, SDP diagonalizations and perspective cuts for a class of nonseparable MIQP, 2007.
    """
    mean = weights.mean(-1, keepdim=True)
    c = torch.where(mean > 0, weights / mean, 1.0).clamp(_LIGHTEST, _HEAVIEST)
    diagonal, mu = start.clone(), _FIRST
    while True:
        for _ in range(_NEWTON):
            diagonal = _newton_step(hessian, c / mu, diagonal)
        if mu <= barrier:
            return diagonal
        mu = max(barrier, mu * _FALL)


def _newton_step(hessian: Tensor, c: Tensor, diagonal: Tensor) -> Tensor:
    """One Newton step on c D + log det(A - D) + sum log d, shortened until it is inside; none where that fails."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(hessian - torch.diag_embed(diagonal))[0])
    gradient = c - inverse.diagonal(dim1=-2, dim2=-1) + 1 / diagonal
    curvature = inverse.square() + torch.diag_embed(diagonal.square().reciprocal())
    step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky_ex(curvature)[0])[..., 0]
    step = torch.where(step.isfinite().all(-1, keepdim=True), step, 0)
    outside = torch.ones(diagonal.shape[:-1], dtype=torch.bool, device=diagonal.device)
    candidate = diagonal
    for _ in range(_HALVINGS):
        candidate = diagonal + step
        failed = torch.linalg.cholesky_ex(hessian - torch.diag_embed(candidate))[1] != 0
        outside = failed | (candidate <= 0).any(-1)
        if not bool(outside.any()):
            return candidate
        step = torch.where(outside[..., None], step * _SHORTEN, step)
    return torch.where(outside[..., None], diagonal, candidate)
