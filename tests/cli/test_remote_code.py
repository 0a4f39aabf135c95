"""Code that comes with a model: every command that loads one runs it with --trust-remote-code alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.outcome import Command

TRUSTED = "--trust-remote-code"


@pytest.fixture
def model(place: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a kind that transformers does not know."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = Path(shutil.copytree(model_folder, place / "model"))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_command_that_loads_a_model(command: Command, model: Path, text_file: Path) -> None:
    text = ("--data", text_file, "--samples", 8, "--length", 32, "--device", "cpu")
    wanda = ("--methods", "wanda", "--sparsity", 0.5)
    weight = ("--weight", "model.layers.0.mlp.up_proj.weight")
    commands: tuple[tuple[object, ...], ...] = (
        ("run", "--model", model, "--method", "wanda", "--sparsity", 0.5, "--out", "run", *text),
        ("compare", "--model", model, *wanda, "--out", "comparison", *text),
        ("capture", "--model", model, *weight, "--out", "layer.safetensors", *text),
        ("eval", model, *text),
        ("plan", "--model", model, "--method", "wanda", "--sparsity", 0.5),
        ("list", "modules", "--model", model),
        ("bench", "inference", model, "--tokens", 8, "--new-tokens", 2, "--batches", 1, "--repeats", 1),
    )
    for words in commands:
        refused = command(*words)
        assert (refused.status, "with --trust-remote-code" in refused.err) == (2, True), words
        assert command(*words, TRUSTED).status == 0, words
    for folder in ("run", "comparison"):
        refused = command("verify", folder)
        assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1), "no permission refutes nothing"
        assert "with --trust-remote-code" in refused.err
        assert command("verify", folder, TRUSTED).status == 0
    edited = json.loads(Path("run/config.json").read_text())
    edited["admm_prune"]["target"] = "90%"
    Path("run/config.json").write_text(json.dumps(edited))
    assert command("verify", "run").status == 1, "what is refuted without the model stays so"


def test_a_tokenizer_that_needs_its_own_code(command: Command, place: Path, model_folder: Path) -> None:
    folder = Path(shutil.copytree(model_folder, place / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused = command("eval", folder, "--data", folder / "config.json", "--device", "cpu")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "model: it needs code that comes with it, which is run only with --trust-remote-code" in refused.err
