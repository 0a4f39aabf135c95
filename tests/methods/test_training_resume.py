"""Training that was interrupted goes on from its checkpoint to the same bytes, and from nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import admm_prune
from admm_prune.errors import UserError
from admm_prune.methods.elsa import trained
from admm_prune.methods.elsa.trainer import MeasuredRate

STEPS = 24
TIMED = {"timings.json", "report.html"}  # they tell times


def run(out: Path, model: Path, text: Path, method: str, *, stop: int | None = None, resume: bool = False) -> None:
    """A run of a few steps; it is interrupted when it says for the `stop`-th time how far it is."""
    said = 0

    def progress(done: int, total: int, at_work: str) -> None:
        nonlocal said
        said += 1
        if said == stop:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"method": method, "steps": STEPS, "samples": 40, "length": 32, "packing": "windows"}
    target: dict[str, Any] = {"sparsity": 0.0 if method == "tuned-dense" else 0.9}
    admm_prune.prune(
        model, data=str(text), out=out, eval_samples=4, resume=resume, progress=progress, **settings, **target
    )


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in TIMED
    }


@pytest.mark.bitwise
@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["elsa", "elsa-l", "elsa-published", "gradual", "tuned-dense"])
def test_an_interrupted_run_ends_in_the_bytes_of_one_that_was_not(
    tmp_path: Path, model_folder: Path, text_file: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "_PART", 6)  # a checkpoint every 2 or 3 steps, as long runs have many
    run(tmp_path / "whole", model_folder, text_file, method)
    again = tmp_path / "again"
    for stop in (3, 4, 8):  # said: in the steps since the run was begun, or taken up again; at last, on a fixed support
        with pytest.raises(KeyboardInterrupt):
            run(again, model_folder, text_file, method, stop=stop, resume=stop > 3)
        assert not again.exists()
    run(again, model_folder, text_file, method, resume=True)
    assert files(again) == files(tmp_path / "whole")
    assert len(files(again)) >= 4
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "again"}


def test_notes_of_a_run_outlast_an_interruption(
    tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "_PART", 6)
    monkeypatch.setattr(trained, "measured_rate", lambda *_: MeasuredRate(0.1, -1.0))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", model_folder, text_file, "gradual", stop=8)
    run(tmp_path / "out", model_folder, text_file, "gradual", resume=True)
    assert "the learning rate could not be measured" in (tmp_path / "out/admm_prune.json").read_text()


def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, model_folder, text_file, "gradual", stop=12)
    shard = next((tmp_path / "out.partial/checkpoints").rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: the journal cannot be trusted"):
        run(out, model_folder, text_file, "gradual", resume=True)
    assert shard.read_bytes() == content
    assert not out.exists()


def test_no_checkpoint_holds_anything_that_could_run_code(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", model_folder, text_file, "elsa", stop=12)
    kept = [path for path in (tmp_path / "out.partial/checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".safetensors", ".json"}
