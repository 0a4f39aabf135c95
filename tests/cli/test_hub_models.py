"""Models by their Hub ids, from a cache as the Hub's client keeps it, without a network: streamed, planned, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from admm_prune.models.loading import open_on_disk
from tests.cli.outcome import Command, Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def cached(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a commit in the cache: links to files that have the names of their contents, weights in shards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--someone--tiny"
    folder, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for made in (folder, blobs, repository / "refs"):
        made.mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    whole = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {
        "model-00001-of-00002.safetensors": {},
        "model-00002-of-00002.safetensors": {},
    }
    for name, tensor in whole.items():
        shards[list(shards)["layers.1" in name]][name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, plain / file, {"format": "pt"})
    names = {name: file for file, tensors in shards.items() for name in tensors}
    (plain / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    return folder


def run(text_file: Path, out: str, model: object = ID) -> tuple[object, ...]:
    how = ("--method", "wanda", "--sparsity", "0.5", "--samples", "8", "--eval-samples", "2", "--json", "--stream")
    return ("run", "--model", model, "--data", text_file, "--out", out, *how)


@pytest.mark.bitwise
def test_a_hub_id_is_streamed_as_its_folder_is(
    cached: Path, command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    for model, out in ((ID, "by-id"), (model_folder, "by-folder")):
        outcome = command(*run(text_file, out, model))
        assert outcome.status == 0, outcome.err
    found, expected = (
        {name: x for path in (place / out).glob("*.safetensors") for name, x in load_file(path).items()}
        for out in ("by-id", "by-folder")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    manifest = json.loads((place / "by-id/admm_prune.json").read_text())
    assert (manifest["settings"]["model"], manifest["model_revision"]) == (ID, COMMIT)


@pytest.mark.slow
def test_a_plan_needs_the_config_alone(cached: Path, command: Command, model_folder: Path) -> None:
    for path in cached.glob("model*"):
        path.unlink()
    by_id, by_folder = (
        command("plan", "--model", model, "--method", "wanda", "--sparsity", "0.5", "--stream", "--json")
        for model in (ID, model_folder)
    )
    assert by_id.status == 0, by_id.err
    keys = ("parameters", "weight_bytes")
    assert [json.loads(by_id.out)[key] for key in keys] == [json.loads(by_folder.out)[key] for key in keys]


@pytest.mark.parametrize("trusted", [False, True])
def test_only_what_is_read_is_downloaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """A Hub that answers: what it would send is told by the client's own filter."""
    described = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"]
    others = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "onnx/config.json",
    ]
    offered = [*described, *others, "model.safetensors", "own.py"]
    folder = tmp_path / COMMIT
    folder.mkdir()
    asked: list[str | None] = []

    def send(_: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(revision)
        sent = filter_repo_objects(offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in sent:
            (folder / name).symlink_to(model_folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", send)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    loaded = open_on_disk(ID, trust_remote_code=trusted)
    assert {path.name for path in folder.iterdir()} == {*described, "model.safetensors", *["own.py"] * trusted}
    assert (loaded.revision, asked) == (COMMIT, [None, COMMIT])


def nothing(cached: Path) -> None:
    shutil.rmtree(cached.parents[1])


def without(name: str) -> Callable[[Path], None]:
    return lambda cached: (cached / name).unlink()


def pickled(cached: Path) -> None:
    """The weights are there in torch's own format alone."""
    weights = {name: x for path in cached.glob("*.safetensors") for name, x in load_file(path).items()}
    torch.save(weights, cached / "pytorch_model.bin")
    for path in cached.glob("model*"):
        path.unlink()


def pickled_by_index(cached: Path) -> None:
    pickled(cached)
    (cached / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "pytorch_model.bin"}}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (nothing, f"{ID}: no such folder here, and as a Hub id it cannot be loaded: no connection to the Hub"),
        (without("model-00002-of-00002.safetensors"), f"{ID}: model-00002-of-00002.safetensors is neither in the"),
        (without("config.json"), f"{ID}: no such folder here, and as a Hub id it cannot be loaded: no connection"),
        (without("tokenizer.json"), f"{ID}: no tokenizer could be read"),
        (pickled, f"{ID}: model.safetensors is neither in the local cache nor on the Hub (other formats can run code"),
        (pickled_by_index, f"{ID}: model.safetensors is neither in the local cache nor on the Hub"),
        (lambda cached: (cached / INDEX).write_text("[]"), "model.safetensors.index.json cannot be read"),
    ],
)
def test_what_is_not_there_is_one_line(
    cached: Path, refused: Refused, text_file: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(cached)
    refused(reason, *run(text_file, "out"))
