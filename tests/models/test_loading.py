from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from admm_prune.errors import UserError
from admm_prune.models import loading
from admm_prune.models.loading import LoadedModel, load, open_on_disk, save
from admm_prune.models.structure import decoder_blocks
from tests.models.tiny_models import build, prune_half

IDS = torch.tensor([[0, 5, 17, 42, 99]])


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A complete saved model: tied Llama in bf16."""
    model = build("llama").to(torch.bfloat16)
    save(LoadedModel(model, tokenizer, "test"), tmp_path / "model", {})
    return tmp_path / "model"


def refusal(source: object) -> str:
    with pytest.raises(UserError) as caught:
        load(str(source))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(source))
    return message


def test_the_config_names_the_dtype_as_in_transformers(folder: Path) -> None:
    """The weights are stored in bf16; the config decides in what they are loaded, in memory and from disk."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for loaded in (load(str(folder)), open_on_disk(str(folder))):
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {stock.dtype} == {torch.float32}
        assert loaded.model.config.dtype == torch.float32


@pytest.mark.bitwise
@pytest.mark.sampled(16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_model_reloads_to_the_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, dtype: torch.dtype
) -> None:
    save(LoadedModel(model.to(dtype), tokenizer, "test"), tmp_path / "dense", {})
    pruned = load(str(tmp_path / "dense"))
    for block in decoder_blocks(pruned.model):
        for view in block.weights:
            view.write(prune_half(view.read()))
    save(pruned, tmp_path / "pruned", {"method": "half", "seed": 0})
    loaded = load(str(tmp_path / "pruned"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for again in (loaded.model, stock):
        assert again.dtype == dtype
        assert torch.equal(again(input_ids=IDS).logits, pruned.model(input_ids=IDS).logits)
        for name, parameter in pruned.model.named_parameters():
            assert torch.equal(again.get_parameter(name), parameter)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "pruned").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "safetensors makes files that their owner alone can read"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "pruned")("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    )


def test_a_tied_head_is_neither_pruned_nor_untied(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    before = head.weight.clone()
    for block in decoder_blocks(model):
        for view in block.weights:
            view.write(torch.zeros(view.shape))
    assert torch.equal(head.weight, before)
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings


def test_metadata_goes_into_the_config_and_not_into_the_callers_model(folder: Path) -> None:
    loaded = load(str(folder))
    save(loaded, folder.parent / "second", {"method": "wanda"})
    assert loaded.model.config.admm_prune == {}
    assert json.loads((folder.parent / "second" / "config.json").read_text())["admm_prune"] == {"method": "wanda"}
    fresh = build("llama")
    save(LoadedModel(fresh, loaded.tokenizer, "test"), folder.parent / "third", {"method": "wanda"})
    assert not hasattr(fresh.config, "admm_prune")


def test_dtype_can_be_chosen(folder: Path) -> None:
    assert load(str(folder)).model.dtype == torch.bfloat16
    assert load(str(folder), dtype=torch.float32).model.dtype == torch.float32


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(str(folder))
    save(loaded, folder.parent / "again", {})
    assert capfd.readouterr() == ("", "")


def test_sources_that_are_no_model_folder(tmp_path: Path) -> None:
    assert "there is no such model folder" in refusal(tmp_path / "missing")
    assert "there is no such model folder" in refusal("../missing")
    assert "not a model folder: it has no config.json" in refusal(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "a file, not a model folder" in refusal(file)


def test_an_unknown_repository_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the Hub\nCheck your connection")

    monkeypatch.setattr(loading, "check_hub", lambda *_: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    assert "no such folder here, and as a Hub id it cannot be loaded" in refusal("owner/name")


@pytest.mark.parametrize("text", ["{broken", "[]", "", "\xff"])
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json cannot be read" in refusal(folder)


@pytest.mark.parametrize("config", [{}, {"model_type": "nonesuch"}, {"model_type": "t5"}])
def test_a_config_of_no_causal_model(folder: Path, config: dict[str, str]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded as a causal language model" in refusal(folder)


def test_a_config_that_contradicts_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    assert "config.json asks for (16, 40)" in refusal(folder)


def test_weights_in_another_format_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(folder)


def test_weights_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged or cut short" in refusal(folder)


def test_weights_that_miss_a_parameter(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "the weights lack model.layers.1.mlp.up_proj.weight (1 missing in all)" in refusal(folder)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(folder: Path, bad: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, path, {"format": "pt"})
    assert "the weight model.layers.1.mlp.up_proj.weight has NaN or Inf" in refusal(folder)


@pytest.mark.parametrize("opens", [load, open_on_disk])
def test_weights_beyond_the_range_of_the_dtype_asked_for_are_refused_for_that(
    folder: Path, opens: Callable[..., LoadedModel]
) -> None:
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = {own: tensor.float() for own, tensor in load_file(path).items()}
    tensors[name][3, 4] = 1e5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} has .* float16"):
        entered(opens(str(folder), dtype="float16"))
    entered(opens(str(folder), dtype="bfloat16"))


def entered(loaded: LoadedModel) -> None:
    """Reads every block."""
    for index in range(2):
        with loaded.offloading.block(index):
            pass


def test_a_tied_weight_in_another_layout_is_saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A module from Python may hold a transposed view; the layout is no part of its weights."""
    model = build("llama", layers=1)
    weight = model.get_output_embeddings().weight
    before = weight.clone()
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    save(LoadedModel(model, tokenizer, "x"), tmp_path, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, before)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_model_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    assert "no tokenizer could be read" in refusal(folder)


def test_a_tokenizer_that_is_there_and_cannot_be_read_is_not_called_missing(folder: Path) -> None:
    """Such as one of a later release of tokenizers."""
    (folder / "tokenizer.json").write_text('{"model": {}}')
    message = refusal(folder)
    assert "no tokenizer could be read from the files there (" in message
    assert "save the model's tokenizer" not in message


@pytest.mark.parametrize("opens", [load, open_on_disk])
@pytest.mark.parametrize("known", [False, True])
def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(
    opens: Callable[..., LoadedModel], known: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of the folder's own, under a kind that transformers knows or not; it leaves a trace when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    trace = tmp_path / "trace"
    (folder / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["architectures"] = ["OwnModel"]
    config["model_type"] = config["model_type"] if known else "own"
    (folder / "config.json").write_text(json.dumps(config))
    if known:
        assert type(opens(str(folder)).model).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(UserError, match="it needs code that comes with it, which is run only with --trust-remote"):
            opens(str(folder))
    assert not trace.exists()
    assert type(opens(str(folder), trust_remote_code=True).model).__name__ == "OwnModel"
    assert trace.exists()


def test_a_relative_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    shutil.move("model", "renamed")
    assert load("renamed").source == "renamed"
