"""The training loop of all methods that train, and a learning rate range test."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from admm_prune.data.sequences import Batch, Row, Sequences
from admm_prune.methods.elsa.engine import Engine, replaced_forwards
from admm_prune.models.losses import cross_entropy, holds_logits, rows_at_once
from admm_prune.models.parallel import ALONE, World
from admm_prune.ops.sharding import local
from admm_prune.solvers.elsa.anchors import totals
from admm_prune.solvers.elsa.moments import total_norm
from admm_prune.solvers.schedules import warm_up_then_linear
from admm_prune.solvers.sparse_adam import SparseAdam

Loss = Callable[[nn.Module, Batch], Tensor]
_ENGINE = Engine()

_WINDOW = 32  # steps per point of the loss curve
_SMALLEST, _LARGEST = -14.0, -2.0  # exponents of 2 of the trial steps, in units of the root mean square of the weights
_TRIALS, _EXACT = 7, 0.4  # maximum number of trials; precision of the exponent
GRADIENTS = 3  # batches whose gradients give the direction
DEFAULT_RATE = 2e-4  # if none can be measured, because no step lowers the loss: the rate of `SparseAdam.faithful`
_AT_HALF, _POWER = 2.3, 0.75  # the best rates of a grid, on two models at five densities: see `rate`


class Trainer:
    """Training steps of one optimizer on batches of a text, with warm-up and linear decay of the learning rate.

    All batches are full: every epoch has a new random order, and leaves out the sequences after its last full batch.
    Several processes share every batch: the model is sharded over them, and gradients are averaged over the processes.

    Attributes:
        objective: the loss of a batch, a mean over its scored tokens.
        engine, device: how and where passes are computed.
        notes: a note if the model needs whole logits.
        steps, done: the steps of the run, and those done so far.
        tokens: the number of tokens trained on so far.
        curve: the points (steps done, mean loss of the steps since the last point).
    """

    def __init__(
        self, model: nn.Module, optimizer: SparseAdam, loss: Loss, sequences: Sequences, *, steps: int,
        batch_size: int, seed: int, warm_up: float = 0.05, world: World = ALONE, engine: Engine = _ENGINE,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.steps, self.engine = model, optimizer, steps, engine
        self.done, self.tokens = 0, 0
        self.curve: list[tuple[int, float]] = []
        self.objective, self._world = loss, world
        self._batches = endless_batches(sequences, batch_size, seed)
        self._taken = 0
        self._rates = LambdaLR(optimizer, warm_up_then_linear(steps, warm_up))
        self._recent: list[Tensor] = []
        self._blocks = engine.blocks(model)
        self.device = next(model.parameters()).device
        whole = holds_logits(model)
        at_once = rows_at_once(model, sequences.length) if whole else batch_size
        self._rows = min(engine.micro_batch or batch_size, at_once)
        self.notes: tuple[str, ...] = ()
        if whole:
            changed = "the model changes its logits after its output embedding"
            self.notes = (f"{changed}: its loss holds those of {self._rows} sequences at once",)

    @property
    def lr(self) -> float:
        """The peak learning rate, which the schedule scales."""
        return float(self._rates.base_lrs[0])

    @lr.setter
    def lr(self, value: float) -> None:
        factor = self._rates.lr_lambdas[0](self.done)
        self._rates.base_lrs = [value] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["lr"] = value * factor

    @property
    def last_lr(self) -> float:
        """The learning rate of the last step."""
        return self.lr * float(self._rates.lr_lambdas[0](max(0, self.done - 1)))

    def take(self, count: int) -> list[Batch]:
        """The next batches of the text, which are then not trained on."""
        self._taken += count
        return [next(self._batches) for _ in range(count)]

    def backward(self, batch: Batch) -> Tensor:
        """Adds the gradient of the loss of a batch to the gradients of the parameters.

        Returns:
            The contribution of this process; the loss is its mean over the processes.
        """
        total = torch.zeros((), device=self.device)
        with replaced_forwards(self._blocks):
            for weight, piece in self._shares(batch):
                with self.engine.autocast(self.device):
                    value = weight * self.objective(self.model, piece)
                value.backward()
                total += value.detach()
        return total

    def _shares(self, batch: Batch) -> Iterator[tuple[float, Batch]]:
        """The micro-batches of this process, with weights. The mean over the processes of their weighted losses is the
        mean loss over the scored tokens of the batch."""
        rows, size = self._world.partition(range(len(batch.lengths))), self._world.size
        scored = max(1, int(batch.scored.sum()))
        # All processes take part in every call: one without sequences left runs the first with weight zero.
        for start in range(0, -(-len(batch.lengths) // size), self._rows):
            chosen = rows[start : start + self._rows]
            piece = Batch(batch.input_ids[chosen or [0]], batch.lengths[chosen or [0]], batch.bos)
            yield (int(piece.scored.sum()) * size / scored if chosen else 0.0), piece

    def held_out_loss(self, sequences: Sequences) -> float:
        """`held_out_loss` of the model, computed as in training. All processes return the value of the first one: they
        may round differently, and have to agree on the best model."""
        with replaced_forwards(self._blocks), self.engine.autocast(self.device):
            loss = held_out_loss(self.model, sequences)
        return self._world.broadcast_from_rank0(lambda: loss)

    def step(self) -> None:
        batch = self.take(1)[0]
        value = self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._rates.step()
        self.done, self.tokens = self.done + 1, self.tokens + int(batch.lengths.sum())
        self._recent.append(value)
        if len(self._recent) == _WINDOW or self.done == self.steps:
            self.curve.append((self.done, float(self._all_recent().mean())))
            self._recent = []

    def position(self) -> dict[str, Any]:
        """The state of the loop, without model and optimizer, as JSON values that are equal in all processes."""
        return {
            "done": self.done,
            "tokens": self.tokens,
            "curve": self.curve,
            "taken": self._taken,
            "base_lrs": list(self._rates.base_lrs),
            "recent": self._all_recent().tolist(),
        }

    def move_to(self, position: dict[str, Any]) -> None:
        """Continues from a `position`; the batches before it are skipped."""
        self.done, self.tokens = position["done"], position["tokens"]
        self.curve = [(step, loss) for step, loss in position["curve"]]
        self.take(position["taken"] - self._taken)
        self._rates.base_lrs = list(position["base_lrs"])
        self._rates.last_epoch = self.done
        device = next(self.model.parameters()).device
        self._recent = list(torch.tensor(position["recent"], device=device))

    def _all_recent(self) -> Tensor:
        """The losses (n,) since the last point of the curve, averaged over the processes."""
        return (
            self._world.all_reduce(torch.stack(self._recent)).div_(self._world.size) if self._recent else torch.zeros(0)
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.done,
            "skipped": self.optimizer.skipped,  # of the steps, for a gradient that was not finite
            "tokens": self.tokens,
            "loss": [{"step": step, "loss": loss} for step, loss in self.curve],
        }


def endless_batches(sequences: Sequences, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of an endless series of epochs, each in its own random order and without the last, incomplete batch. If
    there are fewer sequences than a batch, every batch has all of them."""

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
    """Context in which every parameter requires a gradient; restores the previous setting."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Sequences) -> float:
    """The mean cross-entropy over the scored tokens, in float64; inf if it is not finite."""
    total = sum(float(cross_entropy(model, batch)) for batch in sequences.batches)
    mean = total / sequences.scored_tokens
    return mean if math.isfinite(mean) else math.inf


def passes(validation_batches: float) -> int:
    """The cost of a range test, in forward and backward passes over a batch; a forward pass alone counts as a third.
    The second search that follows if no step lowers the loss is not counted.

    Args:
        validation_batches: the number of batches in one validation.
    """
    return GRADIENTS + math.ceil((_TRIALS + 1) * validation_batches / 3)


@dataclass(frozen=True)
class MeasuredRate:
    """The step along -sign(g) that lowers the loss the most.

    Attributes:
        decrease: by how much it lowers the loss. Not positive if no step lowers the loss; NaN if the loss or the
            gradient is not finite at the weights themselves.
    """

    step: float
    decrease: float

    @property
    def usable(self) -> bool:
        """Whether the step lowers the loss."""
        return 0.0 < self.decrease < math.inf

    def rate(self, density: float) -> float:
        """The learning rate of Adam for training at density d: 2.3 (2 d)^-3/4 times the step, or `DEFAULT_RATE` if that
        is not usable.

        The fewer weights remain, the larger the changes that they need, while the best single step hardly grows.
        """
        if not self.usable:
            return DEFAULT_RATE
        return float(_AT_HALF * self.step * (2.0 * max(density, 1e-3)) ** -_POWER)


def measured_rate(
    model: nn.Module,
    backward: Callable[[Batch], Tensor],
    gradients: Sequence[Batch],
    validation_loss: Callable[[], float],
) -> MeasuredRate:
    """argmin_eta f(x - eta sign(g)), with g the gradient at the weights x: the first step of Adam has this form,
    however the loss is scaled.

    If all trial steps raise f, they may be so large that f is flat or not finite there, and smaller ones are tried.
    Zeros, such as pruned weights, stay zeros. The weights are restored afterwards.

    Args:
        model: whose parameters with `requires_grad` are moved.
        backward: adds the gradient of the training loss of a batch, f or f with distillation, to the gradients of the
            parameters.
        gradients: the batches over which g is averaged.
        validation_loss: computes f for the current weights.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch in gradients:
        backward(batch)
    active = [parameter for parameter in parameters if parameter.grad is not None]
    finite = bool(active) and math.isfinite(total_norm(active)[1])
    parts = [local(parameter.detach()) for parameter in parameters]  # the shards of this process, moved in place
    moved = [(x, x.clone()) for x in parts]
    directions = [_direction(parameter.grad, x) for parameter, x in zip(parameters, parts, strict=True)]
    for parameter in parameters:
        parameter.grad = None
    counts = [torch.stack([x.float().square().sum().double(), x.count_nonzero().double()]) for x in parts]
    square, entries = totals(parameters, torch.stack(counts)).sum(0)
    scale = math.sqrt(float(square) / max(1.0, float(entries)))  # each on its own: a plan answers for single values

    def value(step: float) -> float:
        for (part, x), direction in zip(moved, directions, strict=True):
            part.copy_(x - step * direction.to(x.dtype))
        return validation_loss()

    def best(largest: float) -> tuple[float, float, float]:
        """The exponent of the best step that is not larger than 2^largest, f after it, and the smallest exponent
        tried."""
        tried: list[float] = []

        def at(power: float) -> float:
            tried.append(power)
            return value(scale * 2.0**power)

        bounds, options = (_SMALLEST, largest), {"maxiter": _TRIALS, "xatol": _EXACT}
        optimum: Any = minimize_scalar(at, bounds=bounds, method="bounded", options=options)
        return float(optimum.x), float(optimum.fun), min(tried)

    with torch.no_grad():
        start = value(0.0)
        if not (finite and math.isfinite(start)):
            return MeasuredRate(step=0.0, decrease=math.nan)
        power, least, smallest = best(_LARGEST)
        if least > start:
            power, least, _ = best(smallest)
        for part, x in moved:
            part.copy_(x)
    return MeasuredRate(step=scale * 2.0**power, decrease=start - least)


def _direction(gradient: Tensor | None, x: Tensor) -> Tensor:
    """sign(g) of the local shard, as int8; zero where x is zero."""
    slope = torch.zeros_like(x) if gradient is None else local(gradient)
    return (slope.sign() * (x != 0)).to(torch.int8)
