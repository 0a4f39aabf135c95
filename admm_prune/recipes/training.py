"""The one training loop of the recipes that train: batches in an order without replacement, one optimizer, one rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from admm_prune.data.sequences import Batch, Row, Sequences
from admm_prune.models.evaluate import cross_entropy
from admm_prune.solvers.schedules import warm_up_then_linear
from admm_prune.solvers.sparse_adam import SparseAdam

Loss = Callable[[nn.Module, Batch], Tensor]

_WINDOW = 32  # steps that a point of the curve is the mean over


class Trainer:
    """Steps of one optimizer on batches of a text, at a rate that rises shortly, then falls linearly to zero.

    Every sequence is seen once before any is seen again, in an order drawn anew for every epoch.

    Attributes:
        steps, done: of the run; done so far.
        tokens: trained on so far.
        curve: (steps done, mean loss of the steps since the last point).
    """

    def __init__(
        self, model: nn.Module, optimizer: SparseAdam, loss: Loss, sequences: Sequences, *, steps: int,
        batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.loss, self.steps = model, optimizer, loss, steps
        self.done, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[tuple[int, float]] = []
        self._batches = endless_batches(sequences, batch_size, seed)
        self._rates = LambdaLR(optimizer, warm_up_then_linear(steps))
        self._recent: list[Tensor] = []

    @property
    def lr(self) -> float:
        """The highest rate, before the schedule."""
        return float(self._rates.base_lrs[0])

    @lr.setter
    def lr(self, value: float) -> None:
        factor = self._rates.lr_lambdas[0](self.done)
        self._rates.base_lrs = [value] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["lr"] = value * factor

    def take(self, count: int) -> list[Batch]:
        """The next batches of the text, to be used otherwise."""
        return [next(self._batches) for _ in range(count)]

    def step(self) -> None:
        began = time.perf_counter()
        batch = next(self._batches)
        value = self.loss(self.model, batch)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._rates.step()
        self.done, self.tokens = self.done + 1, self.tokens + int(batch.lengths.sum())
        self._recent.append(value.detach())
        if len(self._recent) == _WINDOW or self.done == self.steps:
            self.curve.append((self.done, float(torch.stack(self._recent).float().mean())))
            self._recent = []
        self.seconds += time.perf_counter() - began

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.done,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "loss": [{"step": step, "loss": loss} for step, loss in self.curve],
        }


def endless_batches(sequences: Sequences, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of whole epochs, one after the other, each in an order of its own."""

    def collate(rows: list[Row]) -> Batch:
        return sequences.batch([row.ids for row in rows])

    loader: DataLoader[Any] = DataLoader(
        list(sequences.rows),  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=batch_size,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        drop_last=len(sequences.rows) >= batch_size,
    )
    while True:
        yield from loader


@contextmanager
def trainable(model: nn.Module) -> Generator[None]:
    """Within it every parameter takes a gradient; afterwards those that did before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Sequences) -> float:
    """The mean cross-entropy over the scored tokens, in float64; inf where it is not a number."""
    total = sum(float(cross_entropy(model, batch)) for batch in sequences.batches)
    mean = total / sequences.scored_tokens
    return mean if math.isfinite(mean) else math.inf
