"""Runs that break off anywhere, go on, and end in the very files that they would have left; journals refused."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import admm_prune
from admm_prune.errors import UserError
from admm_prune.methods.base import LayerReport, RidgeTrial
from admm_prune.result import Convergence, Diagnosis
from admm_prune.runs.journal.folder import TIMINGS
from admm_prune.runs.journal.journal import FolderJournal, home_of, journal_of
from admm_prune.runs.journal.process_state import random_state, restore_random_state
from admm_prune.runs.report import REPORT
from tests.models.tiny_models import shared_keys
from tests.runs.interruption import Interruption

RUNS = [
    ("sparsegpt", False),
    ("wanda", True),
    ("sparsellm", False),
    ("sparsellm", True),
    ("struprune", False),
    ("struprune", True),
]


def prune(model: Path | str, out: Path, text_file: Path, **how: Any) -> Any:
    settings: dict[str, Any] = {"sparsity": 0.3, "data": str(text_file), "samples": 12, "eval_samples": 3}
    return admm_prune.prune(model, out=out, device="cpu", **settings | how)


TIMED = (TIMINGS, REPORT)


def fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of every file but those that tell times."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED}
    return {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.mark.bitwise
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "stream"), RUNS)
def test_a_run_that_breaks_off_after_any_record_ends_in_the_same_files(
    method: str, stream: bool, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process gets one record further than the one before."""
    how: dict[str, Any] = {"method": method, "stream": stream}
    whole = prune(model_folder, tmp_path / "whole", text_file, **how)
    records, out = Interruption(monkeypatch), tmp_path / "out"
    while True:
        torch.manual_seed(records.calls)  # a process may draw before it goes on
        try:
            report = prune(model_folder, out, text_file, resume=records.calls > 0, **how)
            break
        except KeyboardInterrupt:
            assert not out.exists()
    # The dense model's figures, and every block, twice, or once.
    assert records.calls == {"struprune": 6}.get(method, 3)
    assert fingerprints(out) == fingerprints(tmp_path / "whole")
    assert report.as_json() == whole.as_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("how", "after"),
    [
        ({"method": "struprune", "stream": False}, 5),
        ({"method": "structured-global", "stream": False}, 5),
        ({"method": "structured-global", "stream": True}, 5),
        ({"method": "admm", "allocation": "search", "allocation_passes": 6}, 4),
    ],
)
def test_a_run_without_saved_activations_ends_in_the_same_files(
    how: dict[str, Any],
    after: int,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several processes save none: the finished blocks run again, dense where the next block reads dense inputs, and
    pruned to the start of a search while its table is made."""
    prune(model_folder, tmp_path / "whole", text_file, **how)
    out = broken_off(model_folder, text_file, tmp_path, monkeypatch, after=after, **how)  # one block is missing
    with monkeypatch.context() as patch:
        patch.setattr(FolderJournal, "resume_point", lambda *_: None)
        prune(model_folder, out, text_file, resume=True, **how)
    assert fingerprints(out) == fingerprints(tmp_path / "whole")


def test_a_run_goes_on_where_blocks_read_what_others_wrote(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys and values that blocks share are those of the finished blocks, which run again."""
    folder = tmp_path / "model"
    shared_keys().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    how: dict[str, Any] = {"method": "wanda", "stream": False}
    prune(folder, tmp_path / "whole", text_file, **how)
    out = broken_off(folder, text_file, tmp_path, monkeypatch, after=4, **how)  # the last block is missing
    prune(folder, out, text_file, resume=True, **how)
    assert fingerprints(out) == fingerprints(tmp_path / "whole")


def test_files_of_a_kill_in_the_middle_of_a_record_do_no_harm(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = broken_off(model_folder, text_file, tmp_path, monkeypatch, after=2)
    home = home_of(out)
    (home / "records/00002-blocks-00001.unfinished").write_text("half a rec")
    (home / "tensors/00002-blocks-00001.safetensors").write_bytes(b"whole, but its record never came")
    (home / "activations/00002-blocks-00001.unfinished").write_bytes(b"half")
    (home / "model").mkdir(exist_ok=True)
    (home / "model/half.safetensors").write_bytes(b"half")
    prune(model_folder, out, text_file, method="wanda", resume=True)
    prune(model_folder, tmp_path / "whole", text_file, method="wanda")
    assert fingerprints(out) == fingerprints(tmp_path / "whole")


def test_a_kill_between_the_last_renames_loses_neither_the_old_nor_the_new(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(model_folder, out, text_file, method="magnitude")
    old = fingerprints(out)
    broken_off(model_folder, text_file, tmp_path, monkeypatch, after=3, overwrite=True)
    out.rename(home_of(out) / "old")  # as if killed right then
    prune(model_folder, out, text_file, method="wanda", resume=True)
    new = fingerprints(out)
    assert new != old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # And as if killed after the very last rename, with the journal still there: what stands there is its own.
    broken_off(model_folder, text_file, tmp_path, monkeypatch, after=3, overwrite=True)
    (home_of(out) / "old").mkdir()
    (home_of(out) / "old/admm_prune.json").write_text("{}")
    prune(model_folder, out, text_file, method="wanda", resume=True)
    assert fingerprints(out) == new
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", range(8))
def test_an_interruption_of_the_clean_up_leaves_a_finished_run(
    step: int, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the journal is deleted from the given step on."""
    out, steps = tmp_path / "out", iter(range(100))
    home = home_of(out)

    def counted(delete: Any) -> Any:
        def call(path: Path, *arguments: Any, **how: Any) -> Any:
            if out.is_dir() and path.is_relative_to(home) and next(steps) >= step:
                raise KeyboardInterrupt
            return delete(path, *arguments, **how)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "rmdir", counted(Path.rmdir))
        with pytest.raises(KeyboardInterrupt):
            prune(model_folder, out, text_file, method="wanda")
    whole = fingerprints(out)
    if step == 0:  # the journal is complete
        prune(model_folder, out, text_file, method="wanda", resume=True)
    else:
        with pytest.raises(UserError, match=r"nothing to resume: .* is finished; leave --resume out"):
            prune(model_folder, out, text_file, method="wanda", resume=True)
        with pytest.raises(UserError, match="contains an earlier result"):
            prune(model_folder, out, text_file, method="wanda")
        prune(model_folder, out, text_file, method="wanda", overwrite=True)
    assert fingerprints(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def broken_off(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, **how: Any
) -> Path:
    """The place of a run, of wanda by default, that was interrupted after so many records."""
    with monkeypatch.context() as patch:
        Interruption(patch, after=after)
        with pytest.raises(KeyboardInterrupt):
            prune(model_folder, tmp_path / "out", text_file, **{"method": "wanda", **how})
    return tmp_path / "out"


def test_what_is_not_the_same_is_refused_and_nothing_is_lost(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_text, other_model = tmp_path / "other.txt", tmp_path / "model"
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    other_text.write_text(text_file.read_text().replace("cat", "dog"))
    other_model.mkdir()
    for path in model_folder.iterdir():
        (other_model / path.name).write_bytes(path.read_bytes())
    out = broken_off(other_model, text, tmp_path, monkeypatch, after=2)
    home = home_of(out)
    before = fingerprints(home)

    def refused(reason: str, **how: Any) -> None:
        model, data = how.pop("model", other_model), how.pop("text", text)
        with pytest.raises(UserError, match=reason) as told:
            prune(model, out, data, **{"method": "wanda", "resume": True} | how)
        assert "\n" not in str(told.value)
        assert fingerprints(home) == before
        assert not out.exists()

    refused("contains an unfinished run: continue with --resume, or delete the folder", resume=False)
    refused("was begun with method wanda, not magnitude: --resume needs the same arguments", method="magnitude")
    refused("was begun with sparsity 0.3, not 0.4", sparsity=0.4)
    refused("was begun with seed 0, not 1", seed=1)
    refused("was begun with samples 12, not 11", samples=11)
    refused("was begun with data .*text.txt, not .*other.txt", text=other_text)
    refused("was begun with stream False, not True", stream=True)
    text.write_bytes(other_text.read_bytes())
    refused("the calibration text is not the one that .* was begun with")
    text.write_bytes(text_file.read_bytes())
    weights = (other_model / "model.safetensors").read_bytes()
    (other_model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("the model is not the one that .* was begun with: --resume needs the same weights")
    (other_model / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        refused("was begun with threads 1, not 7: --resume needs the same machine and versions")
    prune(other_model, out, text, method="wanda", resume=True)


def test_a_journal_that_is_damaged_or_foreign_is_refused(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = broken_off(model_folder, text_file, tmp_path, monkeypatch, after=2)
    home = home_of(out)

    def refused(reason: str) -> None:
        before = fingerprints(home)
        with pytest.raises(UserError, match=reason) as told:
            prune(model_folder, out, text_file, method="wanda", resume=True)
        assert "\n" not in str(told.value)
        assert fingerprints(home) == before

    for path in sorted(path for path in home.rglob("*") if path.is_file() and path.name != "lock"):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-9] + b"?" + content[-8:], b""):
            path.write_bytes(damaged)
            refused("is damaged")
        path.write_bytes(content)
    first, second = sorted((home / "records").iterdir())
    first.rename(tmp_path / "kept")
    refused("a record before .* is missing")
    (tmp_path / "kept").rename(first)
    (home / "tensors" / f"{second.name}.safetensors").rename(tmp_path / "kept")
    refused("is damaged or gone")
    (tmp_path / "kept").rename(home / "tensors" / f"{second.name}.safetensors")
    with journal_of(tmp_path / "other") as other:
        other.begin({"settings": {"of": "another run"}})
        other.commit("dense", 0, {})
        own = second.read_bytes()
        second.write_bytes((other.home / "records/00000-dense-00000").read_bytes())
    refused("is a record of another run")
    second.write_bytes(own)
    prune(model_folder, out, text_file, method="wanda", resume=True)


def test_there_must_be_something_to_resume_and_the_place_must_be_ours(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"nothing to resume: there is no .*out\.partial; leave --resume out"):
        prune(model_folder, out, text_file, resume=True)
    with pytest.raises(UserError, match="only a run with --out can be resumed"):
        admm_prune.prune(model_folder, sparsity=0.5, data=str(text_file), resume=True)
    prune(model_folder, out, text_file, method="magnitude")
    with pytest.raises(UserError, match=r"nothing to resume: .*out is finished"):
        prune(model_folder, out, text_file, method="magnitude", resume=True)
    home_of(out).mkdir()
    (home_of(out) / "thesis.txt").write_text("not ours")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"out\.partial was not written by admm-prune: choose another output"):
            prune(model_folder, out, text_file, method="magnitude", resume=resume, overwrite=True)
    assert (home_of(out) / "thesis.txt").read_text() == "not ours"
    (tmp_path / "file.partial").write_text("")
    with pytest.raises(UserError, match=r"file\.partial is a file or a link"):
        prune(model_folder, tmp_path / "file", text_file)


def test_what_a_kill_left_before_there_was_a_header_is_no_hindrance(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    home = home_of(tmp_path / "out")
    (home / "records").mkdir(parents=True)
    (home / "header.unfinished").write_text("ha")
    (home / "lock").write_text("1")
    prune(model_folder, tmp_path / "out", text_file, method="magnitude")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_share_a_folder(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with journal_of(tmp_path / "out") as journal:
        journal.begin({"settings": {}})
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"another run is active in .*out\.partial \(process {os.getpid()}\)"):
                prune(model_folder, tmp_path / "out", text_file, resume=resume)
        journal.commit("dense", 0, {"perplexity": float("inf")})
        assert journal.finished("dense") == [{"perplexity": float("inf")}]
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_before_any_work_leaves_nothing(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pattern 16:32 needs a width"):
        prune(model_folder, tmp_path / "deep/out", text_file, sparsity=None, pattern="16:32")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_where_there_is_room(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the disk: the kernel refuses to write more, in the middle of a file."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)\n"
        "from admm_prune.cli import main; main()"
    )
    arguments = [
        "run", "--model", model_folder, "--data", text_file, "--samples", "12", "--eval-samples", "3",
        "--method", "wanda", "--sparsity", "0.3", "--out", "out",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", limited, "40000", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("admm-prune: cannot write to out: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_all_generators_come_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    draw()
    state = random_state()
    first = draw()
    draw()
    restore_random_state(state)
    assert draw() == first


def test_a_report_comes_back_from_json_as_it_was() -> None:
    trial = RidgeTrial(**dict.fromkeys(RidgeTrial.__dataclass_fields__, 0.5))
    finding = Diagnosis("a", "info", "b", "c")
    told = Convergence(**dict.fromkeys(Convergence.__dataclass_fields__, (1, 2)))
    report = LayerReport(
        name="w",
        shape=(3, 7),
        sparsity=8 / 21,
        ridge_trials=(trial,),
        notes=("a",),
        diagnosis=(finding,),
        convergence=told,
    )
    assert LayerReport.from_json(json.loads(json.dumps(report.as_json()))) == report
    assert report.nonzeros == 13


def test_a_recipe_keeps_files_of_its_own_and_computes_once(tmp_path: Path) -> None:
    def work(resume: bool) -> None:
        with journal_of(tmp_path / "out", resume=resume) as journal:
            journal.begin({"settings": {}})
            folder = journal.checkpoints("training")
            assert folder is not None
            rate = journal.once("rate", lambda: [float(not resume)])
            assert rate == [1.0], "it is known when the run goes on"
            step = folder / "step-5.safetensors"
            assert step.exists() == resume
            step.write_text("5")
            if not resume:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(resume=False)
    work(resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.bitwise
@pytest.mark.slow
@pytest.mark.parametrize(("method", "stream"), [*RUNS, ("admm", False), ("elsa", False)])
def test_killed_at_random_times_it_ends_in_the_same_files(
    method: str, stream: bool, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Three kills each, 24 in all, wherever a process is; each is forked with all libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["admm_prune.runs.prune", "transformers.models.llama.modeling_llama"])
    out, whole = tmp_path / "out", tmp_path / "whole"

    def begin(place: Path, resume: bool = False) -> Any:
        how = {"method": method, "stream": stream, "resume": resume, "steps": 24 if method == "elsa" else None}
        process = context.Process(target=prune, args=(model_folder, place, text_file), kwargs=how)
        process.start()
        return process

    for place in (tmp_path / "warm", whole):
        began = time.perf_counter()
        process = begin(place)
        process.join()
        assert process.exitcode == 0
    seconds = time.perf_counter() - began
    draw = random.Random(f"{method} {stream}")
    kills = 0
    header = home_of(out) / "header"
    while kills < 3 or header.is_file() or not out.is_dir():
        process = begin(out, resume=header.is_file())
        if kills < 3:
            process.join(draw.uniform(0, seconds))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if out.is_dir() and not header.is_file():  # whole, whether the kill came after that or not at all
            assert fingerprints(out) == fingerprints(whole)
            if kills < 3:
                shutil.rmtree(out)
    assert fingerprints(out) == fingerprints(whole)
