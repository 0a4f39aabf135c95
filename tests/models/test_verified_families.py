"""Weights in other forms from folder to folder: pruned, written, and every claim computed again by `verify`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import admm_prune
from admm_prune.verify.run import verify_folder
from tests.models.tiny_models import build


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "method", "sparsity"),
    [("mixtral", "wanda", 0.5), ("phi3", "sparsellm", 0.5), ("gpt2", "struprune", 0.3), ("neox", "struprune", 0.3)],
)
def test_a_finished_run_is_verified(
    family: str, method: str, sparsity: float, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    """Experts by their numbers, two halves as the one matrix they are, heads that stay, a class beside the weights."""
    build(family, layers=2).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    report = admm_prune.prune(
        tmp_path / "dense", method=method, sparsity=sparsity, data=str(text_file), samples=12, eval_samples=3,
        out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    assert report.sparsity == pytest.approx(sparsity, abs=0.05)  # within a unit: a head is much of a tiny model
    assert verify_folder(tmp_path / "out", device="cpu").failures == []
