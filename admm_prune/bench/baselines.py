"""Baselines written from the published descriptions, and the device's measured ceilings.

They follow the papers, not the authors' code, and leave out the optimizations of our own solvers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import SupportConstraint

_CHECK, _ITERATIONS, _LEAST = 3, 300, 30
RATES = ("float64", "float32", "bfloat16", "bfloat16x3")


@dataclass(frozen=True)
class Solution:
    """Pruned weights (out, in), and the iterations taken."""

    weight: Tensor
    iterations: int


@precision.full()
def alps(
    weight: Tensor,
    gram: Tensor,
    constraint: SupportConstraint,
    *,
    refit: int = 10,
    dtype: torch.dtype = torch.float64,
) -> Solution:
    """ALPS, in one dtype throughout, without TF32: one eigendecomposition, two products and a sort per iteration.

    H <- H + 0.01 mean(diag H) I, scaled to a unit diagonal; then V <- (G + rho (D - U)) (H + rho I)^-1, Z <- V + U,
    D <- P(Z), U <- Z - D, rho raised by 1.3, 1.2 or 1.1 every 3 iterations as the support changed by more than 10 %,
    0.5 % or at all, until it is stable; then conjugate gradients on the support.

    Source: Meng et al., ALPS, 2024, sections 3 and 4.
    """
    h, w = gram.to(dtype), weight.to(dtype)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    scale = h.diagonal().sqrt()
    h, w = h / scale / scale[:, None], w * scale
    target = w @ h
    values, vectors = torch.linalg.eigh(h)
    values = values.clamp_min(0.0)
    rho, dual, d = 0.1, torch.zeros_like(w), w.clone()
    support = _select(constraint, d)
    d = d * support
    checked = support
    iteration = 0
    inverse = (vectors / (values + rho)) @ vectors.T
    while iteration < _ITERATIONS:
        v = (target + rho * (d - dual)) @ inverse
        z = v + dual
        support = _select(constraint, z)
        d = z * support
        dual = z - d
        iteration += 1
        if iteration % _CHECK == 0:
            changed = int((support != checked).sum()) / max(1, int(support.sum()))
            checked = support
            if changed == 0 or (iteration >= _LEAST and changed < 3e-4):
                break
            factor = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            rho, dual = rho * factor, dual / factor
            inverse = (vectors / (values + rho)) @ vectors.T
    d = _conjugate_gradients(d, h, target, support, refit)
    return Solution(d / scale, iteration)


def sparsegpt(
    weight: Tensor, gram: Tensor, *, sparsity: float = 0.5, pattern: tuple[int, int] | None = None, block: int = 128
) -> Solution:
    """SparseGPT column by column, in float32: three factorizations, a mask for every block, a product after it.

    Source: Frantar and Alistarh, SparseGPT, 2023, algorithm 1; damping 0.01 mean(diag H).
    """
    w, h = weight.float().clone(), gram.float().clone()
    rows, width = w.shape
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, width, block):
        stop = min(start + block, width)
        part, errors = w[:, start:stop].clone(), torch.zeros(rows, stop - start, device=w.device)
        factor = u[start:stop, start:stop]
        diagonal = factor.diagonal()
        drop = torch.zeros_like(part, dtype=torch.bool)
        if pattern is None:
            score = (part / diagonal).square()
            level = score.flatten().sort().values[min(int(sparsity * score.numel()), score.numel() - 1)]
            drop = score <= level
        for j in range(stop - start):
            if pattern is not None and j % pattern[1] == 0:
                n, m = pattern
                score = (part[:, j : j + m] / diagonal[j : j + m]).square()
                drop[:, j : j + m] = torch.zeros_like(score, dtype=torch.bool).scatter_(
                    1, score.topk(m - n, dim=1, largest=False).indices, True
                )
            pruned = part[:, j].masked_fill(drop[:, j], 0.0)
            error = (part[:, j] - pruned) / diagonal[j]
            part[:, j:] -= error[:, None] @ factor[j : j + 1, j:]
            part[:, j] = pruned
            errors[:, j] = error
        w[:, start:stop] = part
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return Solution(w, width)


def _select(constraint: SupportConstraint, z: Tensor) -> Tensor:
    """The support by a full sort where one budget covers all; by the constraint itself otherwise."""
    sparsity = getattr(constraint, "sparsity", None)
    if constraint.group_width > 1 or sparsity is None:
        return constraint.select(Point(weight=z.abs()))["weight"]
    keep = round((1.0 - sparsity) * z.numel())
    mask = torch.zeros(z.numel(), dtype=torch.bool, device=z.device)
    mask[z.abs().flatten().sort(descending=True).indices[:keep]] = True
    return mask.view_as(z)


def _conjugate_gradients(d: Tensor, h: Tensor, target: Tensor, support: Tensor, iterations: int) -> Tensor:
    d = d.clone()
    tiny = torch.finfo(d.dtype).tiny
    residual = (target - d @ h) * support
    direction, squared = residual.clone(), residual.square().sum()
    for _ in range(iterations):
        product = (direction @ h) * support
        alpha = squared / (direction * product).sum().clamp_min(tiny)
        d += alpha * direction
        residual -= alpha * product
        before, squared = squared, residual.square().sum()
        direction = residual + squared / before.clamp_min(tiny) * direction
    return d


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, *, repeats: int = 5, warm_up: int = 1) -> float:
    """The median time of a call, the device idle before and after."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times)


@dataclass(frozen=True)
class Work:
    """The least work possible: operations by the precision of their products, and bytes read or written."""

    operations: dict[str, float]
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        names = {**self.operations, **other.operations}
        sums = {name: self.operations.get(name, 0.0) + other.operations.get(name, 0.0) for name in names}
        return Work(sums, self.moved + other.moved)

    def __mul__(self, times: float) -> Work:
        return Work({name: times * n for name, n in self.operations.items()}, times * self.moved)


@dataclass(frozen=True)
class Ceilings:
    """Operations per second by precision; bytes per second read, and copied (read and written)."""

    operations: dict[str, float]
    read: float
    copied: float

    def floor(self, work: Work) -> float:
        """Seconds: the larger of operations and bytes at their ceilings; the two are assumed to overlap."""
        computing = sum(n / self.operations[name] for name, n in work.operations.items())
        return max(computing, work.moved / self.copied)

    def bound(self, work: Work) -> str:
        """Which of the two is the larger."""
        computing = sum(n / self.operations[name] for name, n in work.operations.items())
        return "operations" if computing >= work.moved / self.copied else "bytes"


@precision.full()
def measured(device: torch.device, *, width: int, entries: int) -> Ceilings:
    """From square products of `width`, and from reading and copying `entries` float32 numbers, that no cache holds."""
    operations = {}
    for name in RATES:
        dtype = torch.float64 if name == "float64" else torch.float32
        a, b, out = (torch.rand(width, width, dtype=dtype, device=device) for _ in range(3))
        if name == "bfloat16":
            half, other = a.bfloat16(), b.bfloat16()
            spent = seconds_of(lambda x=half, y=other: x @ y, device)  # type: ignore[misc]
        else:
            ready = precision.prepared(b, "bfloat16x3" if name == "bfloat16x3" else "exact")
            spent = seconds_of(lambda x=a, y=ready, z=out: precision.multiply(x, y, out=z), device)  # type: ignore[misc]
        operations[name] = 2 * width**3 / spent
    source = torch.rand(entries, device=device)
    target = torch.empty_like(source)
    read = 4 * entries / seconds_of(source.sum, device)
    copied = 8 * entries / seconds_of(lambda: target.copy_(source), device)
    return Ceilings(operations, read, copied)
