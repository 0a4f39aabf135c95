"""The model card beside the weights: valid metadata, the figures of the manifest, snippets that run."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import admm_prune
from admm_prune import Report, load_report
from admm_prune.methods.allocation.rules import RULES, AllocationRule
from admm_prune.methods.joint import Joint
from admm_prune.methods.registry import RECIPES, composed, with_joint
from admm_prune.runs.card import PLACE, card_of, task_rows
from admm_prune.solvers.one_shot import Magnitude

TASKS = {
    "results": {"mats": {"acc,none": 0.25, "acc_stderr,none": 0.0625, "name": "mats", "exact_match,strict": 0.5}},
    "versions": {"mats": 3},
    "shots": {"mats": 0},
    "limit": 40,
    "lm_eval": "0.4.11",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Report:
    """A run by Wanda, of a local model whose own card names a license."""
    model = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("licensed") / "tiny"))
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlanguage: en\ntags: [x]\n---\n# Tiny\n")
    how: dict[str, Any] = {"data": str(text_file), "samples": 4, "eval_samples": 2, "device": "cpu"}
    out = tmp_path_factory.mktemp("runs") / "pruned"
    return admm_prune.prune(model, method="wanda", sparsity=0.5, out=out, **how)


def altered(report: Report, **changes: Any) -> str:
    """The card of the run, with other claims."""
    content = vars(report) | changes
    return card_of(Report(**content), None)


def test_the_metadata_are_what_the_hub_reads(report: Report) -> None:
    assert report.out is not None
    card = ModelCard.load(report.out / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["pruning", "sparse", "admm-prune", "wanda"]
    assert (data["license"], data["license_name"], data["language"]) == ("other", "ours", "en")
    assert "base_model" not in data, "a folder has no id"
    (index,) = data["model-index"]
    (result,) = index["results"]
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics["perplexity"] == pytest.approx(report.pruned.perplexity, rel=1e-5)
    assert metrics["bits_per_char"] == pytest.approx(report.pruned.bits_per_char, rel=1e-5)
    assert result["dataset"] == {"name": "stories.txt (last 10%)", "type": "text"}


def test_a_card_of_chosen_matrices_names_the_fraction_that_was_pruned(report: Report) -> None:
    assert report.label == "50%"
    chosen = {"targets": ["q_proj"], "ignore": [], "overrides": []}
    settings = report.manifest["settings"] | {"selection": chosen}
    card = altered(report, sparsity=0.0472, manifest=report.manifest | {"settings": settings})
    assert "# tiny, pruned to 4.7% by wanda" in card
    assert "tiny-wanda-4.7%" in card


def test_the_text_has_the_figures_with_their_protocol_and_no_folder(report: Report) -> None:
    assert report.out is not None
    text = (report.out / "README.md").read_text()
    assert f"| perplexity | {report.dense.perplexity:.3f} | {report.pruned.perplexity:.3f} |" in text
    assert report.pruned.protocol in text
    assert report.manifest["texts"]["evaluation"]["token_hash"] in text
    assert f"{100 * report.sparsity:.2f} % of the" in text
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert str(report.out.parent) not in prose
    assert "/tmp" not in prose
    recipe = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert recipe is not None
    assert recipe[1] == (report.out / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe[1])["method"] == "wanda"


def test_the_snippets_load_the_model(report: Report) -> None:
    assert report.out is not None
    text = (report.out / "README.md").read_text()
    plain, packed = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(plain.replace(PLACE, str(report.out)), names)
    assert names["model"].config.admm_prune["method"] == "wanda"
    dense = names["model"](**names["tokenizer"]("the cat sat", return_tensors="pt")).logits
    exec(packed.replace(f'snapshot_download("{PLACE}")', repr(str(report.out))), names)
    logits = names["model"](**names["tokenizer"]("the cat sat", return_tensors="pt")).logits
    assert torch.allclose(logits, dense.detach(), atol=1e-4)


def test_a_model_of_the_hub_is_the_base_model(report: Report) -> None:
    text = {**report.manifest["settings"]["text"], "data": "allenai/c4:en", "eval_data": "wikitext2"}
    settings = {**report.manifest["settings"], "model": "org/tiny", "text": text}
    manifest = {**report.manifest, "settings": settings, "model_revision": "a" * 40}
    card = ModelCard(altered(report, manifest=manifest))
    assert card.data.base_model == "org/tiny"
    assert card.data.datasets == ["allenai/c4"]
    assert card.data.license is None, "unknown"
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["dataset"]["type"] == "Salesforce/wikitext"
    assert result["dataset"]["config"] == "wikitext-2-raw-v1"
    assert "[org/tiny](https://huggingface.co/org/tiny)" in card.text


def test_the_card_says_what_the_text_was_for(report: Report) -> None:
    text = {**report.manifest["settings"]["text"], "data": "allenai/c4:en"}
    manifest = {**report.manifest, "settings": {**report.manifest["settings"], "text": text}}
    said = {
        "calibration": "target 50%; calibrated on 4 sequences",
        "training": "target 50%; trained on 4 sequences",
        "measurement": "target 50%; it needs no text; the errors of its layers were measured on 4 sequences",
    }
    for use, words in said.items():
        card = ModelCard(altered(report, text_use=use, manifest=manifest))
        assert words in card.text
        assert card.data.get("datasets") == (None if use == "measurement" else ["allenai/c4"])
    assert report.text_use == "calibration"


def test_only_methods_that_score_weights_alone_need_no_text() -> None:
    assert [name for name, recipe in RECIPES.items() if recipe.text_use == "measurement"] == ["magnitude"]
    assert RECIPES["elsa"].text_use == "training"
    magnitude = composed(None, solver=Magnitude())
    assert magnitude.text_use == "measurement"
    assert with_joint(magnitude, Joint(refit="block")).text_use == "calibration"
    needing = [name for name in RULES if AllocationRule(name).text_use(magnitude) == "calibration"]
    assert set(RULES) - set(needing) == {"uniform", "alphapruning"}


def test_tasks_are_in_text_and_metadata(report: Report) -> None:
    assert list(task_rows(TASKS)) == [("mats", "acc", 0.25, 0.0625), ("mats", "exact_match (strict)", 0.5, None)]
    assert list(task_rows(None)) == []
    card = ModelCard(altered(report, tasks=TASKS))
    assert "| mats | acc | 0 | 0.2500 | 0.0625 |" in card.text
    assert "at most 40 questions of each (not comparable)" in card.text
    results = card.data.to_dict()["model-index"][0]["results"]
    assert {"type": "acc", "value": 0.25} in results[1]["metrics"]


def test_figures_that_are_not_finite_leave_the_metadata_valid(report: Report) -> None:
    pruned = type(report.pruned)(**{**vars(report.pruned), "perplexity": math.nan})
    card = ModelCard(altered(report, pruned=pruned))
    metrics = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["bits_per_char"]
    assert "| perplexity | " in card.text


def test_a_base_card_that_cannot_be_read_is_no_obstacle(report: Report) -> None:
    base = Path(report.manifest["settings"]["model"])
    before = (base / "README.md").read_text()
    try:
        for broken in ("---\nlicense: [\n---\n", "no metadata", "\xff"):
            (base / "README.md").write_bytes(broken.encode("latin-1"))
            assert ModelCard(altered(report)).data.license is None
    finally:
        (base / "README.md").write_text(before)


def test_a_report_read_from_the_folder_has_the_same_card(report: Report) -> None:
    assert report.out is not None
    again = load_report(report.out)
    assert card_of(again, (report.out / "recipe.yaml").read_text()) == (report.out / "README.md").read_text()
