"""The dual update (z and u from x + u, the next penalty and anchor), and its record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.ops import quantization
from admm_prune.ops.sharding import local
from admm_prune.solvers.elsa.anchors import (
    Anchors,
    State,
    Weight,
    local_shard,
    sharded_like,
    totals,
    working_dtype,
)
from admm_prune.solvers.elsa.moments import DeferredGradient, Moments, fused_scores, generator, stored_anchor
from admm_prune.solvers.elsa.settings import Penalty, Score
from admm_prune.solvers.elsa.supports import Support, scores_of

_BALANCE_STEP, _BALANCE_LIMIT = 2.0, 1e3  # balancing keeps rho within a factor 1000 of the schedule
_SMOOTHING = 0.9  # of the mean squared gradient that scales a relative penalty
_DRAW, _PULL_DRAW = 1, 2  # distinguish these random numbers from those of the moments, and from each other
_NORMS = ("x", "z", "u", "primal", "dual", "pull", "quantization", "anchor")  # of a record, in the order of `_update`
_LEAST_NORM = 1e-30  # a denominator is never smaller
_CHOSEN = 1e3  # added to magnitudes below 1, so that the entries of a given mask come first


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """A dual update of one weight: norms are Euclidean, over all processes; z and u are those after the update.

    Attributes:
        x, z, u, a: |x|, |z|, |u|, |x + u before|.
        primal, dual: |x - z|, |z - z_before|.
        pull: |x - c|, with the anchor c before the update.
        quantization: |c - its stored value|, and `anchor`, |c|.
        entered: entries that entered the support.
        support_size, entries: in the support, in all.
        threshold, threshold_before: the smallest score kept, at this update and at the last one.
        rho, rho_next: before and after the update.
        tau: the factor of u for rho_next.
    """

    x: float
    z: float
    u: float
    primal: float
    dual: float
    pull: float
    quantization: float
    anchor: float
    entered: int
    support_size: int
    entries: int
    threshold: float
    threshold_before: float | None
    rho: float
    rho_next: float
    tau: float

    @property
    def primal_residual(self) -> float:
        """|x - z| / |x|."""
        return _ratio(self.primal, self.x)

    @property
    def dual_residual(self) -> float:
        """|z - z_before| / |u|: rho (z - z_before) relative to the multiplier rho u."""
        return _ratio(self.dual, self.u)


@dataclass(frozen=True, kw_only=True)
class DualUpdate:
    """A dual update of all weights.

    Attributes:
        step: optimizer steps done.
        gradient_norm: of the loss, over all parameters, before clipping, at that step.
        skipped: steps skipped so far because of a non-finite gradient.
        weights: by name.
    """

    step: int
    gradient_norm: float
    skipped: int
    weights: Mapping[str, WeightUpdate]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        weights = {
            name: WeightUpdate(support_size=numbers["kept"], **{k: x for k, x in numbers.items() if k != "kept"})
            for name, numbers in content["weights"].items()
        }
        return cls(**{name: value for name, value in content.items() if name != "weights"}, weights=weights)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `support_size` is stored as "kept"."""
        content = asdict(self)
        for numbers in content["weights"].values():
            numbers["kept"] = numbers.pop("support_size")
        return content

    @property
    def primal_residual(self) -> float:
        """|x - z| / |x|."""
        return _ratio(self._norm("primal"), self._norm("x"))

    @property
    def residual_of_solution(self) -> float:
        """|x - z| / |z|, the primal residual of `Progress`."""
        return self._norm("primal") / max(self._norm("z"), _LEAST_NORM)

    @property
    def dual_residual(self) -> float:
        """|z - z_before| / |z|."""
        return _ratio(self._norm("dual"), self._norm("z"))

    @property
    def churn(self) -> float:
        """|M and not M_before| / k: the part of the support that is new."""
        return _ratio(self.support_changes, self._sum("support_size"))

    @property
    def support_changes(self) -> int:
        """Entries that entered the support."""
        return self._sum("entered")

    @property
    def rho(self) -> float:
        """The mean over the pruned entries of the penalty before the update."""
        return self._mean("rho")

    @property
    def tau(self) -> float:
        """The mean over the pruned entries."""
        return self._mean("tau")

    @property
    def quantization_error(self) -> float:
        """|c - its stored value| / |c|."""
        return _ratio(self._norm("quantization"), self._norm("anchor"))

    @property
    def sparsity(self) -> float:
        return 1.0 - _ratio(self._sum("support_size"), self._sum("entries"))

    def _sum(self, name: str) -> int:
        return sum(getattr(w, name) for w in self.weights.values())

    def _norm(self, name: str) -> float:
        return math.hypot(*(getattr(w, name) for w in self.weights.values()))

    def _mean(self, name: str) -> float:
        return _ratio(sum(w.entries * getattr(w, name) for w in self.weights.values()), self._sum("entries"))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class Splitting:
    """The splitting into x and z of weights under one family of supports."""

    support: Support
    penalty: Penalty
    score: Score
    anchors: Anchors
    moments: Moments
    seed: int
    processes: int  # what `penalty.divide_by_world` divides by

    @property
    def held(self) -> bool:
        """Whether x = z at all times."""
        return self.penalty.value == math.inf

    def begin(
        self, weights: Sequence[Weight], fraction: float, masks: Mapping[str, Tensor], *, fixed: bool, anchored: bool
    ) -> None:
        """u = 0 and z = the projection of x, by magnitude or to given masks (of all rows).

        Args:
            fixed: whether the support never changes, so that a given mask may have any number of entries.
            anchored: whether x will differ from z; otherwise only the mask is stored.

        Raises:
            UserError: a given mask is not in the family of supports.
        """

        def score(weight: Weight) -> Tensor:
            magnitude = weight.shard.to(working_dtype(weight.parameter.dtype)).abs()
            if weight.name not in masks:
                return magnitude
            chosen = local_shard(weight.parameter, masks[weight.name]).to(magnitude.device)
            return magnitude.div_(1.0 + magnitude).add_(chosen, alpha=_CHOSEN)

        selected, wrong = [], []
        for weight, mask, _ in self.support.select(weights, score, fraction):
            if weight.name in masks:
                given = local_shard(weight.parameter, masks[weight.name]).to(mask.device)
                wrong.append((weight, torch.count_nonzero(given != mask)))
                mask = given
            state: State = {"rho": 0.0, "dual_rho": 0.0, "lag": 1.0, "balance": 1.0, "threshold": 0.0}
            weight.state.update(state, gradient_square=math.nan)
            if self.score.clean:
                weight.state["fisher"] = sharded_like(
                    weight.parameter, torch.zeros_like(weight.shard, dtype=torch.float32)
                )
            selected.append((weight, mask))
        if wrong and not fixed:
            several = totals([weight.parameter for weight, _ in wrong], torch.stack([n[None] for _, n in wrong]))
            for (weight, _), (entries,) in zip(wrong, several.tolist(), strict=True):
                if entries:
                    raise UserError(
                        f"the mask of {weight.name} is not a support of the target: give one with as many entries, in "
                        "its pattern, or keep the support fixed (freeze=1)"
                    )
        norms = totals(
            [weight.parameter for weight, _ in selected],
            torch.stack([torch.stack([_square(w.shard), torch.count_nonzero(mask).double()]) for w, mask in selected]),
        )
        for (weight, mask), (square, size) in zip(selected, norms.tolist(), strict=True):
            weight.state["kept"], weight.state["weight_rms"] = int(size), math.sqrt(square / weight.entries)
            weight.set_mask(mask)
            if anchored:
                x = weight.shard.to(working_dtype(weight.parameter.dtype))
                self.anchors.write(weight, x.masked_fill(~mask, 0), self._chance(weight, 0))

    def set_masks(self, weights: Sequence[Weight], masks: Mapping[str, Tensor]) -> None:
        """M <- given masks, of all rows, or sharded as the weights are."""
        selected = [local_shard(one.parameter, masks[one.name]).to(one.shard.device) for one in weights]
        _set_masks(zip(weights, selected, strict=True))

    def restart(self, weights: Sequence[Weight], solution: Mapping[str, Tensor], step: int) -> None:
        """z <- a given point, of all rows, or sharded as the weights are, whose support has been set, and u <- 0."""
        for weight in weights:
            weight.state["lag"] = 1.0
            z = local_shard(weight.parameter, solution[weight.name])
            z = z.to(weight.shard.device, working_dtype(weight.parameter.dtype), copy=True)
            self.anchors.write(weight, z, self._chance(weight, step + 1))

    def drop_anchors(self, weights: Sequence[Weight]) -> None:
        """Sets x = z from now on: releases the anchor and the averages for the scores."""
        for weight in weights:
            for name in ("anchor", "anchor_scale", "fisher"):
                weight.state.pop(name, None)

    def set_rho(self, weight: Weight, progress: float) -> float:
        """Sets rho to the schedule's value, and returns the factor of u that keeps rho u constant.

        rho = 0 does not change u: it is rescaled from the last non-zero rho; before the first, rho u is zero.
        A relative rho is 0 until there is a gradient to measure it by, and where all weights are zero.
        """
        state = weight.state
        rho = self.penalty.at(progress) * state["balance"]
        if self.penalty.units == "relative":
            measured = state["gradient_square"] > 0.0 and state["weight_rms"]  # not where it is NaN
            unit = 1.0 if self.penalty.decoupled else math.sqrt(state["gradient_square"])
            rho *= unit / state["weight_rms"] if measured else 0.0
        if self.penalty.divide_by_world:
            rho /= self.processes
        state["rho"] = rho
        if rho == 0.0:
            return 1.0
        before, state["dual_rho"] = state["dual_rho"], rho
        return float(before / rho)

    def idle(self, weight: Weight) -> bool:
        """Whether x has not been trained yet, as a matrix that the loss has not depended on so far: no gradient, or,
        where rho is measured by it, none but zeros. Its u stays zero: x - z is not a residual of a minimization over
        x."""
        square = weight.state["gradient_square"]
        return math.isnan(square) or (self.penalty.units == "relative" and square == 0.0)

    def observe(self, weight: Weight, square: float, progress: float) -> None:
        """Records the gradient of the loss, clipped, before the penalty.

        Args:
            square: its squared norm.
            progress: at the last dual update, for a rho that is set by the first gradient.
        """
        state = weight.state
        mean = square / weight.entries
        first = not state["gradient_square"] > 0.0  # NaN before any
        state["gradient_square"] = mean if first else _SMOOTHING * state["gradient_square"] + (1 - _SMOOTHING) * mean
        if first and math.isfinite(self.penalty.value):
            self.set_rho(weight, progress)
        if "fisher" in state:
            gradient, decay = weight.gradient.float(), self.score.decay
            local(state["fisher"]).mul_(decay).addcmul_(gradient, gradient, value=1.0 - decay)

    def add_penalty(self, weight: Weight, deferred: DeferredGradient | None = None) -> None:
        """g <- g + rho (x - c), in the precision of the computation; or passes it to the kernel that does so.

        What exceeds the range of the gradient's dtype saturates: g has been checked to be finite, and remains so.
        """
        rho = weight.state["rho"]
        if rho and not weight.dense and deferred is not None:
            deferred.pulls[id(weight.parameter)] = (rho, stored_anchor(weight, self.anchors))
        elif rho and not weight.dense:
            largest = torch.finfo(weight.gradient.dtype).max
            for rows, away in self.anchors.away(weight):
                gradient = weight.gradient[rows]
                gradient.copy_(torch.add(gradient, away, alpha=rho).clamp_(-largest, largest))

    def pull(self, weight: Weight, lr: float, step: int) -> None:
        """x <- x - lr rho (x - c); in 16 bits up or down at random: to the nearest, x would not move by less than half
        the distance of two numbers."""
        rate, x = min(1.0, lr * weight.state["rho"]), weight.shard  # at 1 it is c
        if not rate or weight.dense:
            return
        if x.dtype not in quantization.AT_RANDOM:
            for rows, away in self.anchors.away(weight):
                x[rows].sub_(away, alpha=rate)
            return
        rounded = quantization.AT_RANDOM[x.dtype]
        chance = generator(weight.parameter, self.seed, step, weight.index, _PULL_DRAW)
        for rows, away in self.anchors.away(weight):
            x[rows] = rounded(x[rows].to(away.dtype).sub_(away, alpha=rate), chance)

    def scores(self, weight: Weight) -> Tensor:
        """The scores of a = x + u, for the local shard."""
        library = self.score.fisher == "clean" or self.moments.format == "bitsandbytes" or weight.stacked
        if not (self.score.weighted and library):
            second = self.moments.stored_second(weight.parameter, weight.state) if self.score.weighted else None
            fused = fused_scores(weight, stored_anchor(weight, self.anchors), self.score, second)
            if fused is not None:
                return fused
        return scores_of(weight, self.anchors.sum(weight), self.score, self._fisher(weight))

    def update(self, weights: Sequence[Weight], step: int, progress: float, fraction: float) -> dict[str, WeightUpdate]:
        """a <- x + u, M <- the support of its largest scores, rho <- the schedule's, c <- M a - tau (1 - M) a.

        Of an idle weight u stays zero: a = x and c = M x.
        """
        before = {weight.name: (weight.state["rho"], weight.state["threshold"]) for weight in weights}
        taus: dict[str, float] = {}
        sums, least, updated = [], [], []
        for weight, mask, scores in self.support.select(weights, self.scores, fraction):
            taus[weight.name] = self.set_rho(weight, progress)
            measured = self._update(weight, mask, taus[weight.name], step)
            sums.append(measured)
            kept_scores = torch.where(mask, scores, torch.inf)
            least.append((kept_scores.amin() if mask.numel() else scores.new_tensor(torch.inf)).double())
            updated.append(weight)
        parameters = [weight.parameter for weight in updated]
        totalled = totals(parameters, torch.stack(sums)).tolist()
        thresholds = totals(parameters, torch.stack(least), least=True).tolist()
        records = {}
        for weight, numbers, threshold in zip(updated, totalled, thresholds, strict=True):
            rho, threshold_before = before[weight.name]
            norms = {name: math.sqrt(number) for name, number in zip(_NORMS, numbers[:-2], strict=True)}
            weight.state["kept"] = int(numbers[-1])
            weight.state.update(threshold=threshold, weight_rms=norms["x"] / math.sqrt(weight.entries))
            record = WeightUpdate(
                **norms,
                entered=int(numbers[-2]),
                support_size=int(numbers[-1]),
                entries=weight.entries,
                threshold=threshold,
                threshold_before=threshold_before or None,
                rho=rho,
                rho_next=weight.state["rho"],
                tau=taus[weight.name],
            )
            self._balance(weight, record)
            records[weight.name] = record
        return records

    def reselect(self, weights: Sequence[Weight], fraction: float) -> None:
        """M <- the support of the largest scores of x itself.

        Args:
            fraction: of the final sparsity.
        """

        def score(weight: Weight) -> Tensor:
            x = weight.shard.to(working_dtype(weight.parameter.dtype), copy=True)
            return scores_of(weight, x, self.score, self._fisher(weight))

        _set_masks((weight, mask) for weight, mask, _ in self.support.select(weights, score, fraction))

    def _chance(self, weight: Weight, step: int) -> torch.Generator:
        return generator(weight.parameter, self.seed, step, weight.index, _DRAW)

    def _update(self, weight: Weight, mask: Tensor, tau: float, step: int) -> Tensor:
        """Updates the state of one weight; returns the sums of squares for its record, and two counts."""
        before = weight.mask()
        x = weight.shard
        a = self.anchors.sum(weight)
        old = self.anchors.read(weight).to(a.dtype)
        pull = _square(x - old)
        z = a.masked_fill(~mask, 0)
        dual = _square(z - old.masked_fill_(~before, 0))
        primal = _square(x - z)
        idle = self.idle(weight)
        u = a.zero_() if idle else a.masked_fill_(mask, 0)
        if weight.stacked:  # experts without a gradient yet
            second = self.moments.second(weight.parameter, weight.state)
            u.masked_fill_((second.flatten(1).amax(1) == 0)[:, None, None], 0)
        immediate = self.penalty.rescale == "immediate"
        weight.state["lag"] = 1.0 if immediate or idle else tau
        anchor = torch.sub(z, u, alpha=tau if immediate else 1.0)
        self.anchors.write(weight, anchor, self._chance(weight, step + 1))
        weight.set_mask(mask)
        error = _square(anchor - self.anchors.read(weight))
        counts = [torch.count_nonzero(mask & ~before), torch.count_nonzero(mask)]
        squares = [_square(x), _square(z), _square(u), primal, dual, pull, error, _square(anchor)]
        return torch.stack([*squares, *(count.double() for count in counts)])

    def _balance(self, weight: Weight, record: WeightUpdate) -> None:
        threshold = self.penalty.balance
        if threshold is None or self.idle(weight):
            return
        factor = 1.0
        if record.primal_residual > threshold * record.dual_residual:
            factor = _BALANCE_STEP
        elif record.dual_residual > threshold * record.primal_residual:
            factor = 1.0 / _BALANCE_STEP
        balanced = weight.state["balance"] * factor
        weight.state["balance"] = min(_BALANCE_LIMIT, max(1.0 / _BALANCE_LIMIT, balanced))

    def _fisher(self, weight: Weight) -> Tensor | None:
        if not self.score.weighted:
            return None
        if self.score.fisher == "clean":
            return local(weight.state["fisher"])
        return self.moments.second(weight.parameter, weight.state)


def _set_masks(selected: Iterable[tuple[Weight, Tensor]]) -> None:
    """M <- the local shards of masks, one weight after the other, and how many entries they keep on all processes."""
    parameters, states, counts = [], [], []
    for weight, mask in selected:
        weight.set_mask(mask)
        parameters.append(weight.parameter)
        states.append(weight.state)
        counts.append(torch.count_nonzero(mask)[None])
    if not counts:
        return
    for state, size in zip(states, totals(parameters, torch.stack(counts))[:, 0].tolist(), strict=True):
        state["kept"] = int(size)


def _square(x: Tensor) -> Tensor:
    """|x|^2, a float64 scalar."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.double().square()
