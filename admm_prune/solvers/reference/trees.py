"""Rows proved to a gap by branch and bound with dual bounds, many rows and nodes at a time, as data to be rechecked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from admm_prune.ops import precision
from admm_prune.solvers.reference.cells import Cells
from admm_prune.solvers.reference.dual import maximized, proved_leaves
from admm_prune.solvers.reference.perspective_dual import price
from admm_prune.solvers.reference.rigorous import Array, Form, Mask, scaled_form
from admm_prune.solvers.reference.rows import Row, search

_PENALTY, _RELAXATION = 5.0, 1.6
_BATCH = 2048  # nodes that are bounded at a time, the last opened first
_EVERY = 5  # iterations between evaluations of the dual
_KICKS = 5
_STRICTER = 1e-9  # of the bound that closes a node, so that the proved one reaches it too


@dataclass(frozen=True, eq=False)
class TreeCertificate:
    """Solutions of rows and the leaves that prove their bounds, in the coordinates of the problems.

    Args:
        weight: V (rows, in), the best found.
        values: (rows,) (v - w)^T A (v - w).
        bounds: (rows,) proved, the least of the leaves of each row.
        leaves: (leaves, in), int8: 1 where an entry is kept, -1 where it is removed, 0 where that is open. Those of
            a row are those of a binary tree; sides without a support of full size have none.
        row_of_leaf: (leaves,).
        diagonal: D (rows, in), each with A - Diag(D) positive semidefinite; that of a leaf is its row's.
        shift: S (leaves, in).
        nodes: (rows,) bounded in all.
    """

    weight: Array
    values: Array
    bounds: Array
    leaves: np.ndarray[tuple[int, int], np.dtype[np.int8]]
    row_of_leaf: np.ndarray[tuple[int], np.dtype[np.int64]]
    diagonal: Array
    shift: Array
    nodes: np.ndarray[tuple[int], np.dtype[np.int64]]

    @property
    def gaps(self) -> Array:
        """1 - bound / value of every row; 0 where the value is 0."""
        ratio = np.divide(self.bounds, self.values, out=np.ones_like(self.values), where=self.values > 0)
        return np.asarray(np.clip(1 - ratio, 0, 1), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Open nodes: their rows, what they fix, and the state of ADMM of their parents."""

    row: Tensor
    fixed: Tensor
    z: Tensor
    u: Tensor
    slope: Tensor

    def take(self, which: Tensor | slice) -> _Nodes:
        return _Nodes(self.row[which], self.fixed[which], self.z[which], self.u[which], self.slope[which])

    @staticmethod
    def joined(parts: Sequence[_Nodes]) -> _Nodes:
        names = ("row", "fixed", "z", "u", "slope")
        return _Nodes(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@precision.full()
def prove_rows(
    hessian: Tensor,
    target: Tensor,
    keep: Sequence[int],
    *,
    gap: float = 0.01,
    max_nodes: int = 20_000,
    iterations: int = 20,
) -> TreeCertificate:
    """min_v (v - w)^T A (v - w) over v with at most keep_i entries, for each row i, to a relative gap.

    The best v of each row comes from greedy elimination, swaps and kicks, or from a node that leaves one support. A
    node fixes some entries as kept or removed; its bound is the dual of the perspective relaxation for the diagonal of
    the root, by ADMM from the state of its parent. A node whose bound is above (1 - gap) of the best value is a leaf;
    another is split at the entry with the largest v_j^2 (1 / z_j - 1), which is what its relaxation gains by being
    between kept and removed. The bounds of the leaves are lowered by bounds of all rounding; those of open nodes count
    where `max_nodes` is reached.

    Args:
        hessian: A (rows, in, in), positive definite.
        target: W (rows, in).
        keep: of each row, from 0 to in.
        gap: relative to the value, from 0 to below 1.
        max_nodes: of each row on average; the rest stays open.
        iterations: of ADMM for each node; three times as many for the root of a row.

    Raises:
        ValueError: shapes or counts that do not fit, NaN or Inf, a Hessian that is not symmetric or not positive
            definite, or options out of range.
    """
    if not 0 <= gap < 1 or max_nodes < 0 or iterations < 1:
        raise ValueError(
            "prove_rows needs a gap from 0 to below 1, max_nodes of at least 0 and iterations of at least 1, not "
            f"{gap}, {max_nodes} and {iterations}"
        )
    rows, width = _checked(hessian, target, keep)
    scaled, exponents = zip(*(scaled_form(one.double().numpy()) for one in hessian), strict=True)
    scale = np.ldexp(1.0, np.stack(exponents).astype(np.int32))
    a = torch.from_numpy(np.stack([form.hessian for form in scaled]))
    w = target.double() * torch.from_numpy(scale)
    cells = Cells.per_row((rows, width), keep)
    root = maximized(a, w[:, None], cells, device="cpu", rounds=6, iterations=40)
    incumbents = [_best(form, x.numpy(), k) for form, x, k in zip(scaled, w, keep, strict=True)]
    weight = np.stack([v for v, _ in incumbents])
    values = np.array([value for _, value in incumbents])
    goal = torch.from_numpy(values) * (1 - gap) * (1 + _STRICTER)
    counts = torch.zeros(rows, dtype=torch.int64)
    leaves: list[tuple[Tensor, Tensor, Tensor]] = []
    diagonal = torch.where(root.diagonal > 0, root.diagonal, 1.0)
    unit, inverse = diagonal.sqrt(), _inverse(a, diagonal)
    keeps = torch.tensor(list(keep))
    wd = w * unit
    nodes = _Nodes(
        torch.arange(rows), torch.zeros(rows, width, dtype=torch.int8), wd, torch.zeros_like(wd), 1 / _size(wd)
    )
    # Rows without a diagonal have only the bound 0; rows of value 0 need none.
    hopeless = (root.diagonal == 0).all(1) | (goal <= 0)
    leaves.append((nodes.row[hopeless], nodes.fixed[hopeless], torch.zeros_like(w[hopeless])))
    nodes = nodes.take(~hopeless)
    roots = len(nodes.row)  # those at the front that are left: they have no state of a parent
    while (count := len(nodes.row)) > 0:
        begin = max(0, count - _BATCH)
        is_root = count == roots
        if not is_root:  # a batch has roots alone, or none
            begin = max(begin, roots)
        some, rest = nodes.take(slice(begin, None)), nodes.take(slice(0, begin))
        roots = min(roots, begin)
        bound, shift, after, share = _bounded(some, wd, inverse, keeps, 3 * iterations if is_root else iterations)
        counts.index_add_(0, some.row, torch.ones_like(some.row))
        free = some.fixed == 0
        gain = torch.where(free & (share > 0), after.z.square() * (1 / share.clamp_min(1e-9) - 1), 0.0)
        entry = torch.where(free, gain + 1e-300, -1.0).argmax(1)
        split = (bound < goal[some.row]) & free.any(1) & (int(counts.sum()) < max_nodes * rows)
        for i in (split | ((bound < goal[some.row]) & ~free.any(1))).nonzero()[:, 0].tolist():
            support, r = _only_support(some.fixed[i], int(keeps[some.row[i]])), int(some.row[i])
            if support is None:
                continue
            v, value = _refitted(scaled[r], w[r].numpy(), support)
            if value < values[r]:
                weight[r], values[r], goal[r] = v, value, value * (1 - gap) * (1 + _STRICTER)
        done = ~split
        leaves.append((some.row[done], some.fixed[done], shift[done] / unit[some.row[done]]))
        nodes = _Nodes.joined([rest, *(_child(after.take(split), entry[split], sign, keeps) for sign in (1, -1))])
    row, fixed, shift = (torch.cat([leaf[i] for leaf in leaves]) for i in range(3))
    each = proved_leaves(a, root.diagonal, w, keeps, row, fixed, shift)
    bounds = torch.full((rows,), torch.inf, dtype=torch.float64).scatter_reduce(0, row, each, "amin")
    return TreeCertificate(
        weight=weight / scale,
        values=values,
        bounds=np.minimum(bounds.numpy(), values),
        leaves=fixed.numpy(),
        row_of_leaf=row.numpy(),
        diagonal=root.diagonal.numpy() * scale**2,
        shift=shift.numpy() / scale[row.numpy()],
        nodes=counts.numpy(),
    )


def _checked(hessian: Tensor, target: Tensor, keep: Sequence[int]) -> tuple[int, int]:
    if target.ndim != 2 or hessian.shape != (*target.shape, target.shape[1]) or len(keep) != len(target):
        raise ValueError(
            f"prove_rows needs Hessians (rows, in, in), targets (rows, in) and a count for each row, not "
            f"{tuple(hessian.shape)}, {tuple(target.shape)} and {len(keep)} counts"
        )
    rows, width = target.shape
    if not all(0 <= k <= width for k in keep):
        raise ValueError(f"prove_rows keeps from 0 to {width} entries of a row, not {sorted(set(keep))}")
    if not bool(hessian.isfinite().all() and target.isfinite().all()):
        raise ValueError("prove_rows: a Hessian or a target contains NaN or Inf")
    if not torch.equal(hessian, hessian.mT):
        raise ValueError("prove_rows: a Hessian is not symmetric")
    diagonal = hessian.double().diagonal(dim1=-2, dim2=-1)
    if bool((diagonal <= 0).any()) or bool(torch.linalg.cholesky_ex(hessian.double())[1].any()):
        raise ValueError("prove_rows: a Hessian is not positive definite: raise the ridge")
    return rows, width


def _best(form: Form, target: Array, keep: int) -> tuple[Array, float]:
    support, _ = search(Row(form, target, len(target), keep), (), _KICKS)
    return _refitted(form, target, support)


def _refitted(form: Form, target: Array, support: Mask) -> tuple[Array, float]:
    v = Row(form, target, len(target), int(support.sum())).refit(support)
    away = v - target
    return v, max(float(away @ form.hessian @ away), 0.0)  # in this order NaN stays NaN


def _only_support(fixed: Tensor, keep: int) -> Mask | None:
    """The support of full size that a node leaves; None where there are several."""
    inside, free = fixed > 0, fixed == 0
    left = keep - int(inside.sum())
    if left == 0:
        return np.asarray(inside.numpy())
    return np.asarray((inside | free).numpy()) if int(free.sum()) == left else None


def _size(w: Tensor) -> Tensor:
    largest = w.abs().amax(1)
    return torch.where(largest > 0, largest, 1.0)


def _inverse(hessian: Tensor, diagonal: Tensor) -> Tensor:
    """(A - D + penalty D)^-1 in units of D."""
    root = diagonal.sqrt()
    shifted = hessian / root[:, None, :] / root[:, :, None]
    shifted.diagonal(dim1=-2, dim2=-1).add_(_PENALTY - 1)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _child(parents: _Nodes, entry: Tensor, sign: int, keeps: Tensor) -> _Nodes:
    """The sides where `entry` is kept (1) or removed (-1), without those that hold no support of full size."""
    fixed = parents.fixed.scatter(1, entry[:, None], sign)
    keep = keeps[parents.row]
    feasible = ((fixed > 0).sum(1) <= keep) & ((fixed < 0).sum(1) <= fixed.shape[1] - keep)
    return _Nodes(parents.row, fixed, parents.z, parents.u, parents.slope).take(feasible)


def _bounded(
    nodes: _Nodes, target: Tensor, inverses: Tensor, keeps: Tensor, iterations: int
) -> tuple[Tensor, Tensor, _Nodes, Tensor]:
    """(the best dual value of each node, its S, the nodes with their new state, z), in units of D."""
    w, inverse = target[nodes.row], inverses[nodes.row]
    free, inside = nodes.fixed == 0, nodes.fixed > 0
    left = (keeps[nodes.row] - inside.sum(1)).clamp_min(0)
    chosen = torch.arange(w.shape[1]) < left[:, None]
    every = (free.sum(1) <= left)[:, None] & free
    z, u, slope = nodes.z, nodes.u, nodes.slope
    best, best_shift = torch.full((len(w),), -torch.inf, dtype=w.dtype), torch.zeros_like(w)
    share = torch.zeros_like(w)
    for iteration in range(1, iterations + 1):
        before = _PENALTY * (z - u - w)
        shift = torch.bmm((w + before)[:, None], inverse)[:, 0]
        y = _PENALTY * shift - before
        if iteration % _EVERY == 0 or iteration == iterations:
            gains = torch.where(free, y.square(), 0).sort(1, descending=True).values
            value = (shift * (y - w) + 2 * w * y - w.square()).sum(1)
            value -= torch.where(chosen, gains, 0).sum(1) + torch.where(inside, y.square(), 0).sum(1)
            better = value > best
            best, best_shift = torch.where(better, value, best), torch.where(better[:, None], shift, best_shift)
        point = _RELAXATION * (w + shift) + (1 - _RELAXATION) * z + u
        size = point.abs()
        slope = price(torch.where(free, size, 0), left.to(w), _PENALTY, slope)
        share = (size * slope[:, None] - 1 / _PENALTY).clamp(0, 1)
        share = torch.where(inside | every, 1.0, torch.where(free & (left > 0)[:, None], share, 0.0))
        norm = share / (size * slope[:, None]).clamp_min(1e-300)
        z = point * torch.where(share < 1, norm, _PENALTY / (1 + _PENALTY))
        u = point - z
    return best, best_shift, _Nodes(nodes.row, nodes.fixed, z, u, slope), share
