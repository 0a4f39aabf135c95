"""The dual update: z and u from x + u, the next penalty, the next anchor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from admm_prune.solvers.elsa import fused
from admm_prune.solvers.elsa.anchors import Anchors, State, Weight, working_dtype
from admm_prune.solvers.elsa.history import WeightUpdate
from admm_prune.solvers.elsa.moments import Moments
from admm_prune.solvers.elsa.randomness import generator
from admm_prune.solvers.elsa.settings import Penalty, Score
from admm_prune.solvers.elsa.sharding import laid_out_as, local, own_rows, totals
from admm_prune.solvers.elsa.supports import Support, scores_of

_BALANCE_STEP, _BALANCE_LIMIT = 2.0, 1e3  # a rho in balance stays within a factor 1000 of the schedule

_SMOOTHING = 0.9  # of the mean squared gradient that a relative penalty is measured by
_DRAW = 1  # tells these random numbers from those of the moments
_CHOSEN = 1e3  # added to magnitudes below 1, so that the entries of a given mask come first


@dataclass(frozen=True)
class Splitting:
    """How weights under one family of supports are split into x and z."""

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

    def begin(self, weights: Sequence[Weight], fraction: float, masks: Mapping[str, Tensor], *, anchored: bool) -> None:
        """u = 0 and z = the projection of x, by magnitude or to given masks (of all rows).

        Args:
            anchored: whether x will move away from z; otherwise the mask is all there is to keep.
        """

        def score(weight: Weight) -> Tensor:
            magnitude = weight.here.to(working_dtype(weight.parameter.dtype)).abs()
            if weight.name not in masks:
                return magnitude
            chosen = local(own_rows(weight.parameter, masks[weight.name])).to(magnitude.device)
            return magnitude.div_(1.0 + magnitude).add_(chosen, alpha=_CHOSEN)

        selected = []
        for weight, mask, _ in self.support.select(weights, score, fraction):
            state: State = {"rho": 0.0, "dual_rho": 0.0, "lag": 1.0, "balance": 1.0, "threshold": 0.0}
            weight.state.update(state, gradient_square=math.nan)
            if self.score.clean:
                weight.state["fisher"] = laid_out_as(
                    weight.parameter, torch.zeros_like(weight.here, dtype=torch.float32)
                )
            selected.append((weight, mask))
        norms = totals(
            [weight.parameter for weight, _ in selected],
            torch.stack([torch.stack([_square(w.here), torch.count_nonzero(mask).double()]) for w, mask in selected]),
        )
        for (weight, mask), (square, kept) in zip(selected, norms.tolist(), strict=True):
            weight.state.update(weight_rms=math.sqrt(square / weight.entries), kept=int(kept))
            weight.set_mask(mask)
            if anchored:
                x = weight.here.to(working_dtype(weight.parameter.dtype))
                self.anchors.write(weight, x.masked_fill(~mask, 0), self._chance(weight, 0))

    def take(self, weights: Sequence[Weight], masks: Mapping[str, Tensor]) -> None:
        """M <- given masks, of all rows."""
        for weight in weights:
            mask = local(own_rows(weight.parameter, masks[weight.name])).to(weight.here.device)
            weight.state["kept"] = int(torch.count_nonzero(masks[weight.name]))
            weight.set_mask(mask)

    def drop_anchors(self, weights: Sequence[Weight]) -> None:
        """x = z from here on: what z and u were kept in is released, and what scores were made of."""
        for weight in weights:
            for name in ("anchor", "anchor_scale", "fisher"):
                weight.state.pop(name, None)

    def set_rho(self, weight: Weight, progress: float) -> float:
        """Moves rho to where the schedule has it, and returns what u is to be multiplied by, so that rho u stays.

        rho = 0 leaves u alone: it is rescaled from the last rho that was not zero; before the first, rho u is zero.
        A relative rho is 0 until there is a gradient to measure it by, and where all weights are zero.
        """
        state = weight.state
        rho = self.penalty.at(progress) * state["balance"]
        if self.penalty.units == "relative":
            measured = state["gradient_square"] > 0.0 and state["weight_rms"]  # not where it is NaN
            rho *= math.sqrt(state["gradient_square"]) / state["weight_rms"] if measured else 0.0
        if self.penalty.divide_by_world:
            rho /= self.processes
        state["rho"] = rho
        if rho == 0.0:
            return 1.0
        before, state["dual_rho"] = state["dual_rho"], rho
        return float(before / rho)

    def idle(self, weight: Weight) -> bool:
        """Whether x has not been trained yet, as a matrix that the loss has not depended on so far: no gradient, or,
        where rho is measured by it, none but zeros. Its u stays zero: x - z is no residual of a minimisation over x."""
        square = weight.state["gradient_square"]
        return math.isnan(square) or (self.penalty.units == "relative" and square == 0.0)

    def observe(self, weight: Weight, square: float, progress: float) -> None:
        """Takes note of the gradient of the loss, clipped, before the penalty.

        Args:
            square: its squared norm.
            progress: at the last dual update, which a rho that is set by the first gradient belongs to.
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

    def add_penalty(self, weight: Weight, later: fused.Later | None = None) -> None:
        """g <- g + rho (x - c), in the precision of the computation; or tells it to the kernel that will do so.

        What exceeds the range of the gradient's dtype saturates: g has been checked to be finite, and remains so.
        """
        rho = weight.state["rho"]
        if rho and not weight.dense and later is not None:
            later.pulls[id(weight.parameter)] = (rho, fused.stored_anchor(weight, self.anchors))
        elif rho and not weight.dense:
            largest = torch.finfo(weight.gradient.dtype).max
            for rows, away in self.anchors.away(weight):
                gradient = weight.gradient[rows]
                gradient.copy_(torch.add(gradient, away, alpha=rho).clamp_(-largest, largest))

    def pull(self, weight: Weight, lr: float) -> None:
        """x <- x - lr rho (x - c)."""
        rate = lr * weight.state["rho"]
        if rate and not weight.dense:
            for rows, away in self.anchors.away(weight):
                weight.here[rows].sub_(away, alpha=rate)

    def scores(self, weight: Weight) -> Tensor:
        """Of a = x + u, in the part in this process."""
        if not (self.score.weighted and (self.score.fisher == "clean" or self.moments.format == "bitsandbytes")):
            second = self.moments.stored_second(weight.parameter, weight.state) if self.score.weighted else None
            at_once = fused.scores(weight, fused.stored_anchor(weight, self.anchors), self.score, second)
            if at_once is not None:
                return at_once
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
            least.append(torch.where(mask, scores, torch.inf).amin().double() if mask.numel() else _infinity(scores))
            updated.append(weight)
        parameters = [weight.parameter for weight in updated]
        totalled = totals(parameters, torch.stack(sums)).tolist()
        thresholds = totals(parameters, torch.stack(least), least=True).tolist()
        records = {}
        for weight, numbers, threshold in zip(updated, totalled, thresholds, strict=True):
            rho, threshold_before = before[weight.name]
            x, z, u, primal, dual, pull, quantization, anchor = (math.sqrt(n) for n in numbers[:-2])
            weight.state.update(kept=int(numbers[-1]), threshold=threshold, weight_rms=x / math.sqrt(weight.entries))
            record = WeightUpdate(
                x=x,
                z=z,
                u=u,
                primal=primal,
                dual=dual,
                pull=pull,
                quantization=quantization,
                anchor=anchor,
                entered=int(numbers[-2]),
                kept=int(numbers[-1]),
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
            fraction: of what is pruned in the end.
        """

        def score(weight: Weight) -> Tensor:
            x = weight.here.to(working_dtype(weight.parameter.dtype), copy=True)
            return scores_of(weight, x, self.score, self._fisher(weight))

        for weight, mask, _ in self.support.select(weights, score, fraction):
            weight.set_mask(mask)

    def _chance(self, weight: Weight, step: int) -> torch.Generator:
        return generator(weight.parameter, self.seed, step, weight.index, _DRAW)

    def _update(self, weight: Weight, mask: Tensor, tau: float, step: int) -> Tensor:
        """Renews the state of one weight; returns the sums of squares that its record is made of, and two counts."""
        before = weight.mask()
        x = weight.here
        a = self.anchors.sum(weight)
        old = self.anchors.read(weight).to(a.dtype)
        pull = _square(x - old)
        z = a.masked_fill(~mask, 0)
        dual = _square(z - old.masked_fill_(~before, 0))
        primal = _square(x - z)
        idle = self.idle(weight)
        u = a.zero_() if idle else a.masked_fill_(mask, 0)
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


def _square(x: Tensor) -> Tensor:
    """|x|^2, a float64 scalar."""
    narrow = x.dtype == torch.float16  # its norms overflow at 65504
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32 if narrow else None)
    return norm.double().square()


def _infinity(like: Tensor) -> Tensor:
    return torch.full((), torch.inf, dtype=torch.float64, device=like.device)
