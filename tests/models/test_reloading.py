"""A saved folder that does not give the model back is refused, whatever went wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from admm_prune.errors import UserError
from admm_prune.models.export import export
from admm_prune.models.loading import LoadedModel, open_on_disk, save
from admm_prune.models.reloading import check_reloaded
from admm_prune.models.structure import decoder_blocks
from admm_prune.models.sublayers import keep_groups, sublayers
from tests.models.tiny_models import build

IDS = torch.tensor([0, 5, 17, 42, 99, 7, 3, 250, 11, 12])
each_way = pytest.mark.parametrize("whole", [True, False], ids=["whole", "by blocks"])


def saved(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    loaded = LoadedModel(build(family, layers=2), tokenizer, family)
    save(loaded, folder, {})
    return loaded


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


@each_way
@pytest.mark.parametrize("family", ["llama", "llama-untied", "llama-eager", "gpt2", "mixtral", "opt", "gemma3"])
def test_what_was_saved_well_passes(
    family: str, whole: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    check_reloaded(saved(family, tmp_path, tokenizer), tmp_path, IDS, whole=whole)


@each_way
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: edit_weights(f, one_bit), r"not the model in memory \(model\.layers\.1\.mlp\.down_proj\.weight dif"),
        (lambda f: edit_weights(f, lambda t: t.pop("model.norm.weight")), "cannot be loaded again .*model.norm.weight"),
        (lambda f: edit_config(f, rms_norm_eps=1e-2), "the parameters are the same, the logits are not"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "default", "rope_theta": 7.0}), "the logits are not"),
        (lambda f: edit_config(f, intermediate_size=20), r"cannot be loaded again \(the weight model\.layers\.0\.mlp"),
        (lambda f: edit_config(f, num_hidden_layers=1), "cannot be loaded again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut short"), "cannot be loaded again .*damaged"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded again"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot be loaded again .*tokenizer"),
    ],
    ids=["bit", "missing", "eps", "rope", "width", "depth", "cut", "config", "tokenizer"],
)
def test_what_was_not_is_refused_in_one_line(
    damage: Callable[[Path], object], said: str, whole: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    loaded = saved("llama", tmp_path, tokenizer)
    damage(tmp_path)
    with pytest.raises(UserError, match=f"^nothing was saved: .*{said}") as caught:
        check_reloaded(loaded, tmp_path, IDS, whole=whole)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "where it was written is a temporary place"


def test_the_class_beside_the_weights_must_be_there(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build("llama", layers=2)
    parts = [sublayers(block) for block in decoder_blocks(model)]
    keep_groups(parts[0][1], torch.arange(7))
    export(model, parts)
    loaded = LoadedModel(model, tokenizer, "llama")
    save(loaded, tmp_path, {})
    check_reloaded(loaded, tmp_path, IDS)
    with (tmp_path / "modeling_per_layer.py").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"modeling_per_layer\.py is missing or differs"):
        check_reloaded(loaded, tmp_path, IDS)


def test_a_model_on_disk_is_compared_block_by_block(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "dense", tokenizer)
    ours = open_on_disk(str(tmp_path / "dense"))
    for whole in (True, False):
        check_reloaded(ours, tmp_path / "dense", IDS, whole=whole)
    other = LoadedModel(build("qwen3", layers=2), tokenizer, "other")
    other.model.get_parameter("model.layers.0.self_attn.q_norm.weight").mul_(2)
    save(other, tmp_path / "other", {})
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight differs"):
        check_reloaded(ours, tmp_path / "other", IDS, whole=False)
    assert all(parameter.is_meta for parameter in ours.model.parameters())


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    """A class of a caller, which no auto class knows."""

    config_class = OwnConfig


def test_a_class_of_the_callers_own_loads_what_it_saved(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = build("llama", layers=2).config.to_dict()
    model = OwnForCausalLM(OwnConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    loaded = LoadedModel(model.eval().requires_grad_(False), tokenizer, "own")
    save(loaded, tmp_path, {})
    check_reloaded(loaded, tmp_path, IDS)
    edit_weights(tmp_path, one_bit)
    with pytest.raises(UserError, match=r"down_proj\.weight differs"):
        check_reloaded(replace(loaded), tmp_path, IDS)
