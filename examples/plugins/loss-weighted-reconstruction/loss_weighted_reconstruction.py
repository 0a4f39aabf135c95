"""A new objective: the error of every token, weighted by the dense model's loss on the token that follows it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from admm_prune import LayerReconstruction, TokenContext


class LossWeightedReconstruction(LayerReconstruction):
    """min_{V in C} sum_t s_t |x_t V^T - x_t W^T|^2 with s_t = -log p(token t + 1 | tokens up to t) of the dense model.

    Tokens whose successor the model predicts with certainty, and those without a successor, have the weight 0.

    Source of the weighted Gram: Sung et al., RSQ: Learning from Important Tokens Leads to Better Quantized LLMs, 2025,
    where the weights are attention scores.
    """

    @staticmethod
    def token_scores(logits: Tensor, following: Tensor) -> Tensor:
        """The loss (m,) of each prediction, from logits (m, V) and the tokens that follow (m,)."""
        return cross_entropy(logits, following, reduction="none")

    @staticmethod
    def token_weights(inputs: Tensor, context: TokenContext) -> Tensor:
        """s_t (n,)."""
        return context.scores
