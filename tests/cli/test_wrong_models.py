"""Model folders that are damaged, incomplete, of a foreign kind, or of code: refused as any other wrong input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.outcome import Refused

UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], None]


def config(**changes: Any) -> Damage:
    """Entries of config.json changed; None takes one away."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return damage


def file(name: str, content: bytes) -> Damage:
    """A file of these bytes."""
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(part: float) -> Damage:
    """Only the first part of the weights' file."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * part)])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """The weights changed."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save_file({n: x.contiguous() for n, x in change(found).items()}, folder / WEIGHTS, {"format": "pt"})

    return damage


def pickled(folder: Path) -> None:
    """Weights in torch's own format alone."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def sharded(missing: bool) -> Damage:
    """An index that names a shard which is missing, or that is none."""

    def damage(folder: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
        weight_map[UP] = "model-00002-of-00002.safetensors"
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) if missing else "{cut sho")

    return damage


def of_code(folder: Path) -> None:
    """A model whose class is in a file of its own, which leaves a mark where it is run."""
    config(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"})(folder)
    mark = folder.parent / "ran"
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\n")


CONFIGS: dict[str, tuple[Damage, str]] = {
    "no JSON": (file("config.json", b"{cut sho"), "config.json cannot be read"),
    "an empty file": (file("config.json", b""), "config.json cannot be read"),
    "a list": (file("config.json", b"[]"), "config.json cannot be read"),
    "no text": (file("config.json", b"\xff\xfe\x00{"), "config.json cannot be read"),
    "no model type": (config(model_type=None, architectures=None), "model_type"),
    "an unknown model type": (config(model_type="nonesuch"), "nonesuch"),
    "no decoder": (config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "T5Config"),
    "an unknown dtype": (config(dtype="float17"), "float17"),
    "a width that is a word": (config(hidden_size="wide"), "hidden_size"),
    "heads that do not divide": (
        config(num_attention_heads=5, head_dim=None),
        "not a multiple of the number of attention heads",
    ),
    "no blocks": (config(num_hidden_layers=0), "no list of decoder blocks found"),
    "an unknown activation": (config(hidden_act="nonesuch"), "nonesuch"),
    "code": (of_code, "only with --trust-remote-code"),
}
FILES: dict[str, tuple[Damage, str]] = {
    "cut in its numbers": (cut(0.9), "damaged or cut short"),
    "cut in its header": (cut(0.001), "damaged or cut short"),
    "empty": (file(WEIGHTS, b""), "damaged or cut short"),
    "noise": (file(WEIGHTS, bytes(range(256)) * 8), "damaged or cut short"),
    "a weight is missing": (tensors(lambda t: {n: x for n, x in t.items() if n != UP}), f"the weights lack {UP}"),
    "a weight of another shape": (tensors(lambda t: t | {UP: t[UP][:-1]}), f"{UP} has shape (47, 32)"),
    "NaN": (tensors(lambda t: t | {UP: t[UP] * torch.nan}), f"the weight {UP} has NaN or Inf"),
    "integers": (tensors(lambda t: t | {UP: t[UP].to(torch.int8)}), f"{UP} is stored as integers"),
    "more blocks in the config": (config(num_hidden_layers=3), "the weights lack model.layers.2."),
    "fewer blocks in the config": (config(num_hidden_layers=1), "but config.json asks for 1 blocks only"),
    "another width in the config": (config(hidden_size=64), "config.json asks for (300, 64)"),
    "another vocabulary in the config": (config(vocab_size=301), "config.json asks for (301, 32)"),
    "more neurons in the config": (config(intermediate_size=64), "config.json asks for (32, 64)"),
    "other key heads in the config": (config(num_key_value_heads=4), "config.json asks for (32, 32)"),
    "pickled": (pickled, "no safetensors weights in the folder (other formats can run code and are not read)"),
    "a shard is missing": (sharded(missing=True), "model-00002-of-00002.safetensors"),
    "an index that is none": (sharded(missing=False), "index.json"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")] and None, "no tokenizer could be read"),
    "a tokenizer that is none": (file("tokenizer.json", b"{cut sho"), "no tokenizer could be read"),
}


@pytest.fixture
def damaged(place: Path, model_folder: Path) -> Callable[[Damage], str]:
    def make(damage: Damage) -> str:
        shutil.copytree(model_folder, place / "model")
        damage(place / "model")
        return "model"

    return make


def arguments(name: str, model: str, text: Path) -> tuple[object, ...]:
    if name == "eval":
        return (name, model, "--data", text)
    if name == "capture":
        return (name, "--model", model, "--data", text, "--weight", UP, "--out", "layer.safetensors")
    if name == "plan":
        return (name, "--model", model, "--sparsity", "0.5")
    if name == "stream":
        return ("run", "--stream", "--model", model, "--data", text, "--sparsity", "0.5", "--out", "out")
    return (name, "--model", model, "--data", text, "--sparsity", "0.5", "--out", "out")


@pytest.mark.parametrize("name", ["run", "stream", "eval", "plan"])
@pytest.mark.parametrize(("damage", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_is_none(
    refused: Refused,
    damaged: Callable[[Damage], str],
    text_file: Path,
    place: Path,
    name: str,
    damage: Damage,
    reason: str,
) -> None:
    refused(reason, *arguments(name, damaged(damage), text_file))
    assert not (place / "ran").exists()


@pytest.mark.parametrize("name", ["run", "stream"])
@pytest.mark.parametrize(("damage", "reason"), FILES.values(), ids=FILES)
def test_files_that_do_not_hold_the_model(
    refused: Refused, damaged: Callable[[Damage], str], text_file: Path, name: str, damage: Damage, reason: str
) -> None:
    refused(reason, *arguments(name, damaged(damage), text_file))
