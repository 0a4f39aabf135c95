"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted({*FOLDER.glob("*.py")} - {FOLDER / "sparse_adam.py"})  # those that take a model


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, model_folder: Path, text_file: Path, tmp_path, monkeypatch, capsys) -> None:
    words = ["--model", str(model_folder), "--data", str(text_file), "--length", "32", "--steps", "20"]
    words += ["--out", str(tmp_path / "out")] if example.stem == "hf_trainer" else []
    monkeypatch.setattr(sys, "argv", [str(example), *words])
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"80\.\d% pruned: perplexity \d+", capsys.readouterr().out)


def test_the_example_without_a_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "sparse_adam.py"), run_name="__main__")
    assert re.search(r"pruned: loss 0\.\d+, 256 of 2560 weights kept", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ((), ("--bf16", "--accumulation", "2", "--gradient-checkpointing")),
        (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), ("--fsdp", "--bf16")),
    ],
    ids=["one process", "fsdp"],
)
def test_a_run_of_the_trainer_resumes(tmp_path: Path, launcher: tuple[str, ...], options: tuple[str, ...]) -> None:
    """A run with checkpoints, and one that resumes from its middle, write the same weights."""
    script = Path(__file__).parents[1] / "examples/hf_trainer.py"
    command = [sys.executable, *launcher, str(script), "--out", str(tmp_path), "--steps", "8", "--batch", "2"]
    command += ["--length", "32", "--save-steps", "4", *options]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    weights = []
    for more in ((), ("--resume",)):
        run = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        assert "80.0% pruned" in run.stdout
        weights.append(load_file(tmp_path / "model.safetensors"))
        shutil.rmtree(tmp_path / "checkpoint-8")  # so that the first one is resumed from
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
