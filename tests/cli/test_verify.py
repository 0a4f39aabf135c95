"""`admm-prune verify`: exit status 0, 1 and 2, one line of JSON, and a message for every lie in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.outcome import Command, Outcome, Refused

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    """A run and a comparison, made once. Not to be written to."""
    from admm_prune.methods.target import Target
    from admm_prune.runs.compare import ComparisonSettings, compare
    from admm_prune.runs.prune import prune
    from admm_prune.settings import Settings

    place = tmp_path_factory.mktemp("finished")
    text = {"data": str(text_file), "samples": 16}
    prune(str(model_folder), method="wanda", sparsity=0.5, out=place / "pruned", device="cpu", **text)
    settings = ComparisonSettings(
        run=Settings(str(model_folder), device="cpu", **text),
        methods=("magnitude", "admm"),
        targets=(Target(0.7), Target(None, (2, 4))),
    )
    compare(settings, place / "all")
    return place


@pytest.fixture
def pruned(finished: Path, place: Path) -> Path:
    return Path(shutil.copytree(finished / "pruned", place / "pruned"))


@pytest.fixture
def everything(finished: Path, place: Path) -> Path:
    return Path(shutil.copytree(finished / "all", place / "all"))


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensor(path: Path, name: str, edit: Callable[[torch.Tensor], None]) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    edit(tensors[name])
    save_file(tensors, path, metadata)


def falsified(outcome: Outcome, *told: str) -> list[str]:
    """The messages of a verification that failed, among which are these."""
    assert outcome.status == 1
    content = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert content["verified"] is False
    assert outcome.err.splitlines() == [f"admm-prune: {failure}" for failure in content["failures"]]
    for words in told:
        assert any(words in failure for failure in content["failures"]), content["failures"]
    failures: list[str] = content["failures"]
    return failures


def test_a_genuine_run_is_verified(command: Command, pruned: Path) -> None:
    outcome = command("verify", pruned, "--device", "cpu", "--json")
    content = outcome.json()
    assert content["verified"] is True
    assert content["failures"] == []
    assert content["kind"] == "run"
    assert {"tensors", "config.json", "sparsity of every matrix", "target", "perplexity"} <= set(content["checked"])
    assert content["sparsity"] == 0.5
    assert outcome.err == ""
    table = command("verify", pruned, "--quick")
    assert table.status == 0
    assert table.out.splitlines()[-1] == "verified, without the perplexity (--quick)"
    fields = sum(name.startswith("admm_prune.json: layers[].") for name in content["fingerprinted"])
    assert f"layers[] ({fields} fields)" in table.out, "the names of all fields are for --json"
    assert "layers[].bound" not in table.out
    for field in ("settings.ridge", "environment", "layers[].bound", "dense", "notes"):
        assert f"admm_prune.json: {field}" in content["fingerprinted"]
    assert {"tokenizer.json", "report.html", "timings.json"} <= set(content["fingerprinted"])
    assert (content["outcome"], content["unchecked"]) == ("verified", [])


def test_a_genuine_comparison_is_verified_model_by_model(command: Command, everything: Path) -> None:
    content = command("verify", everything, "--device", "cpu", "--json").json()
    assert content["kind"] == "comparison"
    for folder in ("models/magnitude-70", "models/admm-2of4"):
        assert f"{folder}: perplexity" in content


def test_an_altered_tensor_is_named(command: Command, pruned: Path) -> None:
    edit_tensor(pruned / "model.safetensors", UP, lambda weight: weight.mul_(1.001))
    failures = falsified(
        command("verify", pruned, "--json"),
        f"the tensor {UP} in model.safetensors is not the one that was saved",
        "claimed perplexity",
    )
    assert sum("the tensor" in failure for failure in failures) == 1


def test_a_tensor_outside_of_the_blocks_counts_too(command: Command, pruned: Path) -> None:
    edit_tensor(pruned / "model.safetensors", NORM, lambda weight: weight.add_(1e-3))
    falsified(command("verify", pruned, "--quick", "--json"), f"the tensor {NORM} in model.safetensors is not")


def test_an_extra_weight_is_found_in_its_matrix(command: Command, pruned: Path) -> None:
    edit_tensor(pruned / "model.safetensors", UP, lambda weight: weight[0].fill_(1.0))
    falsified(
        command("verify", pruned, "--quick", "--json"),
        f"{UP}: claimed sparsity 0.5, found 0.4",
        f"{UP}: 752 zeros of 1536, 50% asks for 768",
        "claimed sparsity 0.5, found 0.4",
    )


def test_a_model_that_holds_nan(command: Command, pruned: Path) -> None:
    edit_tensor(pruned / "model.safetensors", UP, lambda weight: weight.fill_(torch.nan))
    falsified(command("verify", pruned, "--json"), f"the tensor {UP} contains NaN or Inf")


def test_a_file_cut_short_or_gone(command: Command, pruned: Path) -> None:
    path = pruned / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    falsified(command("verify", pruned, "--json"), "the weights cannot be read")
    path.unlink()
    falsified(command("verify", pruned, "--json"), "weights claimed in ['model.safetensors'], found in []")


FORGED: dict[str, tuple[Callable[[Any], None], str]] = {
    "perplexity": (lambda m: m["pruned"].update(perplexity=m["pruned"]["perplexity"] * 0.99), "claimed perplexity"),
    "no perplexity": (lambda m: m["pruned"].update(perplexity=None), "claimed perplexity None"),
    "bits": (lambda m: m["pruned"].update(bits_per_char=0.1), "claimed bits_per_char 0.1"),
    "tokens": (lambda m: m["pruned"].update(tokens=7), "claimed tokens 7"),
    "sparsity": (lambda m: m.update(sparsity=0.6), "claimed sparsity 0.6, found 0.5"),
    "layer": (lambda m: m["layers"][3].update(sparsity=0.75), ": claimed sparsity 0.75, found 0.5"),
    "layers": (lambda m: m["layers"].pop(), "the layers claimed are not those of the model"),
    "method": (lambda m: m.update(method="admm"), "they must agree"),
    "target": (lambda m: m["settings"]["target"].update(sparsity=0.6), "is not among the settings"),
    "text": (lambda m: m["texts"]["evaluation"].update(token_hash="0" * 64), "is not the recorded one"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "told"), FORGED.values(), ids=FORGED)
def test_a_forged_manifest(command: Command, pruned: Path, edit: Callable[[Any], None], told: str) -> None:
    edit_json(pruned / "admm_prune.json", edit)
    falsified(command("verify", pruned, "--json", "--device", "cpu"), told)


def test_a_forged_config(command: Command, pruned: Path) -> None:
    edit_json(pruned / "config.json", lambda config: config["admm_prune"].update(target="90%"))
    falsified(command("verify", pruned, "--quick", "--json"), "config.json says")


def test_a_config_that_cannot_be_read(command: Command, pruned: Path) -> None:
    (pruned / "config.json").write_text("[")
    falsified(command("verify", pruned, "--quick", "--json"), "config.json cannot be read")
    (pruned / "config.json").unlink()
    falsified(command("verify", pruned, "--quick", "--json"), "config.json cannot be read")


TABLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "perplexity": (lambda m: m["rows"][1].update(perplexity=1.0), "the table says perplexity 1.0"),
    "error": (lambda m: m["rows"][0].update(relative_error=0.0), "the table says relative_error 0.0"),
    "dense": (lambda m: m["dense"].update(perplexity=9.9), "the figures of the dense model differ"),
    "row gone": (lambda m: m["rows"].pop(), "models/admm-2of4 has no row in the table"),
    "folder": (lambda m: m["rows"][0].update(folder="models/none"), "a row for models/none, which is not there"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "told"), TABLE.values(), ids=TABLE)
def test_a_forged_comparison(command: Command, everything: Path, edit: Callable[[Any], None], told: str) -> None:
    edit_json(everything / "admm_prune.json", edit)
    falsified(command("verify", everything, "--quick", "--json"), told)


def test_an_altered_model_of_a_comparison_is_named(command: Command, everything: Path) -> None:
    edit_tensor(everything / "models/admm-2of4/model.safetensors", UP, lambda weight: weight[0, :4].fill_(1.0))
    falsified(
        command("verify", everything, "--quick", "--json"),
        f"models/admm-2of4: {UP}: 1 groups keep more than 2 of 4",
        f"models/admm-2of4: the tensor {UP} in model.safetensors",
    )


def test_a_text_that_moved_is_named_with_data(
    command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    shutil.copy(text_file, place / "first.txt")
    text = place / "first.txt"
    run = ("run", "--model", model_folder, "--data", text, "--samples", 16, "--method", "wanda", "--sparsity", 0.5)
    assert command(*run, "--out", "out").status == 0
    text.rename(place / "moved.txt")
    outcome = command("verify", "out", "--json")
    content = json.loads(outcome.out)
    assert (outcome.status, content["verified"], content["outcome"]) == (3, None, "incomplete")
    assert any("name it with --data" in note for note in content["unchecked"])
    assert command("verify", "out").out.splitlines()[-1].startswith("incomplete: nothing was refuted, but 1 claims")
    content = command("verify", "out", "--data", "moved.txt", "--device", "cpu", "--json").json()
    assert {"perplexity", "texts.calibration.token_hash"} <= set(content["checked"])
    (place / "other.txt").write_text(text_file.read_text()[:6000])
    wrong = command("verify", "out", "--data", "other.txt")
    assert wrong.status == 2
    assert "--data other.txt: the evaluation text is not the recorded one" in wrong.err


def test_a_solved_layer(command: Command, place: Path, layer_file: Path) -> None:
    solved = command("solve", layer_file, "--pattern", "2:4", "--out", "v.safetensors", "--json").json()
    content = command("verify", "v.safetensors", "--layer", layer_file, "--json").json()
    assert content["verified"] is True
    for name in ("relative_error", "relative_error_holdout", "objective", "bound", "sparsity"):
        assert content[name] == pytest.approx(solved[name], rel=1e-6)
    assert {"refit_residual", "unstable_support", "swap_optimal", "swap_gain"} <= set(content)
    table = command("verify", "v.safetensors")
    assert table.out.splitlines()[-1] == "verified"
    edit_tensor(place / "v.safetensors", "weight", lambda weight: weight.mul_(1.01))
    falsified(command("verify", "v.safetensors", "--json"), "the weight was altered", "claimed relative_error")
    assert command("verify", "v.safetensors").out.splitlines()[-1] == "rejected: 4 claims do not hold"


def test_solve_says_what_the_doctor_found(command: Command, layer_file: Path) -> None:
    solved = command("solve", layer_file, "--sparsity", 0.5, "--json").json()
    (finding,) = solved["diagnosis"]
    assert set(finding) == {"code", "severity", "finding", "advice"}
    assert "support" in command("solve", layer_file, "--sparsity", 0.5).out.splitlines()[-1]


def test_a_run_keeps_the_codes_of_the_doctor_for_every_layer(pruned: Path) -> None:
    layers = json.loads((pruned / "admm_prune.json").read_text())["layers"]
    assert all(isinstance(layer["diagnosis"], list) for layer in layers)


def test_an_option_that_does_not_apply_is_named(
    refused: Refused, place: Path, pruned: Path, layer_file: Path, text_file: Path
) -> None:
    options: dict[str, tuple[object, ...]] = {
        "layer": (layer_file,), "bound": ("dual",), "seed": (1,),
        "data": (text_file,), "quick": (), "device": ("cpu",), "trust-remote-code": (),
    }  # fmt: skip
    for name, value in options.items():
        folder, layer = f"pruned is a folder: --{name} is for", f"layer.safetensors is a file: --{name} is for"
        of_a_layer = name in ("layer", "bound", "seed")
        refused(folder if of_a_layer else layer, "verify", pruned if of_a_layer else layer_file, f"--{name}", *value)
    refused("--data is the text for the perplexity", "verify", pruned, "--quick", "--data", text_file)
    refused("no such file or folder: missing", "verify", "missing", "--seed", 1)


def test_wrong_input(command: Command, place: Path, layer_file: Path, pruned: Path, model_folder: Path) -> None:
    (place / "notes.txt").write_text("no tensors here")
    for arguments, reason in (
        (["missing"], "no such file or folder: missing"),
        (["notes.txt"], "notes.txt is not a safetensors file"),
        ([layer_file], "makes no claims: verify takes what 'admm-prune solve --out'"),
        ([model_folder], "is not a finished run: it has no admm_prune.json"),
        ([pruned, "--data", "missing.txt"], "missing.txt: there is no such file"),
    ):
        outcome = command("verify", *arguments)
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.count("\n") == 1
        assert reason in outcome.err
    (pruned / "admm_prune.json").write_text("{}")
    assert "is not a manifest of 'admm-prune run' or" in command("verify", pruned).err
    (pruned / "admm_prune.json").write_text("{")
    assert "is not JSON" in command("verify", pruned).err
