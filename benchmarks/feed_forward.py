"""Feed-forward networks pruned as one problem: output errors with all ablations, perplexity, time.

    python -m benchmarks.feed_forward OUT --model embedded --data embedded [--eval-data FILE] [--label NAME]

There are two tables. Each row is written as soon as it is measured, and the same command continues where it stopped.

- `errors`: for each setting in `SETTINGS` and the feed-forward network of each block, on its inputs in the dense model:
  |net(X) - Y|^2 / |Y|^2 on tokens of the evaluation text, and CPU seconds.
- `perplexity`: whole models pruned by the methods of `--methods`, over `--seeds` samples of the calibration text, with
  the CPU seconds of pruning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from admm_prune.methods.base import Task
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.sparsellm import SparseLLM, network_of
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.evaluate import evaluate
from admm_prune.models.feed_forward import feed_forwards
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.point import Point
from admm_prune.problems.feed_forward import EVEN, FeedForward, GatedFeedForward, Network, Penalties
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.refit import Refit
from admm_prune.solvers.support_descent import SupportDescent
from benchmarks.machine import headline, machine

LOOSE = SparseLLM.penalties
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to solve a network.

    Args:
        explicit: the split objective itself, as published: no closing step inside the rounds.
        closed: one closing step after the explicit rounds.
    """

    inner: str = "admm"
    rounds: int = 1
    explicit: bool = False
    closed: bool = False
    descent: int = 0
    penalties: Penalties = EVEN
    sweeps: int = 1
    freeze_after: int | None = None


SETTINGS: dict[str, Setting] = {
    "local": Setting(explicit=True),
    "local, sparsegpt": Setting(inner="sparsegpt", explicit=True),
    "release-like": Setting(inner="sparsegpt", rounds=4, explicit=True),
    "release-like, closed": Setting(inner="sparsegpt", rounds=4, explicit=True, closed=True),
    "release-like, admm": Setting(rounds=4, explicit=True),
    "release-like, admm, closed": Setting(rounds=4, explicit=True, closed=True),
    "sequential": Setting(),
    "sequential, sparsegpt": Setting(inner="sparsegpt"),
    "sequential, wanda": Setting(inner="wanda"),
    "2 rounds, 1:1:1": Setting(rounds=2),
    "2 rounds": Setting(rounds=2, penalties=LOOSE),
    "2 rounds, frozen": Setting(rounds=2, penalties=LOOSE, freeze_after=1),
    "4 rounds": Setting(rounds=4, penalties=LOOSE),
    "4 rounds, 3 sweeps": Setting(rounds=4, penalties=LOOSE, sweeps=3),
    "8 rounds": Setting(rounds=8, penalties=LOOSE),
    "1 round, 200 steps": Setting(descent=200),
    "sparsellm": Setting(rounds=2, penalties=LOOSE, descent=100),
    "sparsellm, frozen": Setting(rounds=2, penalties=LOOSE, descent=100, freeze_after=1),
    "sparsellm, 4 rounds": Setting(rounds=4, penalties=LOOSE, descent=100),
    "sparsellm, sparsegpt": Setting(inner="sparsegpt", rounds=2, penalties=LOOSE, descent=100),
    "sparsellm, wanda": Setting(inner="wanda", rounds=2, penalties=LOOSE, descent=100),
}
for _alpha in (0.2, 1.0, 5.0):
    for _beta in (0.2, 1.0, 5.0):
        SETTINGS[f"2 rounds, {_alpha:g}:{_beta:g}:1"] = Setting(rounds=2, penalties=Penalties(alpha=_alpha, beta=_beta))


@dataclass
class Rows:
    """Rows of JSON, one a line, found again by some of their values."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def has(self, **values: Any) -> bool:
        return any(all(row[name] == value for name, value in values.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(row, flush=True)


def dense_pairs(loaded: Any, texts: Texts, samples: int) -> Iterator[tuple[str, Network, Pairs]]:
    """Every block's network, and the tokens of it in the dense model: calibration, validation, and other text."""
    blocks = decoder_blocks(loaded.model)
    networks = feed_forwards(loaded.model, blocks)
    calibration, evaluation = texts.calibration(samples), texts.evaluation
    stream = BlockStream(loaded.model, blocks, calibration, "cpu", holdout=evaluation)
    for index, (block, views) in enumerate(zip(blocks, networks, strict=True)):
        pairs = stream.pairs(index, views.weights)
        yield block.name, network_of(views), {part: (x.float(), y.float()) for part, (x, y) in pairs.items()}
        stream.advance(index)


def error_of(setting: Setting, network: Network, pairs: Pairs, target: Target) -> tuple[float, float]:
    """The relative error on other text, and the CPU seconds that the setting took."""
    method = LOCAL_METHODS[setting.inner]
    sets = dict.fromkeys(network.weights, method.constraint(target))
    how: dict[str, Any] = {
        "validation": pairs["validation"],
        "penalties": setting.penalties,
        "damped": dict.fromkeys(network.weights, (method.ridge, method.damping)),
    }
    began = time.process_time()
    whole = NetworkOutput(network, pairs["calibration"], sets, sweeps=setting.sweeps, **how)
    problem: Any = whole
    if setting.explicit:
        kind = GatedFeedForward if network.gated else FeedForward
        problem = kind(network, *pairs["calibration"], sets, **how)
    solver = Alternating(
        inner=method.make(),
        max_iterations=setting.rounds,
        freeze_after=setting.freeze_after,
        together=SupportDescent.of(setting.descent) if setting.descent else None,
        tolerance=-1.0,
    )
    solution = solver.solve(problem).solution
    x = Point({name: solution.get(name, part) for name, part in whole.initial().items()})
    if setting.closed:
        block = whole.block("down", x)
        x = whole.joined(x, "down", block, Refit(method.make(), max_iterations=20).solve(block).solution)
    seconds = time.process_time() - began
    return with_validation_tokens(whole, pairs["holdout"]).validation_loss(x), seconds


def with_validation_tokens(problem: NetworkOutput, tokens: tuple[torch.Tensor, torch.Tensor]) -> NetworkOutput:
    """The same network judged on other tokens."""
    return NetworkOutput(problem.network, problem.tokens, problem.constraints, validation=tokens)


def measure_errors(rows: Rows, loaded: Any, texts: Texts, chosen: argparse.Namespace) -> None:
    target = Target(chosen.error_sparsity)
    settings = {name: SETTINGS[name] for name in chosen.settings.split(";")} if chosen.settings else SETTINGS
    for block, network, pairs in dense_pairs(loaded, texts, chosen.samples):
        for name, setting in settings.items():
            if not rows.has(model=chosen.label, block=block, setting=name):
                error, seconds = error_of(setting, network, pairs, target)
                rows.add(model=chosen.label, block=block, setting=name, error=error, cpu_seconds=round(seconds, 2))


def measure_perplexity(rows: Rows, chosen: argparse.Namespace) -> None:
    for seed in range(chosen.seeds):
        settings = text_settings(chosen, seed)
        for sparsity in map(float, chosen.sparsity.split(",")):
            for name in chosen.methods.split(","):
                key = {"model": chosen.label, "seed": seed, "sparsity": sparsity, "method": name}
                if rows.has(**key):
                    continue
                loaded = load(chosen.model)
                texts = Texts(settings, loaded)
                recipe = recipe_named(name)
                task = Task(target=Target(sparsity), calibration=texts.calibration(chosen.samples), seed=seed)
                began = time.process_time()
                recipe.prune(loaded.model, task)
                seconds = time.process_time() - began
                rows.add(
                    **key, perplexity=evaluate(loaded.model, texts.evaluation).perplexity, cpu_seconds=round(seconds, 2)
                )


def text_settings(chosen: argparse.Namespace, seed: int) -> TextSettings:
    return TextSettings(
        data=chosen.data,
        eval_data=chosen.eval_data,
        samples=chosen.samples,
        eval_samples=chosen.eval_samples,
        seed=seed,
    )


def error_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every setting's error in every block, and its geometric mean over that of "release-like"."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        blocks = list(dict.fromkeys(row["block"] for row in mine))
        measured = {(row["setting"], row["block"]): row for row in mine}
        lines += [f"{model}: relative output error of each block's network on other text", ""]
        lines.append(
            f"{'':28}"
            + "".join(f"{block.rpartition('.')[2]:>9}" for block in blocks)
            + f"{'x release':>11}{'cpu s':>9}"
        )
        for setting in dict.fromkeys(row["setting"] for row in mine):
            results = [measured.get((setting, block)) for block in blocks]
            errors = [row["error"] for row in results if row is not None]
            if len(errors) < len(blocks):
                continue
            base = [measured["release-like", block]["error"] for block in blocks if ("release-like", block) in measured]
            ratio = geometric_mean(errors) / geometric_mean(base) if len(base) == len(errors) else float("nan")
            seconds = sum(row["cpu_seconds"] for row in results if row is not None)
            lines.append(
                f"{setting:28}" + "".join(f"{error:>9.4f}" for error in errors) + f"{ratio:>11.3f}{seconds:>9.1f}"
            )
        lines.append("")
    return lines


def perplexity_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Perplexity of every method, and its ratio to `admm` alone on the same draw; CPU seconds likewise."""
    lines = []
    measured = {(row["model"], row["sparsity"], row["seed"], row["method"]): row for row in rows}
    for model, sparsity in dict.fromkeys((row["model"], row["sparsity"]) for row in rows):
        lines.append(
            f"{model}, {sparsity:.0%}: perplexity, over admm's, time over admm's, for each draw of calibration text"
        )
        mine = [row for row in rows if (row["model"], row["sparsity"]) == (model, sparsity)]
        seeds = sorted({row["seed"] for row in mine})
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = []
            for seed in seeds:
                result, base = (
                    measured.get((model, sparsity, seed, method)),
                    measured.get((model, sparsity, seed, "admm")),
                )
                if result is not None and base is not None:
                    ratio, pace = result["perplexity"] / base["perplexity"], result["cpu_seconds"] / base["cpu_seconds"]
                    cells.append(f"{result['perplexity']:>10.3f} {ratio:>6.3f} {pace:>5.2f}x")
            lines.append(f"  {method:20}" + "   ".join(cells))
        lines.append("")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--label", help="of the model in the tables; its last folder by default")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--eval-data")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--error-sparsity", type=float, default=0.7)
    parser.add_argument("--settings", help="of the error table, separated by ;")
    parser.add_argument("--sparsity", default="0.7,0.8", help="of the perplexity table")
    parser.add_argument("--methods", default="admm,sequential,sparsellm,sparsellm-release")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("errors", "perplexity", "tables"))
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    chosen.label = chosen.label or Path(chosen.model).name
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    errors, perplexities = Rows(chosen.out / "errors.jsonl"), Rows(chosen.out / "perplexity.jsonl")
    parts: dict[str, Callable[[], None]] = {
        "errors": lambda: _errors(errors, chosen),
        "perplexity": lambda: measure_perplexity(perplexities, chosen),
    }
    for part in (chosen.only,) if chosen.only else parts:
        if part in parts:
            parts[part]()
    facts = machine(chosen.date)
    facts["command"] = "python -m benchmarks.feed_forward OUT --model MODEL --data TEXT --samples N --eval-samples N"
    tables = {"machine": facts, "errors": errors.rows, "perplexity": perplexities.rows}
    (chosen.out / "feed_forward.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    lines = [headline(facts), "", *error_table(errors.rows), *perplexity_table(perplexities.rows)]
    (chosen.out / "feed_forward.txt").write_text("\n".join(lines), encoding="utf-8")


def _errors(rows: Rows, chosen: argparse.Namespace) -> None:
    loaded = load(chosen.model)
    with torch.no_grad():
        measure_errors(rows, loaded, Texts(text_settings(chosen, 0), loaded), chosen)


if __name__ == "__main__":
    main()
