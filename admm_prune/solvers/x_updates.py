"""ADMM's minimization over the dense variable: argmin_x f(x) + rho |x - target|_D^2, in the metric D of the solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from admm_prune.ops import backend, quadratic
from admm_prune.ops import precision as products
from admm_prune.point import Point
from admm_prune.problem import Proximable, Quadratic


class DenseUpdate(ABC):
    """The x-step, and the diagonal metric D that ADMM measures distances in: |x|_D^2 = sum_i D_i x_i^2.

    Attributes:
        offset: subtracted from the target before `minimize`, and missing from its result; empty for nothing.
        root: sqrt(D), one number for each column; empty for D = 1.
    """

    offset: Point
    root: Point

    @property
    def form(self) -> products.Precision:
        """The form in which `minimize` multiplies its target, which may be given in it."""
        return "exact"

    @abstractmethod
    def origin(self) -> Point:
        """The unconstrained minimum, or the dense weights if it is not known."""

    @property
    def place(self) -> object:
        """The addresses that `minimize` reads beside its arguments: a new value means that they have changed; None
        that they are unknown, or that `minimize` does not write into `out`."""
        return None

    @abstractmethod
    def prepare(self, rho: float, *, fast: bool = False, in_place: bool = False) -> None:
        """Factors for this penalty.

        Args:
            fast: half the digits are sufficient.
            in_place: reuse the memory of the last penalty's factors, if the shapes agree.
        """

    @abstractmethod
    def release(self) -> None:
        """Frees memory that `minimize` would allocate again."""

    @abstractmethod
    def minimize(self, target: Point, out: Point) -> Point:
        """argmin_x f(x) + rho |x - target|_D^2, both less the offset; may overwrite `target` and write into `out`.

        Args:
            target: itself, or as `form` says.
        """

    def unchecked(self) -> list[Tensor]:
        """Flags of errors that occurred on a device since the last call, to be read and given to `check`."""
        return []

    def check(self, flags: Sequence[Tensor] | None = None) -> None:  # noqa: B027  # optional
        """Raises the errors of flags that were read; by default of all flags, which it waits for."""


class QuadraticUpdate(DenseUpdate):
    """V = W + (T - W) M with M = rho D (A + rho D)^-1 and D = diag(A), which makes it invariant to scaling a channel.

    One Cholesky inverse (in^3 operations) for each penalty, one product (2 out in^2) for each step. With W the
    unconstrained minimum, the linear term of f is never formed. A fast step multiplies in bfloat16, if the device
    is faster in it: M and T - W are rounded to 8 bits, V - W with them, W itself is not. On CUDA the other steps
    multiply in three bfloat16 products, which leaves 16 bits.

    Several problems of one shape are taken together: their rows stacked (problems * out, in), D (problems, in), M
    (problems, in, in).
    """

    def __init__(self, *problems: Quadratic) -> None:
        self.problems = problems
        minimizers = [problem.minimizer for problem in problems]
        metrics = [problem.hessian.diagonal() for problem in problems]
        self._minimizer = minimizers[0] if len(problems) == 1 else torch.cat(minimizers)
        self._metric = metrics[0].clone() if len(problems) == 1 else torch.stack(metrics)
        self.offset = Point(weight=self._minimizer)
        self.root = Point(weight=self._metric.sqrt())
        self._operator: Tensor | None = None
        self._precision: products.Precision = "exact"  # of the products
        self._split: products.Precision = "exact"  # of products in float32 elsewhere
        self._rho = 0.0
        self._failed: list[Tensor] = []

    def origin(self) -> Point:
        return Point(weight=self._minimizer)

    @property
    def form(self) -> products.Precision:
        return self._precision

    @property
    def place(self) -> object:
        return None if self._operator is None else self._operator.data_ptr()

    def prepare(self, rho: float, *, fast: bool = False, in_place: bool = False) -> None:
        self._rho = rho
        before = self._operator if in_place else None
        self._precision = self._split = "bfloat16x3" if splits_products(self._metric) else "exact"
        if fast and self._metric.dtype is torch.float32 and multiplies_bfloat16(self._metric.device):
            self._precision = "bfloat16"
        made = self._factorize()
        if before is not None and (before.shape, before.dtype) == (made.shape, made.dtype):
            self._operator = before.copy_(made)

    def release(self) -> None:
        self._operator = None

    def minimize(self, target: Point, out: Point) -> Point:
        operator = self._factorize() if self._operator is None else self._operator
        x, into = target["weight"], out["weight"]
        if operator.ndim == 3:
            x, into = (y.view(len(operator), -1, y.shape[1]) for y in (x, into))
        products.multiply(x, operator, out=into)
        return out

    def continue_as(self, other: QuadraticUpdate) -> None:
        """Takes over the state of another one, of the same problem or of a batch that contains it."""
        self._rho, self._precision, self._split = other._rho, other._precision, other._split

    def unchecked(self) -> list[Tensor]:
        failed, self._failed = self._failed, []
        return failed

    def check(self, flags: Sequence[Tensor] | None = None) -> None:
        quadratic.check_factored(self.unchecked() if flags is None else flags)

    def _factorize(self) -> Tensor:
        self._operator = None  # frees its memory for the factorization
        metric = self._metric * self._rho
        one, *more = self.problems
        # LAPACK is column-major: a symmetric matrix equals its transpose, so that no transposed copy is needed.
        matrix = (torch.stack([problem.hessian for problem in self.problems]) if more else one.hessian.clone()).mT
        matrix.diagonal(dim1=-2, dim2=-1).add_(metric)
        matrix = quadratic.inverse(matrix, self._failed, self._split)
        self._operator = products.prepared(matrix.mT.mul_(metric[..., None]), self._precision)
        return self._operator


class ProximalUpdate(DenseUpdate):
    """The problem's own proximal operator, with D = 1; rho in units of its curvature."""

    def __init__(self, problem: Proximable) -> None:
        self._problem = problem
        self._rho = 0.0
        self.offset, self.root = Point(), Point()

    def origin(self) -> Point:
        return self._problem.initial()

    def prepare(self, rho: float, *, fast: bool = False, in_place: bool = False) -> None:
        self._rho = rho

    def release(self) -> None:
        pass

    def minimize(self, target: Point, out: Point) -> Point:
        return self._problem.prox(target, self._rho)


def splits_products(x: Tensor) -> bool:
    """True where three products in bfloat16 take less time than one in float32."""
    return x.dtype is torch.float32 and backend.on_device(x) and (not x.is_cuda or multiplies_bfloat16(x.device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """True where products in bfloat16 take a fraction of the time of those in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(bool(features.get(name)) for name in ("avx512_bf16", "amx_bf16"))
