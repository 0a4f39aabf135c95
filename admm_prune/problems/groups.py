"""Group reconstruction: keep the outputs of a module while whole groups of its inner units go."""

from __future__ import annotations

from torch import Tensor

from admm_prune.kernels import groups
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.layer import DEFAULT_RIDGE, LayerReconstruction

_CONSTANT = 1e-5  # a channel is constant where its variance is at most this multiple of its mean square


class GroupReconstruction(LayerReconstruction):
    """min_{V in C} ||X V^T + 1 b^T - Y||_F^2 + damping, V the output matrix of a module, C a set of column groups.

    A unit of the module (a neuron of the feed-forward part, a group of heads that share a key and a value) reaches the
    residual stream through its own columns of V alone (down projection, attention output). So every structured decision
    is a selection of column groups, and once they are zero all other weights of the unit can go without an error.

    Where the module has an output bias, X V^T is matched up to a constant, which the bias takes: then H is the centred
    Gram X^T X - n mu mu^T, and the bias moves by (W - V) mu.

    Args:
        weight, gram, constraint, ridge, damping: see `LayerReconstruction`; `constraint` is a `Groups`.
        mean: mu (in,), the mean input, where a bias can take the constant; None where there is no bias.
        tokens: n, needed with `mean`.

    Raises:
        ValueError: as `LayerReconstruction`; a mean without tokens.
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        constraint: Constraint,
        *,
        mean: Tensor | None = None,
        tokens: int = 0,
        ridge: float = DEFAULT_RIDGE,
        damping: float = 0.0,
    ) -> None:
        if mean is not None and tokens < 1:
            raise ValueError("a mean input needs the number of tokens that it is of")
        self.mean, self._tokens = mean, tokens
        centred_gram = gram if mean is None else centred(gram, mean, tokens)
        super().__init__(weight, centred_gram, constraint, ridge=ridge, damping=damping)

    def refit(self, mask: Point) -> Point:
        """The least-squares weights on a support; on whole columns, by one factorization for all rows."""
        kept = mask["weight"]
        if not bool((kept == kept[0]).all()):
            return super().refit(mask)
        return Point(weight=groups.minimize_on_columns(self.hessian, self.minimizer, kept[0]))

    def _magnitudes(self, e: Tensor, gram: Tensor) -> float:
        """With those of n mu mu^T, which a centred Gram is a difference from."""
        taken = (
            0.0
            if self.mean is None
            else self._tokens * float((e.abs() @ self.mean.abs().to(e)).double().square().sum())
        )
        return super()._magnitudes(e, gram) + 2 * taken

    def bias_shift(self, x: Point) -> Tensor:
        """(W - V) mu (out,): what the bias takes over; zeros without a mean."""
        away = self.weight - x["weight"]
        return away.new_zeros(len(away)) if self.mean is None else away @ self.mean.to(away)


def centred(gram: Tensor, mean: Tensor, tokens: int) -> Tensor:
    """H - n mu mu^T, symmetric; a channel that is constant up to rounding becomes exactly zero."""
    mu = mean.double()
    result = gram.double().addr_(mu, mu, alpha=-tokens)
    constant = result.diagonal() <= _CONSTANT * gram.diagonal()
    result[constant] = 0
    result[:, constant] = 0
    return result.to(gram.dtype)
