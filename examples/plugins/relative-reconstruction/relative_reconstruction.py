"""A new objective: the error of every token relative to the size of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from admm_prune import LayerReconstruction


class RelativeReconstruction(LayerReconstruction):
    """min_{V in C} sum_t s_t |x_t V^T - x_t W^T|^2 with s_t = 1 / |x_t|^2: a few loud tokens do not decide alone."""

    @staticmethod
    def token_weights(inputs: Tensor) -> Tensor:
        """s_t (n,) from the inputs (n, in)."""
        energies = inputs.double().square().sum(1)
        return 1 / energies.clamp_min(torch.finfo(torch.float32).tiny)
