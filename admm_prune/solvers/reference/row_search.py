"""A good support of one row, quickly: greedy elimination, 1-swaps, and a few kicks. The incumbent of the references."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from admm_prune.solvers.reference.rows import Array, Mask, Row

Indices = NDArray[np.intp]

_LEAST_GAIN = 1e-10  # of a swap, relative to the loss: smaller ones may be rounding
_KICKED = 3  # pairs exchanged by a kick


def search(row: Row, starts: Iterable[Mask] = (), kicks: int = 0) -> tuple[Mask, float]:
    """The best support found and its loss: local minima for 1-swaps from greedy elimination and from each start.

    Args:
        starts: supports; one that is not of full size is completed with the largest entries, or thinned to them.
        kicks: exchanges of random pairs from the best support, each followed by swaps (iterated local search).
    """
    candidates = [_eliminated(row), *(row.completed(start) for start in starts)]
    best, loss = min((_swapped(row, kept) for kept in candidates), key=lambda found: found[1])
    generator = np.random.default_rng(0)
    for _ in range(kicks if 0 < row.removals < row.width else 0):
        kept, value = _swapped(row, _kicked(row, best, generator))
        if value < loss:
            best, loss = kept, value
    return best, loss


def _eliminated(row: Row) -> Mask:
    """Removes the entry of the least increment w_j^2 / K_jj until the support has its size, K and w downdated."""
    inverse, target = row.inverse.copy(), row.target.copy()
    kept = np.ones(row.width, dtype=np.bool_)
    for _ in range(row.removals):
        increments = target**2 / np.maximum(inverse.diagonal(), np.finfo(np.float64).tiny)
        full = kept.reshape(-1, row.group).sum(1) <= row.keep
        increments[~kept | full.repeat(row.group)] = np.inf
        j = int(np.argmin(increments))
        column = inverse[:, j] / inverse[j, j]
        target = target - column * target[j]
        inverse = inverse - np.outer(column, inverse[j])
        kept[j] = False
    return kept


def _kicked(row: Row, kept: Mask, generator: np.random.Generator) -> Mask:
    kicked = kept.copy().reshape(-1, row.group)
    for _ in range(_KICKED):
        cell = kicked[generator.integers(len(kicked))]
        cell[generator.choice(np.flatnonzero(cell))] = False
        cell[generator.choice(np.flatnonzero(~cell))] = True
    return kicked.reshape(-1)


def _swapped(row: Row, kept: Mask) -> tuple[Mask, float]:
    """Takes the best swap within a group until none lowers the loss; (support, loss)."""
    kept = kept.copy()
    loss = row.loss(kept)
    if not 0 < row.removals < row.width:
        return kept, loss
    group = np.arange(row.width) // row.group
    while True:
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
        gains = swap_gains(row.hessian, row.target, inside, outside)
        gains[group[inside][:, None] != group[outside]] = -np.inf
        i, j = np.unravel_index(int(np.argmax(gains)), gains.shape)
        swapped = kept.copy()
        swapped[inside[i]], swapped[outside[j]] = False, True
        value = row.loss(swapped)
        if not value < loss * (1 - _LEAST_GAIN):
            return kept, loss
        kept, loss = swapped, value


def swap_gains(hessian: Array, target: Array, inside: Indices, outside: Indices) -> Array:
    """gain_ij = r_j^2 / s_j - (v_i - T_ij r_j / s_j)^2 / (K_ii + T_ij^2 / s_j): what a swap takes off the loss.

    Kept i goes, removed j comes; exact for every pair. With S = inside, K = Ã_SS^-1, v = the refitted weights,
    r = Ã (w - v), T = K Ã_S: and s_j = Ã_jj - Ã_jS T_j.

    Returns:
        (len(inside), len(outside)).

    Source: this project's methods, local.md, eq. (5).
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
    # s_j is zero where column j depends on the columns kept: adding it takes nothing off the loss.
    gains[~np.isfinite(gains)] = -np.inf
    return gains
