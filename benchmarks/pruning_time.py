"""What pruning a model costs in forward passes over the same text, phase by phase, each beside its floor.

    python -m benchmarks.pruning_time OUT --model DIR --data FILE [--methods wanda,admm] [--samples 64] [--length 1024]

A forward pass is one of the model without its head, in the same batches. One-shot pruning needs two of every block:
on the inputs of its matrices, and on to the next block. Phases are exclusive: `calls` records how the model calls its
blocks, `passes` computes blocks, `grams` sums up second moments, `solves` are the layer problems, `rest` is what
remains of the wall clock. A floor counts operations, over the rate of a float32 product measured in the same process:
of passes, two for each weight and token, and those of causal attention; of Grams, d (d + 1) for each token and input
of d channels; of solves, the products H W^T of their iterations. OUT.json and OUT.txt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from admm_prune.data.sequences import Sequences
from admm_prune.methods.base import Outcome, Task
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.target import target_named
from admm_prune.models import capture
from admm_prune.models.activation_store import BatchState
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.statistics import GramAccumulator
from benchmarks.machine import headline, machine, write_results

PHASES = ("calls", "passes", "grams", "solves", "rest")


class Clock:
    """Seconds of nested phases, each without those inside it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.gram_operations = 0
        self._inside = [0.0]

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - began
                self.seconds[phase] += spent - self._inside.pop()
                self._inside[-1] += spent

        return call

    def _counted(self, add: Callable[..., None]) -> Callable[..., None]:
        def call(gram: GramAccumulator, inputs: torch.Tensor, *arguments: Any, **options: Any) -> None:
            width = inputs.shape[-1]
            self.gram_operations += inputs.numel() // width * width * (width + 1)
            add(gram, inputs, *arguments, **options)

        return call

    @contextmanager
    def watching(self) -> Generator[None]:
        """Within it the functions of the phases are timed."""
        with ExitStack() as stack:
            for owner, name, watched in (
                (capture, "record", self.timed("calls", capture.record)),
                (BatchState, "replay", self.timed("passes", BatchState.replay)),
                (GramAccumulator, "add", self.timed("grams", self._counted(GramAccumulator.add))),
            ):
                stack.enter_context(patch.object(owner, name, watched))
            yield


def forward_seconds(loaded: LoadedModel, text: Sequences) -> float:
    """Of one pass of the model without its head."""
    base = loaded.model.base_model
    began = time.perf_counter()
    with torch.no_grad():
        for batch in text.batches:
            base(input_ids=batch.input_ids, use_cache=False)
    return time.perf_counter() - began


def rate(width: int, tokens: int = 4096) -> float:
    """Operations per second of a float32 product, the best of five."""
    x, w = torch.randn(tokens, width), torch.randn(width, width)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        x @ w
        best = min(best, time.perf_counter() - began)
    return 2 * tokens * width * width / best


def floors(loaded: LoadedModel, outcome: Outcome, tokens: int, length: int, gram_operations: int) -> dict[str, float]:
    """Seconds that each phase takes at least, at the rate of a product."""
    blocks = decoder_blocks(loaded.model)
    config: Any = loaded.model.config
    weights = sum(view.shape[0] * view.shape[1] for block in blocks for view in block.weights)
    attention = 2 * length * config.hidden_size * len(blocks)  # q k^T and the mean of v, over half of the positions
    solves = sum(2 * r.iterations * r.shape[0] * r.shape[1] ** 2 for r in outcome.layers)
    per_second = rate(config.hidden_size)
    return {
        "calls": 0.0,
        "passes": 2 * tokens * (2 * weights + attention) / per_second,
        "grams": gram_operations / per_second,
        "solves": solves / per_second,
        "rest": 0.0,
    }


def measured(arguments: argparse.Namespace, method: str, text: TextSettings) -> dict[str, Any]:
    loaded = load(arguments.model, dtype=arguments.dtype)
    recipe = recipe_named(method)
    calibration = Texts(text, loaded).calibration(recipe.samples)
    forward_seconds(loaded, calibration)
    forward = forward_seconds(loaded, calibration)
    clock = Clock()
    task = Task(target=target_named(arguments.target), calibration=calibration)
    began = time.perf_counter()
    with clock.watching():
        outcome = recipe.prune(loaded.model, task)
    wall = time.perf_counter() - began
    seconds = clock.seconds | {"solves": sum(layer.seconds for layer in outcome.layers)}
    seconds["rest"] = wall - sum(seconds.values())
    return {
        "method": method,
        "tokens": calibration.tokens,
        "forward": forward,
        "seconds": wall,
        "ratio": wall / (2 * forward),
        "phases": seconds,
        "floors": floors(loaded, outcome, calibration.tokens, calibration.length, clock.gram_operations),
    }


def text_table(rows: Sequence[dict[str, Any]], head: str) -> str:
    lines = [head, "ratio: seconds to two forward passes over the same text"]
    for row in rows:
        two = f"{row['ratio']:.2f} of two forward passes ({2 * row['forward']:.1f} s)"
        lines += ["", f"{row['method']}, {row['tokens']} tokens: {row['seconds']:.1f} s, {two}"]
        lines.append(f"{'phase':8}{'seconds':>9}{'part':>7}{'floor':>8}")
        for phase in PHASES:
            seconds = row["phases"][phase]
            lines.append(f"{phase:8}{seconds:9.1f}{seconds / row['seconds']:7.1%}{row['floors'][phase]:8.1f}")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--methods", default="wanda,admm")
    parser.add_argument("--target", default="0.5")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    text = TextSettings(
        data=arguments.data, samples=arguments.samples, length=arguments.length, packing="windows", eval_samples=1
    )
    rows = [measured(arguments, method, text) for method in arguments.methods.split(",")]
    facts = machine()
    write_results(
        arguments.out,
        {"machine": facts, "settings": vars(arguments) | {"out": None}, "rows": rows},
        text_table(rows, headline(facts)),
    )


if __name__ == "__main__":
    main()
