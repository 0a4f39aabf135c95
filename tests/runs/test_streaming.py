"""From disk to disk, one block at a time: the same model as in memory, and the bench that measures it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.streaming import ModelOnDisk
from admm_prune.models.structure import decoder_blocks
from admm_prune.recipes.recipe import Request
from admm_prune.recipes.struprune import StruPrune
from admm_prune.recipes.targets import Target
from admm_prune.runs import memory_scaling
from admm_prune.runs.memory_scaling import Peak, Shape, exponent, write_random_model
from admm_prune.runs.streaming import prune_from_disk
from admm_prune.runs.texts import Texts, TextSettings

IDS = torch.tensor([[0, 5, 17, 42, 99, 3, 260]])


@pytest.fixture(scope="module")
def calibration(model_folder: Path, text_file: Path) -> Sequences:
    return Texts(TextSettings(data=str(text_file), samples=12), load(str(model_folder))).calibration()


@pytest.fixture(params=["llama", "opt"])
def folder(request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path) -> Path:
    if request.param == "llama":
        return model_folder
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.3,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt", max_shard_size="20KB")
    return tmp_path / "opt"


@pytest.mark.parametrize("recipe", [StruPrune(), StruPrune(uniform=True)], ids=["per-layer", "uniform"])
def test_from_disk_it_is_the_same_model_to_the_bit(
    recipe: StruPrune, folder: Path, calibration: Sequences, tmp_path: Path
) -> None:
    outcome = prune_from_disk(folder, tmp_path / "out", calibration, 0.3, recipe=recipe)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    expected = recipe.prune(model, Request(target=Target(0.3), calibration=calibration))
    assert outcome.details == expected.details
    stock = outcome.details["form"] == "stock"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not stock)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert [layer.sparsity for layer in outcome.layers] == [layer.sparsity for layer in expected.layers]


def test_a_block_has_weights_only_while_it_is_at_work_on(model_folder: Path) -> None:
    on_disk = ModelOnDisk(model_folder)
    dense = load(str(model_folder)).model

    def present() -> list[bool]:
        return [not any(p.is_meta for p in block.module.parameters()) for block in on_disk.blocks]

    assert present() == [False, False]
    with on_disk.block(1):
        assert present() == [False, True]
        for name, parameter in on_disk.blocks[1].module.named_parameters():
            assert torch.equal(parameter, dense.get_parameter(f"{on_disk.blocks[1].name}.{name}"))
    assert present() == [False, False]


def test_hollow_blocks_are_called_as_full_ones_are(model_folder: Path, calibration: Sequences) -> None:
    dense = load(str(model_folder)).model
    full = BlockStream(dense, decoder_blocks(dense), calibration, "cpu")
    on_disk = ModelOnDisk(model_folder)
    hollow = BlockStream(on_disk.model, on_disk.blocks, calibration, "cpu", hollow=True)
    for mine, its in zip(full._flows["calibration"], hollow._flows["calibration"], strict=True):
        assert torch.equal(mine.hidden, its.hidden)
        for (_, a), (_, b) in zip(mine.calls, its.calls, strict=True):
            assert a.keys() == b.keys()
            assert torch.equal(a["position_embeddings"][0], b["position_embeddings"][0])
    assert "forward" not in vars(on_disk.blocks[0].module)


def test_the_memory_bench_measures_both_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny models here, in this process: the figures are the command's own business."""
    family = (Shape(128, 1), Shape(256, 2))
    monkeypatch.setattr(memory_scaling, "FAMILIES", {"growing": family, "deeper": (Shape(128, 1), Shape(128, 2))})

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        memory_scaling._measure_here(Path(command[3]), Path(command[4]), int(command[5]), float(command[6]))
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(memory_scaling.subprocess, "run", here)
    # Beside what other tests left behind, so small models may need no more memory: the peak is drawn.
    monkeypatch.setattr(memory_scaling.PeakMemory, "extra_mib", 3.0)
    monkeypatch.setattr(memory_scaling.PeakMemory, "__exit__", lambda *_: None)
    content = memory_scaling.bench_memory(tmp_path / "out", tokens=256)
    assert [peak["depth"] for peak in content["peaks"]] == [1, 2, 1, 2]
    assert content["exponents"] == {"growing": 0.0, "deeper": 0.0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"admm_prune.json", "memory.txt", "memory.png"}
    with pytest.raises(UserError, match=r"--most 1000 leaves fewer than two models: give at least"):
        memory_scaling.bench_memory(tmp_path / "out", most=1000)


def test_the_exponent_is_the_slope_of_the_logarithms_and_shapes_count_their_parameters(tmp_path: Path) -> None:
    peaks = [Peak("growing", 1, 1, n, 1.0, 3 * n**0.6, 1.0) for n in (10**6, 10**7, 10**9)]
    assert exponent(peaks) == pytest.approx(0.6)
    shape = Shape(256, 3)
    write_random_model(shape, tmp_path)
    stored = [tensor for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.numel() for tensor in stored) == shape.parameters
    assert sum(view.parameter.numel() for view in ModelOnDisk(tmp_path).blocks[0].weights) == shape.block


def test_folders_that_cannot_be_streamed(model_folder: Path, calibration: Sequences, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a model folder: it has no config.json or no safetensors"):
        prune_from_disk(tmp_path / "nothing", tmp_path / "out", calibration, 0.3)
    with pytest.raises(UserError, match="padding needs the widest block"):
        prune_from_disk(model_folder, tmp_path / "out", calibration, 0.3, recipe=StruPrune(form="padded"))
    with pytest.raises(UserError, match="sparsity must lie between 0 and 1, not 1"):
        prune_from_disk(model_folder, tmp_path / "out", calibration, 1)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model_folder / "config.json").read_text())
    for lost in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        weights = load_file(model_folder / "model.safetensors")
        del weights[lost]
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"the weights lack {lost}"):
            prune_from_disk(broken, tmp_path / "out", calibration, 0.3)
    assert not (tmp_path / "out").exists()


def test_what_is_written_has_an_index_and_the_tokenizer(
    model_folder: Path, calibration: Sequences, tmp_path: Path
) -> None:
    prune_from_disk(model_folder, tmp_path / "out", calibration, 0.3)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "block-00000.safetensors",
        "block-00001.safetensors",
        "outside.safetensors",
    }
    assert load(str(tmp_path / "out")).tokenizer("the cat")["input_ids"]
