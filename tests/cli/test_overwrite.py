"""An earlier result is replaced where that is asked for, and nowhere else; what is not ours never is."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import admm_prune
from admm_prune.bench.memory import bench_memory
from admm_prune.bench.suite import bench_gpu
from admm_prune.errors import UserError
from admm_prune.inference.packing import pack, unpack
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.runs.journal.folder import MANIFEST
from admm_prune.runs.journal.journal import home_of, journal_of
from admm_prune.runs.layer import capture_layer, solve_path
from admm_prune.runs.report.pages import write_difference
from admm_prune.settings import Settings
from tests.cli.outcome import Command, snapshot

QUICK = ("--samples", 4, "--eval-samples", 2, "--device", "cpu")


def run_to(out: str, model: Path, text: Path) -> tuple[object, ...]:
    return ("run", "--model", model, "--data", text, "--method", "magnitude", "--sparsity", 0.5, *QUICK, "--out", out)


def jobs(model: Path, text: Path, layer: Path) -> dict[str, tuple[object, ...]]:
    """Every command that writes to a place which the user names, here `out`."""
    here = ("--model", model, "--data", text, *QUICK)
    return {
        "run": run_to("out", model, text),
        "compare": ("compare", *here, "--methods", "magnitude", "--sparsity", 0.5, "--out", "out"),
        "capture": ("capture", *here, "--weight", "model.layers.0.mlp.up_proj.weight", "--out", "out"),
        "solve": ("solve", layer, "--solver", "magnitude", "--sparsity", 0.5, "--out", "out"),
        "pack": ("pack", "pruned", "out"),
        "unpack": ("unpack", "archive", "out"),
        "report": ("report", "pruned", "pruned", "--out", "out"),
    }


@pytest.fixture
def made(command: Command, place: Path, model_folder: Path, text_file: Path) -> None:
    """A run and its archive, for the commands that begin from one."""
    assert command(*run_to("pruned", model_folder, text_file)).status == 0
    assert command("pack", "pruned", "archive").status == 0


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("name", ["run", "compare", "capture", "solve", "pack", "unpack", "report"])
def test_every_command_asks_before_it_replaces(
    name: str, command: Command, place: Path, model_folder: Path, text_file: Path, layer_file: Path
) -> None:
    job = jobs(model_folder, text_file, layer_file)[name]
    assert command(*job).status == 0
    before = snapshot(place)
    again = command(*job)
    assert again.status == 2
    assert again.err == (
        "admm-prune: out contains an earlier result: replace it with --overwrite, or choose another output\n"
    )
    assert snapshot(place) == before
    assert command(*job, "--overwrite").status == 0
    # What is not ours is never replaced.
    out = place / "out"
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    if (place / "out").suffix or name in ("capture", "solve", "report"):
        out.write_text("a letter")
    else:
        out.mkdir()
        (out / "letter.txt").write_text("a letter")
    before = snapshot(place)
    refused = command(*job, "--overwrite")
    assert refused.status == 2
    assert "was not written by admm-prune" in refused.err
    assert snapshot(place) == before


def test_solve_asks_for_each_of_several_files(command: Command, place: Path, layer_file: Path) -> None:
    job = ("solve", layer_file, "--solver", "magnitude", "--sparsity", "0.5,0.7", "--out", "out.safetensors")
    assert command(*job).status == 0
    (place / "out-0.5.safetensors").unlink()
    assert "out-0.7.safetensors contains an earlier result" in command(*job).err
    assert not (place / "out-0.5.safetensors").exists()
    assert command(*job, "--overwrite").status == 0


@pytest.mark.parametrize(
    "function",
    [
        admm_prune.prune,
        Settings,  # of a comparison too
        capture_layer,
        solve_path,
        pack,
        unpack,
        bench_memory,
        bench_gpu,
        write_difference,
    ],
)
def test_every_function_that_writes_has_the_option(function: Callable[..., Any]) -> None:
    assert inspect.signature(function).parameters["overwrite"].default is False


def test_prune_from_python(model_folder: Path, text_file: Path, place: Path) -> None:
    def prune(**how: Any) -> Any:
        return admm_prune.prune(
            model_folder, method="magnitude", sparsity=0.5, data=str(text_file), samples=4, eval_samples=2, out="out",
            device="cpu", **how,
        )  # fmt: skip

    prune()
    before = snapshot(place)
    with pytest.raises(UserError, match="out contains an earlier result: replace it with --overwrite"):
        prune()
    with pytest.raises(UserError, match="nothing to resume: out is finished; leave --resume out"):
        prune(resume=True)
    assert snapshot(place).keys() == before.keys()
    prune(overwrite=True)


def test_a_comparison_that_is_finished_stays(model_folder: Path, text_file: Path, place: Path) -> None:
    Path("out").mkdir()
    (Path("out") / MANIFEST).write_text("{}")
    from admm_prune.methods.target import Target

    settings = ComparisonSettings(
        run=Settings(str(model_folder), data=str(text_file)), methods=("magnitude",), targets=(Target(0.5),)
    )
    with pytest.raises(UserError, match="out contains an earlier result"):
        compare(settings, Path("out"))
    assert [path.name for path in place.rglob("*")] == ["out", MANIFEST]


FACTS = {"settings": {"method": "wanda"}, "texts": {"calibration": {"tokens": 5}}, "environment": {"threads": 1}}


@pytest.mark.parametrize(("same", "overwrite"), [(True, False), (False, False), (False, True)])
def test_a_run_that_goes_on_replaces_its_own_result_alone(same: bool, overwrite: bool, tmp_path: Path) -> None:
    """It was killed after its last rename, with its journal there still; or someone else's result came meanwhile."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), journal_of(out) as journal:  # noqa: PT012
        journal.begin(FACTS)
        journal.commit("dense", 0, {})
        raise KeyboardInterrupt
    assert home_of(out).is_dir()
    out.mkdir()
    (out / MANIFEST).write_text(json.dumps(FACTS if same else FACTS | {"settings": {"method": "admm"}}))
    if not (same or overwrite):
        with pytest.raises(UserError, match="contains an earlier result"), journal_of(out, resume=True):
            pytest.fail("it was opened")
        assert home_of(out).is_dir()
        return
    with journal_of(out, resume=True, overwrite=overwrite) as journal:
        journal.begin(FACTS)
        with journal.output() as folder:
            (folder / MANIFEST).write_text("new")
    assert (out / MANIFEST).read_text() == "new"


def test_a_result_that_came_while_a_run_was_at_work_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="earlier result"), journal_of(out) as journal:  # noqa: PT012
        journal.begin(FACTS)
        out.mkdir()
        (out / MANIFEST).write_text("theirs")
        with journal.output() as folder:
            (folder / MANIFEST).write_text("ours")
    assert (out / MANIFEST).read_text() == "theirs"


@pytest.mark.usefixtures("made")
def test_an_input_is_never_replaced(command: Command, place: Path, text_file: Path, layer_file: Path) -> None:
    """Not even one that admm-prune wrote: a model, a captured layer, the page of a run that is compared."""
    layer = place / "captured.safetensors"
    shutil.copyfile(layer_file, layer)
    (place / "within").mkdir()
    shutil.copytree(place / "pruned", place / "within/pruned")
    shutil.copyfile(place / "pruned" / MANIFEST, place / "within" / MANIFEST)
    text = place / "pruned/text.txt"
    shutil.copyfile(text_file, text)
    before = snapshot(place)
    methods = ("--methods", "magnitude", "--sparsity", 0.5)
    for job, said in {
        run_to("pruned", Path("pruned"), text_file): "pruned is, or holds, the input pruned",
        run_to("within", Path("within/pruned"), text_file): "within is, or holds, the input within/pruned",
        run_to("pruned", Path("archive"), text): "is, or holds, the input",
        ("compare", "--model", "pruned", "--data", text_file, *methods, *QUICK, "--out", "pruned"): "the input pruned",
        (
            "solve",
            layer,
            "--solver",
            "magnitude",
            "--sparsity",
            0.5,
            "--out",
            layer,
        ): "was not written by admm-prune as",
        ("report", "pruned", "pruned", "--out", "pruned/report.html"): "is, or holds, the input",
        ("pack", "within/pruned", "within"): "within is, or holds, the input within/pruned",
    }.items():
        refused = command(*job, "--overwrite")
        assert refused.status == 2
        assert said in refused.err
        assert len(refused.err.splitlines()) == 1
    assert snapshot(place) == before


@pytest.mark.usefixtures("made")
def test_what_a_user_should_know_of_the_input_is_noted(command: Command, place: Path, text_file: Path) -> None:
    """A model that was pruned before, and texts that are shorter than asked for."""
    many = ("--samples", 5000, "--eval-samples", 5000, "--device", "cpu", "--length", 32)
    again = ("run", "--model", "pruned", "--data", text_file, "--method", "wanda", "--sparsity", 0.3, *many)
    assert command(*again, "--out", "out").status == 0
    notes = json.loads((place / "out" / MANIFEST).read_text())["notes"]
    assert any("pruned before: 50.0% of the weights" in note for note in notes)
    assert any("the calibration text has" in note and "fewer than the requested 5000" in note for note in notes)
    assert any("the evaluation text has" in note for note in notes)
    assert json.loads((place / "pruned" / MANIFEST).read_text())["notes"] == []
