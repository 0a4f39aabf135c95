"""Figures recomputed elsewhere: what rounding explains is accepted with a note, what it does not is rejected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
from admm_prune.runs.claims import with_digest
from admm_prune.runs.prune import prune
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.verify.figures import elsewhere
from admm_prune.verify.report import Verdict
from admm_prune.verify.run import verify_folder

MANIFEST = "admm_prune.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    """A run in bfloat16 and one in float32, evaluated on 60 sequences. Not to be written to."""
    place = tmp_path_factory.mktemp("runs")
    for dtype in ("bfloat16", "float32"):
        prune(
            str(model_folder), method="magnitude", sparsity=0.5, dtype=dtype, device="cpu", samples=4,
            data=str(text_file), eval_data=str(text_file), out=place / dtype,
        )  # fmt: skip
    return place


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "bfloat16", tmp_path / "run"))


def edited(folder: Path, edit: Callable[[dict[str, Any]], None], *, away: bool = True) -> Path:
    """The folder with another manifest under a fingerprint that fits, of a run on another processor if `away`."""
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    if away:
        manifest["environment"]["cpu_capability"] = "another"
    (folder / MANIFEST).write_text(json.dumps(with_digest(manifest)))
    return folder


def differently_rounded(folder: Path) -> dict[str, Any]:
    """The figures of the pruned model by other arithmetic: of its weights in float32."""
    settings = TextSettings(**json.loads((folder / MANIFEST).read_text())["settings"]["text"])
    loaded = load(str(folder), dtype="float32")
    return asdict(evaluate(loaded.model, Texts(settings, loaded).evaluation))


def scaled(factor: float) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["pruned"]["perplexity"] *= factor

    return edit


def test_the_figures_of_another_arithmetic_are_accepted_elsewhere_alone(folder: Path) -> None:
    figures = differently_rounded(folder)
    edited(folder, lambda manifest: manifest.update(pruned=figures), away=False)
    report = verify_folder(folder, device="cpu")
    assert report.verdict is Verdict.REJECTED
    assert any("claimed perplexity" in failure for failure in report.failures)
    edited(folder, lambda _: None)
    report = verify_folder(folder, device="cpu")
    assert (report.verdict, report.failures) == (Verdict.VERIFIED, [])
    note = next(note for note in report.notes if "perplexity " in note)
    assert "within the rounding of bfloat16 in another environment (cpu_capability another became" in note
    assert {"perplexity", "bits_per_char", "perplexity_error"} <= set(report.checked)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_is_rejected_elsewhere_too(folder: Path, factor: float) -> None:
    report = verify_folder(edited(folder, scaled(factor)), device="cpu")
    assert report.verdict is Verdict.REJECTED
    (failure,) = report.failures
    assert failure.startswith("claimed perplexity ")
    assert "more than the rounding of bfloat16 in another environment (cpu_capability" in failure


def test_float32_leaves_less_open(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "float32", tmp_path / "run"))
    report = verify_folder(edited(folder, scaled(1 + 1e-4)), device="cpu")
    assert "more than the rounding of float32" in report.failures[0]


def test_other_figures_are_compared_exactly_everywhere(folder: Path) -> None:
    report = verify_folder(edited(folder, lambda manifest: manifest["pruned"].update(tokens=7)), device="cpu")
    assert report.failures == [failure for failure in report.failures if failure.startswith("claimed tokens 7")] != []


def test_another_continuation_is_refuted_by_the_environment_of_the_run_alone(folder: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["continuation"]["pruned"] = "another word"

    failures = verify_folder(edited(folder, edit, away=False), device="cpu").failures
    assert [failure.startswith("claimed continuation") for failure in failures] == [True]
    report = verify_folder(edited(folder, edit), device="cpu")
    assert report.summary().startswith("verified, without the continuation, in another environment (cpu_capability")
    assert "continuation" not in report.checked
    assert f"{MANIFEST}: continuation.pruned" in report.fingerprinted


def test_rounding_that_cannot_be_measured_leaves_a_claim_unchecked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("admm_prune.verify.figures.free_bytes", lambda _: 0)
    report = verify_folder(edited(folder, scaled(1.01)), device="cpu")
    assert report.verdict is Verdict.INCOMPLETE
    assert "the memory does not hold the model in float32" in report.unchecked[0]
    report = verify_folder(edited(folder, scaled(2.0)), device="cpu")
    assert "even in another environment (cpu_capability" in report.failures[0]


def test_a_figure_that_is_finite_in_one_environment_alone_is_not_checked(folder: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["pruned"]["perplexity"] = None

    assert verify_folder(edited(folder, edit, away=False), device="cpu").verdict is Verdict.REJECTED
    report = verify_folder(edited(folder, edit), device="cpu")
    assert report.verdict is Verdict.INCOMPLETE
    assert "the model overflows here or in another environment" in report.unchecked[0]


def test_what_makes_another_environment(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert elsewhere(manifest, folder, CPU) == ""
    manifest["environment"]["versions"]["torch"] = "1.0"
    manifest["environment"] |= {"python": "3.0", "cuda": "a card", "threads": 99}
    assert elsewhere(manifest, folder, CPU) == (
        f"threads 99 became {torch.get_num_threads()}, torch 1.0 became {torch.__version__}"
    )
    manifest["environment"]["device"] = "cuda"
    assert "device cuda became cpu" in elsewhere(manifest, folder, CPU)
    times = json.loads((folder / "timings.json").read_text())
    (folder / "timings.json").write_text(json.dumps(times | {"machine": "Z80, 1 core, 0 GiB of memory, CP/M"}))
    assert "the processor became " in elsewhere(manifest, folder, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_is_verified_with_the_instructions_of_an_older_processor(runs: Path, dtype: str) -> None:
    older = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    script = "from admm_prune.cli import main; main()"
    command = [sys.executable, "-c", script, "verify", str(runs / dtype), "--device", "cpu"]
    done = subprocess.run(command, env={**os.environ, **older}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
