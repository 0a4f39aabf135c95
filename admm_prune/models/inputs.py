"""Statistics of the inputs of the weights of one block: one Gram for every distinct input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.activation_store import StopForwardError, check_finite
from admm_prune.models.experts import routed
from admm_prune.models.parallel import World
from admm_prune.models.structure import WeightView
from admm_prune.statistics import GramAccumulator, LayerStatistics

TokenWeights = Callable[[Tensor], Tensor]  # inputs (n, in) -> weights (n,)


@dataclass(frozen=True)
class SharedInput:
    """Weights that read the same inputs (q, k and v; gate and up), and the statistics of these."""

    weights: tuple[WeightView, ...]
    statistics: LayerStatistics


class Collector:
    """Accumulates the inputs of some weights of one block in one Gram per distinct input.

    Weights share an input when they are called with the same tensor, unchanged in between. An expert's inputs are
    the tokens that the router sends it. An expert that receives fewer tokens than one of its matrices has inputs
    starves: the block is run again, this matrix is given all tokens of the block except pads, and its statistics
    are taken from those. `weigh` gives the tokens their weights in the Grams. With `centre` the
    statistics include centred Grams.

    With `stop` a forward pass ends with StopForwardError at the last of the inputs, where each of the weights was
    called exactly once in the first pass, which is a whole one; never where the router decides which are called.
    """

    def __init__(
        self,
        weights: tuple[WeightView, ...],
        weigh: TokenWeights | None = None,
        *,
        centre: bool = False,
        stop: bool = False,
    ) -> None:
        self._weights, self._weigh, self._centre = weights, weigh, centre
        self._stop = stop and all(view.expert is None for view in weights)
        self._passes = 0
        self._calls: Counter[int] = Counter()  # of each weight in the current pass
        self._leaders: dict[int, int] = {}  # weight -> the first weight of the block that reads the same input
        self._grams: dict[tuple[int, str], GramAccumulator] = {}  # by (leader, part of the text)
        self._seen: list[tuple[int, Tensor, int]] = []  # this batch's inputs: (leader, tensor, its version)
        self._part = ""
        self._mask = torch.empty(0)
        self._lengths: list[int] = []
        self._routed: dict[int, int] = {}  # tokens that the router sent to weights that starve
        self._joined: set[int] = set()  # leaders whose Grams are those of all processes

    @contextmanager
    def watching(self) -> Generator[None]:
        """Within it, the block's calls are observed: all of them, or after `starving` those of starved experts."""
        numbers = {n: view for n, view in enumerate(self._weights) if n in self._routed or not self._routed}
        with ExitStack() as stack:
            for number, view in numbers.items():
                if view.expert is None:
                    stack.enter_context(view.module.register_forward_pre_hook(self._hook(number)))
            experts = {number: view for number, view in numbers.items() if view.expert is not None}
            if experts:
                stack.enter_context(
                    routed(experts, self._observe_routed, lambda: self._mask, everything=bool(self._routed))
                )
            yield

    def begin(self, part: str, mask: Tensor) -> None:
        """The next calls belong to a batch of `part` with these real tokens."""
        self._part, self._mask, self._seen = part, mask.flatten(), []
        self._lengths = mask.sum(1).tolist()
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
                raise UserError(f"{self._name(number)} is never used on the calibration text: it cannot be pruned")
        shared = []
        for leader in dict.fromkeys(self._leaders.values()):
            members = tuple(weights[number] for number, first in self._leaders.items() if first == leader)
            statistics = LayerStatistics.collected(
                self._grams[leader, "calibration"],
                self._grams.get((leader, "validation")),
                self._grams.get((leader, "holdout")),
                centre=self._centre,
            )
            check_finite(statistics.gram, f"the inputs of {members[0].name}")
            if leader in self._routed:
                statistics = replace(statistics, notes=(self._note(leader, statistics.tokens),))
            shared.append(SharedInput(members, statistics))
        return shared

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

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._observe(number, args[0])
            self._calls[number] += 1
            if self._stop and self._passes > 1 and len(self._calls) == len(self._weights):
                raise StopForwardError

        return hook

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
                f"{self._name(number)} reads {len(rows)} inputs for {len(self._mask)} tokens, not one per token"
            )
        self._add(number, rows[self._mask], self._lengths)

    def _observe_routed(self, number: int, rows: Tensor) -> None:
        """The inputs of an expert: real tokens only. No two experts share an input."""
        self._leaders[number] = number
        self._add(number, rows)

    def _add(self, number: int, rows: Tensor, lengths: list[int] | None = None) -> None:
        key = (number, self._part)
        if key not in self._grams:
            self._grams[key] = self._accumulator(rows.shape[1], rows.device)
        try:
            self._grams[key].add(rows, None if self._weigh is None else self._weigh(rows), lengths)
        except ValueError as error:
            raise UserError(f"{self._name(number)}: {error}") from error

    def _accumulator(self, width: int, device: torch.device) -> GramAccumulator:
        return GramAccumulator(width, device, products=torch.float64 if self._centre else torch.float32)
