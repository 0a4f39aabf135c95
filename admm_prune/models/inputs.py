"""What enters the weights of one block while it runs: one Gram for every distinct input."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.flow import check_finite
from admm_prune.models.structure import WeightView
from admm_prune.problems.gram import GramAccumulator, LayerStatistics


@dataclass(frozen=True)
class SharedInput:
    """Weights that read the same inputs (q, k and v; gate and up), and the statistics of these."""

    weights: tuple[WeightView, ...]
    statistics: LayerStatistics


class Collector:
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
            check_finite(statistics.gram, f"the inputs of {members[0].name}")
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
