"""Network output: preserve the output of a whole feed-forward network, one weight after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problem import Constraint, Problem
from admm_prune.problems.closing import Closing
from admm_prune.problems.constraints import FREE, Product, SparseSet, StackedRows
from admm_prune.problems.feed_forward import EVEN, FeedForward, GatedFeedForward, Network, Penalties, correction
from admm_prune.problems.layer import LayerReconstruction, Share
from admm_prune.statistics import GramAccumulator, TargetAccumulator, pieces

Tokens = tuple[Tensor, Tensor]  # inputs (n, d) and targets (n, m), of any float dtype
_CHUNK = 1024  # tokens that are in the hidden layer at once
_TOKENS_PER_CHANNEL = 16  # tokens used by the split network, per input channel
_WHOLE = 64  # tokens: in smaller chunks, kernels round the last few entries differently from the others
_SAMPLE = 64


def gradient_sample(tokens: int) -> int:
    """The tokens of a sampled gradient, by default."""
    return max(_SAMPLE, tokens // 128)


class NetworkOutput:
    """min |net(X; W1, W2) - Y|^2 over weights in their sets, where net(x) = W2 act(W1 x + b1) + b2, or gated.

    `Stochastic`, and `Coordinated` of two blocks. "down" is the layer reconstruction of Y from the hidden units
    under the present W1: the closing step. It includes b2, if there is one. "up", with the gate stacked on it,
    is the plain layer reconstruction at the dense weights. Elsewhere its target is the pre-activation of the split
    network (`FeedForward`) that begins at the present weights: `sweeps` exact updates of P and Z give the
    target of the hidden units, to which W1 is fitted. Tensors of size n x D exist for one chunk of tokens at a time.

    Points hold "up", "down", "gate" where there is one, and "bias" (m,), b2, where there is one.

    Args:
        tokens: inputs and targets.
        constraints: a set for each weight.
        validation: held-out tokens for `validation_loss`; by default the same.
        penalties: weights of the penalties of the split network.
        sweeps: exact updates of P and Z that give the targets of a block.
        damped: ridge and damping of the layer reconstructions "up" (with the gate) and "down"; none where missing.
        sample: tokens of a sampled gradient; by default a 128th of them, at least 64.
        share: which of all tokens these are, if other processes have the rest; all call in the same order.

    Everything is computed in the dtype of the network's weights, and added up over the tokens in float64. Where a bias
    absorbs means, which are then subtracted from the sums of "down", these are of products in float64.

    Source: the split is that of Bai et al., SparseLLM, 2024; restarting it at the current network, and the closing
    step, are ours.
    """

    order: tuple[str, ...] = ("up", "down")

    def __init__(
        self,
        network: Network,
        tokens: Tokens,
        constraints: Mapping[str, SparseSet],
        *,
        validation: Tokens | None = None,
        penalties: Penalties = EVEN,
        sweeps: int = 1,
        damped: Mapping[str, tuple[float, float]] | None = None,
        sample: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.network, self.tokens, self.validation = network, tokens, tokens if validation is None else validation
        self.share = Share(len(tokens[0])) if share is None else share
        count = self.share.count
        self.sample = min(count, gradient_sample(count) if sample is None else sample)
        self.constraints = constraints
        self.penalties, self.sweeps, self.damped = penalties, sweeps, damped or {}
        self._bias = network.biases.get("down")
        inner = {name: bias for name, bias in network.biases.items() if name != "down"}
        self._inner = Network(network.activation, network.weights, inner)  # b2 is on the targets' side
        self._inputs = ("gate", "up") if network.gated else ("up",)
        self.constraint: Constraint = Product({name: constraints.get(name, FREE) for name in self.initial()})

    @cached_property
    def curvature(self) -> float:
        """The curvature of the down projection at the start."""
        return self._down(self.initial()).curvature

    def initial(self) -> Point:
        x = Point({name: self.network.weights[name] for name in (*self._inputs, "down")})
        return x if self._bias is None else Point({**x, "bias": self._bias})

    def value(self, x: Point) -> float:
        return self._loss(x, self.tokens)[0]

    def validation_loss(self, x: Point) -> float:
        """|net(X; x) - Y|^2 / |Y|^2 on the validation tokens; the error itself where all targets are zero."""
        loss, energy = self._loss(x, self.validation)
        return loss / (energy or 1.0)

    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        """Loss and gradient on the draw-th tokens of a fixed shuffle, scaled up to all tokens."""
        weight, count = x["up"], self.share.count
        scale = count / self.sample
        drawn = torch.arange(draw * self.sample, (draw + 1) * self.sample, device=self._shuffle.device) % count
        # All processes compute the same, from the same tokens: the bits do not depend on which process has which.
        inputs, targets = (self.share.taken(part, self._shuffle[drawn]).to(weight) for part in self.tokens)
        net = self._inner
        pre = {name: net.linear(name, x, inputs) for name in self._inputs}
        act, slope, _ = net.activation.derivatives(pre[self._inputs[0]])
        hidden = act * pre["up"] if net.gated else act
        missing = net.linear("down", x, hidden) - targets
        if self._bias is not None:
            missing += x["bias"]
        back = missing * (2 * scale)
        felt = back @ x["down"]
        gradient = Point(down=back.T @ hidden)
        if net.gated:
            gradient["up"] = (felt * act).T @ inputs
            gradient["gate"] = (felt * pre["up"] * slope).T @ inputs
        else:
            gradient["up"] = (felt * slope).T @ inputs
        if self._bias is not None:
            gradient["bias"] = back.sum(0)
        return scale * float(missing.double().square().sum()), gradient

    def block(self, name: str, x: Point) -> Any:  # a Problem, as in FeedForward
        return self._down(x) if name == "down" else self._up(x)

    def part(self, x: Point, name: str) -> Point:
        return Point(weight=x["down"] if name == "down" else self._stacked(x))

    def joined(self, x: Point, name: str, block: Problem, solution: Point) -> Point:
        weight = solution["weight"]
        if name == "down":
            bias = {} if self._bias is None or not isinstance(block, Closing) else {"bias": block.bias(weight)}
            return Point({**x, "down": weight, **bias})
        parts = weight.split([x[part].shape[0] for part in self._inputs])
        return Point({**x, **dict(zip(self._inputs, parts, strict=True))})

    def _chunks(self, tokens: Tokens, lengths: Sequence[int] = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive tokens in the dtype of the network, so many at once as `lengths` says."""
        for inputs, targets in zip(*(part.split(list(lengths) or _CHUNK) for part in tokens), strict=True):
            yield inputs.to(self.network.weights["up"]), targets.to(self.network.weights["up"])

    def _calibration(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Chunks of the calibration tokens, and the lengths of their pieces of sequences, which are never divided."""
        lengths = [len(self.tokens[0])] if self.share.lengths is None else self.share.lengths
        groups: list[list[int]] = []
        for piece in pieces(lengths):
            if not groups or sum(groups[-1]) + piece > _CHUNK:
                groups.append([])
            groups[-1].append(piece)
        chunks = self._chunks(self.tokens, [sum(group) for group in groups])
        return ((*chunk, group) for chunk, group in zip(chunks, groups, strict=True))

    def _loss(self, x: Point, tokens: Tokens) -> tuple[float, float]:
        """|net(X; x) - Y|^2 and |Y|^2 over all tokens, added in float64."""
        sums = torch.zeros(2, dtype=torch.float64)
        for inputs, targets in self._chunks(tokens):
            outputs = self._inner.linear("down", x, self._inner.hidden(x, inputs))
            if self._bias is not None:
                outputs += x["bias"]
            sums += torch.stack([part.double().square().sum() for part in (outputs - targets, targets)]).cpu()
        loss, energy = self.share.all_reduce(sums).tolist()
        return loss, energy

    @cached_property
    def _shuffle(self) -> Tensor:
        """All tokens in a random order, the same for every problem of as many tokens."""
        order = torch.randperm(self.share.count, generator=torch.Generator().manual_seed(0))
        return order.to(self.tokens[0].device)

    def _stacked(self, x: Point) -> Tensor:
        return torch.cat([x[part] for part in self._inputs])

    @cached_property
    def _gram(self) -> Tensor:
        weight = self.network.weights["up"]
        gram = GramAccumulator(weight.shape[1], weight.device)
        for inputs, _, lengths in self._calibration():
            gram.add(inputs, lengths=lengths)
        gram.join(self.share.all_reduce)
        return gram.gram.to(weight)

    def _up(self, x: Point) -> LayerReconstruction:
        dense = self._stacked(self.network.weights)
        rows = [(self.network.weights[part].shape[0], self.constraints[part]) for part in self._inputs]
        target = None if torch.equal(self._stacked(x), dense) else self._pre_activation_targets(x)
        ridge, damping = self.damped.get("up", (0.0, 0.0))
        return LayerReconstruction(
            dense,
            self._gram,
            rows[0][1] if len(rows) == 1 else StackedRows(tuple(rows)),
            ridge=ridge,
            damping=damping,
            correlation=None if target is None else target[0],
            target_energy=None if target is None else target[1],
        )

    def _pre_activation_targets(self, x: Point) -> tuple[Tensor, float]:
        """The targets of the pre-activations, stacked like the weights: their values under x on all tokens, plus the
        correction of the split network, estimated on a sample of them.

        Returns:
            Their correlation with the inputs, and their energy, less the biases.
        """
        lift = correction(x["down"], self.penalties.output)
        rows, width = self._stacked(x).shape
        corrections = TargetAccumulator(rows, width, x["up"].device)
        kind = GatedFeedForward if self.network.gated else FeedForward
        pre = ("gate_pre", "pre") if self.network.gated else ("pre",)
        count = self.share.count
        stride = max(1, count // (_TOKENS_PER_CHANNEL * width))
        sampled = self.share.every(stride)
        for inputs, targets in self._chunks((self.tokens[0][sampled], self.tokens[1][sampled])):
            tokens = len(inputs)
            inputs, targets = (nn.functional.pad(part, (0, 0, 0, -tokens % _WHOLE)) for part in (inputs, targets))
            if self._bias is not None:
                targets = targets - x["bias"]
            split = kind(self._inner, inputs, targets, {}, penalties=self.penalties)
            point = split.consistent(x)
            before = torch.cat([point[name] for name in pre], 1)
            for _ in range(self.sweeps):
                point["post"] = split.post_activation(point, lift)
                for name in reversed(pre):
                    point[name] = split.split_pre_activation(name, point)
            corrections.add(inputs[:tokens], (torch.cat([point[name] for name in pre], 1) - before)[:tokens])
        corrections.join(self.share.all_reduce)
        scale = count / len(range(0, count, stride))
        present, more = self._stacked(x), scale * corrections.correlation.to(x["up"])
        energy = quadratic.energy(present, self._gram) + 2 * quadratic.inner(present, more) + scale * corrections.energy
        return present @ self._gram + more, energy

    def _down(self, x: Point) -> LayerReconstruction:
        weight, damped = self.network.weights["down"], self.damped.get("down", (0.0, 0.0))
        bias = self._bias is not None
        gram = GramAccumulator(weight.shape[1], weight.device, centre=bias)
        target = TargetAccumulator(weight.shape[0], weight.shape[1], weight.device, centre=bias)
        for inputs, targets, lengths in self._calibration():
            hidden = self._inner.hidden(x, inputs)
            gram.add(hidden, lengths=lengths)
            target.add(hidden, targets, lengths)
        gram.join(self.share.all_reduce)
        target.join(self.share.all_reduce)
        return Closing.of(weight, gram, target, self.constraints["down"], damped, bias=bias)
