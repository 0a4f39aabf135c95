"""Recipe files: what a run leaves behind repeats it, what is packaged can be run, and what is wrong is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import admm_prune
from admm_prune import ADMM, RowWise
from admm_prune.errors import UserError
from admm_prune.methods.registry import recipe_named
from admm_prune.models.loading import load
from admm_prune.runs.recipe_file import packaged_names, read_packaged, read_recipe, written
from admm_prune.runs.recipe_schema import RecipeFile, schema, validated

PAPERS = {"sparsegpt", "wanda", "alps", "admm-gradual", "sparsellm", "struprune", "elsa"}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "how",
    [
        {"method": "sparsegpt", "sparsity": 0.6, "ridge": 0.05, "samples": 9, "seed": 3},
        {"method": "admm", "pattern": "2:4", "ignore": "re:.*down_proj", "overrides": {"re:.*up_proj": 0.75}},
        {"solver": "wanda", "sparsity": 0.5, "targets": ["LlamaMLP"], "length": 32, "packing": "windows"},
        {"method": "magnitude", "sparsity": 0.5, "constraint": "row-wise", "problem": "layer"},
        {"method": "elsa", "sparsity": 0.7, "steps": 4},
        {"method": "struprune", "sparsity": 0.3, "multiple": 4},
    ],
    ids=lambda how: how.get("method") or how["solver"],
)
def test_a_run_is_repeated_by_the_file_beside_its_weights(
    tmp_path: Path, model_folder: Path, text_file: Path, how: dict[str, Any]
) -> None:
    admm_prune.prune(model_folder, data=str(text_file), device="cpu", out=tmp_path / "first", **how)
    recipe = read_recipe(tmp_path / "first")
    content = yaml.safe_load((tmp_path / "first/recipe.yaml").read_text())
    assert content["text"]["data"] == str(text_file)
    assert {key: content[key] for key in how.keys() & content.keys() - {"targets", "ignore"}} == {
        key: value for key, value in how.items() if key in content and key not in ("targets", "ignore")
    }
    admm_prune.prune(**recipe.arguments(), out=tmp_path / "second")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "admm_prune.json").read_text()) for name in ("first", "second"))
    assert first["settings"] == second["settings"]
    assert first["pruned"] == second["pruned"]
    assert (tmp_path / "first/recipe.yaml").read_bytes() == (tmp_path / "second/recipe.yaml").read_bytes()


def test_a_run_with_parts_from_python_says_that_it_cannot_be_repeated(
    tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    admm_prune.prune(
        model_folder, solver=ADMM.fast(), constraint=RowWise(0.5), data=str(text_file), device="cpu",
        out=tmp_path / "out",
    )  # fmt: skip
    recipe = read_recipe(tmp_path / "out")
    assert recipe.objects == {"solver": repr(ADMM.fast()), "constraint": "RowWise(sparsity=0.5, keep=None)"}
    with pytest.raises(UserError, match=r"put together in Python, with solver=ADMM\(.*: it cannot be repeated"):
        recipe.arguments()


def test_a_run_of_a_module_says_that_it_cannot_be_repeated(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    loaded, out = load(str(model_folder)), tmp_path / "out"
    how: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "samples": 4, "eval_samples": 2}
    admm_prune.prune(loaded.model, tokenizer=loaded.tokenizer, data=str(text_file), out=out, **how)
    recipe = read_recipe(out)
    assert recipe.objects == {"model": "LlamaForCausalLM (a PyTorch module)"}
    assert "model" not in yaml.safe_load((out / "recipe.yaml").read_text())
    with pytest.raises(UserError, match=r"cannot be repeated from a file; name the model with --model"):
        recipe.arguments()
    assert recipe.with_options({"model": str(model_folder)}).arguments()["model"] == str(model_folder)
    said = "The run cannot be repeated from {}recipe.yaml{} alone: model was an object in Python."
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert said.format("`", "`") in card
    assert "# LlamaForCausalLM, pruned to" in card
    assert said.format("", "") in page
    assert "run --recipe" not in card + page


def test_every_paper_is_packaged_with_its_protocol() -> None:
    assert set(packaged_names()) == PAPERS | {"embedded"}  # which any machine can run
    for name in PAPERS:
        recipe = read_packaged(name)
        assert recipe.name == name
        assert recipe.summary
        assert recipe.source
        assert recipe.deviations
        assert "/" in recipe.model
        text = recipe.text
        assert (text.data, text.eval_data, text.eval_split, text.length) == ("c4", "wikitext2", "test", 2048)
        assert text.samples == (32768 if name == "elsa" else 128)
        assert recipe.method is not None
        assert recipe_named(recipe.method, steps=recipe.steps).name == recipe.method
        assert validated(yaml.safe_load(written(recipe.as_content())), name) == recipe
    with pytest.raises(UserError, match="unknown recipe 'nonesuch': choose one of admm-gradual, alps"):
        read_packaged("nonesuch")


def test_options_go_before_a_recipe() -> None:
    recipe = read_packaged("sparsegpt")
    changed = recipe.with_options({"pattern": "2:4", "model": "embedded", "samples": 8})
    assert (changed.sparsity, changed.pattern, changed.model, changed.text.samples) == (None, "2:4", "embedded", 8)
    assert changed.text.eval_data == "wikitext2"
    assert changed.method == recipe.method
    again = changed.with_options({"sparsity": "0.25", "data": "mine.txt"})
    assert (again.sparsity, again.pattern) == (0.25, None)
    assert (again.text.eval_data, again.text.documents, again.text.eval_split) == (None, None, None)
    both = changed.with_options({"data": "mine.txt", "eval_data": "other.txt"})
    assert both.text.eval_data == "other.txt"
    assert RecipeFile(sparsity=0.5).with_options({"ridge": "auto"}).ridge == "auto"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("model: [", "line 1: not YAML"),
        ("- 1", "a recipe is a mapping"),
        ("sparsity: 1.5", "sparsity: input should be less than or equal to 1"),
        ("sparsity: 0.5\nmodle: embedded", "modle: extra inputs are not permitted"),
        ("sparsity: 0.5\ntext: {length: 1}", "text.length: input should be greater than or equal to 2"),
        ("sparsity: 0.5\npattern: 2:4", "give either a sparsity such as 0.7 or a pattern"),
        ("pattern: 5:4", "must keep from 1 to 4"),
        ("sparsity: 0.5\nignore: ['re:(']", "is no regular expression"),
        ("sparsity: 0.5\noverrides: {Linear: 7}", "sparsity must lie between 0 and 1"),
    ],
)
def test_what_is_no_recipe_is_told_in_a_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as refusal:
        read_recipe(path)
    assert reason in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_a_pattern_needs_no_quotes_and_numbers_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 2:4 as 124, and 1e-2 as a text."""
    path = tmp_path / "mine.yaml"
    path.write_text("pattern: 2:4\nridge: 1e-2\noverrides: {Linear: 4:8, Conv1D: .5}\ntext: {seed: 7}\n")
    recipe = read_recipe(path)
    assert (recipe.pattern, recipe.ridge, recipe.text.seed) == ("2:4", 0.01, 7)
    assert recipe.overrides == {"Linear": "4:8", "Conv1D": 0.5}
    path.write_text(written(recipe.as_content()))
    assert read_recipe(path) == recipe


def test_the_schema_names_every_field_of_a_run() -> None:
    found = schema()
    assert {"model", "method", "sparsity", "pattern", "text", "overrides"} <= set(found["properties"])
    assert found["additionalProperties"] is False
    assert "length" in found["$defs"]["Text"]["properties"]


@pytest.mark.slow
def test_pydantic_is_not_needed_to_run(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    """A run that is saved, reported and described in YAML, on a machine that has no pydantic."""
    code = (
        "import sys\n"
        "sys.modules['pydantic'] = None\n"
        "import admm_prune\n"
        f"admm_prune.prune({str(model_folder)!r}, method='magnitude', sparsity=0.5, data={str(text_file)!r}, "
        f"device='cpu', out={str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["method"] == "magnitude"
