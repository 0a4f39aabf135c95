"""The quadratic form tr(E A E^T) from products of integers, for devices that are slow in float64.

Most GPUs do a 32nd or a 64th of their float32 operations a second in float64, and many times those in 8-bit integers,
whose products and sums are exact. Numbers in [-1, 1] are sums of digits in [-64, 64],

    x = sum_k d_k 2^(1 - 7 k) + r,    |r| <= 2^(-7 s)    for k = 1, ..., s,

and a product of two such matrices is a sum of products of their digits, of which those with k + l <= s + 1 are formed.

Source: Ootomo, Ozaki, Yokota, DGEMM on integer matrix multiplication unit, 2024; the scheme is of Ozaki, Ogita, Oishi,
Rump, Error-free transformations of matrix multiplication, 2012.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.ops import backend

DIGITS = 5  # s
# int8 to int32, for which torch has no public function
_integer_product: Any = torch._int_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
_TILE = 2048  # rows and columns at once
_WHOLE = 32  # rows and columns come in multiples of it: tensor cores need 16, torch more than 16 rows
_NARROWEST = 1024  # rows and columns: below, launches and digits take more time than a product in float64
_LARGEST = 1.5  # of scaled entries of A
_INTEGER_RATE = (7, 5)  # the first compute capability with 8-bit integers on tensor cores


def preferred(v: Tensor, hessian: Tensor) -> bool:
    """Whether `energy` takes less time than products in float64: for large matrices, on devices slow in those."""
    if {v.dtype, hessian.dtype} != {torch.float32} or min(v.shape) < _NARROWEST or not backend.slow_in_float64(v):
        return False
    return not v.is_cuda or torch.cuda.get_device_capability(v.device) >= _INTEGER_RATE


def energy(v: Tensor, hessian: Tensor, origin: Tensor | None = None) -> Tensor:
    """tr(E A E^T) with E = V - W, a float64 scalar on the device; W = 0 where no origin is given. NaN where an entry is
    not finite, or one of A is so much larger than those on the diagonal that its digits do not fit into bytes.

    A is scaled to a diagonal between 1/2 and 2, and each row of E S to at most 1 by 1 / sigma_i, both by powers of two:
    the result is wrong by at most 13 in 2^(-7 s) sum_ij sigma_i |E S|_ij, and by far less where errors cancel. Costs 15
    products of integers with out in^2 products each, and O(out in) operations in float64.

    Args:
        v: V (out, in), of any float dtype.
        hessian: A (in, in), symmetric, positive semidefinite.
        origin: W (out, in).
    """
    diagonal = hessian.diagonal()
    scale = torch.exp2(torch.where(diagonal > 0, diagonal, 1).double().log2().div_(2).round_())  # S
    total = torch.zeros((), dtype=torch.float64, device=v.device)
    fits = torch.ones((), dtype=torch.bool, device=v.device)
    for columns in _tiles(len(hessian)):
        entries = hessian[columns] * (0.5 / scale[columns, None]).to(hessian) * (1 / scale).to(hessian)
        fits &= (entries.abs() < _LARGEST).all()  # at most 1 where A is semidefinite
    for rows in _tiles(len(v)):
        ours, w = v[rows], None if origin is None else origin[rows]
        largest = (_away(ours, w).abs() * scale).amax(1)
        sigma = torch.exp2(torch.frexp(largest).exponent.double())  # above the largest
        left = digits(ours, 1 / sigma, scale, w)
        for columns in _tiles(len(hessian)):
            # Rows of A in place of its columns: it is symmetric.
            right = digits(hessian[columns], 0.5 / scale[columns], 1 / scale, reverse=True)
            away = _away(ours[:, columns], None if w is None else w[:, columns]) * scale[columns]
            of_rows = (_product(left, right)[: len(away), : away.shape[1]] * away).sum(1)
            total += of_rows @ torch.where(largest.isfinite(), 2 * sigma, torch.nan)
    return torch.where(fits, total, torch.nan)


def digits(x: Tensor, rows: Tensor, columns: Tensor, origin: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """d_1, ..., d_s of numbers in [-1, 1], side by side, as int8: all operations are exact. Of numbers up to 1.5, d_1
    is up to 96.

    Args:
        x: (m, n); the numbers are those of x - origin, scaled.
        rows, columns: (m,) and (n,) float64, powers of two that scale rows and columns.
        origin: (m, n), of the same dtype.
        reverse: d_s first.

    Returns:
        (m', s n'), with zeros up to whole tiles of the tensor cores in rows and in the columns of every digit.
    """
    height, width = (-(-size // _WHOLE) * _WHOLE for size in x.shape)
    if backend.uses_triton(x, torch.float32):
        from admm_prune.ops.triton import integers as fused

        into = torch.empty(height, DIGITS * width, dtype=torch.int8, device=x.device)
        return fused.digits(x, rows, columns, origin, into, padded=width, reverse=reverse)
    left = _away(x, origin) * rows[:, None] * (64 * columns)
    separate = []
    for _ in range(DIGITS):
        digit = (left + 0.5).floor()
        separate.append(nn.functional.pad(digit.to(torch.int8), (0, width - x.shape[1], 0, height - len(x))))
        left = (left - digit).mul_(128)
    return torch.cat(separate[::-1] if reverse else separate, 1)


def _away(x: Tensor, origin: Tensor | None) -> Tensor:
    return x.double() if origin is None else x.double() - origin.double()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T (m, n) in float64, from digits [A_1, ..., A_s] and [B_s, ..., B_1]."""
    width = a.shape[1] // DIGITS
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for count in range(DIGITS, 0, -1):  # the smallest first: k + l = count + 1
        partners = b[:, (DIGITS - count) * width :]
        total.add_(_integer_product(a[:, : count * width], partners.T), alpha=2.0 ** (2 - 7 * (count + 1)))
    return total


def _tiles(size: int) -> list[slice]:
    return [slice(start, min(start + _TILE, size)) for start in range(0, size, _TILE)]
