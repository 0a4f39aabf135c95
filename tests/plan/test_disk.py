"""What a plan says of the disk against what its run writes, counted at every synchronization; and where it is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import admm_prune
from admm_prune.errors import UserError
from admm_prune.models.activation_store import ActivationStore
from admm_prune.plan import plan as plans
from admm_prune.plan.counting import KINDS
from admm_prune.plan.machine import Machine, measured_here
from admm_prune.plan.plan import make_plan

GIVEN: dict[str, Any] = {"sparsity": 0.5, "samples": 4, "eval_samples": 4, "length": 32}


@pytest.fixture
def model(tmp_path: Path, model_folder: Path) -> Path:
    """A model in bfloat16 whose weights are more than what a run says of them."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of the machine, which takes seconds to measure, is of no importance here."""
    monkeypatch.setattr(plans, "measured_here", lambda *_: Machine("here", "", dict.fromkeys(KINDS, 1e9)))


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("elsa", {"steps": 16}),
        pytest.param("staged", {"steps": 16}, marks=pytest.mark.slow),
        ("wanda", {}),
        ("wanda", {"allocation": "search", "allocation_passes": 2}),
        pytest.param("wanda", {"allocation": "fisher"}, marks=pytest.mark.slow),
        pytest.param("admm", {"stream": True, "refit": "block"}, marks=pytest.mark.slow),
        pytest.param("struprune", {}, marks=pytest.mark.slow),
        pytest.param("sparsellm", {"refit": "block"}, marks=pytest.mark.slow),
        pytest.param("elsa-l", {"steps": 16}, marks=pytest.mark.slow),
    ],
)
def test_a_run_writes_what_was_planned_at_most(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: dict[str, Any]
) -> None:
    out, most, synchronize = tmp_path / "out", 0, os.fsync

    def counting(handle: int) -> None:
        nonlocal most
        files = [path.stat() for path in (tmp_path / "out.partial").rglob("*") if path.is_file()]
        most = max(most, sum({one.st_ino: one.st_size for one in files}.values()))
        synchronize(handle)

    given = GIVEN | how | {"method": method, "data": str(text_file), "out": out}
    planned = make_plan(model, **given)
    monkeypatch.setattr(os, "fsync", counting)
    admm_prune.prune(model, device="cpu", **given)
    assert most <= sum(planned.disk.values()) <= 1.3 * most


def test_activations_beyond_their_limit_are_planned_on_disk(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a streamed run does, whose limit is a quarter of the free memory by default."""
    part, filed = "activations between blocks", "activations beyond --activation-memory"
    given = GIVEN | {"method": "wanda", "data": str(text_file), "stream": True}
    monkeypatch.setattr(plans, "resident_bytes", lambda: 0)
    roomy, limited = make_plan(model, **given), make_plan(model, **given, activation_bytes=10_000)

    def held(planned: plans.Plan) -> int:
        return max(stage.parts.get(part, 0) for stage in planned.stages)

    assert held(roomy) > 10_000 == held(limited)
    assert filed not in roomy.disk
    assert limited.disk[filed] == held(roomy) - 10_000
    assert any("(--activation-memory)" in note for note in limited.notes)
    assert limited.disk["activations in the journal"] == roomy.disk["activations in the journal"]
    by_default = make_plan(model, **given, memory=0.001)
    assert held(by_default) == min(held(roomy), 250_000)
    in_memory = make_plan(model, **given | {"stream": False}, memory=0.001)
    assert filed not in in_memory.disk, "without streaming there is no limit by default"

    most, put = 0, ActivationStore.put

    def counting(store: ActivationStore, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        put(store, name, tensor)
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "out.partial/scratch").rglob("*/*")))

    monkeypatch.setattr(ActivationStore, "put", counting)
    admm_prune.prune(model, device="cpu", out=tmp_path / "out", activation_bytes=10_000, **given)
    assert 0 < most <= limited.disk[filed] + 10_000


def test_a_run_that_the_disk_cannot_hold_is_refused(model: Path, tmp_path: Path) -> None:
    planned = make_plan(model, **GIVEN, method="wanda", out=tmp_path / "new/out")
    assert planned.free_disk is not None
    assert planned.refusal() is None
    assert planned.as_json()["free_disk"] == planned.free_disk
    needed = sum(planned.disk.values())
    assert replace(planned, free_disk=needed).refusal() is None
    assert replace(planned, free_disk=None).refusal() is None, "no output, no disk"
    reason = replace(planned, disk={"output": 2 * 10**7, "journal": 10**7}, free_disk=10**7).refusal()
    assert reason is not None
    said = "wanda does not fit: it needs 0.03 GB on the disk of --out, 0.01 GB are available; 0.02 GB are for output:"
    assert reason.startswith(said)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("out", ["new/deep/out", "~/out"])
def test_the_output_need_not_be_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """As for `run`: "~" is the home, and missing folders are made by the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert make_plan(model, **GIVEN, method="wanda", out=out).free_disk is not None
    assert not (tmp_path / "new").exists()


def test_an_output_that_a_run_would_refuse_is_refused(model: Path, tmp_path: Path) -> None:
    for out, reason in (
        (Path("/proc/none/out"), "/proc is not a writable folder"),
        (model, "exists and was not written by admm-prune"),
        (model / "config.json", "is a file or a link, not a folder"),
    ):
        with pytest.raises(UserError, match=reason):
            make_plan(model, **GIVEN, method="wanda", out=out)
    with pytest.raises(UserError, match=r"^cannot write to /proc: "):  # a disk that is full
        measured_here(Path("/proc"))
