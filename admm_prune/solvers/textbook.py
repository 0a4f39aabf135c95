"""Each algorithm as its paper writes it, in float64: the reference implementations of the tests, and code to read.

Nothing here is fast, damped or compact. Matrices are as in the rest of the package: a weight W (out, in), inputs X
(tokens, in), a Hessian A = X^T X (in, in); a layer computes X W^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Select = Callable[[Tensor], Tensor]  # scores, not negative -> the best admissible support, as booleans
Prune = Callable[[Tensor, Tensor], Tensor]  # a weight and its Hessian -> the pruned weight


def admm(weight: Tensor, hessian: Tensor, select: Select, rho: Sequence[float], relaxation: float = 1.0) -> Tensor:
    """min tr((X - W) A (X - W)^T) subject to X = D, D sparse, with the scaled dual variable U.

    Args:
        rho: the penalty of every iteration, in units of the diagonal of A.
        relaxation: a, 1 without over-relaxation.

    Source: Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024,
    section 3; Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011, section 3.
    """
    scale = hessian.double().diagonal().sqrt()
    A, W = hessian.double() / scale / scale[:, None], weight.double() * scale  # Jacobi-scaled: diag A = 1
    D, U, before = W * select(W.abs()), torch.zeros_like(W), rho[0]
    for r in rho:
        U, before = U * (before / r), r  # rho U, the multiplier itself, does not change with rho
        X = (W @ A + r * (D - U)) @ torch.linalg.inv(A + r * torch.eye(len(A)).to(A))
        Z = relaxation * X + (1 - relaxation) * D + U
        D = Z * select(Z.abs())
        U = Z - D
    return D / scale


def sparsegpt(weight: Tensor, hessian: Tensor, select: Callable[[Tensor, int], Tensor], block: int = 128) -> Tensor:
    """Prunes column after column; the error of each is compensated by the columns to its right:

        e_j = (w_j - m_j w_j) / U_jj,    W_{:, j:} <- W_{:, j:} - e_j U_{j, j:},    A^-1 = U^T U, U upper triangular.

    Args:
        select: (scores of a block of columns, its first column) -> its support; the score is w_ij^2 / U_jj^2.

    Source: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot, 2023,
    algorithm 1.
    """
    W = weight.double().clone()
    U = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    for start in range(0, W.shape[1], block):
        columns = slice(start, min(start + block, W.shape[1]))
        M = select((W[:, columns] / U.diagonal()[columns]).square(), start)
        for j, m in enumerate(M.T, start):
            e = torch.where(m, 0, W[:, j]) / U[j, j]
            W[:, j:] -= torch.outer(e, U[j, j:])
            W[~m, j] = 0  # exactly, not only up to rounding
    return W


def elsa(
    x: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    select: Select,
    rho: Callable[[float], float],
    *,
    steps: int,
    interval: int = 32,
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    first: int = 0,
    lagged: bool = True,
) -> tuple[Tensor, Tensor]:
    """min f(x) subject to x = z, z sparse, with the scaled dual variable u; the x-step is `interval` steps of Adam on

        f(x) + rho / 2 |x - z + u|^2,    then    z <- argmin over sparse z of |z - (x + u)|_F^2,    u <- x + u - z,

    where |y|_F^2 = sum F y^2 and F is Adam's second moment v, an estimate of the diagonal of the Fisher information: z
    keeps the entries of x + u with the largest |x + u| sqrt(F).

    Args:
        gradient: (x, step) -> a sample of the gradient of f; clipped to norm 1 before the penalty is added.
        rho: a function of the fraction of the run that is done.
        first: the step of the first update of z and u.
        lagged: as in the released code, u is rescaled to a new rho at the next update only, else at once.

    Returns:
        x and the support of z.

    Source: Lee et al., ELSA, arXiv 2510.01650, 2026; the order of clipping, penalty and updates is that of the released
    code.
    """
    x = x.double().clone()
    mask = select(x.abs())
    z, u = x * mask, torch.zeros_like(x)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    r = last = rho(0.0)
    lag = 1.0
    for t in range(steps):
        g = gradient(x, t)
        g = g * min(1.0, 1.0 / (float(g.norm()) + 1e-6)) + r * (x - z + u)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g.square()
        step = lr / (1 - betas[0] ** (t + 1))
        x = x - step * m / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
        if t >= first and (t - first) % interval == 0:
            a = x + lag * u
            mask = select(a.abs() * v.sqrt())
            z, u = a * mask, a * ~mask
            r = rho(t / steps)
            factor = last / r if r else 1.0
            last = r or last
            lag, u = (factor, u) if lagged else (1.0, u * factor)
    return x, mask


def sparsellm(
    X: Tensor, Y: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, prune: Prune, rounds: int
) -> tuple[Tensor, Tensor]:
    """min |X W1^T + b1 - Z|^2 + |P - relu(Z)|^2 + |P W2^T + b2 - Y|^2 over sparse W1, W2 and free Z, P, in turns.

    Args:
        X, Y: inputs and targets of the feed-forward network (tokens, in), (tokens, out).
        W1, b1, W2, b2: its dense weights and biases, W1 (hidden, in), W2 (out, hidden).

    Returns:
        The pruned W1 and W2 of the last round.

    Source: Bai et al., SparseLLM: Towards Global Pruning of Pre-trained Language Models, 2024, section 3.2, eq. 5 to 9,
    with alpha = beta = gamma. The paper writes tokens as columns.
    """
    Z = X @ W1.T + b1
    P = Z.relu()
    for _ in range(rounds):
        W1 = prune(torch.linalg.lstsq(X, Z - b1).solution.T, X.T @ X)
        W2 = prune(torch.linalg.lstsq(P, Y - b2).solution.T, P.T @ P)
        P = ((Y - b2) @ W2 + Z.relu()) @ torch.linalg.inv(W2.T @ W2 + torch.eye(len(W2.T)).to(W2))
        # Entry by entry Z minimizes (z - m)^2 + (p - relu(z))^2: the better one of its minima over z <= 0 and z >= 0.
        M = X @ W1.T + b1
        below, above = M.clamp(max=0), ((M + P) / 2).clamp(min=0)
        Z = torch.where(_penalties(above, M, P) <= _penalties(below, M, P), above, below)
    return W1, W2


def _penalties(Z: Tensor, M: Tensor, P: Tensor) -> Tensor:
    return (Z - M).square() + (P - Z.relu()).square()
