"""The time of pruning a model: the seconds of each phase of a run, compared with a lower bound.

    python -m benchmarks.pruning_time OUT --model DIR --data FILE [--methods wanda,admm] [--samples 64] [--blocks 3]

A method may have options of `admm-prune run`: `--methods "admm,admm --refit block"`. `--blocks` cuts the model after
this many blocks. A run is a call of `admm_prune.prune` with an output folder. The time of its pruning is divided into
disjoint phases: `calls` records how the model calls its blocks, `passes` computes blocks, `moments` accumulates second
moments, `solves` solves the layer problems, `refit` is the blockwise refit, `journal` writes blocks and activations for
`--resume`, and `other` is the rest of the wall-clock time. `ratio` is the time of pruning relative to two forward
passes of the model without its head over the same batches, measured in the same process: one-shot pruning computes
every block on its dense inputs, and once more after it is pruned, for the inputs of the next block.

The lower bound of a phase is the time that its operations or bytes take at rates measured in the same process.
Operations are counted at the rate of a float32 product: for passes two per weight and token, and those of causal
attention; for second moments d (d + 1) per token and input of d channels; for solves the products H W^T of their
iterations. Bytes are counted at the rates of writing a file and of reading it from the page cache. Writes OUT.json and
OUT.txt.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from admm_prune.data.sequences import Sequences
from admm_prune.methods import joint, layerwise
from admm_prune.methods.registry import recipe_named
from admm_prune.models import capture
from admm_prune.models.activation_store import BatchState
from admm_prune.models.inputs import Collector
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.journal.journal import FolderJournal
from admm_prune.runs.prune import prune
from admm_prune.runs.results import Report
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.solvers.alternating import Alternating
from admm_prune.statistics import GramAccumulator
from benchmarks.machine import headline, machine, write_results

INSIDE = ("calls", "passes", "moments", "solves", "refit", "journal")  # of pruning
_FILE = 1 << 28  # bytes written and read to measure the rates of files


class Clock:
    """The seconds of nested functions, each without those inside it, and the operations that they computed."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(INSIDE, 0.0)
        self.operations = 0  # of second moments
        self._inside = [0.0]

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
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
            self.operations += inputs.numel() * (width + 1)
            add(gram, inputs, *arguments, **options)

        return call

    @contextmanager
    def watching(self) -> Generator[None]:
        """Context in which the functions of the phases are timed."""
        with ExitStack() as stack:
            for owner, name, phase in (
                (capture, "record", "calls"),
                (BatchState, "replay", "passes"),
                (GramAccumulator, "add", "moments"),
                (Collector, "shared_inputs", "moments"),
                (layerwise, "prune_several", "solves"),
                (Alternating, "solve", "solves"),
                (joint, "refit_block", "refit"),
                (FolderJournal, "commit", "journal"),
            ):
                function = getattr(owner, name)
                watched = self._timed(phase, self._counted(function) if name == "add" else function)
                stack.enter_context(patch.object(owner, name, watched))
            yield

    def within(self, pruning: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is watched, and nothing outside it."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.watching():
                return pruning(*arguments, **options)

        return call


def forward_seconds(loaded: LoadedModel, text: Sequences) -> float:
    """Of one pass of the model without its head, after one over the first batch."""
    base = loaded.model.base_model
    began = 0.0
    with torch.no_grad():
        for batch in (text.batches[0], *text.batches):
            base(input_ids=batch.input_ids, use_cache=False)
            began = began or time.perf_counter()
    return time.perf_counter() - began


def product_rate(width: int, tokens: int = 4096) -> float:
    """Operations per second of a float32 product, the best of five."""
    x, w = torch.randn(tokens, width), torch.randn(width, width)
    return 2 * tokens * width * width / _best(lambda: x @ w)


def file_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing a file to the disk, and of reading it again."""
    path, content = folder / "rate", bytes(_FILE)

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())

    rates = _FILE / _best(write, 2), _FILE / _best(path.read_bytes, 2)
    path.unlink()
    return rates


def _best(action: Callable[[], object], times: int = 5) -> float:
    """The minimum seconds of some calls, after one to warm up."""
    best = float("inf")
    for call in range(times + 1):
        began = time.perf_counter()
        action()
        if call:
            best = min(best, time.perf_counter() - began)
    return best


def floors(loaded: LoadedModel, report: Report, tokens: int, length: int, moments: int) -> dict[str, float]:
    """The lower bound of the seconds of each phase that has one."""
    assert report.out is not None
    model, blocks = loaded.model, decoder_blocks(loaded.model)
    config: Any = model.config
    width = config.hidden_size
    weights = sum(view.shape[0] * view.shape[1] for block in blocks for view in block.weights)
    attention = 2 * length * width * len(blocks)  # q k^T and the mean of v, over half of the positions
    head = 2 * width * config.vocab_size
    solves = sum(2 * layer.iterations * layer.shape[0] * layer.shape[1] ** 2 for layer in report.layers)
    saved = sum(file.stat().st_size for file in report.out.glob("*.safetensors"))
    held = 4 * sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
    product = product_rate(width)
    write, read = file_rates(report.out)
    evaluating = report.pruned.tokens * (2 * weights + attention + head) / product
    return {
        "opening the model": saved / read,
        "evaluating the dense model": evaluating,
        "passes": 2 * tokens * (2 * weights + attention) / product,
        "moments": moments / product,
        "solves": solves / product,
        "journal": (held + 4 * tokens * width * len(blocks)) / write,
        "evaluating the pruned model": evaluating,
        "writing the model": saved / write,
        "loading the folder again": saved / read,
        "hashing the files": saved / read,
    }


def shortened(model: str, count: int, folder: Path) -> str:
    """A folder with the model cut to its first blocks."""
    loaded = load(model)
    path = decoder_blocks(loaded.model)[0].name.rpartition(".")[0]
    owner, _, name = path.rpartition(".")
    setattr(loaded.model.get_submodule(owner), name, loaded.model.get_submodule(path)[:count])  # type: ignore[index]
    loaded.model.config.num_hidden_layers = count
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def measured(arguments: argparse.Namespace, model: str, words: str) -> dict[str, Any]:
    """The seconds of one run."""
    method, *options = words.split()
    steps = {option.removeprefix("--"): value for option, value in zip(options[::2], options[1::2], strict=True)}
    how = {"data": arguments.data, "samples": arguments.samples, "length": arguments.length}
    how |= {"packing": "windows", "eval_samples": arguments.eval_samples}
    loaded, recipe, clock = load(model, dtype=arguments.dtype), recipe_named(method), Clock()
    calibration = Texts(TextSettings(**how), loaded).calibration(recipe.samples)
    forward = forward_seconds(loaded, calibration)
    with (
        tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder,
        patch.object(type(recipe), "prune", clock.within(type(recipe).prune)),
    ):
        amount = {"pattern" if ":" in arguments.target else "sparsity": arguments.target}
        began = time.perf_counter()
        report = prune(
            model=model, method=method, out=Path(folder) / "pruned", dtype=arguments.dtype, **how, **amount, **steps
        )
        wall = time.perf_counter() - began
        least = floors(loaded, report, calibration.tokens, calibration.length, clock.operations)
    phases = {phase.name: phase.seconds for phase in report.phases}
    pruning = phases.pop("pruning")
    return {
        "method": words,
        "target": arguments.target,
        "tokens": calibration.tokens,
        "eval_tokens": report.pruned.tokens,
        "forward": forward,
        "pruning": pruning,
        "ratio": pruning / (2 * forward),
        "wall": wall,
        "phases": phases | clock.seconds,
        "floors": least,
    }


def text_table(rows: Sequence[dict[str, Any]], head: str) -> str:
    lines = [head]
    for row in rows:
        two = f"{row['ratio']:.2f} of two forward passes ({2 * row['forward']:.1f} s)"
        lines += ["", f"{row['method']} {row['target']}, {row['tokens']} tokens: pruning {row['pruning']:.1f} s, {two}"]
        lines.append(f"{'phase':28}{'seconds':>9}{'part':>7}{'floor':>8}")
        phases = row["phases"]
        other = row["wall"] - sum(phases.values())
        names = [*(name for name in phases if name not in INSIDE), *INSIDE]
        for name, seconds in [*((name, phases[name]) for name in names), ("other", other), ("wall clock", row["wall"])]:
            floor = f"{row['floors'][name]:8.1f}" if name in row["floors"] else ""
            lines.append(f"{name:28}{seconds:9.1f}{seconds / row['wall']:7.1%}{floor}")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--methods", default="wanda,admm", help="a comma-separated list, each with its options")
    parser.add_argument("--target", default="0.5")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=8)
    parser.add_argument("--length", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, help="only the first so many blocks of the model")
    arguments = parser.parse_args(words)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    rows, facts = [], machine()
    settings = vars(arguments) | {"out": None, "model": Path(arguments.model).name, "data": Path(arguments.data).name}
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder:
        model = arguments.model
        if arguments.blocks is not None:
            model = shortened(model, arguments.blocks, Path(folder) / "shortened")
        for method in arguments.methods.split(","):
            rows.append(measured(arguments, model, method))
            content = {"machine": facts, "settings": settings, "rows": rows}
            write_results(arguments.out, content, text_table(rows, headline(facts)))


if __name__ == "__main__":
    main()
