"""What runs ask of a recipe: a foreign one, which trains nothing but says little, goes through everything."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import admm_prune
from admm_prune.errors import UserError
from admm_prune.methods import registry
from admm_prune.methods.base import IN_PROCESS, Capabilities, LayerReport, Outcome, Runtime, Task
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.registry import RECIPES, recipe_named
from admm_prune.methods.target import Target, parse_targets, target_named
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.settings import Settings
from admm_prune.verify.run import verify_folder


@dataclass(frozen=True)
class Global(Capabilities):
    """One magnitude threshold over all blocks, in a copy of the model; no layer problem is ever solved."""

    name: str = "global"
    summary: str = "largest |w| of the whole model"
    samples: int = 7
    budget: str = "model"

    def check(self, model: nn.Module, target: Target) -> None:
        if target.pattern is not None:
            raise UserError("global: there is no pattern over a whole model")

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        self.check(model, task.target)
        new = copy.deepcopy(model)
        views = [view for block in decoder_blocks(new) for view in block.weights]
        sizes = torch.cat([view.read().abs().flatten() for view in views])
        threshold = sizes.kthvalue(round(task.target.fraction * len(sizes))).values
        reports = []
        for done, view in enumerate(views):
            runtime.report_progress(done, len(views), view.name)
            kept = view.read().abs() > threshold
            view.write(view.read() * kept)
            reports.append(LayerReport(name=view.name, shape=view.shape, sparsity=1 - kept.double().mean().item()))
        runtime.report_progress(len(views), len(views))
        details = {"threshold": threshold.item(), "sequences": len(task.calibration.rows)}
        return Outcome(layers=reports, notes=("a copy was pruned",), details=details, model=new)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "RECIPES", {**RECIPES, "global": Global()})
    return "global"


def test_every_local_method_is_a_recipe_and_so_is_a_reference() -> None:
    assert set(LOCAL_METHODS) <= set(RECIPES)
    for name in (*RECIPES, "group-exact"):
        recipe = recipe_named(name)
        assert recipe.name == name
        assert recipe.summary
        assert recipe.samples > 0
    with pytest.raises(UserError, match=r"unknown method 'nonesuch': choose one of magnitude, .*brute-force"):
        recipe_named("nonesuch")


def test_the_catalogue_comes_without_the_heavy_packages() -> None:
    code = (
        "import sys, admm_prune.methods.registry\n"
        "print(sys.modules.keys() & {'transformers', 'datasets', 'cvxpy', 'matplotlib', 'hypothesis'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("target", parse_targets("0.7,0.123456789", "2:4,1:8"), ids=str)
def test_a_target_is_read_back_from_its_name(target: Target) -> None:
    assert target_named(str(target)) == target


def test_a_model_that_a_recipe_returns_is_the_one_that_is_judged_and_saved(
    foreign: str, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    seen: list[tuple[int, int, str]] = []
    report = admm_prune.prune(
        model_folder, method=foreign, sparsity=0.6, data=str(text_file), out=tmp_path / "out",
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)
    assert report.details["sequences"] == report.manifest["texts"]["calibration"]["sequences"] == 7
    assert report.notes == ("a copy was pruned",)
    assert (0, 14) in [step[:2] for step in seen]
    assert (14, 14, "") in seen
    assert report.pruned.perplexity != report.dense.perplexity
    manifest = json.loads((tmp_path / "out/admm_prune.json").read_text())
    assert manifest["details"] == report.details
    assert manifest["layers"][0]["relative_error"] is None
    assert max(layer["sparsity"] for layer in manifest["layers"]) > 0.61, "the matrices differ"
    assert verify_folder(tmp_path / "out", device="cpu").failures == []


def test_a_budget_of_the_whole_model_that_is_not_met_is_told(
    foreign: str, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    admm_prune.prune(model_folder, method=foreign, sparsity=0.6, data=str(text_file), out=tmp_path / "out")
    path = tmp_path / "out/admm_prune.json"

    def falsify(change: dict[str, Any]) -> list[str]:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | change))
        failures = verify_folder(tmp_path / "out", quick=True, device="cpu").failures
        path.write_text(json.dumps(content))
        return failures

    settings = json.loads(path.read_text())["settings"]
    asked = settings | {"target": {"sparsity": 0.7, "pattern": None, "layers": []}}
    told = falsify({"settings": asked, "target": "70%"})
    assert any(failure.startswith("all matrices together: ") for failure in told)
    assert any("60% asks for" in failure for failure in falsify({"budget": "matrix"})), "not every matrix meets it"
    assert any("weights in the dense blocks" in failure for failure in falsify({"block_weights": 10}))


@pytest.mark.slow
def test_every_recipe_of_a_comparison_is_given_its_own_number_of_sequences(
    foreign: str, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    def compared(samples: int | None, out: str) -> dict[str, Any]:
        settings = ComparisonSettings(
            run=Settings(str(model_folder), data=str(text_file), samples=samples, device="cpu"),
            methods=("wanda", foreign),
            targets=(Target(0.5),),
        )
        return compare(settings, tmp_path / out).as_json()

    own = compared(None, "own")
    assert list(own["texts"]) == ["calibration of wanda", "calibration of global", "evaluation"]
    assert own["texts"]["calibration of global"]["sequences"] == 7 < own["texts"]["calibration of wanda"]["sequences"]
    assert [row["relative_error"] is None for row in own["rows"]] == [False, True]
    assert "calibration of global" in (tmp_path / "own/report.html").read_text()
    manifest = json.loads((tmp_path / "own/models/global-50/admm_prune.json").read_text())
    assert manifest["texts"]["calibration"]["sequences"] == 7
    assert verify_folder(tmp_path / "own", device="cpu").failures == []
    same = compared(5, "same")
    assert list(same["texts"]) == ["calibration", "evaluation"]
    assert same["texts"]["calibration"]["sequences"] == 5
