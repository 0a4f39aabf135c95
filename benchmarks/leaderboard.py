"""Every solver on every layer file of a folder: errors, cost, memory, curves.

    python -m benchmarks.leaderboard LAYERS OUT [--sparsity 0.5,0.7,0.9] [--pattern 2:4] [--solvers a,b]
                                                [--memory] [--curves]

Each row is written as soon as it is measured; the same command continues where it stopped, and only writes the tables
again if nothing is left to measure. A row is identified by the layer file and the settings of the solver, not by its
code: use a new folder when the code changes.

OUT has solves.csv, memory.csv and curves.csv as measured; leaderboard.csv with ratios; leaderboard.txt;
leaderboard.json with the machine; cost.png, cost-holdout.png and curves.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from admm_prune.data.layer_file import LayerFile, load_layer_file
from admm_prune.errors import UserError
from admm_prune.methods.local import Method
from admm_prune.methods.target import Target, parse_targets
from admm_prune.solvers.base import Iterative
from benchmarks import plots, tables
from benchmarks.configurations import CONFIGURATIONS, YARDSTICK, settings, settings_key
from benchmarks.journal import Journal, Record, number, write_csv
from benchmarks.machine import headline, machine
from benchmarks.measuring import FAILURES, Measurement, Product, curve, measure, warm_up
from benchmarks.memory import peak_in_a_process
from benchmarks.published import instance_name

FAILED = "FAILED"
CURVE = ("seconds", "cost", "relative_error", "relative_error_holdout")


@dataclass(frozen=True, eq=False)
class Job:
    """One solver on one layer and pattern."""

    path: Path
    fingerprint: str
    method: Method
    target: Target

    @property
    def key(self) -> Record:
        return {
            "layer": self.path.stem,
            "fingerprint": self.fingerprint,
            "pattern": self.target.label,
            "solver": self.method.name,
            "settings": settings_key(self.method),
        }

    @property
    def words(self) -> str:
        return f"{self.path.stem} {self.target.label} {self.method.name}"


class Leaderboard:
    """The three passes over the jobs of a folder. Failed solves are tried again in the next run.

    Args:
        out: where the journals and reports go.
        solvers: names of CONFIGURATIONS.
        repeats: of a solve, for the median of its time.
    """

    def __init__(
        self, layers: Sequence[Path], out: Path, targets: Sequence[Target], solvers: Sequence[str], repeats: int = 3
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.targets, self.repeats = out, targets, repeats
        self.methods = [CONFIGURATIONS[name] for name in solvers]
        self.fingerprints = {path: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in layers}
        self.solves = Journal(out / "solves.csv", Measurement.columns())
        self.peaks = Journal(out / "memory.csv", ("peak_mib",))
        self.curves = Journal(out / "curves.csv", CURVE)

    def jobs(self, path: Path) -> list[Job]:
        return [Job(path, self.fingerprints[path], m, target) for target in self.targets for m in self.methods]

    def time(self) -> None:
        """Solves what has not been solved yet."""
        for layer, product, jobs in self._missing(self.solves):
            for job in jobs:
                try:
                    row = measure(layer, job.method, job.target, product, repeats=self.repeats).as_row()
                    _say(
                        f"{job.words}: {row['relative_error']:.5g}, {row['seconds']:.2f} s, {row['cost']:.1f} products"
                    )
                except FAILURES as error:
                    row = {**dict.fromkeys(Measurement.columns()), "status": FAILED, "feasible": False}
                    row |= {"rows": layer.weight.shape[0], "width": layer.weight.shape[1], "notes": str(error)}
                    _say(f"{job.words}: {error}")
                self.solves.add(job.key, [row])

    def draw_curves(self) -> None:
        """Runs iterative solvers once more, evaluated along their way."""
        for layer, product, jobs in self._missing(self.curves):
            for job in jobs:
                if not isinstance(job.method.make(), Iterative):
                    continue
                try:
                    points = curve(layer, job.method, job.target, product)
                except FAILURES as error:
                    _say(f"{job.words}: no curve: {error}")
                    continue
                self.curves.add(job.key, points)
                _say(f"{job.words}: a curve of {len(points)} points")

    def weigh(self) -> None:
        """Measures the extra peak memory of every solve in a process of its own."""
        for path in self.fingerprints:
            for job in self.jobs(path):
                if self.peaks.find(job.key):
                    continue
                try:
                    mib = peak_in_a_process(path, job.method.name, job.target)
                except RuntimeError as error:
                    _say(f"{job.words}: {error}")
                    continue
                self.peaks.add(job.key, [{"peak_mib": mib}])
                _say(f"{job.words}: {mib} MiB")

    def rows(self) -> list[tables.Row]:
        """One row a job that has been measured: the latest of its settings."""
        jobs = [job for path in self.fingerprints for job in self.jobs(path)]
        records = [matches[-1] for job in jobs if (matches := self.solves.find(job.key))]
        peaks = {
            (job.path.stem, job.target.label, job.method.name): number(matches[-1]["peak_mib"]) or 0.0
            for job in jobs
            if (matches := self.peaks.find(job.key))
        }
        instances = {path.stem: instance_name(load_layer_file(path)) for path in self.fingerprints}
        return tables.leaderboard_rows(records, peaks, instances)

    def report(self, facts: dict[str, Any]) -> str:
        """Writes the tables and plots; returns the text table."""
        rows = self.rows()
        write_csv(self.out / "leaderboard.csv", rows)
        document = {"machine": facts, "settings": {m.name: settings(m) for m in self.methods}, "rows": rows}
        (self.out / "leaderboard.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        text = tables.text_table(rows, headline(facts))
        (self.out / "leaderboard.txt").write_text(text, encoding="utf-8")
        plots.plot_cost(rows, self.out / "cost.png")
        plots.plot_cost(rows, self.out / "cost-holdout.png", "ratio_holdout")
        yardsticks = {
            (row["layer"], row["pattern"]): row["relative_error"] for row in rows if row["solver"] == YARDSTICK
        }
        jobs = [job for path in self.fingerprints for job in self.jobs(path)]
        points = [
            {**record, "cost": number(record["cost"]), "relative_error": number(record["relative_error"])}
            for job in jobs
            for record in self.curves.find(job.key)
        ]
        if points and yardsticks:
            plots.plot_curves(points, yardsticks, self.out / "curves.png")
        return text

    def _missing(self, journal: Journal) -> Iterator[tuple[LayerFile, Product, list[Job]]]:
        """Layers with jobs that the journal lacks, or has as failed."""
        for path in self.fingerprints:
            jobs = [job for job in self.jobs(path) if not _done(journal.find(job.key))]
            if not jobs:
                continue
            for job in jobs:
                try:
                    warm_up(job.method, job.target)
                except FAILURES:
                    continue  # it will be said of the layer itself
            layer = load_layer_file(path)
            yield layer, Product(layer), jobs


def _done(records: list[Record]) -> bool:
    return bool(records) and records[-1].get("status") != FAILED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=Path, help="a folder of layer files, or one file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--solvers", default=",".join(CONFIGURATIONS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="solves, for the median; those over 20 s are done once")
    parser.add_argument("--threads", type=int, default=1, help="the figures of public code are of one")
    parser.add_argument("--memory", action="store_true", help="also the extra peak memory, in a process a solve")
    parser.add_argument("--curves", action="store_true", help="also error against time, in a pass of its own")
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    facts = machine(chosen.date)
    facts["command"] = " ".join(
        ["python -m benchmarks.leaderboard", *(sys.argv[1:] if arguments is None else arguments)]
    )
    solvers = [name.strip() for name in chosen.solvers.split(",") if name.strip()]
    unknown = [name for name in solvers if name not in CONFIGURATIONS]
    if unknown:
        parser.error(f"no solver '{unknown[0]}': choose from {', '.join(CONFIGURATIONS)}")
    layers = [chosen.layers] if chosen.layers.is_file() else sorted(chosen.layers.glob("*.safetensors"))
    if not layers:
        parser.error(f"no layer file (*.safetensors) in {chosen.layers}: make some with python -m benchmarks.instances")
    try:
        targets = parse_targets(chosen.sparsity, chosen.pattern)
        board = Leaderboard(layers, chosen.out, targets, solvers, chosen.repeats)
        board.time()
        if chosen.curves:
            board.draw_curves()
        if chosen.memory:
            board.weigh()
        print(board.report(facts), end="")
    except (UserError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
