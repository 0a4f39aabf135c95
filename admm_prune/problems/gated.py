"""Gated feed-forward network split by auxiliary variables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from admm_prune.kernels.pre_activation import pre_activation
from admm_prune.point import Point
from admm_prune.problems.feed_forward import FeedForward, PreActivation


class GatedFeedForward(FeedForward):
    """min a |X W1^T + b1 - Z|^2 + a |X Wg^T + bg - S|^2 + |P - act(S) * Z|^2 + b |P W2^T + b2 - Y|^2.

    As `FeedForward`, with the weight "gate" (D, d) and its pre-activation "gate_pre" S (n, D). Z is closed form, S is
    found entry by entry, exactly for ReLU, else to rounding in nearly all entries.

    Source: Bai et al., SparseLLM, 2024, section 3.4. Z for any penalties, and S beyond gradient steps, are ours.
    """

    order = ("up", "gate", "down", "post", "pre", "gate_pre")

    @property
    def names(self) -> tuple[str, ...]:
        return ("up", "gate", "down", "pre", "gate_pre", "post")

    def consistent(self, x: Point) -> Point:
        pre, gate = (self.network.linear(name, x, self.inputs) for name in ("up", "gate"))
        hidden = self.network.activation.value(gate) * pre
        return Point(up=x["up"], gate=x["gate"], down=x["down"], pre=pre, gate_pre=gate, post=hidden)

    def value(self, x: Point) -> float:
        return super().value(x) + self._linear_loss("gate", "gate_pre", x)

    def block(self, name: str, x: Point) -> Any:
        if name == "gate":
            return self._layer_of_inputs("gate", "gate_pre", x)
        return PreActivation(self, name, x) if name == "gate_pre" else super().block(name, x)

    def activated(self, x: Point) -> Tensor:
        return self.network.activation.value(x["gate_pre"]) * x["pre"]

    def split_pre_activation(self, name: str, x: Point) -> Tensor:
        """Z = (a m + act(S) P) / (a + act(S)^2) with m = X W1^T + b1; or S."""
        if name == "pre":
            mean, gain = self.network.linear("up", x, self.inputs), self.network.activation.value(x["gate_pre"])
            a = self.penalties.linear
            return torch.addcmul(a * mean, gain, x["post"]) / (a + gain * gain)
        mean = self.network.linear("gate", x, self.inputs)
        return pre_activation(
            mean, x["post"], x["pre"], 1 / self.penalties.linear, self.network.activation, x["gate_pre"]
        )
