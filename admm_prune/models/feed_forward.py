"""The feed-forward network of a decoder block, found by running it on a few tokens, not by names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.structure import Block, WeightView
from admm_prune.ops.activations import ACTIVATIONS, Activation


@dataclass(frozen=True)
class _Call:
    """One call of a weight: its input tensor, the number of tokens, and copies of the first rows of input and output.

    Copies, because some blocks work in place.
    """

    source: Tensor
    tokens: int
    inputs: Tensor
    outputs: Tensor


_Calls = dict[int, _Call]  # by the identity of a weight's view
_TOKENS = 16
_ROUNDING = 8  # times the unit roundoff, by which a recomputed activation may differ


@dataclass(frozen=True, eq=False)
class FeedForwardViews:
    """y = W2 act(W1 x + b1) + b2, or with a gate y = W2 (act(Wg x + bg) * (W1 x + b1)) + b2, in a block.

    Attributes:
        up, gate, down: the matrices; gate and up may be the halves of one weight.
        weights: of the block, which hold them.
    """

    activation: Activation
    up: WeightView
    down: WeightView
    gate: WeightView | None
    weights: tuple[WeightView, ...]

    @property
    def views(self) -> dict[str, WeightView]:
        """By the names of `problems.feed_forward.Network`."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {"up": self.up, **gate, "down": self.down}


@torch.no_grad()
def feed_forward(block: Block, run: Callable[[], object]) -> FeedForwardViews:
    """The one feed-forward network of a block, found from the first tokens that `run` passes through it.

    Raises:
        UserError: as `feed_forwards`.
    """
    return _feed_forward(block, _recorded_calls(block.weights, run))


@torch.no_grad()
def feed_forwards(model: nn.Module, blocks: list[Block]) -> list[FeedForwardViews]:
    """The one feed-forward network of every block: the model runs on a few tokens, to find the weight that
    reads act(W x) or act(V x) * (W x) of others.

    Raises:
        UserError: a block, named, has none with an activation of `ops.activations`, or more than one, or is a
            mixture of experts.
    """
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers
    ids = torch.arange(_TOKENS, device=next(model.parameters()).device) * 7919 % size
    views = [view for block in blocks for view in block.weights]
    calls = _recorded_calls(views, lambda: model(input_ids=ids[None], use_cache=False))
    return [_feed_forward(block, calls) for block in blocks]


def _recorded_calls(views: Iterable[WeightView], run: Callable[[], object]) -> _Calls:
    calls: _Calls = {}

    def record(key: int, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        entering, leaving = (x.reshape(-1, x.shape[-1]) for x in (args[0], output))
        calls[key] = _Call(args[0], len(entering), entering[:_TOKENS].clone(), leaving[:_TOKENS].clone())

    with ExitStack() as stack:
        for view in views:
            stack.enter_context(view.module.register_forward_hook(partial(record, id(view))))
        run()
    return calls


def check_no_mixture(block: Block) -> None:
    """Refuses a block with several networks, between which a router chooses.

    Raises:
        UserError: it is a mixture of experts.
    """
    if any(view.expert is not None for view in block.weights):
        raise UserError(f"{block.name} is a mixture of experts, not one feed-forward network: use a layer-wise method")


def _feed_forward(block: Block, calls: _Calls) -> FeedForwardViews:
    check_no_mixture(block)
    used = [view for view in block.weights if id(view) in calls]
    networks = [match for down in used if (match := _match(down, used, calls)) is not None]
    if len(networks) != 1:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"cannot read the feed-forward network of {block.name}: {len(networks)} of its weights read act(W x) or "
            f"act(V x) * (W x), act one of {known}; one must: use a layer-wise method"
        )
    return networks[0]


@dataclass(frozen=True)
class _Part:
    """A weight, or a half of one, that may feed the down projection: W x of its call, (tokens, n)."""

    view: WeightView
    weight: WeightView
    source: Tensor
    outputs: Tensor


def _match(down: WeightView, used: list[WeightView], calls: _Calls) -> FeedForwardViews | None:
    """The network that ends in `down`: the best match of its inputs, up to rounding."""
    inputs = calls[id(down)].inputs
    whole, halves = _parts(down, calls[id(down)].tokens, used, calls)
    best, least = None, _ROUNDING * torch.finfo(inputs.dtype).eps
    for activation in ACTIVATIONS.values():
        candidates = [
            (
                _relative_difference(activation.value(up.outputs), inputs),
                FeedForwardViews(activation, up.view, down, None, (up.weight, down)),
            )
            for up in whole
        ]
        for gate, up in (
            *permutations(whole, 2),
            *((a, b) for one, two in halves for a, b in ((one, two), (two, one))),
        ):
            if gate.source is up.source:
                weights = tuple(dict.fromkeys((gate.weight, up.weight, down)))
                views = FeedForwardViews(activation, up.view, down, gate.view, weights)
                candidates.append((_relative_difference(activation.value(gate.outputs) * up.outputs, inputs), views))
        for difference, views in candidates:
            if difference < least:
                best, least = views, difference
    return best


def _parts(
    down: WeightView, tokens: int, used: list[WeightView], calls: _Calls
) -> tuple[list[_Part], list[tuple[_Part, _Part]]]:
    """Weights with as many outputs as `down` has inputs, for as many tokens; in halves, those with twice as many."""
    whole, halves = [], []
    inputs = down.shape[1]
    for view in used:
        call = calls[id(view)]
        if view is down or call.tokens != tokens:
            continue
        outputs = call.outputs
        if view.shape[0] == inputs:
            whole.append(_Part(view, view, call.source, outputs))
        elif view.shape[0] == 2 * inputs:
            first, second = (
                _Part(replace(view, part=(i, i + 1, 2)), view, call.source, outputs[:, i * inputs : (i + 1) * inputs])
                for i in range(2)
            )
            halves.append((first, second))
    return whole, halves


def _relative_difference(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, 0 where both vanish."""
    distance = float((value.double() - reference.double()).norm())
    return distance / (float(reference.double().norm()) or 1.0)
