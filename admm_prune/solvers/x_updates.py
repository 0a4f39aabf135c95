"""ADMM's minimization over the dense variable: argmin_x f(x) + rho |x - target|_D^2, in the metric D of the solve."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Proximable, Quadratic

_PANEL = 512  # rows converted to bfloat16 at once


class DenseUpdate(ABC):
    """The x-step, and the diagonal metric D that ADMM measures distances in: |x|_D^2 = sum_i D_i x_i^2."""

    @abstractmethod
    def origin(self) -> Point:
        """The unconstrained minimum, or the dense weights where that is not known."""

    @abstractmethod
    def weighed(self, x: Point, out: Point) -> Point:
        """x_i sqrt(D_i), into `out`, which may be x."""

    @abstractmethod
    def prepare(self, rho: float, *, fast: bool = False) -> None:
        """Factors for this penalty; `fast` where half the digits will do."""

    @abstractmethod
    def release(self) -> None:
        """Gives up memory that `minimize` would make again."""

    @abstractmethod
    def minimize(self, target: Point, out: Point) -> Point:
        """argmin_x f(x) + rho |x - target|_D^2; may overwrite `target` and write into `out`."""


class QuadraticUpdate(DenseUpdate):
    """V = W + (T - W) M with M = rho D (A + rho D)^-1 and D = diag(A), which makes scaling a channel change nothing.

    One Cholesky inverse (in^3 operations) for each penalty, one product (2 out in^2) for each step. With W the
    unconstrained minimum, the linear term of f is never formed. A fast step multiplies in bfloat16, where the device
    does so in less time: M and T - W are rounded to 8 bits, V - W with them, W itself is not.
    """

    def __init__(self, problem: Quadratic) -> None:
        self._problem = problem
        self._minimizer = problem.minimizer
        self._metric = problem.hessian.diagonal().clone()
        self._root = self._metric.sqrt()
        self._operator: Tensor | None = None
        self._dtype = self._metric.dtype  # of the operator
        self._rho = 0.0

    def origin(self) -> Point:
        return Point(weight=self._minimizer)

    def weighed(self, x: Point, out: Point) -> Point:
        torch.mul(x["weight"], self._root, out=out["weight"])
        return out

    def prepare(self, rho: float, *, fast: bool = False) -> None:
        self._rho = rho
        exact = self._metric.dtype
        half = fast and exact is torch.float32 and multiplies_bfloat16(self._metric.device)
        self._dtype = torch.bfloat16 if half else exact
        self._factorize()

    def release(self) -> None:
        self._operator = None

    def minimize(self, target: Point, out: Point) -> Point:
        operator = self._factorize() if self._operator is None else self._operator
        away, x = target["weight"].sub_(self._minimizer), out["weight"]
        if operator.dtype is away.dtype:
            torch.mm(away, operator, out=x)
        else:
            for rows, panel in zip(x.split(_PANEL), away.split(_PANEL), strict=True):
                rows.copy_(panel.to(operator) @ operator)
        x.add_(self._minimizer)
        return out

    def _factorize(self) -> Tensor:
        self._operator = None  # frees its memory for the factorization
        metric = self._metric * self._rho
        # LAPACK reads columns: a symmetric matrix and its transpose are one, and no copy has to turn it round.
        matrix = self._problem.hessian.clone().mT
        matrix.diagonal().add_(metric)
        matrix = torch.linalg.cholesky(matrix)
        matrix = torch.cholesky_inverse(matrix)
        self._operator = matrix.mT.mul_(metric[:, None]).to(self._dtype)
        return self._operator


class ProximalUpdate(DenseUpdate):
    """The problem's own proximal operator, with D = 1; rho in units of its curvature."""

    def __init__(self, problem: Proximable) -> None:
        self._problem = problem
        self._rho = 0.0

    def origin(self) -> Point:
        return self._problem.initial()

    def weighed(self, x: Point, out: Point) -> Point:
        return out.copy_(x)

    def prepare(self, rho: float, *, fast: bool = False) -> None:
        self._rho = rho

    def release(self) -> None:
        pass

    def minimize(self, target: Point, out: Point) -> Point:
        return self._problem.prox(target, self._rho)


def multiplies_bfloat16(device: torch.device) -> bool:
    """True where products in bfloat16 take a fraction of the time of those in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(bool(features.get(name)) for name in ("avx512_bf16", "amx_bf16"))
