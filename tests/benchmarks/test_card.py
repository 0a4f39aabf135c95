"""`scripts/card.sh` and the plugin of `make gpu`, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_gpu_bench import WITHOUT

ROOT = Path(__file__).parents[2]
ENDLESS = """
import time
def test_one(): pass
def test_two(): time.sleep(60)
def test_three(): assert 0, "wrong"
"""


def card(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "scripts/card.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_limits_of_all_stages_are_twelve_minutes(tmp_path: Path) -> None:
    done = card("--dry-run", "--model", "somewhere", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    stages = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in stages] == ["tests", "bench", "models", "elsa"]
    assert sum(int(limit) for _, limit, *_ in stages) <= 720
    assert all("somewhere" in words for name, _, *words in stages if name in ("models", "elsa"))
    assert not (tmp_path / "out").exists()
    assert card("--sizes").returncode == 2
    some = card("--dry-run", "--stages", "elsa,tests", str(tmp_path / "out"))
    assert [line.split()[0] for line in some.stdout.splitlines()] == ["tests", "elsa"]
    wrong = card("--dry-run", "--stages", "tests,benches", str(tmp_path / "out"))
    assert wrong.returncode == 2
    assert "benches" in wrong.stderr


@pytest.mark.slow
def test_every_stage_runs_without_what_a_gpu_machine_lacks(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    out = tmp_path / "out"
    done = card("--device", "cpu", "--small", str(out), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    stages = (out / "stages.txt").read_text().splitlines()
    logs = "\n".join(path.read_text()[-1000:] for path in out.glob("*.log"))
    assert [line.split()[:3] for line in stages] == [
        [name, "exit", "0"] for name in ("tests", "bench", "models", "elsa")
    ], logs
    assert [row["outcome"] for row in rows(out / "tests.jsonl")] == ["skipped"]
    assert json.loads((out / "bench" / "admm_prune.json").read_text())["rows"]
    for name in ("models", "elsa"):
        first, row = rows(out / f"{name}.jsonl")
        assert first["environment"]["device"].startswith("CPU")
        assert row["perplexity"] > 1


def test_files_without_a_test_for_a_gpu_are_not_imported(tmp_path: Path) -> None:
    marked = "import pytest\n@pytest.mark.{}\ndef test_one(): pass\n".format("gpu")  # this file has no such test
    (tmp_path / "test_marked.py").write_text(marked, encoding="utf-8")
    (tmp_path / "test_other.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    words = ["-p", "tests.gpu_run", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "-q"]
    command = [sys.executable, "-m", "pytest", *words, "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_test_beyond_its_limit_fails_and_the_others_are_on_record(tmp_path: Path) -> None:
    (tmp_path / "test_endless.py").write_text(ENDLESS, encoding="utf-8")
    results = tmp_path / "results.jsonl"
    words = [
        "-p",
        "tests.gpu_run",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--results",
        str(results),
        "--limit",
        "0.5",
    ]
    command = [sys.executable, "-m", "pytest", *words, "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {row["test"].rpartition("::")[2]: row for row in rows(results)}
    assert {name: row["outcome"] for name, row in found.items()} == {
        "test_one": "passed",
        "test_two": "failed",
        "test_three": "failed",
    }
    assert "longer than 0.5 s" in found["test_two"]["error"]
    assert "wrong" in found["test_three"]["error"]
    assert found["test_two"]["seconds"] < 30
