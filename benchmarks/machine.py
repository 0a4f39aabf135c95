"""A description of the machine that a measurement was made on, and the files of its results."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from admm_prune.runs.machine import processor


def machine(date: str | None = None) -> dict[str, Any]:
    """Cores, CPU, versions, threads, load and date, for JSON.

    Args:
        date: ISO; today's by default.
    """
    return {
        "date": date or datetime.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "admm_prune": version("admm-prune"),
    }


def headline(facts: dict[str, Any]) -> str:
    """One line of it."""
    return (
        f"{facts['date']}, {facts['cpu']} ({facts['cores']} cores, {facts['cpu_capability']}), "
        f"{facts['threads']} thread(s), torch {facts['torch']}"
    )


def write_results(out: Path, content: dict[str, Any], table: str) -> None:
    """OUT.json and OUT.txt."""
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    Path(f"{out}.txt").write_text(table, encoding="utf-8")
