"""Recipes on the command line: papers' protocols on the embedded model, runs repeated from files, schema and checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from admm_prune.runs.recipe_file import packaged_names
from tests.cli.outcome import Command


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", packaged_names())
def test_every_protocol_runs_with_another_model_and_text(
    command: Command, place: Path, model_folder: Path, text_file: Path, name: str
) -> None:
    steps = ("--steps", 4) if name == "elsa" else ()
    content = command(
        "reproduce", name, "--model", model_folder, "--data", text_file, "--length", 64, "--samples", 12,
        "--dtype", "float32", *steps, "--out", "out", "--json",
    ).json()  # fmt: skip
    recipe = yaml.safe_load((place / "out/recipe.yaml").read_text())
    assert recipe["model"] == str(model_folder)
    assert recipe["text"]["length"] == 64
    assert content["pruned"]["length"] == 64
    assert content["method"] == recipe["method"]
    assert content["sparsity"] == pytest.approx(recipe["sparsity"], abs=0.1 if name == "struprune" else 0.01)


def test_a_protocol_is_shown_before_it_is_run(command: Command, place: Path) -> None:
    outcome = command("reproduce", "sparsegpt", "--dry-run", "--sparsity", 0.7)
    assert outcome.status == 0
    shown = yaml.safe_load(outcome.out)
    assert (shown["model"], shown["sparsity"], shown["method"]) == ("facebook/opt-6.7b", 0.7, "sparsegpt")
    assert shown["text"]["eval_data"] == "wikitext2"
    content = command("reproduce", "wanda", "--dry-run", "--out", "out", "--json").json()
    assert content["recipe"]["source"].startswith("Sun et al.")
    assert content["out"] == "out"
    assert not list(place.iterdir())
    refused = command("reproduce", "sparsegpt")
    assert (refused.status, refused.out) == (2, "")
    assert "name the folder to write with --out" in refused.err


def test_a_run_is_repeated_from_its_folder_and_options_go_before(
    command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    first = command(
        "run", "--model", model_folder, "--data", text_file, "--method", "magnitude", "--sparsity", 0.7,
        "--ignore", "re:.*down_proj", "--out", "first", "--json",
    ).json()  # fmt: skip
    again = command("run", "--recipe", "first", "--out", "again", "--json").json()
    assert again["pruned"] == first["pruned"]
    assert (place / "again/recipe.yaml").read_bytes() == (place / "first/recipe.yaml").read_bytes()
    other = command("run", "--recipe", "first/recipe.yaml", "--method", "wanda", "--pattern", "2:4", "--out", "other")
    assert other.status == 0
    manifest = json.loads((place / "other/admm_prune.json").read_text())
    assert (manifest["method"], manifest["target"]) == ("wanda", "2:4")
    assert [layer["sparsity"] for layer in manifest["layers"] if "down_proj" in layer["name"]] == [0.0, 0.0]
    shown = command("run", "--recipe", "first", "--seed", 5, "--dry-run", "--out", "none")
    assert yaml.safe_load(shown.out)["text"]["seed"] == 5
    assert not (place / "none").exists()
    plain = command("run", "--sparsity", 0.5, "--samples", 3, "--dry-run")
    assert yaml.safe_load(plain.out)["text"] == {"samples": 3}
    assert not (place / "none").exists()


def test_recipes_are_listed_shown_and_checked(command: Command, place: Path) -> None:
    listed = command("recipe", "list", "--json").json()["recipes"]
    assert set(listed) == set(packaged_names())
    assert all(name in command("recipe", "list").out for name in packaged_names())
    shown = command("recipe", "show", "alps").out
    assert yaml.safe_load(shown) == listed["alps"]
    (place / "mine.yaml").write_text(shown)
    assert command("recipe", "check", "mine.yaml").status == 0
    (place / "mine.yaml").write_text(shown + "samples: 7\n")
    refused = command("recipe", "check", "mine.yaml")
    assert (refused.status, refused.out) == (2, "")
    assert "mine.yaml: samples: extra inputs are not permitted" in refused.err
    schema: Any = command("recipe", "schema").json()
    assert "overrides" in schema["properties"]
