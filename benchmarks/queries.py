"""Queries and keys as one problem on the logits: what it would give before coordinated attention; not a method of ours.

    python -m benchmarks.queries OUT [--method sparsegpt] [--targets 0.7] [--refit block] [--allocation fisher]

For a block of a Llama (no biases, no norms of queries and keys), with l the logits of head h and l* those of the dense
projections on the same inputs,

    min_{Q, K}  sum_th  delta_th^T F_th delta_th,    delta_th = l_th - l*_th over the tokens s <= t,

is quadratic in Q for given K, and in K for given Q. Both start as they were pruned alone; Q and then K are fitted by
conjugate gradients on their supports, and the pair is kept if it lowers the error of the attention's output, with dense
values, on validation tokens. The metrics F:

    softmax   diag(p) - p p^T, the Fisher information of the dense probabilities p;
    floor     the same of 0.8 p + 0.2 u, u uniform over s <= t: a token without probability has a cost too;
    output    the Gauss-Newton matrix of the attention's output, with dense values and output projection.

Supports are `kept` from pruning alone, or `chosen` by the method's solver in the separable metric c_r H that a random
gradient of the objective gives. OUT/runs.csv has a row per run, OUT/queries.txt the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.coordination import damping_of
from admm_prune.methods.joint import JointBlock
from admm_prune.methods.local import Method
from admm_prune.methods.part_checks import Checked
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.ops.quadratic import conjugate_gradient
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.runs.results import Report
from benchmarks.machine import headline, machine
from benchmarks.variants import Losses, parser_of, rows

VARIANTS = ("none", "softmax kept", "softmax chosen", "floor kept", "floor chosen", "output kept")
NAMES = ("query", "key")
_FLOOR, _ITERATIONS, _TOLERANCE = 0.2, 10, 1e-3


@dataclass(frozen=True)
class Rotations:
    """Rotary position embeddings, cosines and sines (L, e)."""

    cosines: Tensor
    sines: Tensor

    def apply(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cosines + torch.cat([-second, first], -1) * self.sines

    def undo(self, x: Tensor) -> Tensor:
        """The adjoint, which is the inverse."""
        first, second = (x * self.sines).chunk(2, -1)
        return x * self.cosines + torch.cat([second, -first], -1)


class Logits:
    """The objective on some sequences, for one metric.

    Args:
        inputs: X (sequences, L, d).
        dense: "query" (H e, d), "key" (G e, d), "value" (G e, d) and "output" (d, H e).
        size: e.
        metric: softmax, floor or output.
    """

    def __init__(self, inputs: Tensor, rotations: Rotations, dense: dict[str, Tensor], size: int, metric: str) -> None:
        self.inputs, self.rotations, self.dense, self.size = inputs, rotations, dense, size
        self.shared = len(dense["query"]) // len(dense["key"])  # query heads of a key
        self.metric = metric
        self.causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
        self.square = dense["output"].T @ dense["output"]
        self.base = [self.logits(dense, x) for x in inputs]
        self.values = [self._heads(dense["value"], x).repeat_interleave(self.shared, 0) for x in inputs]

    def _heads(self, weight: Tensor, x: Tensor) -> Tensor:
        return (x @ weight.T).unflatten(1, (-1, self.size)).transpose(0, 1)

    def rotated(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        """Queries or keys (H, L, e)."""
        heads = self.rotations.apply(self._heads(weight, x))
        return heads if name == "query" else heads.repeat_interleave(self.shared, 0)

    def logits(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.product("query", weights["query"], self.rotated("key", weights["key"], x), x)

    def product(self, name: str, weight: Tensor, other: Tensor, x: Tensor) -> Tensor:
        """Logits (H, L, L) of a projection, for the rotated other one."""
        one = self.rotated(name, weight, x)
        query, key = (one, other) if name == "query" else (other, one)
        return query @ key.transpose(1, 2) / math.sqrt(self.size)

    def back(self, name: str, gradient: Tensor, other: Tensor, x: Tensor) -> Tensor:
        """The adjoint of `product`, before the inputs are multiplied (L, rows)."""
        g = gradient / math.sqrt(self.size)
        heads = self.rotations.undo((g if name == "query" else g.transpose(1, 2)) @ other)
        if name == "key":
            heads = heads.unflatten(0, (-1, self.shared)).sum(1)
        return heads.transpose(0, 1).flatten(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.causal, -math.inf).softmax(-1)

    def weights(self, number: int) -> Tensor:
        p = self.probabilities(self.base[number])
        return (
            (1 - _FLOOR) * p + _FLOOR * self.causal / self.causal.sum(1, keepdim=True) if self.metric == "floor" else p
        )

    def metric_times(self, number: int, delta: Tensor) -> Tensor:
        p, values = self.weights(number), self.values[number]
        if self.metric == "output":
            spread = p * (delta - (p * delta).sum(-1, keepdim=True)) @ values
            pulled = (spread.transpose(0, 1).flatten(1) @ self.square).unflatten(1, (-1, self.size)).transpose(0, 1)
            delta = pulled @ values.transpose(1, 2)
        return p * (delta - (p * delta).sum(-1, keepdim=True))

    def random_gradients(self, name: str, others: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradients (L, rows), with inputs, whose expected square is the metric: J^T w, w standard normal."""
        g = torch.Generator().manual_seed(0)
        for number, (x, other) in enumerate(zip(self.inputs, others, strict=True)):
            p = self.weights(number)
            if self.metric == "output":
                noise = torch.randn(x.shape, generator=g).to(x) @ self.dense["output"]
                noise = noise.unflatten(1, (-1, self.size)).transpose(0, 1) @ self.values[number].transpose(1, 2)
                noise = p * (noise - (p * noise).sum(-1, keepdim=True))
            else:
                noise = p.sqrt() * torch.randn(p.shape, generator=g).to(p)
                noise = noise - p * noise.sum(-1, keepdim=True)
            yield self.back(name, noise, other, x), x

    def fitted(
        self, name: str, weights: dict[str, Tensor], mask: Tensor | None, damping: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """argmin for the other projection as in `weights`, on a mask, with its separable metric c (rows,), H (d, d)."""
        other = "key" if name == "query" else "query"
        others = [self.rotated(other, weights[other], x) for x in self.inputs]
        gram, rows = (
            self.inputs.new_zeros(self.inputs.shape[2], self.inputs.shape[2]),
            self.inputs.new_zeros(len(weights[name])),
        )
        for gradient, x in self.random_gradients(name, others):
            squares = gradient.square()
            gram += (x * squares.sum(1, keepdim=True)).T @ x
            rows += (squares * x.square().sum(1, keepdim=True)).sum(0)
        rows = (rows / gram.trace()).clamp_min(1e-6 * float(rows.mean() / gram.trace()))
        diagonal = gram.diagonal()
        anchor = rows[:, None] * (damping[0] * diagonal + damping[1] * diagonal.mean())

        def times(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            for number, (x, key) in enumerate(zip(self.inputs, others, strict=True)):
                total += self.back(name, self.metric_times(number, self.product(name, v, key, x)), key, x).T @ x
            return total

        right = anchor * self.dense[name]
        for number, (x, key) in enumerate(zip(self.inputs, others, strict=True)):
            right += self.back(name, self.metric_times(number, self.base[number]), key, x).T @ x
        start = self.dense[name] if mask is None else weights[name].where(mask, 0)
        allowed = torch.ones_like(start, dtype=torch.bool) if mask is None else mask
        inverse = (rows[:, None] * diagonal + anchor).reciprocal()
        fitted = conjugate_gradient(
            lambda v: times(v) + anchor * v, right, start, allowed, inverse, _TOLERANCE, _ITERATIONS
        )
        return fitted, rows, gram

    def output_error(self, weights: dict[str, Tensor]) -> float:
        """Of the attention's output with dense values, relative."""
        missing = energy = 0.0
        for x, base, values in zip(self.inputs, self.base, self.values, strict=True):
            dense, now = (self.probabilities(l) @ values for l in (base, self.logits(weights, x)))
            missing, energy = (
                total + float((part.transpose(0, 1).flatten(1) @ self.dense["output"].T).square().sum())
                for total, part in ((missing, now - dense), (energy, dense))
            )
        return missing / energy


class Queries:
    """Fits queries and keys in every block, before its values and outputs.

    Attributes:
        errors: of every block on validation tokens, before and after.
    """

    def __init__(self, model_name: str, variant: str) -> None:
        self.metric, _, self.support = variant.partition(" ")
        self.model = load(model_name, dtype="float32").model  # stays dense
        self.dense = {view.name: view.read() for block in decoder_blocks(self.model) for view in block.weights}
        self.errors: list[tuple[float, float]] = []
        self._coordinated = JointBlock.coordinated

    def coordinated(
        self, joint: JointBlock, reports: Sequence[LayerReport], method: Method, task: Task
    ) -> list[LayerReport]:
        views = {
            name: view for view in joint.block.weights for name in NAMES if view.name.endswith(f"{name[0]}_proj.weight")
        }
        by_name = {report.name: report for report in reports}
        if self.metric != "none" and joint.attention is not None and views["query"].name in by_name:
            dense = {name: self.dense[view.name] for name, view in views.items()} | dict(joint.attention.weights)
            length = task.calibration.length
            inputs = {part: x.unflatten(0, (-1, length)) for part, (x, _) in joint.attention.pairs.items()}
            cosines, sines = self.model.model.rotary_emb(dense["query"], torch.arange(length)[None])
            size = joint.attention.views.size
            parts = {
                part: Logits(x, Rotations(cosines[0], sines[0]), dense, size, self.metric) for part, x in inputs.items()
            }
            alone = {name: view.read().clone() for name, view in views.items()}
            weights = dict(alone)
            solver = Checked.of(method.make())
            for name, view in views.items():
                damping, mask = damping_of(by_name[view.name]), weights[name] != 0
                if self.support == "chosen":
                    free, rows, gram = parts["calibration"].fitted(name, weights, None, damping)
                    scale = rows.sqrt().log2().round().exp2()[:, None]
                    target = task.target.at(view.name)
                    assert target is not None
                    layer = LayerReconstruction(
                        free * scale, gram, method.constraint(target), ridge=damping[0], damping=damping[1]
                    )
                    weights[name] = solver.solve(layer).solution["weight"] / scale
                    mask = weights[name] != 0
                weights[name] = parts["calibration"].fitted(name, weights, mask, damping)[0]
            before, after = (parts["validation"].output_error(w) for w in (alone, weights))
            self.errors.append((before, after))
            if after < before:
                for name, view in views.items():
                    view.write(weights[name])
        return self._coordinated(joint, reports, method, task)


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, VARIANTS)
    parser.add_argument("--refit")
    parser.add_argument("--allocation")
    a = parser.parse_args(words)
    steps = {"coordinate": "attention", "refit": a.refit, "allocation": a.allocation}
    records = rows(a, lambda run, variant: measured(a.model, run, variant), steps)
    lines = [headline(machine()), "before, after: error of the attention's output from queries and keys, validation"]
    for record in records:
        figures = f"{float(record['perplexity']):10.3f} {record['before']:>10} {record['after']:>10}"
        lines.append(f"{record['method']:10} {record['target']} {record['variant']:15} {figures}  {record['settings']}")
    (a.out / "queries.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def measured(model: str, run: Callable[..., Report], variant: str) -> tuple[Report, Losses]:
    queries = Queries(model, variant)

    def coordinated(joint: JointBlock, *how: Any) -> list[LayerReport]:
        return queries.coordinated(joint, *how)

    with patch.object(JointBlock, "coordinated", coordinated):
        report = run()
    if not queries.errors:
        return report, (None, None)
    before, after = (mean(pair[i] for pair in queries.errors) for i in (0, 1))
    return report, (before, after)


if __name__ == "__main__":
    main()
