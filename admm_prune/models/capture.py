"""Calibration: statistics of the inputs of every weight, after the preceding blocks were pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.sequences import Batch, Sequences
from admm_prune.errors import UserError
from admm_prune.models.activation_store import ActivationStore, BatchState, StopForwardError, record, returned_form
from admm_prune.models.archive import Lazy
from admm_prune.models.evaluate import streamed
from admm_prune.models.inputs import BatchTokens, Collector, SharedInput
from admm_prune.models.losses import split_rows, token_scores
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import IN_MEMORY, Offloading
from admm_prune.models.structure import Block, WeightView, replaced_forward
from admm_prune.statistics import SUM_BYTES, UNWEIGHTED, TokenWeighting

_APART = 1 << 30  # bytes of sums from which a separate pass of the block is worth it


class BlockStream:
    """The calibration text on its way through the model, block after block.

    The model is called once per batch, with blocks that return their inputs, to record with which arguments it calls
    them beside the hidden states. From then on blocks are replayed one by one, with the recorded arguments, on the
    outputs of the preceding, already pruned blocks. Blocks are taken in order: `collect(0)`, prune, `advance(0)`,
    `collect(1)`, and so on. One block's statistics are held at a time, and the hidden states of all batches.

    Args:
        model: in evaluation mode.
        blocks: all of its blocks, as `decoder_blocks` finds them.
        sequences: calibration text.
        device: on which the model computes; Grams live there.
        validation_fraction: of the sequences, whose Gram is also kept separately. A single sequence is not split.
        holdout: other text, for reporting only.
        offloading: of the blocks: a block is loaded while it is in use.
        activation_store: keeps the hidden states.
        world: processes that share the sequences, each with a part of every part of the text. The statistics are those
            of all sequences in all of them; everything else is of a process's own share.
        sparing: large Grams of the widest inputs are accumulated separately, in another pass of the block and before
            those of the others; bitwise the same.
        weighting: of the tokens in the Grams. Its scores are computed here, by the model as it is now: 4 bytes per
            token are kept on the host, and of the logits at most 2^25 exist at a time (a row of L x V where the model
            changes them after its output embedding).

    Attributes:
        position: the index of the current block.

    Raises:
        UserError: the hidden states that enter the first block are not finite, there are fewer calibration sequences
            than processes, or the scores cannot be computed.
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
        offloading: Offloading = IN_MEMORY,
        activation_store: ActivationStore | None = None,
        world: World = ALONE,
        sparing: bool = False,
        weighting: TokenWeighting = UNWEIGHTED,
    ) -> None:
        if model.training:
            raise ValueError("a model in training mode drops activations at random: call model.eval() first")
        self._blocks = blocks
        self.position, self._world, self._sparing = 0, world, sparing
        self._weighting = weighting
        activation_store = activation_store or ActivationStore()
        calibration, validation = sequences.split(validation_fraction)
        parts = {"calibration": calibration, "validation": validation, "holdout": holdout}
        # Of a single sequence nothing is held out: there is no validation part then.
        self._texts = {part: text for part, text in parts.items() if text is not None and text.rows}
        if len(calibration.rows) < world.size:
            count = len(sequences.rows)
            raise UserError(
                f"{count} calibration sequences are too few for {world.size} processes: give more --samples"
            )
        self._device = place = torch.device(device)
        local = {part: _partition(text, world) for part, text in self._texts.items()}
        self._tokens: dict[str, list[BatchTokens]] = {}
        if self._weighting.needs_context:
            for part, text in local.items():
                whole = sequences if part != "holdout" else self._texts[part]
                numbers = {id(row): number for number, row in enumerate(whole.rows)}
                rows = [numbers[id(row)] for row in text.rows]
                scores = self._scores(model, text.batches, offloading, activation_store)
                self._tokens[part] = [
                    BatchTokens(batch, torch.tensor(rows[i * text.batch_size : (i + 1) * text.batch_size]), scores[i])
                    for i, batch in enumerate(text.batches)
                ]
        wrap = returned_form(model, blocks, place, offloading)
        self._states = {
            part: record(
                model,
                blocks,
                ((f"{part}/{i}", batch) for i, batch in enumerate(text.batches)),
                place,
                offloading=offloading,
                wrap=wrap,
                activation_store=activation_store,
            )
            for part, text in local.items()
        }

    def _scores(
        self, model: nn.Module, batches: Sequence[Batch], offloading: Offloading, activation_store: ActivationStore
    ) -> list[Tensor | None]:
        """The scores (b, L) of every batch; None for each where the weighting has none."""
        score = self._weighting.score
        if score is None:
            return [None] * len(batches)
        pieces = [split_rows(model, batch) for batch in batches]
        every = [piece for some in pieces for piece in some]
        call = partial(token_scores, model, score=score, device=self._device)
        try:
            if offloading.is_offloaded:
                scores = iter(list(streamed(model, every, offloading, call, activation_store.another())))
            else:
                scores = iter([call(piece) for piece in every])
        except UserError:
            raise
        except (ValueError, LinAlgError) as error:
            raise UserError(f"token scores: {error}") from error
        return [torch.cat([next(scores) for _ in some]) for some in pieces]

    @property
    def activations(self) -> Mapping[str, Tensor]:
        """The hidden states that enter the current block, of every batch by its name, on the host.

        They are loaded on access.
        """
        states = {state.name: state for state in self._all_states()}
        return Lazy(list(states), lambda name: states[name].stored)

    @property
    def shares_state(self) -> bool:
        """Whether blocks may read what earlier ones wrote, see `BatchState.shares_state`: a stream then cannot
        `resume`, it has to `advance` through all blocks."""
        return any(state.shares_state for state in self._all_states())

    def resume(self, index: int, activations: Mapping[str, Tensor]) -> None:
        """Continues at block `index` with earlier `activations` of it.

        Raises:
            ValueError: they are of other batches.
        """
        states = self._all_states()
        if {state.name: state.stored.shape for state in states} != {name: x.shape for name, x in activations.items()}:
            raise ValueError("the activations are of other batches than those of the text")
        for state in states:
            state.hidden = activations[state.name]
        self.position = index

    @torch.no_grad()
    def collect(
        self,
        index: int,
        only: Collection[str] | None = None,
        outputs: dict[str, Tensor] | None = None,
        *,
        centre: bool = False,
        advance: bool = False,
    ) -> list[SharedInput]:
        """The inputs of block `index`, in the order of its weights; pads are left out.

        Args:
            only: names of weights, if not all are needed: Grams are the largest tensors.
            outputs: receives the outputs of the block, (n, hidden size) for every part of the text.
            centre: the statistics include centred Grams (`LayerStatistics.centred`).
            advance: then advances to the next block, where possible with the same pass over the text.

        Raises:
            ValueError: another block is current.
            UserError: a weight is never used, reads inputs other than one per token, activations overflow, or the
                weighting needs what is not known, or does not return one finite non-negative weight per token.
        """
        block = self._current_block(index)
        weights = block.weights if only is None else tuple(view for view in block.weights if view.name in only)
        shared: list[SharedInput] = []
        groups = self._apart(weights)
        # In one pass: experts may need a second one.
        advancing = advance and len(groups) == 1 and all(view.expert is None for view in weights)
        for some in groups:
            receiving = None if shared else outputs  # of the first pass alone
            collector = Collector(some, self._weighting, centre=centre, stop=receiving is None and not advancing)
            self._observe(collector, index, receiving, advance=advancing)
            collector.join(tuple(self._states), self._world)
            if collector.starving():
                self._observe(collector, index)
                collector.join(tuple(self._states), self._world)
            shared += collector.shared_inputs()
        if advancing:
            self.position += 1
        elif advance:
            self.advance(index)
        places = {view.name: place for place, view in enumerate(weights)}
        return sorted(shared, key=lambda one: min(places[view.name] for view in one.weights))

    def _apart(self, weights: tuple[WeightView, ...]) -> list[tuple[WeightView, ...]]:
        """The weights whose Grams are accumulated together: all, or the widest separately to save memory."""
        every = [view.shape[1] for view in weights]
        widths = set(every)
        grams: Collection[int] = (
            every if self._weighting.needs_outputs else widths
        )  # one for each weight, or for each input
        sums = len(self._states) * sum(SUM_BYTES * width**2 for width in grams)
        if not self._sparing or len(widths) == 1 or sums < _APART or any(v.expert is not None for v in weights):
            return [weights]
        widest = max(widths)
        wide = tuple(view for view in weights if view.shape[1] == widest)
        narrow = tuple(view for view in weights if view.shape[1] < widest)
        return [wide, narrow]  # while the widest are accumulated nothing else is held

    def _observe(
        self, collector: Collector, index: int, outputs: dict[str, Tensor] | None = None, *, advance: bool = False
    ) -> None:
        """One run of the block over all batches, whose outputs become the hidden states if it is to advance."""
        with collector.watching():
            for part, states in self._states.items():
                seen: list[Tensor] = []
                tokens = self._tokens.get(part)
                for number, state in enumerate(states):
                    collector.begin(part, state.mask, state.lengths, None if tokens is None else tokens[number])
                    try:
                        hidden = state.replay(self._blocks[index], index)
                    except StopForwardError:
                        continue
                    if outputs is not None:
                        seen.append(hidden[state.mask])
                    if advance:
                        state.hidden = hidden
                if outputs is not None:
                    outputs[part] = torch.cat(seen) if seen else outputs["calibration"][:0]

    @torch.no_grad()
    def pairs(
        self, index: int, weights: Sequence[WeightView], targets: dict[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The inputs of the first of some weights of block `index` and the outputs of the last, real tokens only, for
        every part of the text.

        Args:
            weights: that follow one another, in an order in which the block calls them.
            targets: target outputs of the block, from `collect`: the second of a pair is then the output of the last
                weight that gives them, if the block adds it to its residual stream, in at least float32. The weights
                are not multiplied.

        Returns:
            (n, in) and (n, out) for every part.

        Raises:
            ValueError, UserError: as `advance`.
        """
        block = self._current_block(index)
        first, last = weights[0].module, weights[-1].module
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for part, states in self._states.items():
            inputs, outputs, done = [], [], 0
            for state in states:
                seen: list[Tensor] = []
                with ExitStack() as stack:
                    stack.enter_context(first.register_forward_pre_hook(_keep(seen)))
                    if targets is None:
                        stack.enter_context(last.register_forward_hook(_keep_output(seen)))
                    else:
                        stack.enter_context(_zero_outputs(weights))
                    hidden = state.replay(block, index)
                mask = state.mask.flatten()
                inputs.append(seen[0].reshape(-1, seen[0].shape[-1])[mask])
                if targets is None:
                    outputs.append(seen[1].reshape(-1, seen[1].shape[-1])[mask])
                else:
                    residual = hidden[state.mask]
                    wide = torch.promote_types(residual.dtype, torch.float32)
                    outputs.append(targets[part][done : done + len(residual)].to(wide) - residual)
                    done += len(residual)
            if states:
                pairs[part] = (torch.cat(inputs), torch.cat(outputs))
            else:  # others share the text
                entered, left = pairs["calibration"]
                pairs[part] = (entered[:0], left[:0])
        return pairs

    def places(self, part: str) -> tuple[int, Tensor | None, list[int]]:
        """The number of all tokens of a part of the text; the positions among them of this process's tokens (n,), None
        if it has all; and the lengths of this process's sequences."""
        text = self._texts[part]
        lengths = [len(row.ids) for row in text.rows]
        if self._world.size == 1:
            return text.tokens, None, lengths
        starts = accumulate(lengths, initial=0)
        spans = self._world.partition(list(zip(starts, lengths, strict=False)))
        positions = [torch.arange(start, start + length, device=self._device) for start, length in spans]
        return text.tokens, torch.cat(positions), [length for _, length in spans]

    @torch.no_grad()
    def adds(self, index: int, last: WeightView) -> bool:
        """True if block `index` adds the output of `last` to its own output: tested on one batch of the first
        process."""
        block = self._current_block(index)
        state = next(iter(self._states.values()))[0]
        before = state.replay(block, index)
        size = before.float().square().mean().sqrt()
        g = torch.Generator().manual_seed(0)
        more = torch.randn(before.shape[-1], generator=g).to(before) * size.to(before)
        with last.module.register_forward_hook(_adding(more)):
            after = state.replay(block, index)
        off = ((after.float() - before.float()) - more.float()).square().mean().sqrt()
        return self._world.broadcast_from_rank0(lambda: bool(off <= 0.05 * size))

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Runs block `index` with its current weights and advances to the next block.

        Raises:
            ValueError: another block is current.
            UserError: its outputs are not finite.
        """
        block = self._current_block(index)
        for state in self._all_states():
            state.hidden = state.replay(block, index)
        self.position += 1

    @torch.no_grad()
    def preview(self, index: int) -> Tensor:
        """The outputs of block `index` on the first batch, with its current weights; does not advance."""
        return self._states["calibration"][0].replay(self._current_block(index), index)

    def states(self, index: int) -> Mapping[str, list[BatchState]]:
        """The batches of this process that enter block `index`, for every part of the text."""
        self._current_block(index)
        return self._states

    @torch.no_grad()
    def energy(self) -> float:
        """||h||_F^2: the squared norms of the current hidden states of all calibration tokens, summed in float64."""
        states = self._states["calibration"] + self._states.get("validation", [])
        local = sum(float(state.hidden[state.mask].double().square().sum()) for state in states)
        return float(self._world.all_reduce(torch.tensor(local, dtype=torch.float64)))

    def _all_states(self) -> list[BatchState]:
        return [state for states in self._states.values() for state in states]

    def _current_block(self, index: int) -> Block:
        if index != self.position:
            raise ValueError(f"blocks are taken in order: it is the turn of block {self.position}, not {index}")
        return self._blocks[index]


def _partition(text: Sequences, world: World) -> Sequences:
    return replace(text, rows=tuple(world.partition(text.rows)))


@contextmanager
def _zero_outputs(weights: Sequence[WeightView]) -> Generator[None]:
    """The modules of these weights return zeros, without multiplying."""
    with ExitStack() as stack:
        for view in weights:
            width = view.parameter.shape[-1 if view.transposed else -2]
            stack.enter_context(replaced_forward(view.module, partial(_zeros, width)))
        yield


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, args: seen.append(args[0])


def _keep_output(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    # A copy: Falcon adds to it in place.
    return lambda _, __, output: seen.append(output.clone())


def _adding(more: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, __, output: output + more
