"""Layer reconstruction: keep the outputs of one linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from admm_prune.kernels import precision, quadratic
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.gram import DEAD, check_gram, check_matrix, check_square, check_weight, dead_channels

# What served best on tokens that were not calibrated on: the ridge on drawn layers and the most of the real ones, the
# damping where a few channels outweigh all others and the rare ones are known from few tokens.
DEFAULT_RIDGE, DEFAULT_DAMPING = 0.03, 0.003
_ESCALATIONS = 8  # of a ridge too small to factor, each 10 x


class LayerReconstruction:
    """min_{V in C} ||X V^T - Y||_F^2 + tr((V - W) D (V - W)^T), D = ridge diag(H) + damping mean(diag H) I.

    Rows of V (out, in) share the Hessian A = H + D, with H = X^T X. The target is the layer's own output, Y = X W^T,
    or, with `cross_gram` = X0^T X, the output that the weights W gave on other inputs, Y = X0 W^T; then everything
    goes on as if W were (W X0^T X + W D) A^-1, the unconstrained minimum. The ridge pulls to W, never to zero.

    A channel whose H_jj vanishes is *dead*: it is cut out of H and weighs next to nothing, so that it is pruned first
    and keeps W where the constraint forces it to be kept.

    Args:
        weight: W (out, in), any float dtype; computed with in the dtype of the Gram.
        gram: H (in, in), float32 or float64, undamped.
        constraint: the sparse set C.
        ridge: relative to diag(H), so that scaling a channel changes nothing.
        damping: relative to mean(diag H), as published for SparseGPT (0.01).
        cross_gram: X0^T X (in, in).
        correlation: Y^T X (out, in), in place of `cross_gram`.
        target_energy: ||Y||_F^2; needed with either.

    Raises:
        ValueError: wrong shapes; NaN or Inf; a Gram that is not symmetric or has a negative diagonal; a negative ridge;
            two targets, or one without its energy.

    Attributes:
        token_weights: of a subclass that weighs tokens, sum_t s_t |x_t V^T - y_t|^2: from inputs (n, in) the
            weights s_t >= 0 (n,), a static method. Whoever takes the Gram asks it.

    Sources: Frantar and Alistarh, SparseGPT, 2023; Meng et al., ALPS, 2024. The normal form is ours.
    """

    token_weights: ClassVar[Callable[[Tensor], Tensor] | None] = None

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        constraint: Constraint,
        *,
        ridge: float = DEFAULT_RIDGE,
        damping: float = 0.0,
        cross_gram: Tensor | None = None,
        correlation: Tensor | None = None,
        target_energy: float | None = None,
    ) -> None:
        check_weight(weight)
        check_gram("gram", gram, weight.shape[1])
        if cross_gram is not None:
            check_square("cross_gram", cross_gram, weight.shape[1])
        if correlation is not None:
            check_matrix("correlation", correlation, (weight.shape[0], weight.shape[1]))
        if cross_gram is not None and correlation is not None:
            raise ValueError("cross_gram and correlation both name a target: give one of them")
        if target_energy is None and (cross_gram is not None or correlation is not None):
            given = "correlation" if cross_gram is None else "cross_gram"
            raise ValueError(f"{given} needs target_energy, the squared norm of the target, beside it")
        if ridge < 0 or damping < 0:
            raise ValueError(f"ridge and damping must not be negative: {ridge}, {damping}")
        self.constraint = constraint
        self.weight = weight.detach().to(gram.dtype)
        self.gram = gram.detach()
        self.ridge, self.damping = ridge, damping
        self.cross_gram, self.correlation, self.target_energy = cross_gram, correlation, target_energy
        self.dead = dead_channels(gram)
        self.notes: tuple[str, ...] = ()
        if bool(self.dead.any()):
            self.notes += (f"{int(self.dead.sum())} of {len(gram)} input channels are dead: pruned first",)
        self._ensure_positive_definite()

    @property
    def hessian(self) -> Tensor:
        """A = H + ridge diag(H) + damping mean(diag H) I (in, in), dead channels cut out.

        A new tensor at each access: a solver that is short of memory lets it go between two uses.
        """
        hessian = self.gram.clone()
        diagonal = hessian.diagonal()
        diagonal += self.ridge * diagonal + self.damping * diagonal.mean()
        if bool(self.dead.any()):
            hessian[self.dead] = 0
            hessian[:, self.dead] = 0
            alive = self.gram.diagonal()[~self.dead]
            diagonal[self.dead] = float(alive.median()) * DEAD if len(alive) else 1.0
        return hessian

    @cached_property
    @precision.full()
    def minimizer(self) -> Tensor:
        """The minimum without the constraint (out, in): W itself unless the target came from other inputs."""
        target = self._target
        if target is None:
            return self.weight
        target = target.masked_fill(self.dead, 0) + self.weight * self._anchor
        return torch.cholesky_solve(target.T, torch.linalg.cholesky(self.hessian)).T.contiguous()

    @property
    def linear(self) -> Tensor:
        """G = minimizer A (out, in)."""
        return self.minimizer @ self.hessian

    @cached_property
    def curvature(self) -> float:
        return float(self.hessian.diagonal().double().mean())

    def initial(self) -> Point:
        return Point(weight=self.weight)

    def value(self, x: Point) -> float:
        """tr((V - W') A (V - W')^T) + the value at W', the unconstrained minimum, in float64."""
        return quadratic.energy(x["weight"], self.hessian, self.minimizer) + self._least

    def prox(self, v: Point, rho: float) -> Point:
        """argmin_x f(x) + r |x - v|^2 = W' + r (v - W') (A + r I)^-1, r = rho * curvature."""
        strength = rho * self.curvature
        shifted = self.hessian
        shifted.diagonal().add_(strength)
        away = (v["weight"] - self.minimizer) * strength
        return Point(weight=self.minimizer + torch.cholesky_solve(away.T, torch.linalg.cholesky(shifted)).T)

    def refit(self, mask: Point) -> Point:
        """The least-squares weights on a support, by Cholesky, in Jacobi-scaled coordinates."""
        scaled, scale = quadratic.unit_diagonal_(self.hessian)
        return Point(weight=quadratic.minimize_on_support(scaled, self.minimizer * scale, mask["weight"]) / scale)

    def relative_error(self, x: Point, gram: Tensor | None = None) -> float:
        """||X V^T - Y||^2 / ||Y||^2, undamped, in float64: tr((V-W) H (V-W)^T) / tr(W H W^T) for its own outputs.

        Args:
            gram: another H (in, in), such as that of held-out tokens; only for the layer's own outputs.

        Raises:
            ValueError: another Gram with another target.
        """
        v = x["weight"]
        target = self._target
        if target is None:
            h = self.gram if gram is None else gram
            energy = quadratic.energy(self.weight, h)
            error = quadratic.energy(v, h, self.weight)
            return error / energy if energy > 0 else 0.0
        if gram is not None or self.target_energy is None:
            raise ValueError("an error on other tokens needs their target too")
        energy = quadratic.energy(v, self.gram) - 2 * quadratic.inner(v, target) + self.target_energy
        return energy / self.target_energy if self.target_energy > 0 else 0.0

    @cached_property
    def _least(self) -> float:
        """The value at the unconstrained minimum: 0 for the layer's own target."""
        if self.target_energy is None:
            return 0.0
        anchored = float((self.weight.double().square().sum(0) * self._anchor.double()).sum())
        return self.target_energy + anchored - quadratic.energy(self.minimizer, self.hessian)

    @property
    def _target(self) -> Tensor | None:
        """Y^T X (out, in); None for the layer's own output, X W^T."""
        if self.cross_gram is not None:
            return self.weight @ self.cross_gram.to(self.gram.dtype)
        return None if self.correlation is None else self.correlation.to(self.gram.dtype)

    @property
    def _anchor(self) -> Tensor:
        """The diagonal of D (in,); all of A_jj where channel j is dead."""
        diagonal = self.hessian.diagonal()
        return torch.where(self.dead, diagonal, diagonal - self.gram.diagonal())

    def _ensure_positive_definite(self) -> None:
        """Raises a ridge that is too small for the Gram's precision, and says so in `notes`."""
        if self.ridge + self.damping >= 1e-3:  # more than rounding can take from a unit diagonal
            return
        asked = self.ridge
        for _ in range(_ESCALATIONS):
            scaled, _ = quadratic.unit_diagonal_(self.hessian)
            _, failed = torch.linalg.cholesky_ex(scaled)
            if not int(failed):
                break
            self.ridge = max(10 * self.ridge, 10 * torch.finfo(self.gram.dtype).eps)
        if self.ridge != asked:
            self.notes += (f"the Gram is singular with ridge {asked:g}: raised to {self.ridge:g}",)
