"""The problems of the folder `problems`, with the values of `records.csv`."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmark_utils import checker
from benchopt import BaseDataset

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = {name: path for path in sorted((ROOT / "problems").iterdir()) for name in checker.load_problems(path)}


class Dataset(BaseDataset):
    name = "Collection"
    parameters = {"problem": sorted(PROBLEMS)}
    requirements = ["safetensors"]

    def get_data(self):
        with (ROOT / "records.csv").open(encoding="utf-8") as file:
            best = {row["id"]: float(row["value"]) for row in csv.DictReader(file) if row["value"]}
        problem = checker.load_problems(PROBLEMS[self.problem])[self.problem]
        return {"problem": problem, "best_known": best.get(self.problem)}
