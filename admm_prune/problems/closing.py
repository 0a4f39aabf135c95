"""Closing: fits the last weight of a network, with its bias, to the outputs that the network should have."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from admm_prune.ops import quadratic
from admm_prune.problem import Constraint
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.statistics import GramAccumulator, TargetAccumulator

_CONSTANT = 1e-9  # a unit is constant when its variance is at most this part of its mean square: the rest is rounding


class Closing(LayerReconstruction):
    """min |P V^T + 1 b^T - Y|^2 over V in C and, where there is a bias, b.

    P are the inputs that the weights before really give. A bias absorbs the means of inputs and targets: the layer
    reconstruction is then of both less their means.
    """

    def __init__(self, *arguments: object, count: int, means: tuple[Tensor, Tensor], **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._count, self._means = count, means

    @classmethod
    def of(
        cls,
        weight: Tensor,
        inputs: GramAccumulator,
        targets: TargetAccumulator,
        constraint: Constraint,
        damped: tuple[float, float],
        *,
        bias: bool,
    ) -> Self:
        """From sums over all tokens; `targets` is used up.

        Args:
            weight: the dense weight (m, D), in whose dtype the problem is posed.
            inputs, targets: of P and of (P, Y).
            damped: ridge and damping.
            bias: whether there is one.
        """
        count, mean_input, mean_target = inputs.tokens, inputs.mean, targets.total / max(1, inputs.tokens)
        moments, correlation, energy = inputs.gram, targets.correlation, targets.energy
        if bias:
            before = moments.diagonal().clone()
            moments.addr_(mean_input, mean_input, alpha=-count)
            correlation.addr_(mean_target, mean_input, alpha=-count)
            energy -= count * float(mean_target.square().sum())
            if energy <= _CONSTANT * targets.energy:  # the bias covers the targets: the rest is rounding
                energy, correlation = 0.0, torch.zeros_like(correlation)
            constant = moments.diagonal() <= _CONSTANT * before  # the bias covers the effect of such a unit
            moments[constant], moments[:, constant], correlation[:, constant] = 0, 0, 0
        moments = moments.to(weight)
        return cls(
            weight,
            moments,
            constraint,
            ridge=damped[0],
            damping=damped[1],
            correlation=correlation.to(weight),
            target_energy=energy,
            count=count,
            means=(mean_input.to(weight), mean_target.to(weight)),
        )

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias (m,) beside a weight."""
        mean_input, mean_target = self._means
        return mean_target - weight @ mean_input

    def squared_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """|P V^T + 1 b^T - Y|^2 over all tokens, undamped: a difference of energies, in float64.

        Args:
            bias: b, not necessarily the best; None if the problem has none.
        """
        assert self.correlation is not None
        assert self.target_energy is not None
        error = quadratic.energy(weight, self.gram) - 2 * quadratic.inner(weight, self.correlation) + self.target_energy
        if bias is not None:
            error += self._count * float((self.bias(weight) - bias).double().square().sum())
        return max(error, 0.0)  # in this order NaN stays NaN
