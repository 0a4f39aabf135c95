"""The blockwise refit by what it descends on: the weight of a token, and whose outputs are the targets.

    python -m benchmarks.refit_targets OUT [--method sparsegpt] [--targets 0.5,0.7] [--model DIR --data FILE]

    relative   every token counts relative to its target, |f(h_t) - y_t|^2 / |y_t|^2
    squared    |f(h_t) - y_t|^2
    block      y_t is the output of the dense block on the inputs h_t that it has behind the pruned blocks
    model      y_t is the output of the block in the dense model, on dense inputs

A row is a run of `admm_prune.prune`; `none` is without a refit. `before` and `after` are the losses that the row
descends on, per validation token and averaged over the blocks: they are not comparable between rows. OUT/runs.csv has
the rows, and the same command continues where it stopped; OUT/refit_targets.txt is the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from admm_prune.methods import joint, refit
from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.local import Method
from admm_prune.methods.refit import BlockOutput
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.runs.prune import prune
from benchmarks.journal import Journal
from benchmarks.machine import headline, machine

VARIANTS = ("none", "relative block", "squared block", "relative model", "squared model")
KEY = ("model", "method", "target", "variant", "settings")
COLUMNS = ("perplexity", "seconds", "before", "after")
_refit_block = refit.refit_block


class Squared(BlockOutput):
    """Every token counts alike."""

    def token_weights(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets[:, 0])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--eval-data")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=["0.5", "0.7"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=VARIANTS)
    a = parser.parse_args(words)
    a.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(a.out / "runs.csv", COLUMNS, KEY)
    settings = f"{a.samples} sequences of {a.length} tokens, {a.eval_samples} to evaluate"
    for target in a.targets:
        for variant in a.variants:
            key = {"model": Path(a.model).name, "method": a.method, "target": target, "variant": variant}
            key["settings"] = settings
            if not journal.find(key):
                journal.add(key, [measured(a, target, variant)])
    lines = [headline(machine()), "relative: perplexity, to none at the same target"]
    base = {row["target"]: float(row["perplexity"]) for row in journal.records if row["variant"] == "none"}
    for row in journal.records:
        perplexity = float(row["perplexity"])
        relative = f"{perplexity / base[row['target']]:6.3f}" if row["target"] in base else f"{'':6}"
        losses = f"{row['before']:>12} {row['after']:>12}"
        lines.append(f"{row['method']:10} {row['target']} {row['variant']:15} {perplexity:8.3f} {relative} {losses}")
    (a.out / "refit_targets.txt").write_text("\n".join([*lines, settings]) + "\n", encoding="utf-8")
    print("\n".join(lines))


def measured(a: argparse.Namespace, target: str, variant: str) -> dict[str, Any]:
    began = time.process_time()
    with ExitStack() as stack:
        if "squared" in variant:
            stack.enter_context(patch.object(refit, "BlockOutput", Squared))
        if "model" in variant:
            stack.enter_context(patch.object(joint, "refit_block", DenseStream(a.model).refit_block))
        report = prune(
            a.model,
            data=a.data,
            eval_data=a.eval_data,
            method=a.method,
            sparsity=float(target),
            samples=a.samples,
            length=a.length,
            eval_samples=a.eval_samples,
            dtype="float32",
            refit=None if variant == "none" else "block",
        )
    figures = [block["refit"] for block in report.details.get("joint", ())]
    return {
        "perplexity": report.pruned.perplexity,
        "seconds": time.process_time() - began,
        **{name: mean(one[name] for one in figures) if figures else None for name in ("before", "after")},
    }


if __name__ == "__main__":
    main()
