"""Layer reconstruction: keep the outputs of one linear layer.

Where several processes hold a part of the tokens each, sums over tokens are sums over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from admm_prune.ops import precision, quadratic
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.statistics import DEAD, check_gram, check_matrix, check_square, check_weight, dead_channels, symmetric

# The best settings on held-out tokens: the ridge on synthetic and most real layers, the damping where a few channels
# dominate and the others are estimated from few tokens.
DEFAULT_RIDGE, DEFAULT_DAMPING = 0.03, 0.003
_ROUNDINGS = 32.0  # of an entry of a Gram: when it was stored, and in a blocked sum over thousands of tokens
_SAFE_RIDGE = 1e-3  # of a unit diagonal: more than rounding can take from it
_LARGEST_RAISED = 1.0  # a ridge that is too small to factor is raised tenfold, up to here
AllReduce = Callable[[Tensor], Tensor]  # a tensor -> its sum over all processes, in place


class LayerReconstruction:
    """min_{V in C} ||X V^T - Y||_F^2 + tr((V - W) D (V - W)^T), D = ridge diag(H) + damping mean(diag H) I.

    Rows of V (out, in) share the Hessian A = H + D, with H = X^T X. The target is the layer's own output, Y = X W^T,
    or, with `cross_gram` = X0^T X, the output that the weights W gave on other inputs, Y = X0 W^T; the problem is then
    the same with W replaced by (W X0^T X + W D) A^-1, the unconstrained minimum. The ridge pulls towards W, not towards
    zero.

    All is computed with A as the tensor `hessian` holds it, D added in the dtype of the Gram: `value`, every
    solver and every bound refer to this problem.

    A channel whose H_jj vanishes is *dead*: it is removed from H and gets a tiny weight, so that it is pruned first,
    and keeps the value of W where the constraint forces it to be kept.

    Args:
        weight: W (out, in), any float dtype; computed with in the dtype of the Gram.
        gram: H (in, in), float32 or float64, undamped; (H + H^T) / 2 where it differs from its transpose by rounding.
        constraint: the sparse set C.
        ridge: relative to diag(H), so that scaling a channel changes nothing.
        damping: relative to mean(diag H), as published for SparseGPT (0.01).
        cross_gram: X0^T X (in, in).
        correlation: Y^T X (out, in), in place of `cross_gram`.
        target_energy: ||Y||_F^2; needed with either, without meaning otherwise.

    Raises:
        ValueError: wrong shapes; NaN or Inf; a Gram that is not symmetric, has a negative diagonal or is far from
            positive semidefinite; a ridge, damping or energy that is negative or not finite; two targets, or one
            without its energy.

    Attributes:
        token_weights: of a subclass that weights tokens, sum_t s_t |x_t V^T - y_t|^2: a static method, called while the
            Gram is accumulated, from inputs (n, in), and a `TokenContext` if it has a second parameter, to the weights
            s_t >= 0 (n,). The weight of a token must not depend on the other tokens of the call.
        needs_outputs: the context has the outputs of the matrix: no two matrices then share a Gram.
        token_scores: a static method, from logits (m, V) of the model before it is pruned, in float32, and the tokens
            that follow (m,), to scores (m,): computed once, for the context.

    Sources: Frantar and Alistarh, SparseGPT, 2023; Meng et al., ALPS, 2024. The normal form is ours.
    """

    token_weights: ClassVar[Callable[..., Tensor] | None] = None
    needs_outputs: ClassVar[bool] = False
    token_scores: ClassVar[Callable[[Tensor, Tensor], Tensor] | None] = None

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
            raise ValueError("cross_gram and correlation both define a target: give one of them")
        if target_energy is None and (cross_gram is not None or correlation is not None):
            given = "correlation" if cross_gram is None else "cross_gram"
            raise ValueError(f"{given} needs target_energy, the squared norm of the target, beside it")
        if not all(0 <= number < math.inf for number in (ridge, damping)):
            raise ValueError(f"ridge and damping must be finite and not negative: {ridge}, {damping}")
        self.constraint = constraint
        self.weight = weight.detach().to(gram.dtype)
        self.gram = symmetric(gram.detach())
        self.ridge, self.damping = ridge, damping
        self.cross_gram = None if cross_gram is None else cross_gram.detach().to(gram.dtype)
        self.correlation = None if correlation is None else correlation.detach().to(gram.dtype)
        self.target_energy = None if cross_gram is None and correlation is None else target_energy
        if self.target_energy is not None and not 0 <= self.target_energy < math.inf:
            raise ValueError(
                f"target_energy {self.target_energy:g} is not the squared norm of the target: it must be finite and "
                "not negative"
            )
        self.dead = dead_channels(gram)
        self.notes: tuple[str, ...] = ()
        self._any_dead = bool(self.dead.any())  # once: on a device the host waits for it
        if self._any_dead:
            self.notes += (f"{int(self.dead.sum())} of {len(gram)} input channels are dead: pruned first",)
        self._ensure_positive_definite()

    @property
    def hessian(self) -> Tensor:
        """A = H + ridge diag(H) + damping mean(diag H) I (in, in), dead channels cut out.

        A new tensor at each access, so that a solver can free it between two uses.
        """
        hessian = self.gram.clone()
        diagonal = hessian.diagonal()
        added = self.ridge * diagonal
        diagonal += added + self.damping * diagonal.mean() if self.damping else added
        if self._any_dead:
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
        scaled, scale = quadratic.unit_diagonal_(self.hessian)
        factor = torch.linalg.cholesky(scaled)
        return (torch.cholesky_solve((target / scale).T, factor).T / scale).contiguous()

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

    def value_and_gradient(self, x: Point) -> tuple[float, Point]:
        """The value and its gradient 2 (V - W') A."""
        return self.value(x), Point(weight=2 * (x["weight"] - self.minimizer) @ self.hessian)

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

        For another target it is <V, V H> - 2 <V, Y^T X> + ||Y||^2, a difference of energies. The rounding of the
        tensors may leave it negative where V reproduces the target: it is 0 then, as long as 32 eps of the Gram's dtype
        times the magnitudes that are added up explain it. Where the target is zero, an error beyond such rounding is
        infinite.

        Args:
            gram: another H (in, in), such as that of held-out tokens; only for the layer's own outputs.

        Raises:
            ValueError: another Gram with another target; a negative error that rounding does not explain, where the
                Gram is not positive semidefinite or target_energy is not ||Y||^2.
        """
        v = x["weight"]
        if self.target_energy is None:
            h = self.gram if gram is None else gram
            energy = quadratic.energy(self.weight, h)
            error = quadratic.energy(v, h, self.weight)
            if error < 0 and error < -_ROUNDINGS * torch.finfo(h.dtype).eps * self._magnitudes(v - self.weight, h):
                raise ValueError("gram is not positive semidefinite: it is not X^T X")
            if energy <= 0:
                return _relative_to_nothing(error, h.dtype, self._magnitudes(v - self.weight, h))
            return max(error, 0.0) / energy  # in this order NaN stays NaN
        if gram is not None:
            raise ValueError("an error on other tokens needs their target too")
        whole = self.target_energy
        output_energy = quadratic.energy(v, self.gram)
        shared, sizes = self._correlated(v)
        error = output_energy - 2 * shared + whole
        if error < 0:
            sizes = self._magnitudes(v, self.gram) + 2 * sizes + whole
            if error < -_ROUNDINGS * torch.finfo(self.gram.dtype).eps * sizes:
                raise ValueError(
                    f"target_energy {whole:g} is not the squared norm of the target: some weights would have a squared "
                    f"error of {error:g}; take it, the Gram and the cross_gram from the same tokens, in float64"
                )
        if whole <= 0:
            return _relative_to_nothing(error, self.gram.dtype, self._magnitudes(v, self.gram) + 2 * sizes)
        return max(error, 0.0) / whole

    def minimizer_residual(self) -> tuple[Tensor, Tensor, float] | None:
        """(W' A - G (out, in), the magnitudes that it adds up (out, in), those of the value at W'), in float64.

        For another target only, whose W' comes from a solve and is rounded; None for the layer's own. Dense in float64:
        for the references.
        """
        if self.target_energy is None:
            return None
        w, m, anchor = self.weight.double(), self.minimizer.double(), self._anchor.double()
        alive = (~self.dead).double()
        if self.correlation is None:
            assert self.cross_gram is not None
            cross = self.cross_gram.double() * alive
            target, sizes = w @ cross, w.abs() @ cross.abs()
        else:
            target = self.correlation.double() * alive
            sizes = target.abs()
        hessian = self.hessian.double()
        residual = m @ hessian - (target + w * anchor)
        sizes = sizes + w.abs() * anchor
        product = m.abs() @ hessian.abs()
        energies = self.target_energy + float((w.square() * anchor).sum() + (m.abs() * (2 * sizes + product)).sum())
        return residual, sizes + product, energies

    def _magnitudes(self, e: Tensor, gram: Tensor) -> float:
        """tr(|E| |H| |E|^T): the scale of the rounding errors of a Gram."""
        return quadratic.bilinear(e, gram, e)[1]

    def _correlated(self, v: Tensor) -> tuple[float, float]:
        """(<V, Y^T X>, the magnitudes that it adds up), in float64 from the tensors as stored."""
        if self.correlation is not None:
            return quadratic.inner(v, self.correlation), quadratic.inner(v.abs(), self.correlation.abs())
        assert self.cross_gram is not None
        return quadratic.bilinear(v, self.cross_gram, self.weight)

    @cached_property
    def _least(self) -> float:
        """The value at the unconstrained minimum W': 0 for the layer's own target.

        <W', W' A> - 2 <W', G> + ||Y||^2 + tr(W D W^T), which an error of W' changes in second order only.
        """
        if self.target_energy is None:
            return 0.0
        anchor = self._anchor
        anchored = quadratic.inner(self.weight.double().square(), anchor.expand_as(self.weight))
        anchored -= 2 * quadratic.inner(self.minimizer.double() * self.weight.double(), anchor.expand_as(self.weight))
        shared, _ = self._correlated(self.minimizer.masked_fill(self.dead, 0))
        return self.target_energy + anchored - 2 * shared + quadratic.energy(self.minimizer, self.hessian)

    @property
    def _target(self) -> Tensor | None:
        """Y^T X (out, in); None for the layer's own output, X W^T."""
        if self.cross_gram is not None:
            return self.weight @ self.cross_gram
        return self.correlation

    @property
    def _anchor(self) -> Tensor:
        """The diagonal of D (in,); all of A_jj where channel j is dead."""
        diagonal = self.hessian.diagonal()
        return torch.where(self.dead, diagonal, diagonal - self.gram.diagonal())

    def _ensure_positive_definite(self) -> None:
        """Raises a ridge that is too small for the Gram's precision, and says so in `notes`."""
        if self._least_added() >= _SAFE_RIDGE:
            return
        requested = self.ridge
        while True:
            scaled, _ = quadratic.unit_diagonal_(self.hessian)
            _, failed = torch.linalg.cholesky_ex(scaled)
            if not int(failed):
                break
            raised = max(10 * self.ridge, 10 * torch.finfo(self.gram.dtype).eps)
            if raised > _LARGEST_RAISED:
                raise ValueError(
                    f"gram is not positive semidefinite, even with a ridge of {self.ridge:g}: compute it as X^T X"
                )
            self.ridge = raised
        if self.ridge != requested:
            self.notes += (f"the Gram is singular with ridge {requested:g}: raised to {self.ridge:g}",)

    def _least_added(self) -> float:
        """The least that ridge and damping add to an entry of the diagonal, relative to that entry."""
        if self.ridge >= _SAFE_RIDGE or not self.damping:
            return self.ridge
        diagonal = self.gram.diagonal().double()
        largest = float(diagonal.max())
        return self.ridge + (self.damping * float(diagonal.mean()) / largest if largest > 0 else 0.0)


def _relative_to_nothing(error: float, dtype: torch.dtype, sizes: float) -> float:
    """The relative error where the target is zero: 0 if rounding of the magnitudes explains it, else infinite."""
    return 0.0 if error <= _ROUNDINGS * torch.finfo(dtype).eps * sizes else math.inf


def single_process(values: Tensor) -> Tensor:
    """The sum over one process: the values themselves."""
    return values


@dataclass(frozen=True)
class Share:
    """The tokens of this process. All processes compute sums in the same order.

    Attributes:
        count: tokens of all processes.
        places: (n,) ascending, positions of this process's tokens among all; None if it has all.
        all_reduce: sums a tensor over the processes, in place.
        lengths: of the sequences that this process's tokens belong to, one after the other; None for a single one.
    """

    count: int
    places: Tensor | None = None
    all_reduce: AllReduce = single_process
    lengths: Sequence[int] | None = None

    def every(self, stride: int) -> slice | Tensor:
        """The local tokens at positions 0, stride, 2 stride, ..."""
        if self.places is None:
            return slice(None, None, stride)
        return (self.places % stride == 0).nonzero()[:, 0]

    def taken(self, values: Tensor, places: Tensor) -> Tensor:
        """The values of the tokens at these positions, in their order, on every process.

        Args:
            values: (n, ...), of this process's tokens.
        """
        if self.places is None:
            return values[places]
        local_indices = self._local_index[places]
        is_local = local_indices >= 0
        rows = values.new_zeros(len(places), *values.shape[1:])
        rows[is_local] = values[local_indices[is_local]]
        return self.all_reduce(rows)

    @cached_property
    def _local_index(self) -> Tensor:
        """(count,) the local index of the token at each position; -1 if it is not local."""
        assert self.places is not None
        index = torch.full((self.count,), -1, device=self.places.device)
        index[self.places] = torch.arange(len(self.places), device=self.places.device)
        return index
