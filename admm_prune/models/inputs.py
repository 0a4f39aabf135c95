"""Statistics of the inputs of the weights of one block: one Gram for every distinct input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.sequences import Batch
from admm_prune.errors import UserError
from admm_prune.models.activation_store import StopForwardError, check_finite
from admm_prune.models.experts import routed
from admm_prune.models.parallel import World
from admm_prune.models.structure import WeightView
from admm_prune.statistics import UNWEIGHTED, GramAccumulator, LayerStatistics, TokenContext, TokenWeighting


@dataclass(frozen=True)
class SharedInput:
    """Weights that read the same inputs (q, k and v; gate and up), and the statistics of these."""

    weights: tuple[WeightView, ...]
    statistics: LayerStatistics


@dataclass(frozen=True, eq=False)
class BatchTokens:
    """The tokens of a batch, as a `TokenContext` needs them.

    Attributes:
        sequences: (b,) the numbers of its sequences in the text.
        scores: (b, L), where the objective has some.
    """

    batch: Batch
    sequences: Tensor
    scores: Tensor | None = None

    def context(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors (n,) of the real tokens, by the names of a `TokenContext`."""
        ids, mask = self.batch.input_ids, self.batch.mask
        followed = torch.zeros_like(mask)
        followed[:, :-1] = self.batch.scored[:, 1:]
        columns = {
            "ids": ids,
            "positions": torch.arange(ids.shape[1]).expand_as(ids),
            "sequences": self.sequences[:, None].expand_as(ids),
            "scored": followed,
        }
        if self.scores is not None:
            columns["scores"] = self.scores
        return {name: column[mask].to(device) for name, column in columns.items()}


def check_tokens_known(weights: Iterable[WeightView], weighting: TokenWeighting) -> None:
    """Raises UserError where the weighting needs the tokens of an input of which only the rows are known."""
    for view in weights:
        if weighting.needs_context and view.expert is not None:
            raise UserError(
                f"{view.name}: token_weights with a context needs the tokens of the inputs, which are not known for "
                "experts: leave the experts out with --ignore, or take an objective that reads the inputs alone"
            )


class Collector:
    """Accumulates the inputs of some weights of one block in one Gram per distinct input.

    Weights share an input when they are called with the same tensor, unchanged in between. An expert's inputs are
    the tokens that the router sends it. An expert that receives fewer tokens than one of its matrices has inputs
    starves: the block is run again, this matrix is given all tokens of the block except pads, and its statistics
    are taken from those. `weighting` gives the tokens their weights in the Grams; where it needs the outputs of a
    weight, no Gram is shared. With `centre` the statistics include centred Grams.

    With `stop` a forward pass ends with StopForwardError at the last of the inputs, where each of the weights was
    called exactly once in the first pass, which is a whole one; never where the router decides which are called.
    """

    def __init__(
        self,
        weights: tuple[WeightView, ...],
        weighting: TokenWeighting = UNWEIGHTED,
        *,
        centre: bool = False,
        stop: bool = False,
    ) -> None:
        check_tokens_known(weights, weighting)
        self._weights, self._weighting, self._centre = weights, weighting, centre
        self._stop = stop and all(view.expert is None for view in weights)
        self._passes = 0
        self._calls: Counter[int] = Counter()  # of each weight in the current pass
        self._leaders: dict[int, int] = {}  # weight -> the first weight of the block that reads the same input
        self._grams: dict[tuple[int, str], GramAccumulator] = {}  # by (leader, part of the text)
        self._seen: list[tuple[int, Tensor, int]] = []  # this batch's inputs: (leader, tensor, its version)
        self._part = ""
        self._mask = torch.empty(0)
        self._batch: BatchTokens | None = None
        self._context: dict[str, Tensor] | None = None  # of this batch, once it is needed
        self._lengths: list[int] = []
        self._routed: dict[int, int] = {}  # tokens that the router sent to weights that starve
        self._joined: set[int] = set()  # leaders whose Grams are those of all processes

    @contextmanager
    def watching(self) -> Generator[None]:
        """Within it, the block's calls are observed: all of them, or after `starving` those of starved experts."""
        numbers = {n: view for n, view in enumerate(self._weights) if n in self._routed or not self._routed}
        with ExitStack() as stack:
            for number, view in numbers.items():
                if view.expert is None and self._weighting.needs_outputs:
                    stack.enter_context(view.module.register_forward_hook(self._hook(number)))
                elif view.expert is None:
                    stack.enter_context(view.module.register_forward_pre_hook(self._hook(number)))
            experts = {number: view for number, view in numbers.items() if view.expert is not None}
            if experts:
                stack.enter_context(
                    routed(experts, self._observe_routed, lambda: self._mask, everything=bool(self._routed))
                )
            yield

    def begin(self, part: str, mask: Tensor, lengths: list[int], tokens: BatchTokens | None = None) -> None:
        """The next calls belong to a batch of `part` with these real tokens, so many in each row."""
        self._part, self._mask, self._lengths, self._seen = part, mask.flatten(), lengths, []
        self._batch, self._context = tokens, None
        if self._passes == 1:
            self._stop = self._stop and all(self._calls[number] == 1 for number in range(len(self._weights)))
        self._passes += 1
        self._calls.clear()

    def join(self, parts: Collection[str], world: World) -> None:
        """Sums the statistics of all processes; a process without tokens for an input adds zeros."""
        if world.size == 1:
            return
        for leaders in world.all_gather(self._leaders):  # in one order everywhere
            for number, leader in leaders.items():
                self._leaders.setdefault(number, leader)
        first = world.all_gather(list(self._leaders))[0]
        self._leaders = {number: self._leaders[number] for number in first}
        for leader in dict.fromkeys(self._leaders.values()):
            for part in parts if leader not in self._joined else ():
                if (leader, part) not in self._grams:
                    self._grams[leader, part] = self._accumulator(self._weights[leader].shape[1], self._mask.device)
                self._grams[leader, part].join(world.all_reduce)
            self._joined.add(leader)

    def starving(self) -> bool:
        """True if the block has to run again over all batches, for the experts with too few tokens."""
        for number, view in enumerate(self._weights):
            if view.expert is not None and self._tokens(number) < view.shape[1]:
                self._routed[number] = self._tokens(number)
                self._leaders.pop(number, None)
                self._joined.discard(number)
                for part in ("calibration", "validation", "holdout"):
                    self._grams.pop((number, part), None)
        return bool(self._routed)

    def shared_inputs(self) -> list[SharedInput]:
        weights = self._weights
        for number in range(len(weights)):
            if number not in self._leaders:
                raise UserError(
                    f"{self._name(number)} is never used on the calibration text: it cannot be pruned, and stays dense "
                    "with --ignore"
                )
        shared = []
        for leader in dict.fromkeys(self._leaders.values()):
            members = tuple(weights[number] for number, first in self._leaders.items() if first == leader)
            statistics = LayerStatistics.collected(
                self._grams[leader, "calibration"],
                self._grams.get((leader, "validation")),
                self._grams.get((leader, "holdout")),
                centre=self._centre,
            )
            statistics = self._checked(statistics, members[0].name)
            if leader in self._routed:
                statistics = replace(statistics, notes=(self._note(leader, statistics.tokens),))
            shared.append(SharedInput(members, statistics))
        return shared

    def _checked(self, statistics: LayerStatistics, name: str) -> LayerStatistics:
        """The statistics, without those of a part of the text whose tokens all have the weight 0.

        Raises:
            UserError: a Gram is not finite, or the weights make it zero.
        """
        if self._weighting.weigh is None:
            check_finite(statistics.gram, f"the inputs of {name}")
            return statistics
        if not bool(torch.isfinite(statistics.gram).all()):
            raise UserError(f"{name}: its weighted Gram is not finite: the token weights or the inputs are too large")
        if not bool(statistics.gram.any()) and statistics.mean is not None and bool(statistics.mean.any()):
            raise UserError(f"{name}: its weighted Gram is zero: the token weights are zero, or too small")
        if statistics.validation is not None and not bool(statistics.validation.any()):
            statistics = replace(statistics, validation=None, validation_tokens=0, validation_mean=None)
        if statistics.holdout is not None and not bool(statistics.holdout.any()):
            statistics = replace(statistics, holdout=None, holdout_tokens=0)
        return statistics

    def _name(self, number: int) -> str:
        return self._weights[number].name

    def _note(self, number: int, tokens: int) -> str:
        inputs = self._weights[number].shape[1]
        return (
            f"the router sent this expert {self._routed[number]} tokens, fewer than its {inputs} inputs: "
            f"it was pruned on all {tokens} tokens of the block"
        )

    def _tokens(self, number: int) -> int:
        """Tokens of the calibration text that the weight received; 0 if a part of the text has none."""
        calibration = self._grams.get((number, "calibration"))
        validation = self._grams.get((number, "validation"))
        return 0 if calibration is None else calibration.tokens + (0 if validation is None else validation.tokens)

    def _hook(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            self._observe(number, args[0], output)
            self._calls[number] += 1
            if self._stop and self._passes > 1 and len(self._calls) == len(self._weights):
                raise StopForwardError

        return hook

    def _observe(self, number: int, inputs: Tensor, output: Tensor | None) -> None:
        same = (first for first, x, version in self._seen if x is inputs and x._version == version)
        leader = number if self._weighting.needs_outputs else next(same, number)
        if self._leaders.setdefault(number, leader) != leader:
            raise UserError(f"{self._name(number)} shares its inputs with other weights in some calls only")
        if leader != number:
            return
        self._seen.append((number, inputs, inputs._version))
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) != len(self._mask):
            raise UserError(
                f"{self._name(number)} reads {len(rows)} inputs for {len(self._mask)} tokens, not one per token"
            )
        outputs = None
        if output is not None:
            outputs = output.reshape(len(rows), -1)[self._mask][:, self._weights[number].rows]
        self._add(number, rows[self._mask], self._lengths, outputs)

    def _observe_routed(self, number: int, rows: Tensor) -> None:
        """The inputs of an expert: real tokens only. No two experts share an input."""
        self._leaders[number] = number
        self._add(number, rows)

    def _add(self, number: int, rows: Tensor, lengths: list[int] | None = None, outputs: Tensor | None = None) -> None:
        key, weigh = (number, self._part), self._weighting.weigh
        if key not in self._grams:
            self._grams[key] = self._accumulator(rows.shape[1], rows.device)
        try:
            weights = None if weigh is None else weigh(rows, self._context_of(number, outputs))
            self._grams[key].add(rows, weights, lengths)
        except (ValueError, LinAlgError) as error:
            raise UserError(f"{self._name(number)}: {error}") from error

    def _context_of(self, number: int, outputs: Tensor | None) -> TokenContext | None:
        if not self._weighting.needs_context:
            return None
        if self._context is None:
            assert self._batch is not None
            self._context = self._batch.context(self._mask.device)
        tensors: dict[str, Any] = {name: x.clone() for name, x in self._context.items()}  # in case they are written to
        return TokenContext(weight=self._name(number), outputs=outputs, **tensors)

    def _accumulator(self, width: int, device: torch.device) -> GramAccumulator:
        return GramAccumulator(width, device, centre=self._centre)
