"""From disk to disk, one block at a time: the same model and figures as in memory, and the bench that measures it."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import admm_prune
from admm_prune.bench import memory
from admm_prune.bench.memory import LlamaShape, Peak, write_random_model
from admm_prune.bench.scaling import exponent
from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load, open_on_disk
from admm_prune.models.streaming import ModelOnDisk
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs import prune as prune_module
from admm_prune.runs.results import Report
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.verify.run import verify_folder

IDS = torch.tensor([[0, 5, 17, 42, 99, 3, 260]])
METHODS = ("magnitude", "sparsegpt", "sparsellm", "struprune", "struprune-uniform", "structured-global")


@pytest.fixture(scope="module")
def calibration(model_folder: Path, text_file: Path) -> Sequences:
    return Texts(TextSettings(data=str(text_file), samples=12), load(str(model_folder))).calibration()


def prune(model: Path, out: Path, text_file: Path, **how: Any) -> Report:
    settings: dict[str, Any] = {"sparsity": 0.3, "data": str(text_file), "samples": 12, "eval_samples": 3}
    return admm_prune.prune(model, out=out, device="cpu", **settings | how)


def fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of every file but those that tell times."""
    files = {path.name: path for path in folder.iterdir() if path.name not in ("timings.json", "report.html")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.mark.bitwise
@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
def test_from_disk_it_is_the_same_model_and_the_same_report_to_the_bit(
    method: str, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    before = fingerprints(model_folder)
    streamed = prune(model_folder, tmp_path / "streamed", text_file, method=method, stream=True)
    assert fingerprints(model_folder) == before
    whole = prune(model_folder, tmp_path / "whole", text_file, method=method, stream=False)
    stock = not (tmp_path / "streamed/modeling_per_layer.py").exists()
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=not stock).state_dict()
        for name in ("streamed", "whole")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    manifests = [report.as_json() for report in (streamed, whole)]
    for manifest in manifests:
        del manifest["settings"]["stream"], manifest["weights"], manifest["files"]["recipe.yaml"]
        manifest["files"].pop("model.safetensors.index.json", None)  # of weights that were written block by block
    assert manifests[0].pop("continuation") == {}, "every token of one takes all weights"
    assert manifests[1].pop("continuation").keys() == {"prompt", "dense", "pruned"}
    assert manifests[0] == manifests[1], "perplexities, errors and allocations are the same to the bit"
    assert verify_folder(tmp_path / "streamed", device="cpu").failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_model_is_judged_as_it_would_be_in_memory(dtype: str, model_folder: Path, text_file: Path) -> None:
    whole, on_disk = (opens(str(model_folder), dtype=dtype) for opens in (load, open_on_disk))
    validation = Texts(TextSettings(data=str(text_file)), whole).evaluation
    assert evaluate(on_disk.model, validation, on_disk.offloading) == evaluate(whole.model, validation)
    assert all(parameter.is_meta for parameter in on_disk.model.parameters())


def opened(folder: Path) -> ModelOnDisk:
    offloading = open_on_disk(str(folder)).offloading
    assert isinstance(offloading, ModelOnDisk)
    return offloading


def test_a_block_has_weights_only_while_it_is_at_work_on(model_folder: Path) -> None:
    on_disk = opened(model_folder)
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
    on_disk = opened(model_folder)
    is_offloaded = BlockStream(on_disk.model, on_disk.blocks, calibration, "cpu", offloading=on_disk)
    for mine, its in zip(full._states["calibration"], is_offloaded._states["calibration"], strict=True):
        assert torch.equal(mine.hidden, its.hidden)
        for (_, a), (_, b) in zip(mine.calls, its.calls, strict=True):
            assert a.keys() == b.keys()
            assert torch.equal(a["position_embeddings"][0], b["position_embeddings"][0])
    assert "forward" not in vars(on_disk.blocks[0].module)


@pytest.mark.slow
def test_the_memory_bench_measures_both_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny models here, in this process: the figures are the command's own business."""
    family = (LlamaShape(128, 1), LlamaShape(256, 2))
    monkeypatch.setattr(memory, "FAMILIES", {"growing": family, "deeper": (LlamaShape(128, 1), LlamaShape(128, 2))})

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        memory._measure_in_this_process(Path(command[3]), Path(command[4]), int(command[5]), float(command[6]))
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(memory.subprocess, "run", here)
    # Beside what other tests left behind, so small models may need no more memory: the peaks are given.
    peaks = iter((3.0, 12.0, 5.0, 5.0))
    monkeypatch.setattr(memory.PeakMemory, "extra_mib", property(lambda _: next(peaks)))
    monkeypatch.setattr(memory.PeakMemory, "__exit__", lambda *_: None)
    content = memory.bench_memory(tmp_path / "out", tokens=256)
    assert [peak["depth"] for peak in content["peaks"]] == [1, 2, 1, 2]
    assert [peak["peak_mib"] for peak in content["peaks"]] == [3.0, 12.0, 5.0, 5.0]
    growth = math.log(4) / math.log(family[1].parameters / family[0].parameters)
    assert content["exponents"] == {"growing": pytest.approx(growth), "deeper": pytest.approx(0)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"admm_prune.json", "memory.txt", "memory.png"}


def test_the_exponent_is_the_slope_of_the_logarithms_and_shapes_count_their_parameters(tmp_path: Path) -> None:
    peaks = [Peak("growing", 1, 1, n, 1.0, 3 * n**0.6, 1.0) for n in (10**6, 10**7, 10**9)]
    assert exponent((peak.parameters, peak.peak_mib) for peak in peaks) == pytest.approx(0.6)
    shape = LlamaShape(256, 3)
    write_random_model(shape.config(), tmp_path)
    stored = [tensor for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.numel() for tensor in stored) == shape.parameters
    blocks = decoder_blocks(ModelOnDisk(tmp_path, LlamaForCausalLM, LlamaConfig.from_pretrained(tmp_path)).model)
    assert sum(view.parameter.numel() for view in blocks[0].weights) == shape.block


def test_what_cannot_be_streamed_is_refused(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for how, reason in (
        ({"method": "struprune-padded"}, "struprune-padded pads to the widest block"),
        ({"method": "elsa"}, "elsa trains all weights at once"),
        ({"model": tmp_path / "nothing"}, "there is no such model folder"),
        ({"model": model, "tokenizer": 1}, "the model is in memory already"),
        ({"stream": "often"}, "stream must be auto, True or False, not 'often'"),
        ({"out": None}, "give --out"),
    ):
        arguments: dict[str, Any] = {"model": model_folder, "out": out, "stream": True, "sparsity": 0.3, **how}
        with pytest.raises(UserError, match=reason):
            admm_prune.prune(data=str(text_file), **arguments)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(model_folder / "model.safetensors")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    for changed, reason in (
        ({up: None}, f"the weights lack {up}"),
        ({norm: None}, f"the weights lack {norm}"),
        ({up: weights[up].T.contiguous()}, rf"{up} has shape \(32, 48\), config.json asks for \(48, 32\)"),
        ({up: weights[up] * torch.inf}, f"{up} has NaN or Inf entries"),
    ):
        kept = {name: tensor for name, tensor in {**weights, **changed}.items() if tensor is not None}
        save_file(kept, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=reason):
            prune(broken, out, text_file, method="magnitude", stream=True)
    (broken / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        prune(broken, out, text_file, method="magnitude", stream=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_what_is_written_has_an_index_and_the_tokenizer(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    prune(model_folder, tmp_path / "out", text_file, method="magnitude", stream=True)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "block-00000.safetensors",
        "block-00001.safetensors",
        "outside.safetensors",
    }
    assert load(str(tmp_path / "out")).tokenizer("the cat")["input_ids"]


def test_a_model_that_would_fill_the_memory_is_streamed(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in model_folder.glob("*.safetensors"))
    for free, streams in ((size, True), (10 * size, False)):
        monkeypatch.setattr(prune_module, "free_bytes", lambda _, free=free: free)
        report = prune(model_folder, tmp_path / str(free), text_file, method="magnitude")
        assert report.manifest["settings"]["stream"] is streams


def test_activations_on_disk_change_nothing(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    reports = [
        prune(model_folder, tmp_path / str(limit), text_file, method="wanda", stream=True, activation_bytes=limit)
        for limit in (0, 10**9)
    ]
    assert reports[0].as_json() == reports[1].as_json()
