"""The effects of allocation, coordinated attention and the blockwise refit, separately and combined.

    python -m benchmarks.joint OUT [--methods admm,sparsellm] [--targets 0.5,0.6] [--allocations fisher] [--seeds 0,1]
    python -m benchmarks.joint OUT --model DIR --data FILE --eval-data FILE [--rows none,all] [--blimp blimp.tar.xz]

By default the embedded model is pruned on its own text. Every row is a run of `admm_prune.prune`, in memory, on the
same tokens as the other rows of its seed; a seed draws calibration and evaluation sequences, so that ratios can be
compared between seeds, and perplexities cannot. A row has the perplexity, the weights removed as counted in the pruned
model, the CPU seconds of allocation and pruning, with `--blimp` the accuracy on BLiMP for the first seed, and errors on
validation tokens, averaged over the blocks: `alone` and `together` are the relative errors of the attention output with
value and output projections pruned separately (on the tokens of the fit) and jointly; `before` and `after` are the
errors of the block output before and after the refit, which starts from matrices pruned on all tokens and is kept only
if it lowers the error.

The rows are `none` (the method without these steps), `attention`, `refit`, `both` (of these two), and for every rule of
`--allocations` also `allocation`, `allocation-refit` and `all`. A row is written to OUT/runs.csv as soon as it is
measured, and the same command continues where it stopped; an interrupted run is resumed, and has no seconds. Commands
with other targets, methods or rows can share OUT. OUT/joint.txt and OUT/joint.json are written after every row, and by
`--report`, which measures nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from admm_prune.methods.callbacks import Callback
from admm_prune.runs.journal.journal import home_of
from admm_prune.runs.prune import prune
from admm_prune.runs.results import Report
from benchmarks.journal import Journal, Record, number
from benchmarks.machine import headline, machine, write_results
from benchmarks.real_model import blimp, grid_parser, protocol

Steps = dict[str, str]
Row = dict[str, Any]
ATTENTION, REFIT = {"coordinate": "attention"}, {"refit": "block"}
ROWS: dict[str, Steps] = {
    "none": {},
    "attention": ATTENTION,
    "refit": REFIT,
    "both": ATTENTION | REFIT,
    "allocation": {},
    "allocation-refit": REFIT,
    "all": ATTENTION | REFIT,
}
ALLOCATED = ("allocation", "allocation-refit", "all")
UNALLOCATED = ("none", "attention", "refit", "both")
ABLATION = ("none", "allocation", "attention", "refit", "all")  # by default, where there are allocations
NO_STEPS = "-"
FIGURES = (("attention", "alone"), ("attention", "together"), ("refit", "before"), ("refit", "after"))
PRUNING = ("allocating the budget", "pruning")  # the phases whose seconds count
KEY = ("model", "target", "method", "steps", "seed", "settings")
COLUMNS = (
    "perplexity", "dense", "weights", "removed", "seconds", "blimp", "blimp_error", *map("_".join, FIGURES)
)  # fmt: skip


class CpuSeconds(Callback):
    """The CPU seconds of allocation and pruning."""

    total = began = 0.0

    def on_phase_begin(self, name: str) -> None:
        self.began = time.process_time()

    def on_phase_end(self, name: str, seconds: float, peak_mib: float) -> None:
        if name in PRUNING:
            self.total += time.process_time() - self.began


def label(steps: Steps) -> str:
    return " ".join(f"--{name} {value}" for name, value in steps.items()) or NO_STEPS


def chosen_steps(rows: Sequence[str], allocations: Sequence[str]) -> list[Steps]:
    """The steps of the rows of these names, each allocated row once for every rule."""
    steps: list[Steps] = []
    for name in rows:
        rules = allocations if name in ALLOCATED else (None,)
        steps += [({} if rule is None else {"allocation": rule}) | ROWS[name] for rule in rules]
    return steps


class Bench:
    """The runs of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.journal = Journal(arguments.out / "runs.csv", COLUMNS, KEY)
        self.tasks = None if arguments.blimp is None else blimp(arguments.blimp, arguments.out, arguments.pairs)

    def run(self) -> None:
        a = self.arguments
        for seed, target, method in product(a.seeds, a.targets, a.methods):
            for steps in chosen_steps(a.rows, a.allocations):
                self.measure(target, method, steps, seed)

    def measure(self, target: str, method: str, steps: Steps, seed: int) -> None:
        """Adds one row, unless it is there."""
        key = {
            "model": Path(self.arguments.model).name,
            "target": target,
            "method": method,
            "steps": label(steps),
            "seed": str(seed),
            "settings": protocol(self.arguments),
        }
        if self.journal.find(key):
            return
        # Run folders only serve to resume; only the rows stay.
        out = self.arguments.out / "-".join([method, target.replace(":", "-"), str(seed), *steps.values()])
        resumed, seconds = home_of(out).is_dir(), CpuSeconds()
        report = self._prune(out, target, method, steps, seed, resumed, seconds)
        shutil.rmtree(out)
        accuracy = {} if report.tasks is None else report.tasks["results"]["blimp"]
        row = {
            "perplexity": report.pruned.perplexity,
            "dense": report.dense.perplexity,
            "weights": report.block_weights,
            "removed": report.block_weights - sum(layer.nonzeros for layer in report.layers),
            "seconds": None if resumed else seconds.total,
            "blimp": accuracy.get("acc,none"),
            "blimp_error": accuracy.get("acc_stderr,none"),
            **joint_figures(report),
        }
        self.journal.add(key, [row])
        print(f"{key} {row['perplexity']:.3f}", file=sys.stderr, flush=True)
        write_report(self.arguments.out)

    def _prune(
        self, out: Path, target: str, method: str, steps: Steps, seed: int, resume: bool, seconds: Callback
    ) -> Report:
        a = self.arguments
        how: dict[str, Any] = {"pattern": target} if ":" in target else {"sparsity": float(target)}
        if steps.get("allocation") in ("search", "evolutionary"):
            how["allocation_passes"] = a.allocation_passes
        if self.tasks is not None and seed == a.seeds[0]:
            how |= {"tasks": "blimp", "task_folder": self.tasks}
        names = ("data", "eval_data", "samples", "length", "eval_samples", "dtype")
        how |= {name: getattr(a, name) for name in names}
        return prune(
            a.model,
            method=method,
            seed=seed,
            out=out,
            resume=resume,
            overwrite=True,
            stream=False,
            callbacks=seconds,
            **how,
            **steps,  # type: ignore[arg-type]
        )


def joint_figures(report: Report) -> dict[str, float | None]:
    """The figures of the joint steps, as means over the blocks."""
    blocks = report.details.get("joint") or report.details.get("feed_forward") or []
    figures: dict[str, float | None] = {}
    for step, name in FIGURES:
        values = [block[step][name] for block in blocks if step in block]
        figures[f"{step}_{name}"] = mean(values) if values else None
    return figures


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each target, method and steps: means over the seeds.

    `relative` is the perplexity relative to the method without steps on the same seed, `ratio` relative to sparsegpt
    without steps; None where that was not measured.
    """

    def perplexity_at(record: Record, method: str) -> float | None:
        """Of a method without steps, else as in the record."""
        wanted = {**{name: record[name] for name in KEY}, "method": method, "steps": NO_STEPS}
        found = (r for r in records if all(r[name] == value for name, value in wanted.items()))
        return next((float(r["perplexity"]) for r in found), None)

    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in KEY if name != "seed"), []).append(record)
    rows: list[Row] = []
    for runs in groups.values():
        values = [float(run["perplexity"]) for run in runs]

        def relative_to(of: Callable[[Record], str], runs: Sequence[Record] = runs) -> float | None:
            pairs = [(float(run["perplexity"]), perplexity_at(run, of(run))) for run in runs]
            return _mean([value / base for value, base in pairs if base is not None])

        means = {name: _mean([x for run in runs if (x := number(run[name])) is not None]) for name in COLUMNS}
        rows.append(
            {name: runs[0][name] for name in KEY if name != "seed"}
            | means
            | {
                "spread": max(values) - min(values),
                "seeds": len(runs),
                "relative": relative_to(lambda run: run["method"]),
                "ratio": relative_to(lambda _: "sparsegpt"),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def text_table(rows: Sequence[Row], head: str) -> str:
    lines = [
        head,
        "relative: to the method without steps, ratio: to sparsegpt, both on the same draw, mean over draws;",
        "spread: of perplexities over draws, each with its own evaluation sequences; CPU s: of allocation and pruning;",
        "errors: on validation tokens, means over the blocks.",
    ]
    columns = f"{'method':10} {'steps':58} {'perplexity':>10} {'spread':>7} {'draws':>5} {'relative':>8} {'ratio':>6}"
    for place in dict.fromkeys((row["model"], row["settings"], row["target"]) for row in rows):
        here = [row for row in rows if (row["model"], row["settings"], row["target"]) == place]
        lines += [
            "",
            f"{place[0]} at {place[2]}, dense {here[0]['dense']:.3f}; {here[0]['weights']:.0f} weights",
            place[1],
            f"{columns} {'removed':>9} {'CPU s':>6} {'BLiMP':>6}  errors",
        ]
        for row in sorted(here, key=lambda row: str(row["method"])):
            errors = ", ".join(
                f"{step} {row[f'{step}_{first}']:.5f} -> {row[f'{step}_{second}']:.5f}"
                for step, first, second in (("attention", "alone", "together"), ("refit", "before", "after"))
                if row[f"{step}_{first}"] is not None
            )
            cells = [
                f"{row['method']:10} {row['steps']:58} {row['perplexity']:10.3f} {row['spread']:7.3f}",
                f"{row['seeds']:5} {_cell(row['relative'], '.3f'):>8} {_cell(row['ratio'], '.3f'):>6}",
                f"{row['removed']:9.0f} {_cell(row['seconds'], '.0f'):>6} {_cell(row['blimp'], '.3f'):>6}  {errors}",
            ]
            lines.append(" ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write_report(out: Path) -> None:
    rows = rows_of(Journal(out / "runs.csv", COLUMNS, KEY).records)
    facts = machine()
    write_results(out / "joint", {"machine": facts, "rows": rows}, text_table(rows, headline(facts)))


def main(words: Sequence[str] | None = None) -> None:
    parser = grid_parser(__doc__, methods=("admm", "sparsellm"), targets=("0.5", "0.6", "0.7"), eval_samples=32)
    parser.set_defaults(model="embedded", data="embedded", samples=32, length=256)
    parser.add_argument("--allocations", type=_names, default=[], help="rules, such as fisher,search")
    parser.add_argument("--allocation-passes", type=int, default=64, help="of a search")
    parser.add_argument("--rows", type=_names, help=f"some of {','.join(ROWS)}")
    parser.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))], default=[0])
    parser.add_argument("--blimp", type=Path, help="an archive of BLiMP's .jsonl files")
    parser.add_argument("--pairs", type=int, default=20, help="of each file of BLiMP")
    arguments = parser.parse_args(words)
    arguments.rows = arguments.rows or (ABLATION if arguments.allocations else UNALLOCATED)
    if unknown := [name for name in arguments.rows if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]}: choose some of {','.join(ROWS)}")
    if not arguments.allocations and set(ALLOCATED) & set(arguments.rows):
        parser.error(f"the rows {', '.join(ALLOCATED)} need --allocations")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        Bench(arguments).run()
    write_report(arguments.out)
    print((arguments.out / "joint.txt").read_text(encoding="utf-8"), end="")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
