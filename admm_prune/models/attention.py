"""The attention of a decoder block, found by running it: where values enter it, and where head outputs leave it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.activation_store import BatchState, StopForwardError, in_dtype
from admm_prune.models.structure import Block, WeightView, replaced_forward
from admm_prune.models.sublayers import NO_KEYS, by_module, head_size, module_named

_LINEAR = 1e-3  # by which a map that is linear may miss additivity, in float32


@dataclass(frozen=True, eq=False)
class AttentionViews:
    """The value projection V (G e, d) and the output projection O (m, H e) of a block.

    Attributes:
        size: e, of a head.
        weights: all four matrices of the attention.
    """

    value: WeightView
    output: WeightView
    size: int
    weights: tuple[WeightView, ...]

    @property
    def heads(self) -> int:
        """H."""
        return self.output.shape[1] // self.size


def attention_views(block: Block) -> tuple[AttentionViews, ...]:
    """The possible value projections with the output projection: four matrices in a module that has the size of a head,
    of which the last is the output projection.

    Raises:
        UserError: there is no such module, or more than one, or it keeps queries, keys and values in one matrix.
    """
    candidates: list[tuple[AttentionViews, ...]] = []
    for name, views in by_module(block).items():
        module = module_named(block, name)
        size = head_size(module)
        if size is None:
            continue
        if "A_log" in dict(module.named_parameters(recurse=False)):
            continue  # a state space model with heads
        if len(views) == 2:
            joined = max(views, key=lambda view: view.shape[0])
            why = f"{joined.name} holds queries, keys and values in one matrix"
            if views[0].shape == views[1].shape[::-1]:
                why = f"{name} {NO_KEYS}"
            raise UserError(_refusal(block, why))
        if len(views) == 4:
            inner, output = (views[2], *views[:2]), views[3]
            whole = (view for view in inner if output.shape[1] % view.shape[0] == view.shape[0] % size == 0)
            candidates.append(tuple(AttentionViews(view, output, size, tuple(views)) for view in whole))
    if len(candidates) != 1 or not candidates[0]:
        raise UserError(_refusal(block, f"{len(candidates)} of its modules have queries, keys, values and an output"))
    return candidates[0]


def attention_of(block: Block, states: Sequence[BatchState], index: int) -> AttentionViews:
    """The value and output projections of a block: head outputs are linear in the values, not in queries and keys.

    Args:
        states: batches that enter the block, of which the first is run.
        index: of the block.

    Raises:
        UserError: as `attention_views`; no head outputs are linear, because the block norms them or the values.
    """
    for views in attention_views(block):
        if ModelMixing(block, views, states[:1], index).is_linear():
            return views
    raise UserError(_refusal(block, "its head outputs are not linear in the values"))


class ModelMixing:
    """A `problems.attention.Mixing` by the block itself, with its current queries and keys.

    The block is run up to its output projection, in float32 at least, with values in place of those it computes. What
    enters the output projection is an affine map of the values; its adjoint is taken by automatic differentiation.

    Args:
        states: batches that enter the block; every batch is a span.
        index: of the block.
    """

    def __init__(self, block: Block, views: AttentionViews, states: Sequence[BatchState], index: int) -> None:
        self._block, self._views, self._states, self._index = block, views, states, index
        self.heads = views.heads
        self.dtype = torch.promote_types(views.value.parameter.dtype, torch.float32)
        ends = accumulate((int(state.mask.sum()) for state in states), initial=0)
        self.spans: Sequence[slice] = [slice(start, stop) for start, stop in pairwise(ends)]

    def mix(self, span: int, values: Tensor) -> Tensor:
        return next(self.mix_several(span, (values,)))

    def mix_several(self, span: int, several: Iterable[Tensor]) -> Iterator[Tensor]:
        projected: dict[nn.Module, list[Tensor]] = {}  # the queries and keys are the same for all values
        for values in several:
            with torch.no_grad():
                mixed = self._run(span, values, projected)
            yield mixed

    def unmix(self, span: int, mixed: Tensor) -> Tensor:
        values = mixed.new_zeros(len(mixed), self._views.value.shape[0]).requires_grad_()
        with torch.enable_grad():
            outputs = self._run(span, values, {})
        return torch.autograd.grad(outputs, values, mixed)[0]

    def is_linear(self) -> bool:
        """Whether head outputs are linear in the values, tested on the first batch."""
        g = torch.Generator().manual_seed(0)
        shape = (self.spans[0].stop, self._views.value.shape[0])
        one, two = (torch.randn(shape, generator=g).to(self._states[0].mask.device, self.dtype) for _ in range(2))
        first, second, both = self.mix_several(0, (one, two, one + two))
        return bool((both - first - second).norm() <= _LINEAR * both.norm())

    def _run(self, span: int, values: Tensor, projected: dict[nn.Module, list[Tensor]]) -> Tensor:
        """The head outputs for given values.

        Args:
            projected: the outputs of the query and key projections in an earlier run of the span, which are used in
                place of new ones; where it is empty, they are added.
        """
        state, views = self._states[span], self._views
        padded = values.new_zeros(state.mask.numel(), values.shape[1])
        padded = padded.index_copy(0, state.mask.flatten().nonzero()[:, 0], values)
        seen: list[Tensor] = []

        def project(inputs: Tensor, *_: object, **__: object) -> Tensor:
            return padded.view(*inputs.shape[:-1], -1)

        with ExitStack() as stack:
            stack.enter_context(in_dtype(self._block.module, self.dtype))
            for module in {view.module for view in views.weights} - {views.value.module, views.output.module}:
                if len(projected.get(module, ())) == 1:  # a module may be called several times
                    # A copy, which the block may change in place.
                    repeat = lambda *_, known=projected[module][0], **__: known.clone()  # noqa: E731
                    stack.enter_context(replaced_forward(module, repeat))
                elif module not in projected:
                    stack.enter_context(module.register_forward_hook(partial(_keep, projected)))
            stack.enter_context(replaced_forward(views.value.module, project))
            stack.enter_context(views.output.module.register_forward_pre_hook(partial(_keep_and_stop, seen)))
            stack.enter_context(suppress(StopForwardError))
            state.replay(self._block, self._index, finite=False, dtype=self.dtype)
        return seen[0].reshape(-1, seen[0].shape[-1])[state.mask.flatten()]


def _keep(outputs: dict[nn.Module, list[Tensor]], module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
    outputs.setdefault(module, []).append(output.clone())  # the block may change it in place


def _keep_and_stop(seen: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen.append(args[0])
    raise StopForwardError


def _refusal(block: Block, why: str) -> str:
    return f"cannot coordinate the attention of {block.name}: {why}"
