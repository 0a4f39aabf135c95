"""Groups of columns of a quadratic form: their interactions, their elimination one after the other, least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.ops.quadratic import unit_diagonal, unit_diagonal_

_DIGITS = 1e3  # (condition number) x (rounding) is to stay below its inverse


@dataclass(frozen=True)
class Elimination:
    """Groups in the order of their removal, and the increase of f after each, with the others refitted.

    Attributes:
        order: (count,), indices of groups.
        losses: (count,), float64, nondecreasing.
        escalated: the Hessian's own precision was not enough; float64 was used.
    """

    order: Tensor
    losses: Tensor
    escalated: bool = False


def columns_of(groups: Tensor, width: int) -> Tensor:
    """The columns of some groups of `width` consecutive ones, in the order of the groups."""
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


def interactions(hessian: Tensor, minimizer: Tensor, width: int) -> Tensor:
    """Q_gh = sum over i in g, j in h of (V^T V)_ij A_ij: zeroing a set R of groups costs sum_{g,h in R} Q_gh.

    Args:
        hessian: A (in, in).
        minimizer: V (out, in).
        width: columns of a group.

    Returns:
        (groups, groups), float64, symmetric positive semidefinite.
    """
    product = (minimizer.T @ minimizer).mul_(hessian).double()
    count = len(product) // width
    return product.view(count, width, count, width).sum((1, 3))


def minimize_on_columns(hessian: Tensor, minimizer: Tensor, mask: Tensor) -> Tensor:
    """argmin_V tr((V - W) A (V - W)^T) over V that vanish outside of some columns S: V_S = W_S + W_R A_RS A_SS^-1.

    One Cholesky factorization for all rows, Jacobi-scaled.

    Args:
        hessian: A (in, in), positive definite.
        minimizer: W (out, in).
        mask: (in,), boolean: the columns S.

    Raises:
        torch.linalg.LinAlgError: A_SS is not positive definite in its own precision.
    """
    inside, outside = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
    solution = torch.zeros_like(minimizer)
    if len(inside) == 0:
        return solution
    block, scale = unit_diagonal_(hessian[inside][:, inside])
    right = (minimizer[:, outside] @ hessian[outside][:, inside]) / scale
    factor = torch.linalg.cholesky(block)
    solution[:, inside] = minimizer[:, inside] + torch.cholesky_solve(right.T, factor).T / scale
    return solution


def eliminate(hessian: Tensor, minimizer: Tensor, width: int, count: int, batch: int) -> Elimination:
    """Removes `count` groups of columns, each time those whose removal costs least, with the others refitted exactly:

        dE(R) = tr(V_R (K_RR)^-1 V_R^T),   V <- V - V_R (K_RR)^-1 K_R:,   K <- K - K_:R (K_RR)^-1 K_R:,   K = A^-1.

    Scores are of single groups, and renewed after every `batch` removals. Within a batch the groups are removed in the
    order of their scores; with K_RR = L L^T the losses of all prefixes are the column norms of V_R L^-T, and exact.

    Args:
        hessian: A (in, in), positive definite.
        minimizer: V (out, in).
        width: columns of a group; divides in.
        count: groups to remove.
        batch: groups removed between two updates of the scores; all of them for a one-shot choice.

    Raises:
        torch.linalg.LinAlgError: A is singular up to rounding, in float64 too.
    """
    try:
        return _eliminate(hessian, minimizer, width, count, batch)
    except LinAlgError:
        if hessian.dtype is torch.float64:
            raise
        elimination = _eliminate(hessian.double(), minimizer.double(), width, count, batch)
        return Elimination(elimination.order, elimination.losses, escalated=True)


def _eliminate(hessian: Tensor, minimizer: Tensor, width: int, count: int, batch: int) -> Elimination:
    inverse, scale = unit_diagonal(hessian)
    factor = torch.linalg.cholesky(inverse)
    if float(factor.diagonal().amin()) ** 2 < _DIGITS * torch.finfo(factor.dtype).eps:  # at most 1 / condition number
        raise LinAlgError("too few digits to invert the Hessian")
    inverse = torch.cholesky_inverse(factor)
    v = minimizer * scale
    gone = torch.zeros(len(inverse) // width, dtype=torch.bool, device=v.device)
    order: list[int] = []
    rises: list[Tensor] = []
    while len(order) < count:
        scores = _scores(inverse, v, width, gone)
        # kthvalue and topk break ties arbitrarily; a stable sort removes the higher index first.
        ranked = len(gone) - 1 - scores.flip(0).argsort(stable=True)
        groups = ranked[: min(batch, count - len(order))]
        columns = columns_of(groups, width)
        factor = torch.linalg.cholesky(inverse[columns][:, columns])
        answer = torch.linalg.solve_triangular(factor, v[:, columns].T, upper=False)  # L^-1 V_R^T
        rises.append(answer.double().square().sum(1).view(-1, width).sum(1))
        order += groups.tolist()
        if len(order) == count:  # the scores are not needed again
            break
        spread = torch.linalg.solve_triangular(factor, inverse[columns], upper=False)  # L^-1 K_R:
        v.addmm_(answer.T, spread, alpha=-1)
        inverse.addmm_(spread.T, spread, alpha=-1)
        gone[groups] = True
        inverse[columns], inverse[:, columns], v[:, columns] = 0, 0, 0
    device = v.device
    losses = torch.cat(rises).cumsum(0) if rises else torch.zeros(0, dtype=torch.float64, device=device)
    return Elimination(torch.tensor(order, dtype=torch.long, device=device), losses)


def _scores(inverse: Tensor, v: Tensor, width: int, gone: Tensor) -> Tensor:
    """tr(V_g (K_gg)^-1 V_g^T) of every group; infinite for removed groups."""
    if width == 1:
        scores = v.square().sum(0) / inverse.diagonal()
    else:
        count = len(gone)
        at = torch.arange(count, device=v.device)
        blocks = inverse.view(count, width, count, width)[at, :, at]
        blocks[gone] = torch.eye(width, dtype=v.dtype, device=v.device)
        factors = torch.linalg.cholesky(blocks)
        sides = v.T.reshape(count, width, -1)
        scores = torch.linalg.solve_triangular(factors, sides, upper=False).square().sum((1, 2))
    scores[gone] = torch.inf
    if bool(torch.isnan(scores).any()) or bool((scores < 0).any()):
        raise LinAlgError("the inverse Hessian lost its positive diagonal")
    return scores
