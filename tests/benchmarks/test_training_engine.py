"""The benchmark of training: every step and phase is timed, and nothing stays patched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from admm_prune.methods.elsa.engine import Engine
from admm_prune.models.loading import load
from admm_prune.solvers import sparse_adam
from benchmarks import training_engine
from benchmarks.training_engine import PHASES, Clock, random_text, timed_phases, trainer


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_engine_is_compared_with_a_plain_loop(
    tmp_path: Path, model_folder: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model_folder), "--batch-size", "2", "--length", "16", "--repeats", "2", "--no-memory"]
    training_engine.main([str(tmp_path / "out"), *words, "--device", "cpu", "--precision", precision])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["precision"] == {"bf16": "bfloat16"}.get(precision, precision)
    steps = content["result"]["steps"]
    assert list(steps) == ["plain", "masked", "admm"]
    assert all(len(row["seconds"]) == 2 for row in steps.values())
    assert steps["plain"]["of_plain"] == 1.0
    for phases in content["result"]["phases"].values():
        assert list(phases["seconds"]) == list(PHASES)
        assert all(seconds > 0 for seconds in (*phases["seconds"].values(), *phases["floors"].values()))
    assert capsys.readouterr().out == (tmp_path / "out.txt").read_text()


def test_phases_add_up_to_a_step_and_leave_nothing_behind(model_folder: Path) -> None:
    model = load(str(model_folder), dtype="float32").model.requires_grad_(True)
    run = trainer(model, Engine(), random_text(model.config.vocab_size, 4, 16), 2, masked=True)
    run.step()
    clock, before, total_norm = Clock(torch.device("cpu")), dict(vars(run.optimizer)), sparse_adam.total_norm
    with timed_phases(run, clock) as spent:
        whole = clock.seconds(run.step)
    assert 0.5 * whole < sum(spent.values()) <= whole
    assert sparse_adam.total_norm is total_norm
    assert "backward" not in vars(run)
    after = vars(run.optimizer)
    assert after.keys() == before.keys()
    assert after["step"] == before["step"]  # the scheduler's
