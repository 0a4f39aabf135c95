"""Lower bounds of whole layers from blocks on the diagonal: stronger than `dual_bound`, and as data too.

With D block-diagonal and definite, A - D semidefinite, any S, Q = S (A - D), Y = W D - Q and E = V - W,

    tr(E A E^T) >= -<S, Q> + tr(E D E^T) + 2 <Q, E>
                 = -<S, Q> + tr(W D W^T) - 2 <Q, W> + sum_blocks (v^T D_b v - 2 y^T v),

where the last term is at least -y_T^T D_TT^-1 y_T for a v with the support T. All supports of a block are tried.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.ops import precision
from admm_prune.solvers.reference.block_relaxation import Partition, maximize_block_dual, most_gained, padded_inverses
from admm_prune.solvers.reference.bounds import Bound
from admm_prune.solvers.reference.cells import Cells, cells_of
from admm_prune.solvers.reference.dual import LEAST_EIGENVALUE, STEPS_BACK, semidefinite
from admm_prune.solvers.reference.rigorous import UNDERFLOW, UNIT, Array, gamma, total_bound
from admm_prune.solvers.reference.rows import floor_of, quadratic, scaled_hessian, to_array

KIND = "block-diagonal dual"
MOST_SUPPORTS = 1296  # of a block, by default: four groups of 2:4


@dataclass(frozen=True, eq=False)
class BlockCertificate:
    """A bound and the multipliers that prove it, in the coordinates of the problem.

    Args:
        bound: of the problem's value.
        columns: (blocks, b), every column once.
        blocks: D (blocks, b, b), each definite, with A - D semidefinite.
        shift: S (out, in).
    """

    bound: Bound
    columns: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    blocks: Array
    shift: Array

    def tensors(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64] | np.dtype[np.int64]]]:
        """By name, as a certificate file of the layer collection holds them."""
        return {"columns": self.columns, "blocks": self.blocks, "shift": self.shift}


@precision.full()
def block_bound(
    candidate: object, objective: float | None = None, *, width: int = 8, rounds: int = 5, iterations: int = 20
) -> BlockCertificate | None:
    """The dual of a relaxation that keeps blocks of the Hessian exact, with blocks chosen for it.

    D takes more of A than a diagonal can, and what a block does under each of its supports is exact. Blocks are whole
    groups of N:M, tiles or groups of columns, those that are most strongly coupled together. On the CPU. A round costs
    3 `iterations` products of W with A, and in each a product of out in b numbers with the supports of a block: 256
    for 8 columns of a row. The bound is computed from the multipliers in float64, and lowered by bounds of all
    rounding.

    Args:
        candidate: a Quadratic problem.
        objective: the value of a feasible point, to compare with.
        width: columns of a block, at most, but at least one group or tile; fewer where this does not divide the layer
            or gives too many supports.
        rounds: matrices D that are tried.
        iterations: of the ascent, for each of three smoothings.

    Returns:
        None where float64 does not prove that A is positive definite: then f has no bound. The bound is f(minimizer)
        where no more is proved.

    Raises:
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: supports of an unknown kind or of several, groups of more than `MOST_SUPPORTS` supports, a Hessian
            that is not positive definite, or options out of range.

    Source: `maximize_block_dual`; on diagonals, Frangioni and Gentile, SDP diagonalizations and perspective cuts, 2007.
    """
    if min(width, rounds, iterations) < 1:
        raise ValueError(
            f"block_bound needs a width, rounds and iterations of at least 1, not {width}, {rounds} and {iterations}"
        )
    problem = quadratic("block_bound", candidate)
    form, scale = scaled_hessian("block_bound", problem)
    target = to_array(problem.minimizer) * scale
    parts = cells_of("block_bound", problem.constraint, (target.shape[0], target.shape[1]))
    if len(parts) > 1:
        raise ValueError("block_bound knows sets of one kind: rows with groups of different sizes have several")
    if not form.definite or not np.isfinite(target).all():
        return None
    # A matrix that differs from its transpose stands for any between: A' >= A - doubt Diag(A).
    hessian = torch.from_numpy(form.hessian).clone()
    hessian.diagonal().mul_(1 - form.doubt * (1 + 4 * UNIT) - (4 * UNIT if form.doubt else 0.0))
    w = torch.from_numpy(target)
    partition = partition_of(hessian, parts[0][1], width)
    blocks, shift, loss = _proved(hessian, w, partition, rounds, iterations)
    floor = floor_of(problem, scale)
    value = total_bound(form, floor, loss)
    if value is None:
        return None
    columns = partition.columns.numpy()
    return BlockCertificate(
        bound=Bound.above(floor.value, value, KIND, objective),
        columns=columns,
        blocks=blocks.numpy() * scale[columns][:, :, None] * scale[columns][:, None, :],
        shift=shift.numpy() / scale,
    )


def partition_of(hessian: Tensor, cells: Cells, width: int) -> Partition:
    """Blocks of at most `MOST_SUPPORTS` supports and `width` columns, or one group or tile, of columns that A couples
    strongly."""
    size = cells.shape[1]
    patterned = cells.by_row and cells.group < size
    unit = cells.group if patterned else cells.tile[1]
    options = 2
    if patterned:
        if len(cells.keep.unique()) > 1:
            raise ValueError("block_bound knows one pattern N:M, not several")
        options = math.comb(unit, int(cells.keep[0]))
    fitting = [k for k in range(1, max(1, width // unit) + 1) if size % (unit * k) == 0 and options**k <= MOST_SUPPORTS]
    if options > MOST_SUPPORTS:
        raise ValueError(
            f"block_bound lists at most {MOST_SUPPORTS} supports of a block; a group of {int(cells.keep[0])}:{unit} "
            f"has {options}: use dual_bound"
        )
    together = max(fitting, default=1)
    groups = torch.arange(size).view(-1, unit)
    columns = groups[coupled(hessian, unit, together)].flatten(1)
    if patterned:
        subsets = list(itertools.combinations(range(unit), int(cells.keep[0])))
        single = torch.zeros(len(subsets), unit, dtype=torch.bool)
        for row, chosen in zip(single, subsets, strict=True):
            row[list(chosen)] = True
    else:
        single = torch.tensor([[False], [True]]).expand(2, unit)
    indices = torch.cartesian_prod(*[torch.arange(len(single))] * together).view(-1, together)
    supports = single[indices].flatten(1)
    choices = torch.zeros(len(supports), dtype=torch.long) if patterned else indices.sum(1)
    keep = cells.keep.new_empty(0) if patterned else cells.keep
    return Partition(columns, supports, choices, cells.tile[0], keep)


def coupled(hessian: Tensor, unit: int, together: int) -> Tensor:
    """(blocks, together) of units of columns: each begins with the strongest coupling left, and grows by the strongest.

    The coupling of two units is the sum of the squared entries of A with a unit diagonal.
    """
    count = len(hessian) // unit
    if together == 1:
        return torch.arange(count)[:, None]
    diagonal = hessian.diagonal()
    relative = hessian.square() / diagonal / diagonal[:, None]
    strength = relative.view(count, unit, count, unit).sum((1, 3))
    strength.fill_diagonal_(-1.0)
    blocks = []
    for _ in range(count // together):
        members = list(divmod(int(strength.argmax()), count))
        while len(members) < together:
            total = strength[members].sum(0)
            total[members] = -math.inf
            members.append(int(total.argmax()))
        strength[members] = -math.inf
        strength[:, members] = -math.inf
        blocks.append(members)
    return torch.tensor(blocks)


def _proved(
    hessian: Tensor, target: Tensor, partition: Partition, rounds: int, iterations: int
) -> tuple[Tensor, Tensor, float]:
    """(D, S, a proved lower bound of the loss): zeros, and 0, where no more is proved."""
    count, size = partition.columns.shape
    nothing = torch.zeros(count, size, size, dtype=hessian.dtype), torch.zeros_like(target), 0.0
    root = hessian.diagonal().sqrt()
    if not float(torch.linalg.eigvalsh(hessian / root / root[:, None])[0]) > LEAST_EIGENVALUE or not bool(target.any()):
        return nothing
    exponent = torch.frexp(target.abs().max()).exponent  # by powers of two, which round nothing
    try:
        blocks, shift = maximize_block_dual(
            hessian, torch.ldexp(target, -exponent), partition, rounds=rounds, iterations=iterations
        )
    except LinAlgError:  # A is too close to singular for the factorizations
        return nothing
    shift = torch.ldexp(shift, exponent)
    if not bool(shift.isfinite().all()):
        return nothing
    for back in STEPS_BACK:
        lowered = blocks - back * torch.diag_embed(hessian.diagonal()[partition.columns])
        if _is_proved(hessian, lowered, partition):
            loss = block_loss(hessian, lowered, target, shift, partition)
            return (lowered, shift, loss) if loss > 0 else nothing
    return nothing


def _is_proved(hessian: Tensor, blocks: Tensor, partition: Partition) -> bool:
    """Whether the blocks are proved to be definite, and A - D, with the rounding of the difference, semidefinite."""
    rest = hessian - partition.spread(blocks)
    rounding = torch.zeros(len(hessian), dtype=hessian.dtype)
    place = partition.columns
    rounding[place] = 4 * UNIT * rest[place[:, :, None], place[:, None, :]].abs().sum(2)
    least = LEAST_EIGENVALUE**2 * hessian.diagonal()[place]
    return bool(semidefinite(blocks, least).all() and semidefinite(rest, rounding))


def block_loss(hessian: Tensor, blocks: Tensor, target: Tensor, shift: Tensor, partition: Partition) -> float:
    """A lower bound of tr(E A E^T) over the set, never below 0, for blocks that are proved.

    Y is known within r: gamma_(2n) of |S| (|A| + |D|) and |W| |D|. With X close to D_TT^-1 and |I - D_TT X| <= a < 1 in
    the maximum norm, D_TT^-1 <= X / (1 - a); the form of X is a norm, in which r adds up.
    """
    n, height, size = len(hessian), partition.height, partition.columns.shape[1]
    whole, slack = partition.spread(blocks), 2 * gamma(2 * n + 16)
    scaled, pull = target @ whole, shift @ (hessian - whole)
    pull_sizes = shift.abs() @ (hessian.abs() + whole.abs())
    scaled_sizes = target.abs() @ whole.abs()
    error = slack * (pull_sizes + scaled_sizes) + UNDERFLOW
    terms = [-(shift * pull), target * scaled, -2 * pull * target]
    sizes = (shift.abs() + 2 * target.abs()) * (pull.abs() + error) + target.abs() * scaled_sizes
    doubt = (slack * sizes + (shift.abs() + 2 * target.abs()) * error).sum() * (1 + slack * len(target))
    constant = math.fsum(torch.stack(terms).flatten().tolist()) - float(doubt)
    inverses = padded_inverses(blocks, partition.supports)
    inverses = (inverses + inverses.transpose(-1, -2)) / 2
    inside = partition.supports[:, :, None] & partition.supports[:, None, :]
    matrices = blocks[:, None] * inside
    away = (torch.eye(size, dtype=blocks.dtype) * inside - matrices @ inverses).abs()
    away += 2 * gamma(size + 4) * (matrices.abs() @ inverses.abs() + 1)
    ratio = away.sum(-1).amax((1, 2)) * (1 + slack)  # of each block
    norm = inverses.abs().sum(-1).amax((1, 2)) * (1 + slack)
    if not bool((ratio < 0.5).all()):
        return 0.0
    y = partition.blocks(scaled - pull)
    products = (y.transpose(-1, -2) @ y).flatten(2)
    squares = products.unflatten(2, (size, size)).diagonal(dim1=-2, dim2=-1).sum(-1)
    doubtful = 4 * gamma(height + size * size + 16) * squares * norm[:, None] + UNDERFLOW * (1 + norm[:, None])
    wrong = partition.blocks(error).amax((2, 3)) * math.sqrt(height * size) * norm.sqrt()[:, None]
    forms = products @ inverses.flatten(2).transpose(1, 2)
    gains = ((forms + doubtful[..., None]).clamp_min(0).sqrt() + wrong[..., None]).square()
    gains = gains * (1 + 32 * UNIT) / (1 - ratio[:, None, None])
    counts = range(int(partition.choices.max()) + 1)
    most = torch.stack([gains[..., partition.choices == count].amax(-1) for count in counts], -1)
    lines = partition.lines(most)
    admitted = most_gained(lines, partition.keep)
    # a price l adds rounding of l choices to every line, and l is at most the largest gain
    rounding = gamma(lines.shape[1] + 16) * (admitted + lines.amax() * lines.shape[2] * lines.shape[1])
    gained = math.fsum((admitted + (rounding if len(partition.keep) else 0)).tolist())
    loss = (
        constant - gained - 8 * UNIT * (abs(constant) + gained + math.fsum(torch.stack(terms).abs().flatten().tolist()))
    )
    return max(0.0, loss) if math.isfinite(loss) else 0.0
