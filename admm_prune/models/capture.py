"""Calibration: what enters every weight of every block, given that the blocks before are pruned already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Batch, Sequences
from admm_prune.errors import UserError
from admm_prune.models.structure import Block, WeightView
from admm_prune.problems.gram import GramAccumulator, LayerStatistics

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class SharedInput:
    """Weights that read the same inputs (q, k and v; gate and up), and the statistics of these."""

    weights: tuple[WeightView, ...]
    statistics: LayerStatistics


class BlockStream:
    """The calibration text on its way through the model, block after block.

    The model runs once per batch, up to its last block, to learn how it calls its blocks: with which arguments beside
    the hidden states. From then on blocks are replayed one by one, by that very call, on the hidden states that the
    blocks before, pruned meanwhile, put out. Blocks are taken in order: `collect(0)`, prune, `advance(0)`,
    `collect(1)`, and so on. One block's statistics are held at a time, and the hidden states of all batches.

    Args:
        model: in evaluation mode, on `device`.
        blocks: all of its blocks, as `decoder_blocks` finds them.
        sequences: calibration text.
        device: of the model; the hidden states and Grams live there.
        validation_fraction: of the sequences: their Gram is kept apart too. A single sequence is not cut.
        holdout: other text, for reporting only.
        hollow: the blocks have no weights yet, and are passed by while the model runs.

    Raises:
        UserError: the hidden states that enter the first block are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        sequences: Sequences,
        device: torch.device | str,
        *,
        validation_fraction: float = 0.15,
        holdout: Sequences | None = None,
        hollow: bool = False,
    ) -> None:
        if model.training:
            raise ValueError("a model in training mode drops activations at random: call model.eval() first")
        self._blocks = blocks
        self._position = 0
        calibration, validation = sequences.split(validation_fraction)
        parts = {"calibration": calibration, "validation": validation, "holdout": holdout}
        with _passed_by(blocks) if hollow else nullcontext():
            self._flows = {
                part: [_Flow.record(model, blocks, batch, device) for batch in text.batches]
                for part, text in parts.items()
                if text is not None
            }

    @torch.no_grad()
    def collect(
        self, index: int, only: Collection[str] | None = None, outputs: dict[str, Tensor] | None = None
    ) -> list[SharedInput]:
        """The inputs of block `index`, in the order in which the block first uses them; pads are left out.

        Args:
            only: names of weights, where not all of them are asked for: a Gram is the largest thing there is.
            outputs: receives what the block puts out, (n, hidden size) for every part of the text.

        Raises:
            ValueError: it is another block's turn.
            UserError: a weight is never used, reads inputs that do not come one a token, or activations overflow.
        """
        block = self._turn(index)
        weights = block.weights if only is None else tuple(view for view in block.weights if view.name in only)
        collector = _Collector(weights)
        with collector.watching():
            for part, flows in self._flows.items():
                seen: list[Tensor] = []
                for flow in flows:
                    collector.begin(part, flow.mask)
                    hidden = flow.replay(block, index)
                    if outputs is not None:
                        seen.append(hidden[flow.mask])
                if outputs is not None:
                    outputs[part] = torch.cat(seen)
        return collector.shared_inputs()

    @torch.no_grad()
    def pairs(
        self, index: int, first: WeightView, last: WeightView, wanted: dict[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What enters `first` and what `last` puts out in block `index`, real tokens only, for every part of the text.

        Args:
            wanted: what the block is to put out, as `collect` gave it: the second of a pair is then what `last` would
                have to put out for that, where the block adds it to its residual stream.

        Returns:
            (n, in) and (n, out) for every part.

        Raises:
            ValueError, UserError: as `advance`.
        """
        block = self._turn(index)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for part, flows in self._flows.items():
            inputs, outputs, done = [], [], 0
            for flow in flows:
                seen: list[Tensor] = []
                with ExitStack() as stack:
                    stack.enter_context(first.module.register_forward_pre_hook(_keep(seen)))
                    stack.enter_context(last.module.register_forward_hook(_keep_output(seen)))
                    hidden = flow.replay(block, index)
                mask = flow.mask.flatten()
                entering, leaving = (x.reshape(-1, x.shape[-1])[mask] for x in seen)
                if wanted is not None:
                    leaving = leaving + wanted[part][done : done + len(leaving)] - hidden[flow.mask]
                    done += len(leaving)
                inputs.append(entering)
                outputs.append(leaving)
            found[part] = (torch.cat(inputs), torch.cat(outputs))
        return found

    @torch.no_grad()
    def adds(self, index: int, last: WeightView) -> bool:
        """True where block `index` adds what `last` puts out to its own output: tried out on one batch."""
        block = self._turn(index)
        flow = next(iter(self._flows.values()))[0]
        before = flow.replay(block, index)
        size = before.float().square().mean().sqrt()
        g = torch.Generator().manual_seed(0)
        more = torch.randn(before.shape[-1], generator=g).to(before) * size.to(before)
        with last.module.register_forward_hook(_adding(more)):
            after = flow.replay(block, index)
        off = ((after.float() - before.float()) - more.float()).square().mean().sqrt()
        return bool(off <= 0.05 * size)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Runs block `index`, as its weights are now, and hands its outputs to the next block.

        Raises:
            ValueError: it is another block's turn.
            UserError: its outputs are not finite.
        """
        block = self._turn(index)
        for flows in self._flows.values():
            for flow in flows:
                flow.hidden = flow.replay(block, index)
        self._position += 1

    @torch.no_grad()
    def preview(self, index: int) -> Tensor:
        """What block `index`, as its weights are now, makes of the first batch; nothing moves on."""
        return self._flows["calibration"][0].replay(self._turn(index), index)

    @torch.no_grad()
    def energy(self) -> float:
        """||h||_F^2: the square norms of all calibration tokens' present hidden states, added up in float64."""
        flows = self._flows["calibration"] + self._flows.get("validation", [])
        return sum(float(flow.hidden[flow.mask].double().square().sum()) for flow in flows)

    def _turn(self, index: int) -> Block:
        if index != self._position:
            raise ValueError(f"blocks are taken in order: it is the turn of block {self._position}, not {index}")
        return self._blocks[index]


@contextmanager
def _passed_by(blocks: list[Block]) -> Generator[None]:
    """Blocks hand on the hidden states as they come: what else they are called with does not depend on these."""
    for block in blocks:
        block.module.forward = lambda *args, **kwargs: _without_hidden(args, kwargs)[0]
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


class _StopRecordingError(Exception):
    """Ends the recording run at the last block: neither its outputs nor the logits are needed."""


@dataclass
class _Flow:
    """One batch under way: its hidden states (b, L, d), its real tokens (b, L), and every block's other arguments."""

    hidden: Tensor
    mask: Tensor
    calls: list[_Call]

    @classmethod
    @torch.no_grad()
    def record(cls, model: nn.Module, blocks: list[Block], batch: Batch, device: torch.device | str) -> _Flow:
        entering: list[Tensor] = []
        calls: list[_Call] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not blocks[len(calls)].module:
                raise UserError(f"the model calls its blocks out of order: {blocks[len(calls)].name} was expected")
            hidden, call = _without_hidden(args, kwargs)
            if not calls:
                entering.append(hidden)
            calls.append(call)
            if len(calls) == len(blocks):
                raise _StopRecordingError

        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block.module.register_forward_pre_hook(hook, with_kwargs=True))
            stack.enter_context(suppress(_StopRecordingError))
            model(input_ids=batch.input_ids.to(device), use_cache=False)
        if len(calls) < len(blocks):
            raise UserError(f"the model never calls {blocks[len(calls)].name}: it cannot be pruned")
        _check_finite(entering[0], f"the hidden states that enter {blocks[0].name}")
        return cls(entering[0], batch.mask.to(device), calls)

    def replay(self, block: Block, index: int) -> Tensor:
        """The hidden states that `block` makes of the present ones."""
        args, kwargs = self.calls[index]
        output = block.module(self.hidden, *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        _check_finite(hidden, f"the outputs of {block.name}")
        return hidden


class _Collector:
    """Adds what enters some weights of one block to one Gram per distinct input.

    Weights share an input when they are called with the very same tensor, unchanged in between.
    """

    def __init__(self, weights: tuple[WeightView, ...]) -> None:
        self._weights = weights
        self._leaders: dict[int, int] = {}  # weight -> the first weight of the block that reads the same input
        self._grams: dict[tuple[int, str], GramAccumulator] = {}  # by (leader, part of the text)
        self._seen: list[tuple[int, Tensor, int]] = []  # this batch's inputs: (leader, tensor, its version)
        self._part = ""
        self._mask = torch.empty(0)

    @contextmanager
    def watching(self) -> Generator[None]:
        with ExitStack() as stack:
            for number, view in enumerate(self._weights):
                stack.enter_context(view.module.register_forward_pre_hook(self._hook(number)))
            yield

    def begin(self, part: str, mask: Tensor) -> None:
        """The next calls belong to a batch of `part` with these real tokens."""
        self._part, self._mask, self._seen = part, mask.flatten(), []

    def shared_inputs(self) -> list[SharedInput]:
        weights = self._weights
        for number in range(len(weights)):
            if number not in self._leaders:
                raise UserError(f"{self._name(number)} is never used on the calibration text: it cannot be pruned")
        shared = []
        for leader in dict.fromkeys(self._leaders.values()):
            members = tuple(weights[number] for number, first in self._leaders.items() if first == leader)
            statistics = LayerStatistics.collected(
                self._grams[leader, "calibration"],
                self._grams.get((leader, "validation")),
                self._grams.get((leader, "holdout")),
            )
            _check_finite(statistics.gram, f"the inputs of {members[0].name}")
            shared.append(SharedInput(members, statistics))
        return shared

    def _name(self, number: int) -> str:
        return self._weights[number].name

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: self._observe(number, args[0])

    def _observe(self, number: int, inputs: Tensor) -> None:
        leader = next((first for first, x, version in self._seen if x is inputs and x._version == version), number)
        if self._leaders.setdefault(number, leader) != leader:
            raise UserError(f"{self._name(number)} shares its inputs with other weights in some calls only")
        if leader != number:
            return
        self._seen.append((number, inputs, inputs._version))
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) != len(self._mask):
            raise UserError(
                f"{self._name(number)} reads {len(rows)} inputs for {len(self._mask)} tokens, not one a token"
            )
        key = (number, self._part)
        if key not in self._grams:
            self._grams[key] = GramAccumulator(rows.shape[1], rows.device)
        self._grams[key].add(rows[self._mask])


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, args: seen.append(args[0])


def _keep_output(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    return lambda _, __, output: seen.append(output)


def _adding(more: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, __, output: output + more


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    """Parts a block's arguments into the hidden states, which come first or by that name, and the others."""
    if args:
        return args[0], (args[1:], kwargs)
    others = dict(kwargs)
    return others.pop("hidden_states"), ((), others)


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{what} are not finite: load the model in another dtype, or look for damaged weights")
