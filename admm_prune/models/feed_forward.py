"""The feed-forward network of a decoder block, found by what its weights do to a few tokens, not by names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.kernels.activations import ACTIVATIONS, Activation
from admm_prune.models.structure import Block, WeightView

_Calls = dict[int, tuple[Tensor, Tensor]]  # inputs and outputs, by the identity of a weight's view
_TOKENS = 16
_ROUNDING = 8  # times the unit roundoff, by which a recomputed activation may differ


@dataclass(frozen=True, eq=False)
class FeedForwardViews:
    """y = W2 act(W1 x + b1) + b2, or with a gate y = W2 (act(Wg x + bg) * (W1 x + b1)) + b2, in a block."""

    activation: Activation
    up: WeightView
    down: WeightView
    gate: WeightView | None = None

    @property
    def views(self) -> dict[str, WeightView]:
        """By the names of `problems.feed_forward.Network`."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {"up": self.up, **gate, "down": self.down}


@torch.no_grad()
def feed_forward(block: Block, run: Callable[[], object]) -> FeedForwardViews:
    """The one feed-forward network of a block, by what its weights do to the first tokens of what `run` gives it.

    Raises:
        UserError: as `feed_forwards`.
    """
    calls: _Calls = {}
    with ExitStack() as stack:
        for view in block.weights:
            stack.enter_context(view.module.register_forward_hook(_remembering(calls, id(view))))
        run()
    return _feed_forward(block, calls)


@torch.no_grad()
def feed_forwards(model: nn.Module, blocks: list[Block]) -> list[FeedForwardViews]:
    """The one feed-forward network of every block: the model runs on a few tokens, and the weight is looked for that
    reads act(W x) or act(V x) * (W x) of others.

    Raises:
        UserError: a block, named, has none with an activation of `kernels.activations`, or more than one.
    """
    calls: _Calls = {}
    with ExitStack() as stack:
        for view in (view for block in blocks for view in block.weights):
            stack.enter_context(view.module.register_forward_hook(_remembering(calls, id(view))))
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers
        device = next(model.parameters()).device
        model(input_ids=(torch.arange(_TOKENS, device=device) * 7919 % size)[None], use_cache=False)
    return [_feed_forward(block, calls) for block in blocks]


def _remembering(calls: _Calls, key: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[key] = (args[0], output)

    return hook


def _feed_forward(block: Block, calls: _Calls) -> FeedForwardViews:
    used = [view for view in block.weights if id(view) in calls]
    found = [match for down in used if (match := _match(down, used, calls)) is not None]
    if len(found) != 1:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"cannot read the feed-forward network of {block.name}: {len(found)} of its weights read act(W x) or "
            f"act(V x) * (W x), act one of {known}; one must: use a method that goes layer by layer"
        )
    return found[0]


def _match(down: WeightView, used: list[WeightView], calls: _Calls) -> FeedForwardViews | None:
    """The network that ends in `down`: what comes closest to its inputs, to rounding."""
    wanted = calls[id(down)][0]
    tokens = wanted.numel() // wanted.shape[-1]
    wanted = wanted.reshape(-1, wanted.shape[-1])[:_TOKENS]
    outputs = {
        id(view): calls[id(view)][1].reshape(-1, down.shape[1])[:_TOKENS]
        for view in used
        if view is not down and view.shape[0] == down.shape[1] and tokens * down.shape[1] == calls[id(view)][1].numel()
    }
    others = [view for view in used if id(view) in outputs]
    best, least = None, _ROUNDING * torch.finfo(wanted.dtype).eps
    for activation in ACTIVATIONS.values():
        active = {key: activation.value(output) for key, output in outputs.items()}
        tried = [(_off(active[id(up)], wanted), FeedForwardViews(activation, up, down)) for up in others]
        tried += [
            (_off(active[id(gate)] * outputs[id(up)], wanted), FeedForwardViews(activation, up, down, gate))
            for gate, up in permutations(others, 2)
            if calls[id(gate)][0] is calls[id(up)][0]
        ]
        for off, views in tried:
            if off < least:
                best, least = views, off
    return best


def _off(value: Tensor, wanted: Tensor) -> float:
    """|value - wanted| / |wanted|, 0 where both vanish."""
    away = float((value.double() - wanted.double()).norm())
    return away / (float(wanted.double().norm()) or 1.0)
