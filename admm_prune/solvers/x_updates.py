"""ADMM's minimization over the dense variable: argmin_x f(x) + rho |x - target|^2, in the solver's coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from admm_prune.kernels import quadratic
from admm_prune.point import Point
from admm_prune.problem import Proximable, Quadratic


class DenseUpdate(ABC):
    """The x-step. Its coordinates may differ from the problem's by a positive scaling of the entries."""

    @abstractmethod
    def origin(self) -> Point:
        """The unconstrained minimum, or the dense weights where that is not known."""

    @abstractmethod
    def prepare(self, rho: float) -> None:
        """Factors for this penalty."""

    @abstractmethod
    def minimize(self, target: Point) -> Point:
        """argmin_x f(x) + rho |x - target|^2; may overwrite `target`."""

    @abstractmethod
    def scaled(self, x: Point) -> Point:
        """From the problem's coordinates to these."""

    @abstractmethod
    def unscaled(self, x: Point) -> Point:
        """From these coordinates to the problem's."""


class QuadraticUpdate(DenseUpdate):
    """V = W + rho (T - W) (A + rho I)^-1 in Jacobi-scaled coordinates, where diag(A) = 1.

    One Cholesky inverse (in^3 operations) for each penalty, one product (2 out in^2) for each step. With W the
    unconstrained minimum, the linear term of f is never formed.
    """

    def __init__(self, problem: Quadratic) -> None:
        self._hessian = problem.hessian
        self._scale = problem.hessian.diagonal().sqrt()
        self._minimizer = problem.minimizer * self._scale
        self._inverse: Tensor | None = None
        self._rho = 0.0

    def origin(self) -> Point:
        return Point(weight=self._minimizer)

    def scaled_hessian(self) -> Tensor:
        """S^-1 A S^-1, with a unit diagonal."""
        return quadratic.unit_diagonal(self._hessian)[0]

    def prepare(self, rho: float) -> None:
        self._inverse = None  # frees its memory for the factorization
        shifted = self.scaled_hessian()
        shifted.diagonal().add_(rho)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted, out=shifted), out=shifted)
        self._rho = rho

    def minimize(self, target: Point) -> Point:
        if self._inverse is None:
            raise RuntimeError("prepare(rho) comes before minimize")
        away = target["weight"].sub_(self._minimizer)
        return Point(weight=torch.addmm(self._minimizer, away, self._inverse, alpha=self._rho))

    def scaled(self, x: Point) -> Point:
        return x.map(lambda v: v * self._scale)

    def unscaled(self, x: Point) -> Point:
        return x.map(lambda v: v / self._scale)


class ProximalUpdate(DenseUpdate):
    """The problem's own proximal operator, in its own coordinates; rho in units of its curvature."""

    def __init__(self, problem: Proximable) -> None:
        self._problem = problem
        self._rho = 0.0

    def origin(self) -> Point:
        return self._problem.initial()

    def prepare(self, rho: float) -> None:
        self._rho = rho

    def minimize(self, target: Point) -> Point:
        return self._problem.prox(target, self._rho)

    def scaled(self, x: Point) -> Point:
        return x

    def unscaled(self, x: Point) -> Point:
        return x
