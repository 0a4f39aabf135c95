"""Recipes on the command line: papers' protocols on the embedded model, runs repeated from files, schema and checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from admm_prune.cli.run import show_plan
from admm_prune.runs import recipe_file
from admm_prune.runs.recipe_file import packaged_names, read_packaged
from admm_prune.runs.recipe_schema import Expected, validated
from tests.cli.outcome import Command, Outcome


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
    assert content["ratio"] == content["pruned"]["perplexity"] / content["dense"]["perplexity"]
    assert (content["expected"], content["passed"]) == (None, None)
    if read_packaged(name).expected is None:
        assert content["not_compared"] == f"the recipe '{name}' names no published figures of its model and sparsity"
    else:
        assert "--data, " in content["not_compared"]
        assert ", --model, " in content["not_compared"]
        assert content["not_compared"].endswith(" differ from the protocol")


def test_a_reproduction_passes_fails_or_is_not_compared(
    command: Command, place: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expect(ratio: float) -> None:
        expected = {"dense": 2, "pruned": 2 * ratio, "table": "Table 9", "tolerance": 0.02, "reason": "five draws"}
        text = {"data": str(text_file), "samples": 12, "length": 64}
        content = {"model": str(model_folder), "method": "magnitude", "sparsity": 0.7, "text": text}
        recipe = validated({**content, "name": "mine", "expected": expected}, "mine")
        monkeypatch.setattr(recipe_file, "read_packaged", lambda name: recipe)

    def reproduced(*options: object) -> Outcome:
        return command("reproduce", "mine", *options, "--out", "out", "--overwrite")

    expect(1000)
    failed = reproduced("--json")
    content = json.loads(failed.out)
    reached = content["ratio"]
    assert (failed.status, content["passed"], content["not_compared"]) == (1, False, None)
    assert content["expected"] == {
        "dense": 2, "pruned": 2000, "ratio": 1000, "table": "Table 9", "tolerance": 0.02, "reason": "five draws",
    }  # fmt: skip
    assert reached == content["pruned"]["perplexity"] / content["dense"]["perplexity"]
    assert (place / "out/report.html").is_file(), "what was measured is kept"

    for factor, status, verdict in ((1.015, 0, "pass"), (1.03, 1, "FAIL")):
        expect(reached * factor)
        outcome = reproduced()
        assert outcome.status == status
        assert f"dense: {reached:.4g}, expected {reached * factor:.4g} +- 2 %: {verdict}\n" in outcome.out
        assert outcome.err.count("admm-prune:") == 0
    for how in (("--sparsity", 0.7, "--device", "cpu"), ("--stream", "--activation-memory", 0.5)):
        content = json.loads(reproduced(*how, "--json").out)
        assert content["passed"] is False, "options that change no setting of the protocol leave the comparison"
        assert content["ratio"] == pytest.approx(reached, rel=1e-6)
    assert json.loads((place / "out/admm_prune.json").read_text())["settings"]["stream"] is True

    for options, reason in (
        (("--sparsity", 0.5, "--seed", 1), "--seed, --sparsity differ"),
        (("--data", text_file, "--documents", 50), "--documents differs"),
    ):
        outcome = reproduced(*options)
        assert outcome.status == 0
        assert f"; not compared: {reason} from the protocol\n" in outcome.out
        assert "pass" not in outcome.out


def test_a_ratio_that_is_no_number_does_not_pass() -> None:
    expected = Expected(dense=10, pruned=20, table="", tolerance=0.5, reason="")
    ratios = (0.9, 1.1, 2.9, 3.1, float("nan"), float("inf"))
    assert [expected.passed(ratio) for ratio in ratios] == [False, True, True, False, False, False]


def test_expected_figures_are_sourced() -> None:
    expected = {name: read_packaged(name).expected for name in packaged_names()}
    assert {name for name, one in expected.items() if one is None} == {"admm-gradual", "sparsellm", "struprune"}
    for name, one in expected.items():
        if one is not None:
            assert name == "embedded" or "arXiv" in one.table
            assert one.ratio > 1
            assert one.tolerance < 0.1


@pytest.mark.slow
def test_the_recipe_of_the_embedded_model_passes(command: Command, place: Path) -> None:
    content = command("reproduce", "embedded", "--device", "cpu", "--out", "out", "--json").json()
    assert content["passed"] is True
    assert content["expected"]["ratio"] == pytest.approx(content["ratio"], rel=0.005)


def test_a_protocol_is_shown_before_it_is_run(command: Command, place: Path) -> None:
    outcome = command("reproduce", "sparsegpt", "--dry-run", "--sparsity", 0.7)
    assert outcome.status == 0
    shown = yaml.safe_load(outcome.out)
    assert (shown["model"], shown["sparsity"], shown["method"]) == ("facebook/opt-6.7b", 0.7, "sparsegpt")
    assert shown["text"]["eval_data"] == "wikitext2"
    assert "expected" not in shown, "the paper's figures are of another sparsity"
    assert yaml.safe_load(command("reproduce", "sparsegpt", "--dry-run").out)["expected"]["pruned"] == 11.55
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


def test_of_several_processes_the_first_prints_what_would_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for json_ in (False, True):
            show_plan(read_packaged("embedded"), {"out": None}, json_)
            assert bool(capsys.readouterr().out) == (rank == "0")


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
    for wrong, reason in (
        ("0", "greater than 0"),
        ("1.5", "less than 1"),
        ("much", "valid number"),
        (".nan", "number"),
    ):
        (place / "mine.yaml").write_text(shown.replace("tolerance: 0.09", f"tolerance: {wrong}"))
        refused = command("recipe", "check", "mine.yaml")
        assert refused.status == 2
        assert "mine.yaml: expected.tolerance: " in refused.err
        assert reason in refused.err
    for wrong, reason in (  # what only a run would refuse is no recipe that can be run
        ("method: sparsgpt\nsparsity: 0.5", "unknown method 'sparsgpt' (did you mean 'sparsegpt'?)"),
        ("method: wanda\nsteps: 8\nsparsity: 0.5", "wanda does not train: --steps is for"),
        ("constraint: row-wise\npattern: '2:4'", "the pattern 2:4 is a sparse set of its own"),
        ("allocation: owll\nsparsity: 0.5", "did you mean 'owl'?"),
        ("device: gpu\nsparsity: 0.5", "device: input should be 'auto', 'cpu' or 'cuda'"),
        ("shots: 5\nsparsity: 0.5", "shots is of tasks: name them with tasks"),
        ("task_limit: 5\nsparsity: 0.5", "task_limit is of tasks: name them with tasks"),
        ("tasks: [' ']\nsparsity: 0.5", "name at least one task"),
    ):
        (place / "mine.yaml").write_text(f"model: embedded\n{wrong}\n")
        for words in (("recipe", "check", "mine.yaml"), ("run", "--recipe", "mine.yaml", "--dry-run")):
            refused = command(*words)
            assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
            assert reason in refused.err
    schema: Any = command("recipe", "schema").json()
    assert {"overrides", "expected"} <= schema["properties"].keys()


def test_one_of_several_processes_prints_a_dry_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for json_too in ((), ("--json",)):
            told = command("run", "--sparsity", "0.5", "--dry-run", *json_too)
            assert (told.status, bool(told.out)) == (0, prints)
