"""A disk that fills up ends in one line, whatever was being written, and the run goes on where there is room.

A limit on the size of a file stands for the disk: the kernel refuses to write more, in the middle of a file.
"""

from __future__ import annotations

import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import admm_prune
from admm_prune.data.durable import raising_os_errors
from admm_prune.errors import UserError, WriteError
from admm_prune.methods.elsa.checkpoints import Checkpoints
from admm_prune.models.activation_store import ActivationStore
from admm_prune.models.parallel import ALONE


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """Within it no file of this process can be larger, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def prune(model: Path, out: Path, text: Path, **how: Any) -> None:
    settings: dict[str, Any] = {"data": str(text), "samples": 40, "eval_samples": 4, "length": 32, "device": "cpu"}
    admm_prune.prune(model, out=out, packing="windows", sparsity=0.5, **settings | how)


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_while_a_model_in_memory_is_saved(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how: dict[str, Any] = {"method": "wanda", "samples": 4}
    with largest_file(largest(model_folder) - 1), pytest.raises(UserError) as caught:
        prune(model_folder, out, text_file, **how)
    kept = f"finished work is kept in {out}.partial; continue with --resume"
    assert str(caught.value) == f"cannot write to {out}: File too large: {kept}"
    assert not out.exists()
    prune(model_folder, out, text_file, resume=True, **how)
    assert (out / "model.safetensors").is_file()


def test_while_a_checkpoint_is_written(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how: dict[str, Any] = {"method": "gradual", "steps": 24}

    def full(done: int, total: int, at_work: str) -> None:
        if at_work and done > total // 2 and kept_checkpoints(out):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with largest_file(before[0]), pytest.raises(UserError) as caught:
        prune(model_folder, out, text_file, progress=full, **how)
    assert str(caught.value).startswith(f"cannot write to {out}.partial/checkpoints/training: File too large: ")
    assert str(caught.value).endswith(f": finished work is kept in {out}.partial; continue with --resume")
    assert len(kept_checkpoints(out)) == 1, "the one before is safe, and the unfinished one takes no room"
    prune(model_folder, out, text_file, resume=True, **how)
    assert out.is_dir()


def kept_checkpoints(out: Path) -> list[str]:
    return [path.name for path in (out.with_name("out.partial") / "checkpoints/training").glob("*")]


def test_the_first_checkpoint_leaves_nothing(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with largest_file(40_000), pytest.raises(UserError, match=r"checkpoints/training: File too large$"):
        prune(model_folder, tmp_path / "out", text_file, method="gradual", steps=24)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_a_checkpoint_is_written_is_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wraps whatever its writers raise in an exception of its own."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "training", ALONE)
    checkpoints.save({"x": torch.ones(3)}, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr("admm_prune.methods.elsa.checkpoints.HuggingFaceStorageWriter.write_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save({"x": torch.zeros(3)}, {"step": 2})
    assert Checkpoints(tmp_path / "training", ALONE).latest() == {"step": 1}


def test_while_activations_are_written(tmp_path: Path) -> None:
    store = ActivationStore(limit=0, folder=tmp_path)
    with largest_file(4000), pytest.raises(WriteError, match=r"^cannot write to .*activations-.*: File too large$"):
        store.put("hidden", torch.ones(10_000))


def test_the_reason_is_found_in_what_compiled_libraries_raise() -> None:
    """The package tokenizers raises a plain Exception."""
    with pytest.raises(OSError, match="No space left on device") as caught, raising_os_errors():
        raise Exception("No space left on device (os error 28)")
    assert caught.value.errno == 28
    with pytest.raises(KeyError, match="x"), raising_os_errors():
        raise KeyError("x")
