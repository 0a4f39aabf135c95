"""Variants of the blockwise refit: its number of steps, the weights of tokens, and its targets.

    python -m benchmarks.refit_variants OUT [--variants none,"relative block"] [--model DIR --data FILE]

    relative   the error of a token is relative to its target, |f(h_t) - y_t|^2 / |y_t|^2
    squared    the error of a token is |f(h_t) - y_t|^2
    block      y_t is the output of the dense block on the outputs h_t of the pruned blocks before it
    model      y_t is the output of the block in the dense model, on dense inputs

Settings of the descent may follow: the number of steps, the learning rate, the second beta of Adam, and the number of
warm-up steps, as in "relative block 100 0.03 0.99 5"; the defaults are those of the method.

A row is a run of `admm_prune.prune`; `none` has no refit. `before` and `after` are the loss that is minimized, per
validation token and averaged over the blocks; they cannot be compared between different losses or targets. `seconds` is
the CPU time of the run with its evaluation. OUT/runs.csv has the rows, and the same command continues where it stopped;
OUT/refit_variants.txt has the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from admm_prune.methods import joint, refit
from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.local import Method
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.runs.results import Report
from admm_prune.solvers.support_descent import SupportDescent
from benchmarks.machine import headline, machine
from benchmarks.variants import Losses, parser_of, rows

LOSSES, TARGETS = ("relative", "squared"), ("block", "model")
VARIANTS = (
    "none",
    *("relative block", "squared block", "relative model"),
    *(
        "relative block 50",
        "relative block 70 0.05 0.95",
        "relative block 70 0.03 0.99 5",
        "relative block 100 0.03 0.99 5",
    ),
)
_SETTINGS = (("over", int), ("rate", float), ("betas", lambda text: (0.9, float(text))), ("warm_up", int))
_refit_block = refit.refit_block


class Squared(refit.BlockTokens):
    """The loss with equal weights for all tokens."""

    @property
    def weights(self) -> Tensor:  # type: ignore[override]  # a cached property of the same type
        return torch.ones(len(self.targets))


class DenseStream:
    """A refit to the outputs of the dense model's own blocks."""

    def __init__(self, model_name: str) -> None:
        self.model = load(model_name, dtype="float32").model
        self.stream: BlockStream | None = None

    def refit_block(
        self,
        stream: BlockStream,
        index: int,
        block: Block,
        outputs: dict[str, Tensor],
        reports: Sequence[LayerReport],
        method: Method,
        task: Task,
    ) -> Any:
        blocks = decoder_blocks(self.model)
        if self.stream is None:
            self.stream = BlockStream(self.model, blocks, task.calibration, "cpu")
        of_dense: dict[str, Tensor] = {}
        self.stream.collect(index, {blocks[index].weights[0].name}, of_dense)
        self.stream.advance(index)
        return _refit_block(stream, index, block, of_dense, reports, method, task)


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, VARIANTS)
    a = parser.parse_args(words)
    for variant in a.variants:
        if variant != "none":
            _parsed(parser, variant)
    records = rows(a, lambda run, variant: measured(parser, a.model, run, variant))
    lines = [headline(machine()), "relative: perplexity, to none at the same method, target and settings"]
    bases = {_place(row): row for row in records if row["variant"] == "none"}
    for row in records:
        base, perplexity = bases.get(_place(row)), float(row["perplexity"])
        relative = f"{perplexity / float(base['perplexity']):6.3f}" if base else f"{'':6}"
        figures = f"{perplexity:8.3f} {relative} {row['before']:>12} {row['after']:>12} {float(row['seconds']):6.0f} s"
        lines.append(f"{row['method']:10} {row['target']} {row['variant']:32} {figures}  {row['settings']}")
    (a.out / "refit_variants.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def measured(
    parser: argparse.ArgumentParser, model: str, run: Callable[..., Report], variant: str
) -> tuple[Report, Losses]:
    if variant == "none":
        return run(), (None, None)
    loss, target, descent = _parsed(parser, variant)
    with ExitStack() as stack:
        stack.enter_context(patch.object(refit, "DESCENT", descent))
        if loss == "squared":
            stack.enter_context(patch.object(refit, "BlockTokens", Squared))
        if target == "model":
            stack.enter_context(patch.object(joint, "refit_block", DenseStream(model).refit_block))
        report = run(refit="block")
    figures = [block["refit"] for block in report.details["joint"]]
    before, after = (mean(one[name] for one in figures) for name in ("before", "after"))
    return report, (before, after)


def _parsed(parser: argparse.ArgumentParser, variant: str) -> tuple[str, str, SupportDescent]:
    """The loss, the targets and the descent."""
    loss, target, *settings = [*variant.split(), "", ""]
    try:
        how = {name: parse(text) for (name, parse), text in zip(_SETTINGS, filter(None, settings), strict=False)}
        descent = replace(refit.DESCENT, **how)
    except ValueError:
        loss = ""
    if loss not in LOSSES or target not in TARGETS:
        words = f"{'|'.join(LOSSES)} {'|'.join(TARGETS)} [STEPS [RATE [BETA2 [WARM_UP]]]]"
        parser.error(f"there is no variant '{variant}': give none, or {words}")
    return loss, target, replace(descent, max_iterations=descent.over)


def _place(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "method", "target", "settings"))


if __name__ == "__main__":
    main()
