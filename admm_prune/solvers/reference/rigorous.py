"""Lower bounds that hold in exact arithmetic, from float64 computations and bounds on their rounding errors.

What is bounded: f(V) = tr((V - M) A (V - M)^T) + f(M), with the entries of the tensors `hessian` A and `minimizer` M as
they are stored, whatever their dtype, and the number `value(M)`; every V of the set, in exact arithmetic.

Notation: u = 2^-53, gamma_k = k u / (1 - k u). An inner product of k terms, in any order, with or without fused
multiply-adds, has an error of at most gamma_k times the sum of the magnitudes (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, section 3.1). Scaling is by powers of two and rounds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

UNIT = 2.0**-53
UNDERFLOW = 1e-290  # more than all products of O(1) numbers lose by underflow together
_EXACT_WIDTH = 48  # up to which definiteness is decided in integers where float64 cannot


def gamma(k: int) -> float:
    """k u / (1 - k u)."""
    return k * UNIT / (1 - k * UNIT)


@dataclass(frozen=True, eq=False)
class Form:
    """A quadratic form v^T A v, scaled so that its diagonal D lies in [1/2, 2).

    Args:
        hessian: A (n, n), float64, symmetric.
        doubt: e with |x^T (A' - A) y| <= e |x|_D |y|_D for the intended A'; not 0 where the given matrix differs from
            its transpose.
    """

    hessian: Array
    doubt: float = 0.0

    @property
    def width(self) -> int:
        return len(self.hessian)

    @property
    def diagonal(self) -> Array:
        return np.array(self.hessian.diagonal(), dtype=np.float64)

    @cached_property
    def inverse(self) -> Array:
        """K = A^-1 (n, n), exactly symmetric, up to `inverse_error`."""
        factor = torch.linalg.cholesky(torch.from_numpy(self.hessian))
        inverse: Array = torch.cholesky_inverse(factor).numpy()
        return np.asarray((inverse + inverse.T) / 2, dtype=np.float64)

    @cached_property
    def least(self) -> float:
        """l >= 0 with v^T A' v >= l v^T D v for every v; 0 where none above it is proved."""
        return max(0.0, least_eigenvalue(self.hessian, self.diagonal) - self.doubt)

    @cached_property
    def definite(self) -> bool:
        """Whether A' is proved to be positive definite."""
        if self.least > 0:
            return True
        return self.doubt == 0 and self.width <= _EXACT_WIDTH and _definite_in_integers(self.hessian)

    @cached_property
    def inverse_error(self) -> float:
        """h with (1 - h) A'^-1 <= K <= (1 + h) A'^-1 in the order of symmetric matrices; inf where A' may be singular.

        With A' K = I + E, K - A'^-1 = A'^-1 E, and A'^(1/2) (K - A'^-1) A'^(1/2) = A'^(-1/2) E A'^(1/2) is symmetric
        and similar to E: its norm is the spectral radius of E, at most |E|_F. E is computed from one product, of which
        rounding takes at most gamma_(n+1) (|A| |K| + I).
        """
        if self.least == 0:
            return math.inf
        n = self.width
        excess = self.hessian @ self.inverse
        excess[np.diag_indices(n)] -= 1
        sizes = _norm(self.hessian) * _norm(self.inverse)
        error = _norm(excess) + gamma(n + 1) * (sizes + math.sqrt(n)) + 2 * self.doubt * _norm(self.inverse)
        return error * (1 + gamma(n * n + 8))

    @cached_property
    def inverse_least(self) -> float:
        """l with K >= l diag(K), K as computed; 0 where none above it is proved."""
        return max(0.0, least_eigenvalue(self.inverse, self.inverse.diagonal()))

    @cached_property
    def inverse_spread(self) -> float:
        """t with K <= t diag(K), K as computed."""
        return -least_eigenvalue(-self.inverse, self.inverse.diagonal())

    @property
    def elimination_error(self) -> float:
        """A relative error that no loss(R) computed by eliminating R from K, one entry after the other, exceeds; with n
        the width and l = `inverse_least`, h + 32 n^2 u / l, or inf.

        Elimination without pivoting is exact for K + dK with |dK_ij| <= 4 n u sqrt(K_ii K_jj), as of Cholesky (Higham,
        theorem 10.3), which in the order of symmetric matrices is a relative change of K_RR by 4 n^2 u / l. A pivot row
        changes an entry j of w by K_ji w_i / K_ii, at most sqrt(K_jj loss(R)), and w_j^2 itself is at most
        K_jj loss(R) where j is still to be removed: so w has an error of 4 n u sqrt(K_jj loss(R)), and loss(R) a
        relative one of 8 n^2 u / l. The costs of pairs, 1 - c^2 >= l in their denominators, add 20 u / l, the proofs
        of eigenvalues 2 n^2 u, and the sums 4 n u.
        """
        if self.inverse_least == 0:
            return math.inf
        return self.inverse_error + 32 * self.width**2 * UNIT / self.inverse_least


def scaled_form(hessian: Array) -> tuple[Form, NDArray[np.int64]]:
    """(the form of A, exponents k (n,)): A = diag(2^k) (scaled A) diag(2^k), exactly.

    A matrix A that is not symmetric stands for any one between A and A^T.

    Args:
        hessian: A (n, n), finite, with a positive diagonal.
    """
    fraction_exponents = np.frexp(hessian.diagonal())[1].astype(np.int64)
    exponents = fraction_exponents // 2
    scaled = np.ldexp(hessian, (-exponents - exponents[:, None]).astype(np.int32))
    skew = np.abs(scaled - scaled.T)
    if not skew.any():
        return Form(np.asarray(scaled, dtype=np.float64)), exponents
    symmetric = scaled / 2 + scaled.T / 2
    doubt = (_norm(skew) + 2 * UNIT * _norm(symmetric)) * 2 * (1 + gamma(len(scaled) ** 2 + 8))  # D >= 1/2
    return Form(np.asarray(symmetric, dtype=np.float64), doubt), exponents


def least_eigenvalue(matrix: Array, diagonal: Array) -> float:
    """l with v^T M v >= l v^T D v for every v, just below the least eigenvalue of D^-1/2 M D^-1/2; -inf without proof.

    M - m D is proved semidefinite up to rounding by its Cholesky factorization, for an m a little below the computed
    eigenvalue: one that runs to its end factors a matrix within gamma_(n+1) / (1 - gamma_(n+1)) sqrt(m_ii m_jj) of it
    (Higham, theorem 10.5, after Demmel), m_ii its diagonal, which takes n times as much from l.

    Args:
        matrix: M (n, n), symmetric.
        diagonal: D > 0 (n,).
    """
    n = len(matrix)
    root = np.sqrt(diagonal)
    with np.errstate(all="ignore"):
        relative = matrix / root / root[:, None]
    if not np.isfinite(relative).all():
        return -math.inf
    guess = float(torch.linalg.eigvalsh(torch.from_numpy(relative))[0])
    rounding = n * gamma(n + 1) / (1 - gamma(n + 1))
    largest = float((np.abs(matrix.diagonal()) / diagonal).max())
    step = max(1e-9 * abs(guess), 2 * rounding * largest)
    best = -math.inf
    for shift in (guess - step, guess / 2 if guess > 0 else 2 * guess - step):
        shifted = matrix.copy()
        shifted[np.diag_indices(n)] -= shift * diagonal
        _, failed = torch.linalg.cholesky_ex(torch.from_numpy(shifted))
        if not int(failed):
            room = float((shifted.diagonal() / diagonal).max()) * (1 + 4 * UNIT)
            lost = rounding * room * (1 + 8 * UNIT) + 4 * UNIT * (largest + abs(shift)) + UNDERFLOW
            best = max(best, math.nextafter(shift - lost, -math.inf))
            if best > 0:
                return best
    return best


def _definite_in_integers(matrix: Array) -> bool:
    """Whether a symmetric matrix is positive definite: its leading minors, by fraction-free elimination (Bareiss)."""
    entries = [[Fraction(x) for x in row] for row in matrix.tolist()]
    common = max(x.denominator for row in entries for x in row)  # powers of two
    rows = [[int(x * common) for x in row] for row in entries]
    before = 1
    for k, top in enumerate(rows):
        if top[k] <= 0:
            return False
        for row in rows[k + 1 :]:
            row[k + 1 :] = [
                (x * top[k] - row[k] * y) // before for x, y in zip(row[k + 1 :], top[k + 1 :], strict=True)
            ]
        before = top[k]
    return True


def refit_steps(form: Form, target: Array, supports: Mask) -> Array:
    """v - w for the least squares v on each support (m, n), all of one size: -w_R and A_SS^-1 A_SR w_R.

    Args:
        target: w (m, n) or (n,).
        supports: (m, n).
    """
    target = np.broadcast_to(target, supports.shape)
    steps = np.where(supports, 0.0, -target)
    size = int(supports[0].sum())
    if size == 0:
        return steps
    inside = np.nonzero(supports)[1].reshape(len(supports), size)
    blocks = form.hessian[inside[:, :, None], inside[:, None, :]]
    pull = np.take_along_axis(steps @ form.hessian, inside, 1)
    try:
        solved = np.linalg.solve(blocks, -pull[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        solved = (np.linalg.pinv(blocks, hermitian=True) @ -pull[:, :, None])[:, :, 0]
    np.put_along_axis(steps, inside, solved, 1)
    return steps


def least_losses(form: Form, target: Array, supports: Mask, steps: Array) -> tuple[Array, Array]:
    """(loss, bound): the least of L^2 = (v - w)^T A (v - w) over the v that vanish on R, and a proved lower bound (m,).

    For any p with p_R = -w_R, q = A p and r = q_S, convexity gives, S being where v is free,

        L^2 >= 2 q^T (v - w) - p^T q = b + 2 r^T (v - w)_S,    b = q_R^T p_R - q_S^T p_S,

    where |r^T (v - w)_S| <= L t, t^2 = sum_S r_j^2 / D_jj / l with A >= l D. So L >= b / (sqrt(b + t^2) + t). At the
    least squares b is the loss itself and r rounding: the bound does not depend on how p was computed.
    Rounding: q has an error of gamma_n |p| |A|, b one of less than gamma_(3n+8) |p| |A| |p|^T.

    Args:
        target: w (m, n) or (n,); the results are in units of w^2.
        supports: S (m, n).
        steps: p (m, n), from `refit_steps`; where it is not finite the bound is 0.
    """
    n = form.width
    target = np.broadcast_to(target, supports.shape)
    with np.errstate(all="ignore"):
        exponent = np.frexp(np.abs(steps).max(1))[1]  # no power of it overflows or underflows then
        p = np.ldexp(steps, -exponent[:, None])
        q, sizes = p @ form.hessian, np.abs(p) @ np.abs(form.hessian)
        long = form.doubt * (p * p * form.diagonal).sum(1) * (1 + gamma(n + 8))
        value = np.where(supports, -q * p, q * p).sum(1)
        b = value - gamma(3 * n + 8) * (sizes * np.abs(p)).sum(1) - long - UNDERFLOW
        residual = np.where(supports, np.abs(q) + gamma(2 * n + 4) * sizes, 0.0)
        t = np.sqrt((residual * residual / form.diagonal).sum(1))
        t = (t + np.sqrt(form.doubt * long) + UNDERFLOW) * (1 + gamma(n + 16)) / math.sqrt(form.least or math.nan)
        free = supports.any(1)
        t = np.where(free, t, 0.0)
        b = np.maximum(b, 0.0)
        root = b / (np.sqrt(b + t * t) + t)
        bound = np.where(b > 0, root * root * (1 - gamma(16)), 0.0)
        bound = np.where(np.isfinite(bound) & (bound > 0), bound, 0.0)
        exact = np.ldexp(bound, 2 * exponent)
        exact = np.where(exact < np.finfo(np.float64).tiny, 0.0, exact)
        losses = np.ldexp(np.maximum(value, 0.0), 2 * exponent)
    return np.where(np.isnan(losses), np.inf, losses), np.where(np.isfinite(exact), exact, 0.0)


@dataclass(frozen=True, eq=False)
class Floor:
    """f(M), and what is known of its rounding and of that of M.

    Args:
        value: as computed.
        residual: R = M A - G (out, n), scaled as A^-1, bounded entry by entry; None where M is the minimum exactly.
        energies: the magnitudes that `value` is a sum of; 0 where it is exact.
    """

    value: float
    residual: Array | None = None
    energies: float = 0.0


def total_bound(form: Form, floor: Floor, loss: float) -> float | None:
    """A lower bound of f where the losses of the rows are proved to add up to at least `loss`; None without a proof.

    f(V) = f(M) + |V - M|_A^2 + 2 <V - M, R> >= f(M) + (|V - M|_A - P)^2 - P^2, P^2 = sum R_ij^2 / D_jj / l being at
    least |R|_(A^-1)^2. f(M) as computed is off by at most gamma_(2k+2n+16) times its magnitudes, k = out n.
    """
    if not form.definite or not math.isfinite(loss):
        return None
    if floor.residual is None and floor.energies == 0 and 0 in (floor.value, loss):
        return floor.value + loss
    with np.errstate(all="ignore"):
        squared = 0.0
        if floor.residual is not None and floor.residual.any():
            sizes = np.square(floor.residual) / form.diagonal
            squared = float(sizes.sum()) * (1 + gamma(sizes.size + 8)) / form.least if form.least > 0 else math.inf
        terms = 1 if floor.residual is None else floor.residual.size
        doubt = gamma(2 * terms + 2 * form.width + 16) * floor.energies
        left = max(0.0, math.sqrt(loss) * (1 - 2 * UNIT) - math.sqrt(squared) * (1 + 2 * UNIT))
        bound = floor.value - doubt - squared + left * left * (1 - 4 * UNIT)
        bound -= 4 * UNIT * (abs(floor.value) + doubt + squared + loss)
    return bound if math.isfinite(bound) else None


def rounded_down_sum(terms: list[float]) -> float:
    """A lower bound of the sum of terms that are not negative."""
    return math.fsum(terms) * (1 - 2 * UNIT)


def _norm(matrix: Array) -> float:
    """The Frobenius norm, rounded up."""
    return float(np.linalg.norm(matrix)) * (1 + gamma(matrix.size + 4))
