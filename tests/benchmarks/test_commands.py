"""The commands of benchmarks that no other test runs, on the smallest input that they accept."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMANDS = {
    "feed_forward": "OUT --samples 2 --eval-samples 1 --seeds 1 --sparsity 0.7 --methods admm --only perplexity",
    "float64": "OUT",
    "memory_plan": "OUT --models 1B --methods wanda",
    "network_memory": "--width 64 --hidden 128 --tokens 512 --rounds 1 --descent 2",
    "packed_model": "OUT.json --sparsity 0.5 --new-tokens 2 --repeats 1 --width 64 --intermediate 128 --blocks 2 "
    "--vocabulary 512",
    "plan_accuracy": "OUT --date 2026-01-01 --cases embedded --only magnitude",
    "rounding": "OUT --model embedded --data TEXT --dtypes bfloat16 --sequences 1 --length 16",
    "speed": "OUT --width 128 --blocks 2 --sparsity 0.5 --tokens 16 --decode 2 --repeats 1",
    "streaming": "OUT --shape tiny --blocks 2 --samples 2 --length 64 --methods 'admm --refit block'",
    "surrogate_free": "OUT --steps 8 --batch-size 2 --length 32 --eval-samples 2 --sparsity 0.9 --seeds 1 "
    "--methods elsa-l",
    "training_step": "OUT.json --length 16 --batch-size 1 --steps 8",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs_and_leaves_its_results(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One word follows another, and a sentence ends. " * 200)
    words = shlex.split(COMMANDS[name].replace("OUT", str(tmp_path / "out")).replace("TEXT", str(text)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [path.read_text() for path in tmp_path.rglob("*.json")] or [done.stdout]  # one prints them alone
    assert all(json.loads(result) for result in results)
