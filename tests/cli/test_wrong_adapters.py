"""Adapters beside a model, or alone: every command that takes a model refuses them before any work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from admm_prune import prune
from admm_prune.errors import UserError
from admm_prune.models.adapters import check_repository
from admm_prune.models.loading import load, open_on_disk
from admm_prune.models.structure import decoder_blocks
from tests.cli.outcome import Refused

TEXT = ("--data", "embedded")
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "--model", "model", "--sparsity", "0.5", "--out", "out", *TEXT),
    "streamed": ("run", "--stream", "--model", "model", "--sparsity", "0.5", "--out", "out", *TEXT),
    "compare": ("compare", "--model", "model", "--sparsity", "0.5", "--methods", "wanda", "--out", "out", *TEXT),
    "eval": ("eval", "model", *TEXT),
    "capture": ("capture", "--model", "model", "--weight", "w", "--out", "layer.safetensors", *TEXT),
    "plan": ("plan", "--model", "model", "--sparsity", "0.5"),
    "bench inference": ("bench", "inference", "model"),
    "pack": ("pack", "model", "out"),
}


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_with_an_adapter(
    refused: Refused, place: Path, model_folder: Path, adapter: Path, name: str, alone: bool
) -> None:
    shutil.copytree(adapter, place / "model")
    if not alone:
        shutil.copytree(model_folder, place / "model", dirs_exist_ok=True)
    refused("merge them with admm_prune.merge_lora(model)", *COMMANDS[name])


def test_a_repository_with_an_adapter(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--someone--tiny"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(adapter, repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    for read in (load, open_on_disk, check_repository):
        with pytest.raises(UserError, match="someone/tiny: there is a PEFT adapter in it"):
            read("someone/tiny")


def models(folder: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    def fresh() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder)

    yield "lora", peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj"]))
    yield "inner", peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj"])).base_model.model
    yield "prompts", peft.get_peft_model(fresh(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    injected = fresh()
    injected.add_adapter(peft.LoraConfig(target_modules=["up_proj"]))
    yield "injected", injected


@pytest.mark.parametrize("with_out", [False, True])
def test_a_module_with_adapters(place: Path, model_folder: Path, with_out: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for name, model in models(model_folder):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(UserError, match="the model has PEFT adapters") as error:
            prune(model.eval(), tokenizer=tokenizer, data="embedded", sparsity=0.5, out="out" if with_out else None)
        assert "\n" not in str(error.value), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not list(place.iterdir())


def test_a_merged_model_is_pruned(model_folder: Path, text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = adapted.merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    how = {"data": str(text_file), "samples": 4, "eval_samples": 2, "length": 32}
    prune(merged, tokenizer=tokenizer, method="magnitude", sparsity=0.5, **how)
    assert all(float((view.read() == 0).float().mean()) > 0.4 for b in decoder_blocks(merged) for view in b.weights)
