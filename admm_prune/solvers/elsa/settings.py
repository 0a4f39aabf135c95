"""The settings of ELSA: the penalty, the score that selects the support, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from admm_prune.errors import UserError, check_at_least, check_fractions, unknown

Shape = Literal["constant", "linear", "cosine", "exponential"]
Units = Literal["absolute", "relative"]
Rescale = Literal["immediate", "lagged"]
Fisher = Literal["none", "adam", "clean"]


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The weight rho of (rho / 2) |x - z + u|^2, and its schedule.

    With s the progress of the run before its support is frozen, from 0 to 1, and start = `start` * `value`:
    linear start + (value - start) s, cosine start + (value - start) (1 - cos(pi s)) / 2,
    exponential start (value / start)^s. rho changes only when the duals do.

    Args:
        value: the final rho; inf keeps x = z throughout.
        shape: of the schedule.
        start: the initial rho, as a fraction of `value`.
        units: "absolute" takes `value` as published. "relative" takes it, for each weight matrix, in units of
            rms(clipped gradient of the loss) / rms(weight): at 1 the pull on a weight as far from its target as weights
            are large equals a typical gradient. Of a decoupled penalty the unit is 1 / rms(weight): the pull then
            equals a step of Adam, lr.
        rescale: "immediate" rescales u as soon as rho changes, so that the multiplier rho u is constant; "lagged" only
            at the next dual update, as the published code does.
        decoupled: the pull is not a gradient but a separate step after Adam's, x <- x - lr rho (x - z + u), which
            keeps it out of Adam's second moment; `value` then has another scale.
        balance: where given, the rho of a matrix doubles after each dual update whose relative primal residual exceeds
            `balance` times its dual residual, and halves in the opposite case.
        divide_by_world: divides rho by the number of processes, as the published code does.

    Sources: Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011, section 3.4.1 (balance),
    with the relative residuals of Wohlberg, ADMM Penalty Parameter Selection by Residual Balancing, 2017.
    """

    value: float = 0.1
    shape: Shape = "constant"
    start: float = 0.0
    units: Units = "relative"
    rescale: Rescale = "immediate"
    decoupled: bool = False
    balance: float | None = None
    divide_by_world: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, value=0)
        check_fractions(self, "start")
        if self.shape == "exponential" and self.start == 0.0:
            raise UserError("an exponential penalty cannot start at 0: give a start such as 0.01")
        check_at_least(self, balance=1)
        if self.balance == 1:
            raise UserError(f"balance compares residuals by a factor above 1, not {self.balance}")
        check_choice("shape of a penalty", self.shape, Shape)
        check_choice("unit of a penalty", self.units, Units)
        check_choice("rescaling of u", self.rescale, Rescale)

    def at(self, progress: float) -> float:
        """rho at `progress`, before units and balance."""
        if self.shape == "constant":
            return self.value
        start = self.start * self.value
        if self.shape == "exponential":
            return float(start * (1.0 / self.start) ** progress)
        rise = progress if self.shape == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
        return start + (self.value - start) * rise


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of the entries of a = x + u: |a| F^power, with F a diagonal of the Fisher information.

    Args:
        fisher: "adam" takes Adam's second moment, which also holds the square of a coupled penalty; "clean" keeps a
            moving average of the squared gradient of the loss alone, one more tensor; "none" takes F = 1.
        power: 1/2 is the projection in the metric F, 0 the one by magnitude.
        decay: of the clean average.
        hysteresis: scores of entries in the support count 1 + hysteresis times, so that it changes less.

    A zero in F, which has underflowed, counts as just below the smallest positive number.
    """

    fisher: Fisher = "adam"
    power: float = 0.5
    decay: float = 0.999
    hysteresis: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(self, power=0, hysteresis=0, decay=0)
        if not self.decay < 1:
            raise UserError(f"decay of Score must be less than 1, not {self.decay}")
        check_choice("Fisher diagonal", self.fisher, Fisher)

    @property
    def clean(self) -> bool:
        """Whether a moving average of the squared gradient is kept."""
        return self.weighted and self.fisher == "clean"

    @property
    def weighted(self) -> bool:
        return self.fisher != "none" and self.power > 0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The schedule of a run; steps count from 0.

    Args:
        interval: steps between dual updates.
        first_update: the step after which the first update comes.
        total_steps: the steps of the run; None if its length is unknown, and then nothing depends on progress.
        freeze: the fraction of the run at its end in which the support stays and pruned weights are zero.
        ramp: the fraction of the steps before the freeze in which the sparsity grows, by 1 - (1 - s)^3 of the target.

    Source of the ramp: Zhu and Gupta, To prune, or not to prune, 2017.
    """

    interval: int = 32
    first_update: int = 32
    total_steps: int | None = None
    freeze: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(self, interval=1, first_update=0, total_steps=1)
        check_fractions(self, "freeze", "ramp")
        if self.total_steps is None and (self.freeze not in (0.0, 1.0) or self.ramp):
            raise UserError("freeze and ramp are fractions of the run: give total_steps, or freeze=0 and ramp=0")

    @property
    def freeze_at(self) -> int | None:
        """The first step with a frozen support; None where there is none, or no `total_steps` to take a fraction of."""
        return None if self.total_steps is None or not self.freeze else round(self.total_steps * (1.0 - self.freeze))

    @property
    def frozen_throughout(self) -> bool:
        """Whether no step comes before the freeze."""
        return self.freeze == 1.0 or self.freeze_at == 0

    def progress(self, step: int) -> float:
        """The part of the steps before the freeze that lie before `step`, 0 to 1; 1 where there are none."""
        if self.frozen_throughout:
            return 1.0
        end = self.total_steps if self.freeze_at is None else self.freeze_at
        return 0.0 if end is None else min(1.0, step / end)

    def updated(self, step: int) -> int:
        """The step after which the duals were last updated, before `step`; 0 where they were not yet."""
        if step <= self.first_update:
            return 0
        return self.first_update + (step - 1 - self.first_update) // self.interval * self.interval

    def due(self, step: int) -> bool:
        """Whether the duals are updated after Adam's step `step`."""
        return step >= self.first_update and (step - self.first_update) % self.interval == 0

    def fraction(self, step: int) -> float:
        """The fraction of the final sparsity."""
        if not self.ramp:
            return 1.0
        return 1.0 - max(0.0, 1.0 - self.progress(step) / self.ramp) ** 3

    def wrong_length(self, steps: int) -> str | None:
        """A warning for a run that ends, or continues, after `steps`; None if that is as planned."""
        if self.total_steps is None or steps == self.total_steps:
            return None
        if steps > self.total_steps:
            return f"after {steps} steps, more than total_steps={self.total_steps}: the schedules ended too early"
        late = self.freeze_at is not None and steps < self.freeze_at
        return (
            f"after {steps} steps of total_steps={self.total_steps}, before "
            f"{'the support was to be frozen' if late else 'the end of the schedules'}: total_steps counts calls of "
            "step(), one for several batches whose gradients are accumulated"
        )


def check_choice(what: str, value: str, choices: Any) -> None:
    """Raises UserError for a value that is none of those of a Literal type."""
    if value not in get_args(choices):
        raise unknown(what, value, get_args(choices))


def check_adam(settings: Mapping[str, Any], clip: float | None = None) -> None:
    """Raises UserError for what torch's AdamW refuses, and for an eps, or a norm to clip to, that is not positive.

    Args:
        settings: lr, betas, eps, weight_decay, foreach and fused of a group of parameters.
    """
    lr, betas, eps, weight_decay = (settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
    foreach, fused = settings["foreach"], settings["fused"]
    if clip is not None and not clip > 0:
        raise UserError(f"clip is a norm above 0, or None for no clipping, not {clip}")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise UserError(f"lr is one number, not a tensor of {lr.numel()}")
    if isinstance(lr, Tensor) and foreach:
        raise UserError("lr as a tensor needs foreach=False or foreach=None")
    if foreach and fused:
        raise UserError("give foreach=True or fused=True, not both")
    if not lr >= 0 or not eps > 0 or not weight_decay >= 0:
        raise UserError(
            f"lr and weight_decay are at least 0, and eps is above it, since both moments of a pruned weight are zero: "
            f"not {float(lr)}, {weight_decay} and {eps}"
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas are two numbers from 0 to below 1, not {tuple(map(float, betas))}")
