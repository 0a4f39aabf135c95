"""Packed models: the logits, texts and bytes of the masked dense model, from every kind of folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from admm_prune import PackedLinear, load_packed, pack_model
from admm_prune.errors import UserError
from admm_prune.inference import packed_folder
from admm_prune.inference.packing import pack
from admm_prune.models.checkpoint import Checkpoint
from admm_prune.models.loading import load
from admm_prune.ops import packed
from admm_prune.prunable import matrices
from tests.models.tiny_models import FAMILIES, VARIANTS, build

IDS = torch.arange(1, 12)[None]


def pruned(model: nn.Module, sparsity: float = 0.6) -> Any:
    """Zeros in every matrix, drawn at random."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in matrices(model):
            weight.parameter[torch.rand(weight.parameter.shape, generator=g) < sparsity] = 0
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return pruned(load("embedded").model)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("masked")
    model.save_pretrained(place)
    return place


def test_logits_and_text(model: Any) -> None:
    layers = pack_model(copy.deepcopy(model))
    kinds = {type(module) for name, module in layers.named_modules() if name.endswith("_proj")}
    assert kinds == {PackedLinear}
    torch.testing.assert_close(layers(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    assert torch.equal(layers.generate(IDS, **settings), model.generate(IDS, **settings))


def test_bfloat16(model: Any) -> None:
    dense = copy.deepcopy(model).bfloat16()
    expected = dense(IDS).logits.float()
    logits = pack_model(dense)(IDS).logits.float()
    assert float((logits - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("sharded", [False, True])
def test_an_archive_is_loaded_packed(
    model: Any, tmp_path: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a dense tensor of any matrix."""
    model.save_pretrained(tmp_path / "masked", **({"max_shard_size": "3MB"} if sharded else {}))
    assert len(list((tmp_path / "masked").glob("*.safetensors"))) == (1 if not sharded else 5)
    pack(tmp_path / "masked", tmp_path / "archive")
    dense: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (dense.append(name), read(self, name))[1])
    layers = load_packed(tmp_path / "archive")
    assert not any("_proj" in name for name in dense)
    assert torch.equal(layers(IDS).logits, pack_model(copy.deepcopy(model))(IDS).logits)
    assert not any(parameter.is_meta for parameter in layers.parameters())


def test_negative_zeros_of_an_archive_take_no_memory(model: Any, tmp_path: Path) -> None:
    """A product with a mask leaves them."""
    masked = load("embedded").model
    with torch.no_grad():
        for weight, zeros in zip(matrices(masked), matrices(model), strict=True):
            weight.parameter.mul_(zeros.parameter != 0)
    masked.save_pretrained(tmp_path / "masked")
    pack(tmp_path / "masked", tmp_path / "archive")
    layers, expected = load_packed(tmp_path / "archive"), pack_model(copy.deepcopy(model))
    for name, values in expected.state_dict().items():
        assert torch.equal(layers.state_dict()[name], values)


def test_a_dense_folder_is_packed_while_it_is_loaded(model: Any, folder: Path) -> None:
    layers = load_packed(folder)
    assert torch.equal(layers(IDS).logits, pack_model(copy.deepcopy(model))(IDS).logits)
    size, dense = (sum(x.nbytes for x in (*m.parameters(), *m.buffers())) for m in (layers, model))
    matrix_bytes = sum(weight.parameter.nbytes for weight in matrices(model) if "lm_head" not in weight.name)
    assert size - (dense - matrix_bytes) == pytest.approx((0.4 + 1 / 32) * matrix_bytes, rel=0.03)
    half = load_packed(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.values.dtype == torch.bfloat16


@pytest.mark.parametrize("family", sorted({**FAMILIES, **VARIANTS}))
def test_every_family(family: str) -> None:
    """Mixtures of experts, transposed and fused weights, biases, state space models."""
    model = pruned(build(family).eval().requires_grad_(False))
    expected = model(input_ids=IDS % model.config.get_text_config().vocab_size).logits
    layers = pack_model(copy.deepcopy(model))
    dense = [w.name for w in matrices(layers) if w.parameter.dtype in packed.FLOATS and "head" not in w.name]
    assert not dense
    logits = layers(input_ids=IDS % model.config.get_text_config().vocab_size).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_state_dict_devices_and_dtypes(model: Any) -> None:
    layers = pack_model(copy.deepcopy(model))
    other = pack_model(pruned(copy.deepcopy(model), 0.8))
    other.load_state_dict(layers.state_dict())
    assert torch.equal(other(IDS).logits, layers(IDS).logits)
    layer = layers.model.layers[0].mlp.up_proj
    weight = layer.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight)
    small = pack_model(copy.deepcopy(model), values="int8", group=64).bfloat16()
    layer = small.model.layers[0].mlp.up_proj
    assert (layer.values.dtype, layer.scales.dtype) == (torch.int8, torch.float32)
    state = layers.state_dict()
    state["model.layers.0.mlp.down_proj.values"] = state["model.layers.0.mlp.down_proj.values"][1:]
    with pytest.raises(ValueError, match="do not belong together"):
        other.load_state_dict(state)
    state = layers.state_dict()
    state["model.layers.0.mlp.down_proj.offsets"] = state["model.layers.0.mlp.down_proj.offsets"] + 1000
    other.load_state_dict(state)  # offsets are those of the bits, which other files might contradict
    assert torch.equal(other(IDS).logits, layers(IDS).logits)
    layer = layers.model.layers[0].mlp.up_proj.to("meta")
    assert layer.values.is_meta
    assert layer(torch.ones(2, 256, device="meta")).shape == (2, 640)


def test_int8_is_smaller_and_close(model: Any) -> None:
    exact, small = (pack_model(copy.deepcopy(model), **how) for how in ({}, {"values": "int8", "group": 64}))
    expected, logits = exact(IDS).logits, small(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.05
    layer = small.model.layers[0].mlp.up_proj.matrix
    assert layer.nbytes < 0.45 * exact.model.layers[0].mlp.up_proj.matrix.nbytes


def test_tied_and_shared_weights(model: Any) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layers = pack_model(copy.deepcopy(model))
    assert isinstance(layers.lm_head, nn.Linear)
    block = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.ReLU())
    block[1].weight = block[0].weight
    block.add_module("again", block[0])
    pruned(block, 0.9)
    x = torch.randn(2, 64)
    expected = block(x)
    pack_model(block)
    assert block[0].values is block[1].values
    assert block[0] is block.again
    torch.testing.assert_close(block(x), expected)


def test_compile(model: Any) -> None:
    layers = pack_model(copy.deepcopy(model))
    compiled = torch.compile(layers.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 3, 256)
    torch.testing.assert_close(compiled(x), layers.model.layers[0].mlp(x))


def stranded(folder: Path, out: Path, two_four: bool) -> None:
    """The folder as compressed-tensors writes it, from its documented layout, with numpy's own packing."""
    shutil.copytree(folder, out)
    tensors: dict[str, Tensor] = {}
    for name, x in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = x
            continue
        mask = x != 0
        if two_four:
            mask = torch.zeros(x.shape[0], x.shape[1] // 4, 4, dtype=torch.bool)
            mask.scatter_(2, x.unflatten(1, (-1, 4)).abs().topk(2, 2).indices, True)
            mask = mask.flatten(1)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.bitmask"] = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
        values = x[mask]
        tensors[f"{stem}.compressed"] = values.view(x.shape[0], -1) if two_four else values
        shape = torch.tensor(x.shape)
        tensors[f"{stem}.shape"] = shape[:, None] if two_four else shape
        if not two_four:
            tensors[f"{stem}.row_offsets"] = mask.sum(1).cumsum(0) - mask.sum(1)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    kind = "sparse-24-bitmask" if two_four else "sparse-bitmask"
    sparsity = {"format": kind, "targets": ["Linear"], "sparsity_structure": "2:4" if two_four else "unstructured"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": sparsity,
    }
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("two_four", [False, True])
def test_folders_of_compressed_tensors(model: Any, tmp_path: Path, two_four: bool) -> None:
    masked = load("embedded").model if two_four else model
    if two_four:
        with torch.no_grad():
            for block in masked.model.layers:
                for weight in matrices(block):
                    groups = weight.parameter.unflatten(1, (-1, 4))
                    kept = groups.abs().topk(2, 2).indices
                    weight.parameter.copy_(torch.zeros_like(groups).scatter(2, kept, groups.gather(2, kept)).flatten(1))
    masked.save_pretrained(tmp_path / "masked")
    stranded(tmp_path / "masked", tmp_path / "stranded", two_four)
    layers = load_packed(tmp_path / "stranded")
    for name, weight in masked.named_parameters():
        if name.endswith("_proj.weight"):
            layer = layers.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(layer.weight, weight)
            assert (layer.offsets is None) == two_four
    assert torch.equal(layers(IDS).logits, pack_model(copy.deepcopy(masked))(IDS).logits)


def test_damage_is_refused(folder: Path, tmp_path: Path) -> None:
    def changed(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        stranded(folder, tmp_path / "case", two_four=False)
        tensors = load_file(tmp_path / "case/model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "case/model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_packed(tmp_path / "case")

    stem = "model.layers.0.mlp.up_proj"
    changed(lambda t: t[f"{stem}.bitmask"].bitwise_not_(), "up_proj.weight is damaged")
    changed(lambda t: t.pop(f"{stem}.bitmask"), "lack")
    changed(lambda t: t.pop(f"{stem}.shape"), "the parts of model.layers.0.mlp.up_proj are missing")
    changed(lambda t: t[f"{stem}.compressed"].fill_(torch.nan), "has NaN or Inf entries")
    changed(lambda t: t.update({f"{stem}.shape": torch.tensor([1280, 128])}), "has shape|is damaged")
    changed(lambda t: t.pop("model.norm.weight"), "the weights lack model.norm.weight")


def test_wrong_input(model: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no linear layer has enough zeros"):
        pack_model(load("embedded").model)
    with pytest.raises(UserError, match="give None or 'int8'"):
        pack_model(model, values="int4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a multiple of 32"):
        pack_model(model, values="int8", group=40)
    with pytest.raises(UserError, match="a multiple of 32"):
        load_packed(folder, group=64)
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load_packed(tmp_path / "none")
    shutil.copytree(folder, tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized/config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}
    (tmp_path / "quantized/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its weights are quantized"):
        load_packed(tmp_path / "quantized")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "quantized/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its weights are quantized \(fp8\): only floats can be packed"):
        load_packed(tmp_path / "quantized")
    with pytest.raises(UserError, match=r"weights of torch.float64 cannot be packed, only float32"):
        load_packed(folder, dtype=torch.float64)
    with pytest.raises(UserError, match=r"weights of torch\.float64 cannot be packed, only float32"):
        pack_model(copy.deepcopy(model).double())
    infinite = copy.deepcopy(model)
    infinite.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or Inf entries, which int8 cannot"):
        pack_model(infinite, values="int8")
    assert not any(isinstance(module, PackedLinear) for module in infinite.modules())
    with pytest.raises(ValueError, match=r"a bias \(3,\) for a matrix of 4 rows"):
        PackedLinear(packed.pack(torch.eye(4)), torch.ones(3))


def test_weights_of_another_model_than_the_config(folder: Path, tmp_path: Path) -> None:
    """Refused as by the loader of dense models: tensors without a place, float8, and numbers that overflow."""
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(folder / "model.safetensors")

    def refused(message: str, changes: dict[str, Tensor], **how: Any) -> None:
        save_file({**stored, **changes}, file, {"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_packed(tmp_path / "other", **how)

    refused("up_proj.bias, for which the model of config.json has no place", {f"{name[:-6]}bias": torch.ones(640)})
    refused(r"up_proj.weight is stored quantized \(F8_E4M3\)", {name: stored[name].to(torch.float8_e4m3fn)})
    refused("up_proj.weight is stored as integers", {name: stored[name].int()})
    large = stored[name].clone()
    large[0, 0] = 1e6
    refused("up_proj.weight has entries up to 1e.06, too large for float16", {name: large}, dtype=torch.float16)
    assert load_packed(tmp_path / "other").model.layers[0].mlp.up_proj.weight[0, 0] == 1e6


def test_a_packed_layer_is_copied_and_saved_after_it_was_used(tmp_path: Path) -> None:
    """The library keeps pointers to its tensors, which are those of one process."""
    g = torch.Generator().manual_seed(0)
    layer = PackedLinear(packed.pack(torch.randn(8, 40, generator=g).relu()), torch.ones(8))
    x = torch.randn(3, 40, generator=g)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(other(x), expected)


def test_a_packed_layer_that_moves_within_the_memory() -> None:
    """`share_memory` keeps the tensor objects, and replaces their storage."""
    layer = PackedLinear(packed.pack(torch.eye(40)))
    x = torch.arange(40.0)[None]
    layer(x)
    layer.share_memory()
    layer.values.fill_(2.0)
    assert torch.equal(layer(x), 2 * x)


def test_stock_transformers_reads_the_same_dense_model(model: Any, folder: Path) -> None:
    """The reference of this module is the stock model, not a reader of this package."""
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stock(IDS).logits, model(IDS).logits)
    assert packed_folder.STRANDED == ("sparse-bitmask", "sparse-24-bitmask")
