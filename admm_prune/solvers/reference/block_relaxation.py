"""Multipliers of a lower bound with blocks on the diagonal: D for given weights, and S for a given D.

For a block-diagonal D with A - D semidefinite, any S, Q = S (A - D), Y = W D - Q and E = V - W, the loss of V is at
least

    dual(D, S) = -<S, Q> + tr(W D W^T) - 2 <Q, W> - (the largest sum of gains that the budgets admit),

where a support T of a block has the gain y_T^T D_TT^-1 y_T. It is concave in S; all supports of a block are listed. A
budget of k choices over blocks has a price l >= 0: at most k l + sum_blocks max_T (gain of T - l choices of T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BARRIERS = (1.0, 0.2, 0.04)  # of the blocks, relative to the mean weight, before the last one
_FIRST_BARRIER, _LAST_BARRIER = 0.1, 1e-3  # of the rounds: blocks at the boundary overfit the first weights
_SWEEPS = 4  # over the blocks at each barrier
_INSIDE = 0.5  # of the least eigenvalue: the first D, strictly inside
_SMOOTHING = (0.1, 0.02, 0.005)  # of the maximum over supports, relative to the mean loss of a block
_SHORTER = 0.7  # the step, where the smoothed dual has fallen
_EVERY = 10  # iterations between evaluations of the dual
_PRICE_STEPS = 12
_PRICE_TOLERANCE = 1e-5
_BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class Partition:
    """The columns in blocks, and what may be kept of each block.

    Args:
        columns: (blocks, b), every column once.
        supports: (supports, b), boolean: what is listed.
        choices: (supports,) how much of the budget each takes; zeros where there is none.
        height: rows that are kept together.
        keep: (budgets,) integers: one for each row, one for the matrix, or none.
    """

    columns: Tensor
    supports: Tensor
    choices: Tensor
    height: int
    keep: Tensor

    def blocks(self, x: Tensor) -> Tensor:
        """(out, in) -> (blocks, out / height, height, b)."""
        count, size = self.columns.shape
        return x[:, self.columns.flatten()].reshape(-1, self.height, count, size).permute(2, 0, 1, 3)

    def matrix(self, blocks: Tensor) -> Tensor:
        """The inverse of `blocks`."""
        flat = blocks.permute(1, 2, 0, 3).reshape(-1, self.columns.numel())
        matrix = torch.empty_like(flat)
        matrix[:, self.columns.flatten()] = flat
        return matrix

    def spread(self, diagonal: Tensor) -> Tensor:
        """Blocks (blocks, b, b) as a matrix (in, in)."""
        size = self.columns.numel()
        whole = torch.zeros(size, size, dtype=diagonal.dtype)
        whole[self.columns[:, :, None], self.columns[:, None, :]] = diagonal
        return whole

    def lines(self, gains: Tensor) -> Tensor:
        """(blocks, groups, choices + 1) -> (budgets, lines, choices + 1)."""
        if len(self.keep) == 1:
            return gains.reshape(1, -1, gains.shape[-1])
        return gains.transpose(0, 1)


def maximize_block_dual(
    hessian: Tensor, target: Tensor, partition: Partition, *, rounds: int = 5, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """(D (blocks, b, b), S (out, in)) of a high lower bound, by turns as `maximize_dual`.

    For a given S, sum_blocks <C, D> with C the second moment of v - w - s under the smoothed choice of supports is a
    supergradient; the mean over the rounds is maximized (`largest_blocks`), which is dual averaging.

    Args:
        hessian: A (in, in), float64, positive definite with a diagonal of about 1.
        target: W (out, in).
        rounds: matrices D that are tried.
        iterations: of the ascent in S, for each smoothing; three times as many for the best D.
    """
    count, size = partition.columns.shape
    inside = _INSIDE * float(torch.linalg.eigvalsh(hessian)[0])
    start = torch.eye(size, dtype=hessian.dtype).mul(inside).expand(count, size, size)
    weights = torch.eye(size, dtype=hessian.dtype).repeat(count, 1, 1)
    shift = torch.zeros_like(target)
    best, chosen = -math.inf, (start.clone(), shift)
    for number in range(1, rounds + 1):
        barriers = (*_BARRIERS, max(_LAST_BARRIER, _FIRST_BARRIER / number))
        blocks = largest_blocks(hessian, weights, partition.columns, start, barriers)
        ascent = _Ascent(hessian, target, partition, blocks)
        value, shift, moments = ascent.run(shift, iterations)
        if value > best:
            best, chosen = value, (blocks, shift)
        mean = moments.diagonal(dim1=-2, dim2=-1).mean()
        if not float(mean) > 0:
            break
        weights = weights + moments / mean
    blocks, shift = chosen
    value, more, _ = _Ascent(hessian, target, partition, blocks).run(shift, 3 * iterations)
    return blocks, more if value > best else shift


class _Ascent:
    """Accelerated ascent in S for a given D, with the maximum over supports smoothed, in float32.

    The gradient is 2 (E - S) (A - D), E the mean of v - w under the smoothed choice, and the curvature at most that of
    (A - D) + (A - D) D^-1 (A - D) but for the smoothing, so that a step is (E - S) D A^-1. Nothing depends on its
    rounding: the bound is computed from what it ends in.

    Source: Nesterov, Smooth minimization of non-smooth functions, 2005; O'Donoghue and Candès, Adaptive restart for
    accelerated gradient schemes, 2015.
    """

    def __init__(self, hessian: Tensor, target: Tensor, partition: Partition, blocks: Tensor) -> None:
        self.partition = partition
        whole = partition.spread(blocks)
        self.rest, self.target = (hessian - whole).float(), target.float()
        self.scaled = (target @ whole).float()
        self.energy = float((target @ whole * target).sum())
        self.step = (whole @ torch.cholesky_inverse(torch.linalg.cholesky(hessian))).float()
        self.inverses = padded_inverses(blocks, partition.supports).float()
        flat = self.inverses.flatten(2)
        self.forms = flat.transpose(1, 2).contiguous()
        self.by_choice = [(partition.choices == c).nonzero()[:, 0] for c in range(int(partition.choices.max()) + 1)]
        self.price = torch.zeros(len(partition.keep))

    def run(self, shift: Tensor, iterations: int) -> tuple[float, Tensor, Tensor]:
        """(the dual, S, the moments C (blocks, b, b)) from a start S."""
        start = shift.float()
        best, highest, unit = self._dual(start), start, 0.0
        for smoothing in _SMOOTHING:
            unit = smoothing * max(best, 1e-3 * self.energy) / (len(self.forms) * len(self.partition.blocks(start)[0]))
            size, speed, last = 1.0, 1.0, -math.inf
            before = point = highest
            for iteration in range(1, iterations + 1):
                value, mean, _ = self._smoothed(point, unit)
                if value < last:
                    size, speed, last, point = size * _SHORTER, 1.0, -math.inf, before
                    continue
                moved = point + size * (mean - self.target - point) @ self.step
                faster = (1 + math.sqrt(1 + 4 * speed * speed)) / 2
                point, before = moved + (speed - 1) / faster * (moved - before), moved
                speed, last = faster, value
                if iteration % _EVERY == 0 or iteration == iterations:
                    dual = self._dual(before)
                    if dual > best:
                        best, highest = dual, before
        return best, highest.to(shift.dtype), self._moments(highest, unit).to(shift.dtype)

    def _linear(self, shift: Tensor) -> tuple[float, Tensor, Tensor]:
        """(dual but for the gains, Y in blocks, y y^T summed over rows kept together (blocks, groups, b b))."""
        pull = shift @ self.rest
        constant = self.energy - float((pull * (shift + 2 * self.target)).double().sum())
        y = self.partition.blocks(self.scaled - pull)
        return constant, y, (y.transpose(-1, -2) @ y).flatten(2)

    def _dual(self, shift: Tensor) -> float:
        constant, _, products = self._linear(shift)
        gains = products @ self.forms
        most = torch.stack([gains[..., same].amax(-1) for same in self.by_choice], -1)
        return constant - float(most_gained(self.partition.lines(most), self.partition.keep).sum())

    def _smoothed(self, shift: Tensor, unit: float) -> tuple[float, Tensor, tuple[Tensor, Tensor]]:
        """(the smoothed dual, the mean of v, the shares of the supports and the products y y^T)."""
        constant, y, products = self._linear(shift)
        gains = (products @ self.forms).div_(unit)
        keep = self.partition.keep
        if len(keep):
            lines = torch.stack([gains[..., same].logsumexp(-1) for same in self.by_choice], -1)
            self.price, value = _price(self.partition.lines(lines), keep, self.price / unit)
            each = self.price if len(keep) > 1 else self.price.expand(gains.shape[1])
            gains -= each[:, None] * self.partition.choices
            self.price = self.price * unit
        else:
            value = float(gains.logsumexp(-1).double().sum())
        shares = gains.softmax(-1)
        mixed = (shares @ self.inverses.flatten(2)).unflatten(-1, y.shape[-1:] * 2)
        return constant - unit * value, self.partition.matrix(y @ mixed), (shares, products)

    def _moments(self, shift: Tensor, unit: float) -> Tensor:
        """sum_rows of the mean of (v - w - s)^T (v - w - s) in each block."""
        _, mean, (shares, products) = self._smoothed(shift, unit)
        inner = (shares.transpose(1, 2) @ products).unflatten(-1, self.inverses.shape[-1:] * 2)
        second = (self.inverses @ inner @ self.inverses).sum(1)
        expected, aim = (self.partition.blocks(x).flatten(1, 2) for x in (mean, self.target + shift))
        cross = expected.transpose(1, 2) @ aim
        moments: Tensor = second - cross - cross.transpose(1, 2) + aim.transpose(1, 2) @ aim
        return (moments + moments.transpose(1, 2)) / 2


def padded_inverses(blocks: Tensor, supports: Tensor) -> Tensor:
    """D_TT^-1 (blocks, supports, b, b), with zeros outside of T."""
    inside = supports[:, :, None] & supports[:, None, :]
    matrices = blocks[:, None] * inside + torch.diag_embed((~supports).to(blocks.dtype))
    inverses: Tensor = torch.linalg.inv(matrices) * inside
    return inverses


def _price(lines: Tensor, keep: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """(l (budgets,), sum_budgets of the least of sum_lines log sum_c exp(x_c - l c) + l keep), by Newton's method.

    Args:
        lines: x (budgets, lines, choices + 1).
    """
    counts = torch.arange(lines.shape[-1], dtype=lines.dtype)
    low, high, price = torch.zeros_like(start), torch.full_like(start, math.inf), start
    tolerance = _PRICE_TOLERANCE * keep.clamp_min(1)
    for _ in range(_PRICE_STEPS):
        shares = (lines - price[:, None, None] * counts).softmax(-1)
        mean = (shares * counts).sum(-1)
        excess = mean.sum(1) - keep
        low, high = torch.where(excess > 0, price, low), torch.where(excess > 0, high, price)
        if bool(((excess.abs() <= tolerance) | (high == 0)).all()):
            break
        rate = ((shares * counts.square()).sum(-1) - mean.square()).sum(1)
        newton = price + excess / rate
        middle = torch.where(high.isinf(), 2 * price + 1, (low + high) / 2)
        inside = newton.isfinite() & (newton > low) & (newton < high)
        price = torch.where(inside, newton, torch.where((newton <= 0) & (low == 0), 0.0, middle))
    terms = (lines - price[:, None, None] * counts).logsumexp(-1)
    return price, float(terms.double().sum() + (price * keep).double().sum())


def most_gained(lines: Tensor, keep: Tensor) -> Tensor:
    """A bound of the largest sum of one gain of each line, of c choices at the place c; (budgets,), or (lines,).

    The least over prices l of sum_lines max_c (x_c - l c) + l keep, by bisection; any l gives a bound.
    """
    if not len(keep):
        return lines[..., 0].flatten()
    counts = torch.arange(lines.shape[-1], dtype=lines.dtype)
    low = torch.zeros(len(lines), dtype=lines.dtype)
    high = lines.amax((1, 2)).clamp_min(torch.finfo(lines.dtype).tiny)
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        above = (lines - price[:, None, None] * counts).argmax(-1).sum(1) > keep
        low, high = torch.where(above, price, low), torch.where(above, high, price)
    totals = [(lines - price[:, None, None] * counts).amax(-1).sum(1) + price * keep for price in (low, high)]
    return torch.minimum(*totals)


def largest_blocks(
    hessian: Tensor, weights: Tensor, columns: Tensor, start: Tensor, barriers: tuple[float, ...]
) -> Tensor:
    """argmax_D sum_blocks <C, D> + mu (log det(A - D) + log det D), for a falling sequence of mu, block by block.

    With K = (A - D)^-1 and T = K_bb^-1 + D_b, the supremum of the block, its best value X satisfies
    C / mu + X^-1 = (T - X)^-1: in coordinates where T is the identity, X and C have the same eigenvectors, and
    eigenvalues x and c / mu with c / mu + 1 / x = 1 / (1 - x). A step costs a product of (in, b) with (b, in).

    Args:
        hessian: A (in, in), positive definite, with a diagonal of about 1.
        weights: C (blocks, b, b), symmetric; what is negative counts as 0.
        columns: (blocks, b).
        start: D (blocks, b, b), inside.
    """
    mean = weights.diagonal(dim1=-2, dim2=-1).mean()
    blocks, rest = start.clone(), hessian.clone()
    identity = torch.eye(columns.shape[1], dtype=hessian.dtype)
    rest[columns[:, :, None], columns[:, None, :]] -= start
    for barrier in barriers:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(rest))
        for _ in range(_SWEEPS):
            for i, place in enumerate(columns):
                across = inverse[:, place]
                most = torch.linalg.inv(across[place]) + blocks[i]
                root = torch.linalg.cholesky((most + most.T) / 2)
                scaled = root.T @ (weights[i] / (mean * barrier)) @ root
                c, vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
                c = c.clamp_min(0)
                x = 2 / (2 - c + (4 + c * c).sqrt())  # the root in (1/2, 1) of c x^2 + (2 - c) x = 1
                best = root @ (vectors * x) @ vectors.T @ root.T
                change = (best + best.T) / 2 - blocks[i]
                inverse += across @ torch.linalg.solve(identity - change @ across[place], change) @ across.T
                blocks[i] += change
                rest[place[:, None], place] -= change
    return blocks
