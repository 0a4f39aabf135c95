"""Feed-forward networks, plain and gated, split by auxiliary variables: each block of variables has an easy problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from admm_prune.errors import check_positive
from admm_prune.ops.activations import Activation, pre_activation
from admm_prune.point import Point
from admm_prune.problem import Constraint, Problem
from admm_prune.problems.constraints import FREE, Product, SparseSet
from admm_prune.problems.layer import AllReduce, LayerReconstruction, single_process
from admm_prune.statistics import GramAccumulator, TargetAccumulator


@dataclass(frozen=True)
class Network:
    """y = W2 act(W1 x + b1) + b2, or with a gate y = W2 (act(Wg x + bg) * (W1 x + b1)) + b2: a dense network.

    Attributes:
        weights: "up" W1 (D, d), "down" W2 (m, D) and, where there is a gate, "gate" Wg (D, d).
        biases: of the same names; a name that is missing has none.
    """

    activation: Activation
    weights: Point
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def gated(self) -> bool:
        return "gate" in self.weights

    def linear(self, name: str, x: Point, inputs: Tensor) -> Tensor:
        """Inputs (n, in) through one weight of x and the bias of that name (n, out)."""
        bias = self.biases.get(name)
        return inputs @ x[name].T if bias is None else torch.addmm(bias, inputs, x[name].T)

    def hidden(self, x: Point, inputs: Tensor) -> Tensor:
        """The input of the down projection (n, D)."""
        up = self.linear("up", x, inputs)
        if self.gated:
            return self.activation.value(self.linear("gate", x, inputs)).mul_(up)
        return self.activation.value(up)


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """The weights of the penalties of a split network: linear maps (alpha), output (beta), activation (gamma).

    Only their ratios matter.

    Raises:
        UserError: one is not positive and finite.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "alpha", "beta", "gamma")

    @property
    def linear(self) -> float:
        return self.alpha / self.gamma

    @property
    def output(self) -> float:
        return self.beta / self.gamma


EVEN = Penalties()


class FeedForward:
    """min a |X W1^T + b1 - Z|^2 + |P - act(Z)|^2 + b |P W2^T + b2 - Y|^2 over W1, W2, Z and P.

    with W1 and W2 in their sets, a = alpha / gamma, b = beta / gamma. `Coordinated`: "up" and "down" are layer
    reconstructions; "post" (P) and "pre" (Z) are `Minimizable`, P by a Cholesky factor of the size of the output, Z
    entry by entry, exactly for ReLU, else to rounding in nearly all entries. Biases are fixed.

    Points hold "up" (D, d), "down" (m, D), "pre" and "post" (n, D). Initially Z and P are those of the dense network,
    for which the block "up" is exactly the plain layer reconstruction.

    Args:
        network: without a gate.
        inputs: X (n, d), float32 or float64; everything is computed in this dtype.
        targets: Y (n, m).
        constraints: a set for each weight.
        validation: held-out inputs and targets for `validation_loss`; by default the same.
        damped: ridge and damping of each weight's layer reconstruction; none where it is missing.
        all_reduce: sums over all processes, each of which has its own tokens, with their Z and P; all call it in the
            same order.

    Source: Bai et al., SparseLLM: Towards Global Pruning of Pre-trained Language Models, 2024, eq. 5 to 9. The Woodbury
    form of P, the anchored fit of the weights and the rule for Z are ours.
    """

    order: tuple[str, ...] = ("up", "down", "post", "pre")
    names: tuple[str, ...] = ("up", "down", "pre", "post")  # of the tensors of a point

    def __init__(
        self,
        network: Network,
        inputs: Tensor,
        targets: Tensor,
        constraints: Mapping[str, SparseSet],
        *,
        validation: tuple[Tensor, Tensor] | None = None,
        penalties: Penalties = EVEN,
        damped: Mapping[str, tuple[float, float]] | None = None,
        all_reduce: AllReduce = single_process,
    ) -> None:
        self.network, self.penalties, self.all_reduce = network, penalties, all_reduce
        self.inputs, self.targets = inputs, targets
        self.validation = (inputs, targets) if validation is None else validation
        self.constraints, self.damped = constraints, damped or {}
        self.constraint: Constraint = Product({name: constraints.get(name, FREE) for name in self.names})

    @cached_property
    def curvature(self) -> float:
        """Half the mean diagonal of the Hessian over the weights, at the start."""
        dense = self.network.weights
        hidden = self.network.hidden(dense, self.inputs)
        total = sum(
            self.penalties.linear * self._energy(self.inputs) * len(w) for name, w in dense.items() if name != "down"
        ) + self.penalties.output * self._energy(hidden) * len(dense["down"])
        return total / dense.numel()

    def initial(self) -> Point:
        return self.consistent(self.network.weights)

    def consistent(self, x: Point) -> Point:
        """The weights of x, with Z and P as these weights compute them: all of the loss is in the output."""
        pre = self.network.linear("up", x, self.inputs)
        return Point(up=x["up"], down=x["down"], pre=pre, post=self.network.activation.value(pre))

    def value(self, x: Point) -> float:
        linear, activation = self._linear_loss("up", "pre", x), self._energy(x["post"] - self.activated(x))
        output = self.network.linear("down", x, x["post"]) - self.targets
        return linear + activation + self.penalties.output * self._energy(output)

    def block(self, name: str, x: Point) -> Any:  # a Problem; some type checkers take a cached_property for no member
        if name == "post":
            return PostActivation(self, name, x)
        if name == "pre":
            return PreActivation(self, name, x)
        if name == "down":
            return self._layer("down", x["post"], self.targets, self.penalties.output)
        return self._layer_of_inputs(name, "pre", x)

    def part(self, x: Point, name: str) -> Point:
        return Point({("weight" if name in self.network.weights else name): x[name]})

    def joined(self, x: Point, name: str, block: Problem, solution: Point) -> Point:
        return Point({**x, name: solution["weight"] if "weight" in solution else solution[name]})

    def validation_loss(self, x: Point) -> float:
        """|net(X; x) - Y|^2 / |Y|^2 of the network itself, independent of Z and P, on the validation tokens; the error
        itself where all targets are zero."""
        inputs, targets = self.validation
        outputs = self.network.linear("down", x, self.network.hidden(x, inputs))
        return self._energy(outputs - targets) / (self._energy(targets) or 1.0)

    def activated(self, x: Point) -> Tensor:
        """act(Z) (n, D)."""
        return self.network.activation.value(x["pre"])

    def post_activation(self, x: Point, correction: Tensor) -> Tensor:
        """The best P with all else fixed at x (n, D): F + (Y - b2 - F W2^T) correction, with F = act(Z)."""
        hidden = self.activated(x)
        missing = self.targets - self.network.linear("down", x, hidden)
        return torch.addmm(hidden, missing, correction)

    def split_pre_activation(self, name: str, x: Point) -> Tensor:
        """The best Z with all else fixed at x (n, D)."""
        mean = self.network.linear("up", x, self.inputs)
        return pre_activation(mean, x["post"], None, 1 / self.penalties.linear, self.network.activation, x["pre"])

    def _layer_of_inputs(self, name: str, pre: str, x: Point) -> LayerReconstruction:
        dense = self.network.weights
        same = torch.equal(x[name], dense[name]) and torch.equal(x[pre], self.network.linear(name, dense, self.inputs))
        if float(self.all_reduce(torch.tensor(float(not same)))) == 0:  # everywhere
            return self._layer(name, self.inputs, None, self.penalties.linear)
        return self._layer(name, self.inputs, x[pre], self.penalties.linear)

    def _layer(self, name: str, inputs: Tensor, targets: Tensor | None, scale: float) -> LayerReconstruction:
        """scale |inputs W^T + bias - targets|^2; the weight's own output where no targets are given."""
        gram = GramAccumulator(inputs.shape[1], inputs.device)
        gram.add(inputs)
        gram.join(self.all_reduce)
        correlation, energy = None, None
        if targets is not None:
            bias = self.network.biases.get(name)
            seen = TargetAccumulator(targets.shape[1], inputs.shape[1], inputs.device)
            seen.add(inputs, targets if bias is None else targets - bias)
            seen.join(self.all_reduce)
            correlation, energy = (scale * seen.correlation).to(inputs), scale * seen.energy
        ridge, damping = self.damped.get(name, (0.0, 0.0))
        return LayerReconstruction(
            self.network.weights[name],
            (scale * gram.gram).to(inputs),
            self.constraints.get(name, FREE),
            ridge=ridge,
            damping=damping,
            correlation=correlation,
            target_energy=energy,
        )

    def _linear_loss(self, name: str, pre: str, x: Point) -> float:
        return self.penalties.linear * self._energy(self.network.linear(name, x, self.inputs) - x[pre])

    def _energy(self, x: Tensor) -> float:
        """The sum of squares of all tokens."""
        return float(self.all_reduce(x.double().square().sum()))


class AuxiliaryBlock:
    """The problem in one auxiliary variable of a split network, all else fixed: its minimum is known."""

    constraint: Constraint = FREE
    curvature = 1.0

    def __init__(self, split: FeedForward, name: str, x: Point) -> None:
        self._split, self._name, self._x = split, name, x

    def initial(self) -> Point:
        return Point({self._name: self._x[self._name]})

    def value(self, x: Point) -> float:
        """The value of the whole."""
        return self._split.value(Point({**self._x, **x}))


class PostActivation(AuxiliaryBlock):
    """min_P |P - act(Z)|^2 + b |P W2^T + b2 - Y|^2."""

    def minimize(self) -> Point:
        """P = F + b (Y - b2 - F W2^T) (I + b W2 W2^T)^-1 W2 with F = act(Z)."""
        lift = correction(self._x["down"], self._split.penalties.output)
        return Point(post=self._split.post_activation(self._x, lift))


class PreActivation(AuxiliaryBlock):
    """min_Z of the terms of Z: the linear map below it and the activation above it."""

    def minimize(self) -> Point:
        return Point({self._name: self._split.split_pre_activation(self._name, self._x)})


def correction(down: Tensor, output: float) -> Tensor:
    """b (I + b W2 W2^T)^-1 W2 (m, D): maps a residual of the output to a change of the hidden units."""
    system = output * down @ down.T
    system.diagonal().add_(1)
    return torch.cholesky_solve(output * down, torch.linalg.cholesky(system))


class GatedFeedForward(FeedForward):
    """min a |X W1^T + b1 - Z|^2 + a |X Wg^T + bg - S|^2 + |P - act(S) * Z|^2 + b |P W2^T + b2 - Y|^2.

    As `FeedForward`, with the weight "gate" (D, d) and its pre-activation "gate_pre" S (n, D). Z is closed form, S is
    found entry by entry, exactly for ReLU, else to rounding in nearly all entries.

    Source: Bai et al., SparseLLM, 2024, section 3.4. Z for any penalties, and S beyond gradient steps, are ours.
    """

    order = ("up", "gate", "down", "post", "pre", "gate_pre")
    names = ("up", "gate", "down", "pre", "gate_pre", "post")

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
