"""Structured methods on a real language model: perplexity, size, prefill and decoding compared with the dense model.

    python -m benchmarks.structured_model OUT --data wikitext2-valid.txt --eval-data wikitext2-test.txt [--model DIR]

The model and the windows of the texts are those of `benchmarks.real_model`. All methods calibrate on the same tokens,
and a target is a fraction of the parameters in the matrices of all blocks. Perplexities are measured first; the times
of inference afterwards by `admm-prune bench inference`, together with the dense model. Methods with the same loss
curves share them in OUT/curves; the seconds of each row include the time of its curves.

Each row is written as soon as it is measured, and the same command continues where it stopped. OUT has quality.csv,
inference.csv, structured_model.json, structured_model.txt and the models; `--report` only writes the JSON and the text
again, `--no-inference` leaves out the times.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from admm_prune.methods.base import Task
from admm_prune.methods.struprune.struprune import STRUCTURED, StruPrune
from admm_prune.methods.target import Target
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import LoadedModel, load, save
from admm_prune.problems.allocation import Curve
from admm_prune.runs.manifest import Phases
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from benchmarks.journal import Journal, number
from benchmarks.machine import headline, machine, write_results
from benchmarks.real_model import DENSE, command, grid_parser, parsed, protocol, smollm2

RECIPES = {recipe.name: recipe for recipe in STRUCTURED}
METHODS = ("struprune", "structured-global", "structured-wanda")
KEY = ("model", "target", "method")
RUNS = ("prefill", "decode")
_SERIES = ("losses", "savings")  # the tensors of a curve
QUALITY = (
    "perplexity", "parameters", "removed", "removed_of_blocks", "bytes", "tokens", "eval_tokens", "curve_seconds",
    "pruning_seconds", "peak_mib", "settings",
)  # fmt: skip
INFERENCE = (
    "repeats", "tokens", "new_tokens", "dense_prefill", "prefill", "dense_decode", "decode", "prefill_speedup",
    "decode_speedup", "prefill_differs", "decode_differs", "dense_prefill_spread", "prefill_spread",
    "dense_decode_spread", "decode_spread", "load_average",
)  # fmt: skip


class Bench:
    """The rows of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.quality = Journal(self.out / "quality.csv", QUALITY, KEY)
        self.inference = Journal(self.out / "inference.csv", INFERENCE, KEY)
        self.source = str(arguments.model or smollm2(self.out / "SmolLM2-135M"))

    def run(self) -> None:
        a = self.arguments
        rows = [(target, method) for target in a.targets for method in a.methods]
        for target, method in [*rows, (DENSE, DENSE)]:
            self._measure_quality(target, method)
            report(self.out)
        for target, method in rows if a.inference else []:
            self._measure_inference(target, method)
            report(self.out)

    @cached_property
    def texts(self) -> Texts:
        a = self.arguments
        settings = TextSettings(
            data=a.data,
            eval_data=a.eval_data,
            samples=a.samples,
            eval_samples=a.eval_samples,
            length=a.length,
            packing="windows",
        )
        return Texts(settings, self._load())

    def _load(self) -> LoadedModel:
        return load(self.source, dtype=self.arguments.dtype)

    def _folder(self, target: str, method: str) -> Path:
        return self.out / (DENSE if method == DENSE else f"{method}-{target}")

    def _key(self, target: str, method: str) -> dict[str, str]:
        return {"model": Path(self.source).name, "target": target, "method": method}

    def _measure_quality(self, target: str, method: str) -> None:
        """Prunes, saves and evaluates, unless it is done; the dense model is saved in the data type of the others."""
        key, folder = self._key(target, method), self._folder(target, method)
        if self.quality.find(key):
            return
        loaded = self._load()
        before = _parameters(loaded.model)
        phases = Phases("cpu")
        curve_seconds, saved = 0.0, 0.0
        if method != DENSE:
            recipe = RECIPES[method]
            task = Task(target=Target(float(target)), calibration=self.texts.calibration())
            curves, curve_seconds = self._curves(recipe, task)
            with phases("pruning"):
                outcome = recipe.prune(loaded.model, task, curves=curves)
            saved = outcome.details["saved"]
            model: Any = outcome.model or loaded.model
            loaded = replace(loaded, model=model)
        save(loaded, folder, {"method": method, "target": target})
        evaluated = evaluate(loaded.model, self.texts.evaluation)
        row = {
            "perplexity": evaluated.perplexity,
            "parameters": _parameters(loaded.model),
            "removed": 1 - _parameters(loaded.model) / before,
            "removed_of_blocks": saved,
            "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "tokens": None if method == DENSE else self.texts.calibration().tokens,
            "eval_tokens": evaluated.tokens,
            "curve_seconds": curve_seconds,
            "pruning_seconds": curve_seconds + sum(phase.seconds for phase in phases),
            "peak_mib": max((phase.peak_mib for phase in phases), default=0.0),
            "settings": protocol(self.arguments),
        }
        self.quality.add(key, [row])
        print(f"{key} {row['perplexity']:.3f} ({row['pruning_seconds']:.0f} s)", file=sys.stderr, flush=True)

    def _curves(self, recipe: StruPrune, task: Task) -> tuple[dict[str, Curve], float]:
        """The loss curves of a recipe, and the seconds that measuring them took.

        The curves depend on the dense model and on the fields of the recipe below, so that they are measured once for
        all targets and methods with equal fields.
        """
        fields = (recipe.selector, recipe.compensate, recipe.relative, recipe.uniform, recipe.ridge)
        path = self.out / "curves" / f"{'-'.join(map(str, fields))}.safetensors"
        if not path.is_file():
            began = time.perf_counter()
            curves = recipe.measure(self._load().model, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_curves(path, curves, time.perf_counter() - began)
        return read_curves(path)

    def _measure_inference(self, target: str, method: str) -> None:
        """Prefill and decoding by turns with the dense model, unless it is done. CPU seconds of one thread."""
        key, a = self._key(target, method), self.arguments
        if self.inference.find(key):
            return
        words = (
            "--tokens",
            a.prefill,
            "--new-tokens",
            a.decode,
            "--batches",
            1,
            "--repeats",
            a.repeats,
            "--threads",
            1,
            "--json",
        )
        figures, _ = command(
            "bench", "inference", self._folder(target, method), "--against", self._folder(DENSE, DENSE), *words
        )
        by_form = {row["form"]: row for row in figures["rows"]}
        dense, pruned = by_form["dense"], by_form["as stored"]
        row: dict[str, Any] = {"repeats": a.repeats, "tokens": a.prefill, "new_tokens": a.decode}
        for name, count in zip(RUNS, (a.prefill, a.decode), strict=True):
            for prefix, form in (("dense_", dense), ("", pruned)):
                speed = form["prefill"] if name == "prefill" else form["decoding"][0]["speed"]
                least, most = speed["range"]
                row[f"{prefix}{name}"] = count / least
                row[f"{prefix}{name}_spread"] = most / least - 1
            row[f"{name}_speedup"] = speed["speedup"]
            row[f"{name}_differs"] = int(speed["differs"])
        self.inference.add(key, [row | {"load_average": machine()["load_average"][0]}])


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def write_curves(path: Path, curves: Mapping[str, Curve], seconds: float) -> None:
    """Writes curves atomically, as safetensors, with the seconds that they took in the metadata."""
    tensors = {f"{part}/{name}": getattr(curve, part).clone() for name, curve in curves.items() for part in _SERIES}
    limits = {
        name: {
            "least": curve.least,
            "multiple": curve.multiple,
            "stays": None if curve.stays is None else sorted(curve.stays),
        }
        for name, curve in curves.items()
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"limits": json.dumps(limits), "seconds": repr(seconds)})
    partial.rename(path)


def read_curves(path: Path) -> tuple[dict[str, Curve], float]:
    """The curves of `write_curves`, and their seconds."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        curves = {
            name: Curve(
                name,
                *(file.get_tensor(f"{part}/{name}") for part in _SERIES),
                least=limits["least"],
                multiple=limits["multiple"],
                stays=None if limits["stays"] is None else frozenset(limits["stays"]),
            )
            for name, limits in json.loads(metadata["limits"]).items()
        }
    return curves, float(metadata["seconds"])


def rows_of(quality: Journal, inference: Journal) -> list[dict[str, Any]]:
    """Every row with its ratios of perplexity to the dense model and to struprune at the same target."""
    perplexities = {(r["model"], r["target"], r["method"]): float(r["perplexity"]) for r in quality.records}
    bytes_of_dense = {r["model"]: float(r["bytes"]) for r in quality.records if r["method"] == DENSE}
    rows = []
    for record in quality.records:
        model, target, method = (record[name] for name in KEY)
        key = {"model": model, "target": target, "method": method}
        ours = perplexities.get((model, target, "struprune"))
        row: dict[str, Any] = key | {name: number(record[name]) for name in QUALITY if name != "settings"}
        row["settings"] = record["settings"]
        row["ratio_to_dense"] = row["perplexity"] / perplexities.get((model, DENSE, DENSE), math.nan)
        row["ratio_to_struprune"] = None if ours is None else row["perplexity"] / ours
        row["bytes_of_dense"] = row["bytes"] / bytes_of_dense.get(model, math.nan)
        measured = inference.find(key)
        row["inference"] = {name: number(measured[0][name]) for name in INFERENCE} if measured else None
        rows.append(row)
    return rows


def text_table(rows: Sequence[dict[str, Any]], head: str, words: str) -> str:
    columns = (
        f"{'target':>7} {'method':18}{'perplexity':>11}{'/dense':>8}{'/struprune':>11}{'removed':>9}{'blocks':>8}"
        f"{'MB':>8}{'/dense':>8}{'pruning':>9}{'peak MiB':>10}"
    )
    lines = [
        head,
        f"python -m benchmarks.structured_model {words}",
        "/dense, /struprune: ratios of perplexity; removed: percent of all parameters, and of those of the blocks'",
        "matrices, which the target is of; MB: of the saved folder; pruning: seconds; peak: memory while pruning,",
        "beyond the model's.",
        *dict.fromkeys(row["settings"] for row in rows),
        "",
        columns,
    ]
    for row in rows:
        ratio = "" if row["ratio_to_struprune"] is None else f"{row['ratio_to_struprune']:.3f}"
        lines.append(
            f"{row['target']:>7} {row['method']:18}{row['perplexity']:11.3f}{row['ratio_to_dense']:8.3f}{ratio:>11}"
            f"{100 * row['removed']:9.2f}{100 * row['removed_of_blocks']:8.2f}{row['bytes'] / 1e6:8.1f}"
            f"{row['bytes_of_dense']:8.3f}{row['pruning_seconds']:9.0f}{row['peak_mib']:10.0f}"
        )
    timed = [row for row in rows if row["inference"] is not None]
    if not timed:
        return "\n".join(lines) + "\n"
    first = timed[0]["inference"]
    heads = (f"{f'dense {name}':>14}{name:>9}{'ratio':>9}{'spread':>14}" for name in RUNS)
    lines += [
        "",
        f"Prefill of {first['tokens']:.0f} tokens and decoding of {first['new_tokens']:.0f}: tokens per CPU second,",
        f"one thread, best of {first['repeats']:.0f} repeats by turns with the dense model in the same run;",
        "spread: slowest / fastest repeat - 1, dense and pruned; ~: within the spread.",
        "",
        f"{'target':>7} {'method':18}{''.join(heads)}",
    ]
    for row in timed:
        figures = row["inference"]
        line = f"{row['target']:>7} {row['method']:18}"
        for name in RUNS:
            mark = " " if figures[f"{name}_differs"] else "~"
            line += f"{figures[f'dense_{name}']:14.1f}{figures[name]:9.1f}{figures[f'{name}_speedup']:8.3f}{mark}"
            line += f"{100 * figures[f'dense_{name}_spread']:7.1f}%{100 * figures[f'{name}_spread']:5.1f}%"
        lines.append(line)
    return "\n".join(lines) + "\n"


def report(out: Path) -> None:
    """The table and the JSON of what has been measured."""
    rows = rows_of(Journal(out / "quality.csv", QUALITY, KEY), Journal(out / "inference.csv", INFERENCE, KEY))
    facts, words = machine(), (out / "command.txt").read_text(encoding="utf-8")
    content = {"machine": facts, "command": f"python -m benchmarks.structured_model {words}", "rows": rows}
    write_results(out / "structured_model", content, text_table(rows, headline(facts), words))


def main(words: Sequence[str] | None = None) -> None:
    parser = grid_parser(__doc__, methods=METHODS, targets=("0.2", "0.3"), eval_samples=32)
    parser.add_argument("--threads", type=int, default=2, help="of pruning and evaluation")
    parser.add_argument("--prefill", type=int, default=256, help="tokens")
    parser.add_argument("--decode", type=int, default=16, help="tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-inference", dest="inference", action="store_false")
    given = sys.argv[1:] if words is None else list(words)
    arguments = parsed(parser, given)
    torch.set_num_threads(arguments.threads)
    if not arguments.report:
        shown = " ".join(Path(word).name if Path(word).is_absolute() else word for word in given)
        (arguments.out / "command.txt").write_text(shown, encoding="utf-8")
        Bench(arguments).run()
    report(arguments.out)


if __name__ == "__main__":
    main()
