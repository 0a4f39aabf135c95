"""Quadratic forms of a shared Hessian, and exact least squares on a support."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.ops import backend, integer_energy
from admm_prune.ops import precision as products

_TILE, _TILE_ON_DEVICE = 256, 2048  # rows and columns converted to float64 at once
_GATHERED = 1 << 24  # entries of the gathered Hessians solved at once
_TRIANGLE = 128  # triangles of this width are inverted directly
_PANEL, _PANEL_ON_DEVICE = 512, 16384  # rows that go through all conjugate gradients together: bounds the work space
_PROBES = 4  # vectors that a factor is tried on
_UNCHECKED = 16  # iterations of conjugate gradients between convergence checks on a device


def energy(v: Tensor, hessian: Tensor, origin: Tensor | None = None) -> float:
    """tr(E A E^T) with E = V - W, for V and W (out, in), A (in, in) symmetric; W = 0 where no origin is given.

    In float64 whatever the dtypes, the difference too, in tiles of bounded memory. Of A only what is above the diagonal
    is multiplied, and counts twice: out in^2 operations. On GPUs that are slow in float64 the products are of integers,
    and the result is as accurate up to about 1e-9 (`integer_energy`), unless A is indefinite or an entry not finite.
    """
    if integer_energy.preferred(v, hessian):
        value = float(integer_energy.energy(v, hessian, origin))
        if not math.isnan(value):
            return value
    tile = _tile(v)
    total = torch.zeros((), dtype=torch.float64, device=v.device)
    for i, rows in enumerate(v.split(tile)):
        e = rows.double()
        if origin is not None:
            e = e - origin[i * tile : (i + 1) * tile].double()
        for start in range(0, len(hessian), tile):
            above = hessian[: start + tile, start : start + tile].to(torch.float64, copy=True)  # changed below
            above[:start] *= 2
            total += (e[:, : start + tile] @ above).mul_(e[:, start : start + tile]).sum()
    return float(total)


def inner(a: Tensor, b: Tensor) -> float:
    """<A, B> = sum_ij A_ij B_ij, in float64."""
    tile = _tile(a)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(tile), b.split(tile), strict=True):
        total += (x.double() * y.double()).sum()
    return float(total)


def bilinear(a: Tensor, matrix: Tensor, b: Tensor) -> tuple[float, float]:
    """(<A, B M>, <|A|, |B| |M|>) for A and B (out, in), M (in, in) of any kind: the sum, and that of its magnitudes.

    In float64, in tiles of bounded memory: 4 out in^2 operations.
    """
    tile = _tile(a)
    total, sizes = torch.zeros(2, dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(tile), b.split(tile), strict=True):
        right = right.double()
        for columns in (slice(start, start + tile) for start in range(0, len(matrix), tile)):
            part, some = matrix[:, columns].double(), left[:, columns].double()
            total += (right @ part).mul_(some).sum()
            sizes += (right.abs() @ part.abs()).mul_(some.abs()).sum()
    return float(total), float(sizes)


def _tile(x: Tensor) -> int:
    return _TILE_ON_DEVICE if backend.on_device(x) else _TILE


def unit_diagonal(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """As `unit_diagonal_`, in memory of its own."""
    return unit_diagonal_(hessian.clone())


def unit_diagonal_(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """S^-1 A S^-1, in the memory of A, and the diagonal of S = sqrt(diag A): Jacobi's scaling, in which v is v S."""
    scale = hessian.diagonal().sqrt()
    return hessian.div_(scale).div_(scale[:, None]), scale


def inverse_factor(hessian: Tensor) -> Tensor:
    """U upper triangular with A^-1 = U^T U, from one Cholesky factorization and one triangular inverse.

    Reversing rows and columns of A, factoring, and reversing back gives A = R R^T with R upper; U = R^-1.

    Raises:
        torch.linalg.LinAlgError: A is not positive definite in its own precision.
    """
    factor: Tensor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    _invert_upper(factor)
    return factor


def factor_residual(factor: Tensor, hessian: Tensor) -> float:
    """max_v |U A U^T v - v| / |v| over some vectors v of random signs: how far U^T U is from A^-1.

    In float64 whatever the dtypes, in tiles of bounded memory: 24 in^2 operations. Of a matrix E = U A U^T - I,
    |E v|^2 / |v|^2 is |E|_F^2 / in in the mean.

    Args:
        factor: U (in, in), upper triangular.
        hessian: A (in, in), symmetric.
    """
    signs = torch.randint(0, 2, (len(factor), _PROBES), generator=torch.Generator().manual_seed(0))
    v = signs.mul_(2).sub_(1).to(factor.device, torch.float64)
    tiles = [slice(start, start + _tile(factor)) for start in range(0, len(factor), _tile(factor))]
    y = torch.zeros_like(v)
    for rows in tiles:
        y += factor[rows].double().T @ v[rows]
    for matrix in (hessian, factor):
        y = torch.cat([matrix[rows].double() @ y for rows in tiles])
    largest = float(torch.linalg.vector_norm(y - v, dim=0).max())
    return largest / math.sqrt(len(factor))


def inverse(matrix: Tensor, failed: list[Tensor], precision: products.Precision = "exact") -> Tensor:
    """A^-1 by Cholesky, symmetric; the memory of A is used up. A (..., in, in) may be several.

    Args:
        failed: on a device, receives the failure flag for `check_factored`, which avoids a synchronization.
        precision: of the product that ends it there.

    Raises:
        torch.linalg.LinAlgError: on the CPU, where A is not positive definite in its own precision.
    """
    if not backend.on_device(matrix):
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    failed.append(info)
    _invert_upper(factor)
    # A = R^T R, so A^-1 = R^-1 R^-T: one product, where a solve against the identity would take its time in steps.
    return products.multiply(factor, products.prepared(factor.mT, precision), out=torch.empty_like(matrix))


def check_factored(failed: Sequence[Tensor]) -> None:
    """Raises torch.linalg.LinAlgError where one of the factorizations failed."""
    if failed and bool(torch.cat([one.view(-1) for one in failed]).any()):
        raise LinAlgError("the matrix is not positive definite in its own precision: raise the ridge")


def _invert_upper(factor: Tensor) -> None:
    """R <- R^-1 for R upper triangular, in place: halves by recursion, the corner by products.

    Costs a third of a triangular solve against the identity, which ignores the zeros of the right-hand side.
    """
    width = factor.shape[-1]
    blocks = 1 << max(0, -(-width // _TRIANGLE) - 1).bit_length()
    if blocks > 1 and width % blocks == 0 and factor.ndim == 2 and backend.on_device(factor):
        _invert_blocks(factor, width // blocks)
        return
    if width <= _TRIANGLE:
        identity = torch.eye(width, dtype=factor.dtype, device=factor.device)
        factor.copy_(torch.linalg.solve_triangular(factor, identity, upper=True))
        return
    half = width // 2
    upper, lower, corner = factor[..., :half, :half], factor[..., half:, half:], factor[..., :half, half:]
    _invert_upper(upper)
    _invert_upper(lower)
    corner.copy_(upper @ corner @ lower).neg_()


def _invert_blocks(factor: Tensor, size: int) -> None:
    """`_invert_upper` by batched products: a few launches for all blocks of one size on the diagonal."""
    down, across = factor.stride()

    def views(step: int, right: int, below: int) -> Tensor:
        """The blocks (count, size, size) that lie so far from every `step`-th entry of the diagonal."""
        place = factor.storage_offset() + right * across + below * down
        return factor.as_strided((len(factor) // step, size, size), (step * (down + across), down, across), place)

    diagonal, identity = views(size, 0, 0), torch.eye(size, dtype=factor.dtype, device=factor.device)
    diagonal.copy_(torch.linalg.solve_triangular(diagonal, identity, upper=True))
    while size < len(factor):
        corner = views(2 * size, size, 0)
        product = torch.bmm(views(2 * size, 0, 0), corner)
        corner.copy_(torch.baddbmm(product, product, views(2 * size, size, size), beta=0, alpha=-1))
        size *= 2


def minimize_on_support(hessian: Tensor, minimizer: Tensor, mask: Tensor) -> Tensor:
    """argmin_V tr((V - W) A (V - W)^T) over V that vanish where the mask is False, row by row, by Cholesky.

    With S the support of a row and R the rest, v_S = w_S + A_SS^-1 A_SR w_R. Rows of similar |S| are solved together,
    padded with the identity. Cost: about out |S|^3 / 3 operations after one product of W with A.

    Args:
        hessian: A (in, in), positive definite.
        minimizer: W (out, in).
        mask: (out, in), boolean.

    Raises:
        torch.linalg.LinAlgError: A_SS is not positive definite in its own precision.
    """
    correction = minimizer.masked_fill(mask, 0) @ hessian
    solution = minimizer.masked_fill(~mask, 0)
    sizes = mask.sum(1)
    order = sizes.argsort(stable=True)
    position = 0
    while position < len(order):
        smallest = max(int(sizes[order[position]]), 1)
        count = max(1, _GATHERED // smallest**2)
        rows = order[position : position + count]
        widest = int(sizes[rows[-1]])
        while count > 1 and count * widest**2 > 2 * _GATHERED:
            count //= 2
            rows = rows[:count]
            widest = int(sizes[rows[-1]])
        position += count
        if widest:
            _solve_rows(solution, correction, hessian, mask, rows, widest)
    return solution


def _solve_rows(solution: Tensor, correction: Tensor, hessian: Tensor, mask: Tensor, rows: Tensor, width: int) -> None:
    """Adds A_SS^-1 A_SR w_R to the given rows of the solution; every |S| is at most `width`."""
    row_masks = mask[rows]
    columns = row_masks.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    present = row_masks.gather(1, columns)
    both = present[:, :, None] & present[:, None, :]
    blocks = hessian[columns[:, :, None], columns[:, None, :]].masked_fill_(~both, 0)
    blocks.diagonal(dim1=1, dim2=2).masked_fill_(~present, 1)
    right = correction[rows].gather(1, columns).masked_fill_(~present, 0)
    step = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(blocks))[:, :, 0]
    solution[rows] = solution[rows].scatter_add(1, columns, step.masked_fill_(~present, 0))


def conjugate_gradient(
    system: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    mask: Tensor,
    inverse: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """Solves `system(v) = right` on the entries of a mask, preconditioned by a diagonal `inverse`.

    Stops at a residual of `tolerance` times the right-hand side, both in the norm of the preconditioner.
    """
    v = start.clone()
    residual = (right - system(v)).where(mask, 0)
    direction = residual * inverse
    squared = inner(residual, direction)
    limit = tolerance**2 * inner(right.where(mask, 0), right * inverse)
    for _ in range(max_iterations):
        if squared <= limit:
            break
        product = system(direction).where(mask, 0)
        curvature = inner(direction, product)
        if curvature <= 0:  # rounding: the residual is as small as it gets
            break
        v.add_(direction, alpha=squared / curvature)
        residual.add_(product, alpha=-squared / curvature)
        preconditioned = residual * inverse
        before, squared = squared, inner(residual, preconditioned)
        direction.mul_(squared / before).add_(preconditioned)
    return v


def conjugate_gradient_on_support_(
    v: Tensor, hessian: Tensor, minimizer: Tensor, mask: Tensor, *, tolerance: float, max_iterations: int
) -> tuple[int, float]:
    """The problem of `minimize_on_support` by conjugate gradients, in place, one product an iteration.

    Jacobi's preconditioner D = diag(A) makes it invariant to scaling a channel. A row stops when its residual on the
    support, |R|_(D^-1), is at most `tolerance` times |W|_D.

    Args:
        v: V (out, in), zero where the mask is False: the start, then the solution.

    Returns:
        The iterations done, and the largest relative residual of a row.
    """
    diagonal = hessian.diagonal()
    done, worst = 0, 0.0
    panel = _PANEL_ON_DEVICE if backend.on_device(v) else _PANEL
    for rows in (slice(i, i + panel) for i in range(0, len(v), panel)):  # rows are independent
        iterations, residual = _descend_conjugate_(
            v[rows], minimizer[rows], mask[rows], hessian, diagonal, tolerance, max_iterations
        )
        done, worst = max(done, iterations), max(worst, residual)
    return done, worst


def _descend_conjugate_(
    v: Tensor,
    minimizer: Tensor,
    mask: Tensor,
    hessian: Tensor,
    diagonal: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[int, float]:
    """Moves v (rows, in) in place; the iterations done and the largest relative residual."""
    residual = torch.mm(minimizer - v, hessian).mul_(mask)
    scale = (minimizer.square() @ diagonal).sqrt_()[:, None]
    floor = torch.finfo(v.dtype).tiny
    direction = residual / diagonal
    squared = (residual * direction).sum(1, keepdim=True)
    iteration = 0
    while iteration < max_iterations:
        active = squared.sqrt() > tolerance * scale
        if not (backend.on_device(v) and max_iterations <= _UNCHECKED) and not bool(active.any()):
            break
        iteration += 1
        product = torch.mm(direction, hessian).mul_(mask)
        curvature = (direction * product).sum(1, keepdim=True)
        alpha = (squared / curvature.clamp_min(floor)).masked_fill_(~active, 0)
        v.addcmul_(direction, alpha)
        residual.addcmul_(product, alpha, value=-1)
        preconditioned = torch.div(residual, diagonal, out=product)
        previous, squared = squared, (residual * preconditioned).sum(1, keepdim=True)
        direction.mul_(squared / previous.clamp_min(floor)).add_(preconditioned)
    return iteration, float((squared.sqrt() / scale.clamp_min(floor)).max())
