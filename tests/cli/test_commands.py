"""What the commands write to stdout, to stderr and to disk when all is well."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.outcome import Command

FIGURES = {
    "perplexity", "bits_per_char", "tokens", "characters", "packing", "length", "truncated_tokens", "protocol",
    "perplexity_error",
}  # fmt: skip
MANIFEST = {
    "method", "target", "budget", "text_use", "block_weights", "sparsity", "dense", "pruned", "tasks", "layers",
    "notes", "details", "continuation", "settings", "model_revision", "texts", "environment", "weights", "files",
    "sha256",
}  # fmt: skip
MATRICES = 14  # 2 blocks of q, k, v, o, gate, up, down
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def run(command: Command, place: Path, model_folder: Path, text_file: Path) -> Any:
    """`admm-prune run` on the tiny model."""
    return lambda *options: command("run", "--model", model_folder, "--data", text_file, "--samples", 16, *options)


def test_run_says_one_line_and_reports_progress_on_stderr(run: Any) -> None:
    outcome = run("--method", "wanda", "--sparsity", 0.5, "--out", "pruned", "--json")
    content = outcome.json()
    assert set(content) == {"out", "method", "target", "sparsity", "dense", "pruned", "tasks", "seconds"}
    assert set(content["dense"]) == set(content["pruned"]) == FIGURES
    assert (content["out"], content["method"], content["target"]) == ("pruned", "wanda", "50%")
    assert [line for line in outcome.err.splitlines() if ": " in line] == [
        "pruning: 0/2 model.layers.0",
        "pruning: 1/2 model.layers.1",
    ]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm", "admm-gradual"])
@pytest.mark.parametrize(("option", "value", "pruned"), [("--sparsity", "0.7", 0.7), ("--pattern", "2:4", 0.5)])
def test_sparsity_is_exact_to_one_weight_in_every_matrix(
    run: Any, place: Path, method: str, option: str, value: str, pruned: float
) -> None:
    content = run("--method", method, option, value, "--out", "pruned", "--json").json()
    weights = {
        name: tensor for name, tensor in load_file(place / "pruned/model.safetensors").items() if "_proj." in name
    }
    assert len(weights) == MATRICES
    for name, weight in weights.items():
        assert abs(int((weight == 0).sum()) - pruned * weight.numel()) <= 1, name
        if option == "--pattern":
            assert int(weight.unflatten(1, (-1, 4)).count_nonzero(dim=2).max()) <= 2, name
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert content["sparsity"] == pytest.approx(zeros / total, rel=1e-12)


def test_the_manifest_is_complete(run: Any, place: Path, model_folder: Path, text_file: Path) -> None:
    content = run("--method", "admm", "--pattern", "2:4", "--seed", 3, "--out", "pruned", "--json").json()
    manifest = json.loads((place / "pruned/admm_prune.json").read_text())
    assert set(manifest) == MANIFEST
    assert {key: manifest[key] for key in ("dense", "pruned", "sparsity")} == {
        key: content[key] for key in ("dense", "pruned", "sparsity")
    }
    assert manifest["settings"]["model"] == str(model_folder)
    assert manifest["settings"]["target"] == {"sparsity": None, "pattern": [2, 4], "layers": []}
    assert manifest["settings"]["text"]["seed"] == 3
    for role in ("calibration", "evaluation"):
        record = manifest["texts"][role]
        assert record["source"].startswith(str(text_file))
        assert len(record["fingerprint"]) == len(record["token_hash"]) == 64
    assert manifest["texts"]["calibration"]["fingerprint"] != manifest["texts"]["evaluation"]["fingerprint"]
    assert {"admm-prune", "torch", "transformers"} <= set(manifest["environment"]["versions"])
    assert len(manifest["layers"]) == MATRICES
    for layer in manifest["layers"]:
        assert 0 < layer["relative_error"] < 1
        assert layer["sparsity"] == 0.5


def test_the_config_carries_our_key_and_nothing_that_servers_refuse(run: Any, place: Path) -> None:
    assert run("--method", "magnitude", "--sparsity", 0.5, "--out", "pruned").status == 0
    config = json.loads((place / "pruned/config.json").read_text())
    assert config["admm_prune"] == {"method": "magnitude", "target": "50%", "sparsity": 0.5}
    assert "sparsity_config" not in config
    assert "quantization_config" not in config
    assert AutoModelForCausalLM.from_pretrained(place / "pruned").config.admm_prune["target"] == "50%"
    assert AutoTokenizer.from_pretrained(place / "pruned").bos_token == "<s>"


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(run: Any, place: Path) -> None:
    for seed, out in ((1, "first"), (1, "second"), (2, "third")):
        assert run("--method", "admm", "--sparsity", 0.6, "--seed", seed, "--out", out).status == 0
    first, second, third = ((place / out / "model.safetensors").read_bytes() for out in ("first", "second", "third"))
    assert first == second
    assert first != third


def test_without_json_a_table(run: Any) -> None:
    outcome = run("--method", "magnitude", "--sparsity", 0.5, "--out", "pruned")
    assert "magnitude 50%" in outcome.out
    assert "50.00 % of the block matrices are pruned; saved in pruned" in outcome.out


def test_eval_of_a_pruned_folder_finds_the_figures_of_its_run(
    run: Any, command: Command, place: Path, text_file: Path
) -> None:
    (place / "judge.txt").write_text(text_file.read_text()[:3000])
    pruned = run("--method", "wanda", "--sparsity", 0.5, "--eval-data", "judge.txt", "--out", "pruned", "--json").json()
    outcome = command("eval", "pruned", "--data", "judge.txt", "--json")
    content = outcome.json()
    assert content.pop("text")["source"] == "judge.txt"
    assert content.pop("notes") == []
    assert set(content) == FIGURES | {"sparsity"}
    assert content == {**pruned["pruned"], "sparsity": pruned["sparsity"]}
    assert outcome.err == ""
    table = command("eval", "pruned", "--data", "judge.txt")
    assert f"{content['perplexity']:.3f}" in table.out
    assert content["protocol"] in table.out


def test_compare_writes_the_report_the_plot_and_the_models(
    command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    outcome = command(
        "compare", "--model", model_folder, "--data", text_file, "--methods", "magnitude,wanda,magnitude",
        "--sparsity", "0.5,0.7", "--pattern", "2:4", "--out", "all", "--json",
    )  # fmt: skip
    content = outcome.json()
    assert {"model", "parameters", "dense", "rows", "settings", "texts", "environment"} <= set(content)
    pairs = [(row["method"], row["target"]) for row in content["rows"]]
    assert pairs == [(method, target) for target in ("50%", "70%", "2:4") for method in ("magnitude", "wanda")]
    for row in content["rows"]:
        assert row["reloaded_perplexity"] == row["perplexity"]
        assert (place / "all" / row["folder"] / "model.safetensors").is_file()
        assert 0 < row["relative_error"] < 1
    manifest = json.loads((place / "all/admm_prune.json").read_text())
    assert {key: value for key, value in manifest.items() if key not in ("files", "sha256")} == content
    assert (place / "all/perplexity.png").read_bytes().startswith(b"\x89PNG")
    page = (place / "all/report.html").read_text()
    assert "<svg" in page
    assert "http-equiv" not in page
    assert outcome.err.splitlines()[:2] == ["evaluating the dense model", "comparing: 0/6 magnitude 50%"]
    assert not list(place.glob(".*"))


def test_compare_prints_a_table_with_every_row_whole(
    command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    outcome = command(
        "compare", "--model", model_folder, "--data", text_file, "--methods", "magnitude,admm-gradual",
        "--pattern", "2:4", "--samples", 8, "--out", "all",
    )  # fmt: skip
    assert outcome.status == 0
    rows = [line.split() for line in outcome.out.splitlines() if "2:4" in line]
    assert [row[0] for row in rows] == ["magnitude", "admm-gradual"]
    assert all(len(row) == 8 for row in rows)
    assert "…" not in outcome.out


def test_a_captured_layer_is_solved_by_every_solver(
    command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    options = ("--model", model_folder, "--data", text_file, "--weight", UP, "--samples", 16)
    captured = command("capture", *options, "--out", "layer.safetensors", "--json")
    content = captured.json()
    assert content["shape"] == [48, 32]
    assert content["weight"] == UP
    assert content["tokens"] > content["tokens_validation"] > 0
    assert captured.err.splitlines() == ["capturing: 0/2 model.layers.0", "capturing: 1/2 model.layers.1"]
    tensors = load_file(place / "layer.safetensors")
    assert set(tensors) == {"weight", "gram", "gram_validation", "gram_holdout"}
    dense = AutoModelForCausalLM.from_pretrained(model_folder).get_parameter(UP)
    assert torch.equal(tensors["weight"], dense)
    errors = {}
    for solver in ("magnitude", "sparsegpt", "admm"):
        solved = command("solve", "layer.safetensors", "--solver", solver, "--sparsity", 0.5, "--json").json()
        assert {
            "relative_error", "relative_error_holdout", "sparsity", "bound", "status", "iterations", "seconds",
            "peak_mib",
        } <= set(solved)  # fmt: skip
        assert solved["sparsity"] == 0.5
        errors[solver] = solved["relative_error"]
    assert errors["admm"] < errors["sparsegpt"] < errors["magnitude"]
    again = ("capture", *options, "--out", "layer.safetensors")
    assert "layer.safetensors contains an earlier result" in command(*again).err
    assert command(*again, "--overwrite").status == 0


def test_solve_writes_the_weight_whose_error_it_reports(
    command: Command, place: Path, layer_file: Path, layer_tensors: dict[str, torch.Tensor]
) -> None:
    solved = command("solve", layer_file, "--sparsity", 0.5, "--out", "v.safetensors", "--json").json()
    v = load_file(place / "v.safetensors")["weight"].double()
    w = layer_tensors["weight"].double()

    def error(gram: torch.Tensor) -> float:
        gram, change = gram.double(), v - w
        return float(torch.trace(change @ gram @ change.T) / torch.trace(w @ gram @ w.T))

    assert solved["relative_error"] == pytest.approx(error(layer_tensors["gram"]), rel=1e-6)
    assert solved["relative_error_holdout"] == pytest.approx(error(layer_tensors["gram_holdout"]), rel=1e-6)
    assert int((v == 0).sum()) == w.numel() // 2
    table = command("solve", layer_file, "--pattern", "2:4").out
    assert "relative error" in table
    assert "2:4" in table


@pytest.mark.parametrize(("bound", "kind"), [("dual", "perspective dual"), ("block", "block-diagonal dual")])
def test_solve_and_verify_prove_a_strong_bound(command: Command, layer_file: Path, bound: str, kind: str) -> None:
    options = ("solve", layer_file, "--sparsity", 0.5, "--json")
    quick = command(*options).json()
    solved = command(*options, "--bound", bound, "--out", "v.safetensors").json()
    assert solved["bound_kind"] == kind
    assert quick["bound"] < solved["bound"] <= solved["objective"]
    assert solved["gap"] == pytest.approx(1 - solved["bound"] / solved["objective"])
    checked = command("verify", "v.safetensors", "--json").json()  # it repeats the argument of the claim
    assert checked["verified"]
    assert checked["bound_recomputed"] == pytest.approx(solved["bound"], rel=1e-9)
    assert checked["gap"] == pytest.approx(solved["gap"], rel=1e-6)
    assert command(*options, "--bound", "exact").status == 2


def test_verify_proves_a_dual_bound_of_a_layer_but_not_of_a_folder(
    command: Command, place: Path, layer_file: Path
) -> None:
    quick = command("solve", layer_file, "--sparsity", 0.5, "--out", "v.safetensors", "--json").json()
    checked = command("verify", "v.safetensors", "--bound", "dual", "--json").json()
    assert checked["bound"] == quick["bound"] < checked["bound_recomputed"]
    assert checked["bound_recomputed_kind"] == "perspective dual"
    folder = place / "folder"
    folder.mkdir()
    assert "--bound is for a layer" in command("verify", "folder", "--bound", "dual").err


def test_solve_goes_along_a_path(command: Command, place: Path, layer_file: Path) -> None:
    options = ("solve", layer_file, "--solver", "admm")
    path = command(*options, "--sparsity", "0.75,0.5", "--out", "v.safetensors", "--json").json()["path"]
    assert [(solved["target"], solved["sparsity"]) for solved in path] == [("0.75", 0.75), ("0.5", 0.5)]
    alone = command(*options, "--sparsity", "0.5", "--json").json()
    assert set(path[1]) == {"target", *alone}
    assert path[1]["relative_error"] == pytest.approx(alone["relative_error"], rel=1e-4)
    assert sorted(file.name for file in place.glob("v*")) == ["v-0.5.safetensors", "v-0.75.safetensors"]
    assert command("verify", "v-0.75.safetensors").status == 0
    tables = command(*options, "--sparsity", "0.75,0.5").out
    assert tables.index("admm 75%") < tables.index("admm 50%")


def test_ridge_auto_says_what_it_tried(
    run: Any, command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    assert run("--sparsity", 0.5, "--ridge", "auto", "--out", "pruned").status == 0
    manifest = json.loads((place / "pruned/admm_prune.json").read_text())
    assert manifest["settings"]["ridge"] == "auto"
    for layer in manifest["layers"]:
        assert layer["ridge_trials"][0].keys() == {"ridge", "damping", "error"}
        assert layer["ridge"] == layer["ridge_trials"][0]["ridge"]
    capture = ("capture", "--model", model_folder, "--data", text_file, "--samples", 16, "--weight", UP)
    assert command(*capture, "--out", "layer.safetensors").status == 0
    solve = ("solve", "layer.safetensors", "--sparsity", 0.5, "--ridge", "auto")
    solved = command(*solve, "--json").json()
    assert solved["damping"] == solved["ridge_trials"][0]["damping"]
    assert "tried ridge 0, damping 0.01: validation error" in command(*solve).out


def test_a_layer_error_in_the_manifest_is_that_of_its_layer_file(
    run: Any, command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    """The first block sees the dense model's inputs, so that `run` and `capture` followed by `solve` must agree."""
    name = "model.layers.0.self_attn.q_proj.weight"
    assert run("--method", "sparsegpt", "--sparsity", 0.5, "--out", "pruned").status == 0
    layer = json.loads((place / "pruned/admm_prune.json").read_text())["layers"][0]
    assert layer["name"] == name
    options = ("--model", model_folder, "--data", text_file, "--samples", 16)
    assert command("capture", *options, "--weight", name, "--out", "q.safetensors").status == 0
    solved = command("solve", "q.safetensors", "--solver", "sparsegpt", "--sparsity", 0.5, "--json").json()
    assert math.isclose(solved["relative_error"], layer["relative_error"], rel_tol=1e-5)


def test_list_names_what_there_is_and_what_fits(command: Command) -> None:
    content = command("list", "--json").json()
    assert {"methods", "problems", "constraints", "fits"} <= set(content)
    methods = [method["name"] for method in content["methods"]]
    assert {"magnitude", "wanda", "sparsegpt", "admm", "admm-gradual"} <= set(methods)
    assert all(fit["fits"] or fit["why"] for fit in content["fits"])
    table = command("list").out
    for group in ("methods", "problems", "constraints"):
        for item in content[group]:
            assert item["name"] in table


def test_list_shows_one_kind_and_the_reasons_when_asked(command: Command) -> None:
    methods = command("list", "methods").out
    assert "sparsegpt" in methods
    assert "LayerReconstruction" not in methods
    assert set(command("list", "methods", "--json").json()) == {"methods"}
    assert set(command("list", "solvers", "--json").json()) == {"pairs", "fits"}
    reason = "Wanda, FeedForward: Wanda needs a Quadratic problem"
    assert reason in command("list", "--why").out
    assert reason in command("list", "solvers", "--why").out
    for shown in (command("list").out, command("list", "solvers").out):
        assert "SupportDescent" in shown
        assert reason not in shown
    assert "plug-ins" in command("list", "plugins").out


def test_list_shows_the_modules_of_a_model(command: Command, model_folder: Path) -> None:
    content = command("list", "modules", "--model", model_folder, "--json").json()
    assert content["blocks"] == ["model.layers.0", "model.layers.1"]
    assert len(content["modules"]) == 14
    first = content["modules"][0]
    assert (first["name"], first["class"]) == ("model.layers.0.self_attn.q_proj", "Linear")
    shown = command("list", "modules", "--model", model_folder).out
    assert "14 matrices in 2 blocks, model.layers.0 to model.layers.1" in shown
    assert [line.split()[0] for line in shown.splitlines() if "Linear" in line] == [
        f"self_attn.{name}_proj" for name in "qkvo"
    ] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_a_run_takes_the_ends_of_names(run: Any, place: Path) -> None:
    how = ("--targets", "mlp", "--targets", "q_proj", "--override", "down_proj=2:4", "--ignore", "layers.0")
    assert run("--method", "magnitude", "--sparsity", 0.75, *how, "--out", "out").status == 0
    layers = json.loads((place / "out/admm_prune.json").read_text())["layers"]
    pruned = {layer["name"]: round(layer["sparsity"], 2) for layer in layers if layer["sparsity"]}
    block = "model.layers.1."
    assert pruned == {
        f"{block}self_attn.q_proj.weight": 0.75,
        f"{block}mlp.gate_proj.weight": 0.75,
        f"{block}mlp.up_proj.weight": 0.75,
        f"{block}mlp.down_proj.weight": 0.5,
    }


def test_report_writes_a_page_again_and_one_on_the_difference(run: Any, command: Command, place: Path) -> None:
    for method in ("magnitude", "wanda"):
        assert run("--method", method, "--sparsity", 0.5, "--out", method).status == 0
    page = (place / "wanda/report.html").read_bytes()
    (place / "wanda/report.html").write_text("")
    assert command("report", "wanda", "--json").json() == {"out": "wanda/report.html"}
    assert (place / "wanda/report.html").read_bytes() == page
    content = command("report", "magnitude", "wanda", "--out", "page.html", "--json").json()
    assert content["out"] == "page.html"
    assert content["unlike"] == ["settings.method"]
    assert content["same_text"]
    assert "magnitude" in (place / "page.html").read_text()
    outcome = command("report", "magnitude", "wanda", "--out", "page.html", "--overwrite")
    assert "perplexity, pruned" in outcome.out
    assert "different texts" not in outcome.out
    assert run("--method", "wanda", "--sparsity", 0.5, "--eval-samples", 1, "--out", "shorter").status == 0
    outcome = command("report", "wanda", "shorter", "--out", "page.html", "--overwrite")
    assert "evaluated on different texts: their perplexities are not comparable" in outcome.out
    refused = command("report", "wanda", "--out", "page.html")
    assert (refused.status, refused.out) == (2, "")
    assert "--out is for the difference of two runs" in refused.err


def test_run_prunes_what_is_chosen_to_targets_of_its_own(run: Any, place: Path) -> None:
    outcome = run(
        "--method", "magnitude", "--sparsity", 0.5, "--targets", "LlamaMLP", "--targets", "re:.*q_proj",
        "--ignore", "re:.*layers.0", "--override", "re:.*up_proj=2:8", "--out", "out",
    )  # fmt: skip
    assert outcome.status == 0
    layers = json.loads((place / "out/admm_prune.json").read_text())["layers"]
    found = {layer["name"].removeprefix("model.layers."): round(layer["sparsity"], 2) for layer in layers}
    pruned = {name: value for name, value in found.items() if value}
    assert pruned == {
        "1.self_attn.q_proj.weight": 0.5, "1.mlp.gate_proj.weight": 0.5, "1.mlp.up_proj.weight": 0.75,
        "1.mlp.down_proj.weight": 0.5,
    }  # fmt: skip
    refused = run("--method", "magnitude", "--sparsity", 0.5, "--override", "up_proj", "--out", "other")
    assert (refused.status, refused.out) == (2, "")
    assert "an override is PATTERN=TARGET" in refused.err
