"""Branch and bound: the proven optimum of small rows, or the remaining gap.

The branch and bound tree of one row: many nodes at a time, as batched arrays.

A node has removed the entries R, permanently keeps some others, and has `left` entries still to remove from its free
ones. With K = K^(R) and w = w^(R), K and w downdated by R and restricted to the free entries, what a further removal
costs is

    single_i = w_i^2 / K_ii,    pair_ij = (single_i + single_j - 2 c_ij x_i x_j) / (1 - c_ij^2),

x = w / sqrt(diag K), c = K with unit diagonal, on top of loss(R). Two entries *conflict* where loss(R) + pair_ij
reaches the incumbent: the loss being monotone, no better support removes both. The entries that a better support
removes are free of conflicts among themselves, a clique of `left` compatible entries: whatever has fewer than left - 1
compatible partners is kept permanently. This test settles most nodes; where inputs are nearly orthogonal, a sum does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from admm_prune.errors import check_at_least
from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.result import Result, Status
from admm_prune.solvers.reference.bounds import loss_bounds
from admm_prune.solvers.reference.rigorous import Array, Mask
from admm_prune.solvers.reference.rows import Row, Supports, search, separate

_BUCKET = 4  # nodes are stored by their number of free entries, rounded up to a multiple of this
_NEVER = 1e100  # the target of a padding entry: removing it costs 1e200
_ROUNDS = 2  # of the clique test: dropping an entry may drop others
_MARGIN = 1e-9  # between an eigenvalue and the bound to prove below it
_LEAST_SCHUR = 1e-15  # 1 - c_ij^2 of two entries that agree to rounding
_ROUNDED = 1e-12  # of a loss: a bound that is lower by less is not noted
_BATCH = 256  # nodes expanded at a time
_MEMORY = 256 * 2**20  # bytes of open nodes beyond which the search dives
_KICKS = 10


@dataclass(frozen=True, eq=False)
class Nodes:
    """N nodes with m free entries each, of a row of n entries; nodes with fewer are padded."""

    inverse: Array  # K^(R) (N, m, m)
    target: Array  # w^(R) (N, m)
    entries: NDArray[np.intp]  # (N, m), which entries of the row are free
    removed: Mask  # (N, n), R
    left: NDArray[np.intp]  # (N,), how many entries are still to be removed, at least 2
    loss: Array  # (N,), loss(R)
    bound: Array  # (N,), at least loss(R): a lower bound of every completion

    @classmethod
    def root(cls, inverse: Array, target: Array, removals: int) -> Self:
        n = len(target)
        nothing = np.zeros((1, n), dtype=np.bool_)
        zero = np.zeros(1)
        return cls(inverse[None], target[None], np.arange(n)[None], nothing, np.array([removals]), zero, zero)

    def take(self, which: NDArray[np.intp] | Mask) -> Self:
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Leaf(NamedTuple):
    """A support of full size."""

    removed: Mask  # (n,)
    loss: float


class Pool:
    """The open nodes, in buckets by their number of free entries."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[Nodes]] = {}

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def push(self, nodes: Nodes) -> None:
        self._buckets.setdefault(nodes.target.shape[1], []).append(nodes)

    def pop(self, count: int, ceiling: float, memory: float) -> Nodes | None:
        """Up to `count` nodes of one bucket, least bounds first; drops those that reach the ceiling.

        The fullest bucket comes first, so that a batch is worth its overhead; once the open nodes hold more than
        `memory` bytes, the one with the fewest free entries, which is a dive and frees nodes before it adds many.
        """
        sizes = {width: sum(len(part.loss) for part in parts) for width, parts in self._buckets.items()}
        if sum(8 * width**2 * size for width, size in sizes.items()) > memory:
            width = min(sizes)
        else:
            width = max(sizes, key=lambda w: (min(sizes[w], count), -w))
        nodes = Nodes.joined(self._buckets.pop(width))
        nodes = nodes.take(nodes.bound < ceiling)
        if len(nodes.loss) > count:
            order = np.argpartition(nodes.bound, count)
            self._buckets[width] = [nodes.take(order[count:])]
            nodes = nodes.take(order[:count])
        return nodes if len(nodes.loss) else None

    def least_bound(self) -> float:
        """A lower bound of every support below an open node; infinite where none is open."""
        return min((float(part.bound.min()) for parts in self._buckets.values() for part in parts), default=np.inf)


def expand(nodes: Nodes, ceiling: float) -> tuple[list[Nodes], Leaf | None]:
    """All children of the nodes that may hold a support with a loss below `ceiling`, and the best leaf reached.

    The entries of a node are put in order, the most expensive first. Child i removes entry i and keeps those before it
    permanently (Furnival and Wilson, Regressions by leaps and bounds, 1974): what is expensive to remove leaves a large
    subtree that soon reaches the ceiling, what is cheap a small one.
    """
    x, correlation = _unit_diagonal(nodes)
    promising = ~_sums_reach(nodes, x * x, correlation, ceiling)
    if not promising.all():
        nodes, x, correlation = nodes.take(promising), x[promising], correlation[promising]
    single, pair = x * x, _pair_costs(x, correlation)
    last = nodes.left == 2
    leaf = _best_leaf(nodes, pair, last) if last.any() else None
    if last.all():
        return [], leaf
    if last.any():
        nodes, single, pair = nodes.take(~last), single[~last], pair[~last]
    if leaf is not None:
        ceiling = min(ceiling, leaf.loss)
    partners = nodes.left - 1
    compatible, alive = _cliques(pair < (ceiling - nodes.loss)[:, None, None], partners)
    order = np.argsort(np.where(alive, -single, np.inf), axis=1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    compatible &= rank[:, :, None] < rank[:, None, :]
    free = compatible.sum(2)
    parent, entry = np.nonzero(alive & (free >= partners[:, None]))
    return _children(nodes, single, pair, compatible, parent, entry), leaf


def _unit_diagonal(nodes: Nodes) -> tuple[Array, Array]:
    """(x = w / sqrt(diag K) (N, m), K with unit diagonal (N, m, m))."""
    # (Ã_SS)^-1 has a diagonal of at least 1 / Ã_jj, which is above 1/2; less is rounding.
    scale = 1 / np.sqrt(np.maximum(np.einsum("bii->bi", nodes.inverse), 0.5))
    correlation = nodes.inverse * scale[:, :, None]
    correlation *= scale[:, None, :]
    return nodes.target * scale, correlation


def _sums_reach(nodes: Nodes, single: Array, correlation: Array, ceiling: float) -> Mask:
    """Marks nodes with loss(R) + sum of the `left` smallest single_j / lambda_max(c) >= ceiling (N,).

    The bound of nearly orthogonal inputs, where single removals add up and pairs say little. An eigenvalue is computed
    only where the longest column of c, which it exceeds, does not already rule the bound out.
    """
    sums = np.cumsum(np.sort(single, axis=1), axis=1)[np.arange(len(single)), nodes.left - 1]
    allowed = sums / (ceiling - nodes.loss)
    reach = allowed >= 1
    reach[reach] = allowed[reach] >= np.sqrt(np.square(correlation[reach]).sum(2).max(1))
    if reach.any():
        reach[reach] = allowed[reach] >= np.linalg.eigvalsh(correlation[reach])[:, -1] * (1 + _MARGIN)
    if reach.any():
        # The eigenvalue is a guess; that a Cholesky factorization runs to its end is the proof.
        rest = -correlation[reach]
        np.einsum("bii->bi", rest)[:] += allowed[reach][:, None]
        try:
            np.linalg.cholesky(rest)
        except np.linalg.LinAlgError:
            reach[:] = False
    return reach


def _pair_costs(x: Array, pair: Array) -> Array:
    """(x_i^2 + x_j^2 - 2 c_ij x_i x_j) / (1 - c_ij^2) in place of c (N, m, m), infinite on the diagonal."""
    schur = 1 - pair * pair
    np.maximum(schur, _LEAST_SCHUR, out=schur)
    single = x * x
    pair *= -2 * x[:, :, None]
    pair *= x[:, None, :]
    pair += single[:, :, None]
    pair += single[:, None, :]
    pair /= schur
    np.einsum("bii->bi", pair)[:] = np.inf
    return pair


def _best_leaf(nodes: Nodes, pair: Array, last: Mask) -> Leaf:
    losses = np.where(last[:, None], nodes.loss[:, None] + pair.reshape(len(pair), -1), np.inf)
    node, both = np.unravel_index(int(np.argmin(losses)), losses.shape)
    removed = nodes.removed[node].copy()
    removed[nodes.entries[node, list(divmod(int(both), pair.shape[1]))]] = True
    return Leaf(removed, float(losses[node, both]))


def _cliques(compatible: Mask, partners: NDArray[np.intp]) -> tuple[Mask, Mask]:
    """Drops entries with too few compatible partners; (compatible (N, m, m), alive (N, m))."""
    for _ in range(_ROUNDS):
        alive = compatible.sum(2) >= partners[:, None]
        compatible &= alive[:, None, :]
        compatible &= alive[:, :, None]
    alive = compatible.sum(2) >= partners[:, None]
    return compatible, alive


def _children(
    nodes: Nodes, single: Array, pair: Array, compatible: Mask, parent: NDArray[np.intp], entry: NDArray[np.intp]
) -> list[Nodes]:
    """Child c removes `entry[c]` of node `parent[c]`; its free entries are those marked compatible[parent, entry]."""
    chosen = compatible[parent, entry]
    free = chosen.sum(1)
    first = np.argsort(~chosen, axis=1, kind="stable")  # the free entries, then the others
    left = nodes.left[parent] - 1
    # Whatever is removed next holds an entry at least as expensive as the left-th cheapest.
    following = np.sort(np.where(chosen, pair[parent, entry], np.inf), axis=1)
    bound = np.maximum(nodes.bound[parent], nodes.loss[parent] + following[np.arange(len(left)), left - 1])
    widths = np.minimum(-(-free // _BUCKET) * _BUCKET, chosen.shape[1])
    children = []
    for width in np.unique(widths):
        of = np.flatnonzero(widths == width)
        p, i, index = parent[of], entry[of], first[of, :width]
        row = nodes.inverse[p[:, None], i[:, None], index]
        column = row / nodes.inverse[p, i, i][:, None]
        inverse = nodes.inverse[p[:, None, None], index[:, :, None], index[:, None, :]]
        inverse -= column[:, :, None] * row[:, None, :]
        target = nodes.target[p[:, None], index] - column * nodes.target[p, i][:, None]
        padding = np.arange(width) >= free[of][:, None]
        inverse[padding] = 0
        inverse.transpose(0, 2, 1)[padding] = 0
        np.einsum("bii->bi", inverse)[padding] = 1
        target[padding] = _NEVER
        removed = nodes.removed[p]
        removed[np.arange(len(of)), nodes.entries[p, i]] = True
        loss = nodes.loss[p] + single[p, i]
        children.append(Nodes(inverse, target, nodes.entries[p[:, None], index], removed, left[of], loss, bound[of]))
    return children


@dataclass(frozen=True)
class BranchAndBound:
    """min_R loss_i(R) for every row i, loss(R) = w_R^T (K_RR)^-1 w_R, by best-first branch and bound.

    Each row starts from the best of greedy elimination, 1-swaps and a few kicks; `tree` says how its nodes are expanded
    and bounded. One budget over a whole matrix is one row of out * in entries with the Hessian I kron A. On one core, a
    row of 32 entries with 16 kept takes 0.01 s with the inputs of an ordinary layer and 0.05 s at cond(A) = 1e6; of 48,
    under a second; of 64, many seconds, or no proof at all where few are kept and A is ill-conditioned.

    Args:
        time_limit: seconds for all rows together; an unfinished row leaves its unused share to those after it.
        gap: relative to the loss of a row: what a better support must gain to be worth a proof.
        max_width: the widest row accepted.

    Returns (solve):
        Status SOLVED where the tree of every row closed to `gap` in floating point; else TIME_LIMIT, with the best
        supports found and the least bound of the open nodes. `iterations` counts nodes. The bound is what the tree
        proves less the rounding of its eliminations, `Form.elimination_error`, or that of `lower_bound`, which is valid
        for every support. Where it misses `gap` in a closed row, because A is ill-conditioned, a note says by how much.

    Raises (solve):
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: the supports are N:M groups or of an unknown kind, a row is wider than `max_width`, or the Hessian
            is not positive definite.

    Source: Furnival and Wilson, Regressions by leaps and bounds, 1974; the bounds of nodes are ours.
    """

    time_limit: float = math.inf
    gap: float = 1e-9
    max_width: int = 64

    def __post_init__(self) -> None:
        check_at_least(self, time_limit=0, gap=0, max_width=1)

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        separated = separate(type(self).__name__, problem, self.max_width)
        if any(row.group < row.width and 0 < row.removals < row.width for row in separated.rows):
            raise ValueError(
                f"BranchAndBound takes one budget per row or per matrix; {type(problem.constraint).__name__} has a "
                "budget for each group of a row: use BruteForce, MixedIntegerReference or GroupExact"
            )
        solved: list[Solved] = []
        for i, (row, known) in enumerate(separated.starts(start)):
            now = time.perf_counter()
            share = (began + self.time_limit - now) / (len(separated.rows) - i)
            solved.append(solve_row(row, search(row, known, _KICKS), self.gap, now + share))
        open_rows = sum(not row.closed for row in solved)
        notes = []
        if open_rows:
            notes.append(
                f"{open_rows} of {len(solved)} rows are not proved optimal: raise time_limit ({self.time_limit} s)"
            )
        gaps = [1 - row.bound / row.loss for row in solved if row.closed and row.loss > 0]
        missed = [gap for gap in gaps if gap > 2 * self.gap + _ROUNDED]
        if missed:
            notes.append(
                f"the bounds of {len(missed)} of {len(solved)} rows are up to {max(missed):.1e} below their losses "
                "because of rounding: raise the ridge"
            )
        return separated.result(
            [row.support for row in solved],
            [row.bound for row in solved],
            start=start,
            status=Status.TIME_LIMIT if open_rows else Status.SOLVED,
            iterations=sum(row.nodes for row in solved),
            seconds=time.perf_counter() - began,
            notes=tuple(notes),
        )


class Solved(NamedTuple):
    """The best support of a row, its loss, a lower bound of the optimum, nodes expanded, and whether it is proved."""

    support: Mask
    loss: float
    bound: float
    nodes: int
    closed: bool


def solve_row(row: Row, incumbent: tuple[Mask, float], gap: float, deadline: float) -> Solved:
    """Proves or improves the incumbent (kept, loss) of one row with one budget.

    Args:
        gap: relative to the loss.
        deadline: in the time of `time.perf_counter`.
    """
    # By a power of two, which rounds nothing: the tree has numbers such as `_NEVER` that fit entries of about 1.
    exponent = int(np.frexp(np.abs(row.target).max())[1])
    scaled = replace(row, target=np.ldexp(row.target, -exponent))
    solved = _solve_scaled(scaled, (incumbent[0], float(np.ldexp(incumbent[1], -2 * exponent))), gap, deadline)
    bound = float(np.ldexp(solved.bound, 2 * exponent))
    normal = bound >= np.finfo(np.float64).tiny  # less may have been rounded up
    return solved._replace(loss=float(np.ldexp(solved.loss, 2 * exponent)), bound=bound if normal else 0.0)


def _solve_scaled(row: Row, incumbent: tuple[Mask, float], gap: float, deadline: float) -> Solved:
    """`solve_row` where the largest entry of w is about 1."""
    support, loss = incumbent
    if row.removals in (0, row.width):
        return Solved(support, loss, row.least(support[None])[1], 0, True)
    if row.removals == 1:
        single = ~np.eye(row.width, dtype=np.bool_)
        best, bound = row.least(single)
        return Solved(single[best], row.loss(single[best]), bound, 1, True)
    plain = Supports(row.keep, ((row.group, row.keep),))
    root = max(loss_bounds(row.form, torch.from_numpy(row.target[None]), plain).values())
    least_leaf = math.inf
    pool, count = Pool(), 0
    pool.push(Nodes.root(row.inverse, row.target, row.removals))
    while pool and time.perf_counter() < deadline:
        nodes = pool.pop(_BATCH, loss * (1 - gap), _MEMORY)
        if nodes is None:
            continue
        count += len(nodes.loss)
        children, leaf = expand(nodes, loss * (1 - gap))
        if leaf is not None:
            least_leaf = min(least_leaf, leaf.loss)
        if leaf is not None and leaf.loss < loss:
            value = row.loss(~leaf.removed)
            if value < loss:
                support, loss = ~leaf.removed, value
        for child in children:
            pool.push(child)
    # The tree compares what it computes; a leaf may have been computed below the loss that stands for it in the end.
    threshold = min(loss * (1 - gap), least_leaf, pool.least_bound())
    proved = (
        max(0.0, threshold * (1 - row.form.elimination_error)) if math.isfinite(row.form.elimination_error) else 0.0
    )
    return Solved(support, loss, max(root, proved), count, not pool)
