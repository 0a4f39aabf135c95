"""Group reconstruction: preserve the outputs of a module while structured groups of its columns are removed."""

from __future__ import annotations

from torch import Tensor

from admm_prune.ops import group_compensation
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.layer import DEFAULT_RIDGE, LayerReconstruction
from admm_prune.statistics import centred


class GroupReconstruction(LayerReconstruction):
    """min_{V in C} ||X V^T + 1 b^T - Y||_F^2 + damping, V the output matrix of a module, Y = X W^T its dense output, b
    the change of its bias, and C the matrices in which a number of column groups are zero.

    A structured group of the module (a neuron of the feed-forward part, or the heads that share a key and a value)
    reaches the residual stream through its own columns of V alone (down projection, attention output). So structured
    pruning is a selection of column groups, and once they are zero all other weights of these groups can be removed
    without an error.

    Where the module has an output bias, X V^T is matched up to a constant, which the bias absorbs: then H is the
    centred Gram X^T X - n mu mu^T, and the bias moves by (W - V) mu.

    Args:
        weight: W (out, in), dense.
        gram: H (in, in), the sum of x x^T over the tokens.
        constraint: a `Groups`.
        ridge: as in `LayerReconstruction`.
        damping: as in `LayerReconstruction`.
        mean: mu (in,), the mean input, where a bias can take the constant; None where there is no bias.
        tokens: n, needed with `mean`, unless `centred_gram` is given.
        centred_gram: X^T X - n mu mu^T, in place of `gram`, where it is known more accurately than from a rounded
            Gram (`LayerStatistics.centred`); needs `mean`.

    Raises:
        ValueError: as `LayerReconstruction`; a mean without tokens; a centred Gram without a mean.
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        constraint: Constraint,
        *,
        mean: Tensor | None = None,
        tokens: int = 0,
        centred_gram: Tensor | None = None,
        ridge: float = DEFAULT_RIDGE,
        damping: float = 0.0,
    ) -> None:
        if centred_gram is not None:
            if mean is None:
                raise ValueError("a centred Gram needs the mean that was subtracted")
            gram = centred_gram
        elif mean is not None:
            if tokens < 1:
                raise ValueError("a mean input needs the number of tokens that it is of")
            gram = centred(gram, mean, tokens)
        self.mean = mean
        self._subtracted = (
            0 if centred_gram is not None else tokens
        )  # tokens of the mean subtracted from a rounded Gram
        super().__init__(weight, gram, constraint, ridge=ridge, damping=damping)

    def refit(self, mask: Point) -> Point:
        """The least-squares weights on a support; on whole columns, by one factorization for all rows."""
        support = mask["weight"]
        if not bool((support == support[0]).all()):
            return super().refit(mask)
        return Point(weight=group_compensation.minimize_on_columns(self.hessian, self.minimizer, support[0]))

    def _magnitudes(self, e: Tensor, gram: Tensor) -> float:
        """With those of n mu mu^T, which a centred Gram is a difference from."""
        magnitudes = super()._magnitudes(e, gram)
        if self.mean is None or not self._subtracted:
            return magnitudes
        return magnitudes + 2 * self._subtracted * float((e.abs() @ self.mean.abs().to(e)).double().square().sum())

    def bias_shift(self, x: Point) -> Tensor:
        """(W - V) mu (out,): the change of the bias; zeros without a mean."""
        away = self.weight - x["weight"]
        return away.new_zeros(len(away)) if self.mean is None else away @ self.mean.to(away)
