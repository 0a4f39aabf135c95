"""Archives of masked models: lossless to the byte, smaller by what the zeros take, and no loader mistakes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from admm_prune.errors import UserError
from admm_prune.inference.packing import pack, unpack
from admm_prune.models.archive import PACK_MANIFEST, pack_file, unpack_file
from admm_prune.models.loading import load
from admm_prune.runs.claims import weights_sha256
from admm_prune.runs.prune import prune
from admm_prune.runs.report import write_difference, write_report


def masked(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    x[torch.rand(shape, generator=g) < sparsity] = 0
    return x.to(dtype)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    odd = masked((7, 13), 0.6, torch.float32)
    odd[0, 0], odd[0, 1], odd[0, 2] = -0.0, torch.nan, torch.inf
    return {
        "double": masked((5, 9), 0.8, torch.float64),
        "float": odd,
        "half": masked((33, 65), 0.5, torch.bfloat16),
        "dense": torch.randn(16, generator=torch.Generator().manual_seed(1)),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(0.0),
        "zeros": torch.zeros(100, dtype=torch.float16),
        "flags": torch.rand(100, generator=torch.Generator().manual_seed(2)) < 0.1,
        "index": torch.arange(9),
        "float8": masked((8, 64), 0.95, torch.float32).to(torch.float8_e4m3fn),
    }


@pytest.mark.bitwise
def test_a_file_comes_back_to_the_byte(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "w.safetensors", {"format": "pt"})
    packed = pack_file(tmp_path / "w.safetensors", tmp_path / "packed")
    assert {"double", "float", "half", "zeros", "float8"} <= set(packed)
    assert not {"dense", "empty"} & set(packed)
    unpack_file(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    with safe_open(tmp_path / "packed", framework="pt") as file:
        values = file.get_tensor("half.values")
        kept = weights["half"].flatten()[weights["half"].flatten() != 0]
        assert torch.equal(values, kept)
        assert file.get_tensor("half.bits").numel() == -(-33 * 65 // 8)
        assert bool(torch.signbit(file.get_tensor("float.values")[0]))  # minus zero is a value


@pytest.mark.parametrize(("dtype", "sparsity", "ratio"), [(torch.float32, 0.7, 0.33), (torch.bfloat16, 0.5, 0.56)])
def test_the_ratio_is_that_of_the_docs(tmp_path: Path, dtype: torch.dtype, sparsity: float, ratio: float) -> None:
    save_file({"w": masked((512, 512), sparsity, dtype)}, tmp_path / "w.safetensors")
    pack_file(tmp_path / "w.safetensors", tmp_path / "packed")
    found = (tmp_path / "packed").stat().st_size / (tmp_path / "w.safetensors").stat().st_size
    assert found == pytest.approx(ratio, abs=0.01)


def test_a_run_comes_back_with_its_fingerprints(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prune(str(model_folder), method="magnitude", sparsity=0.8, data=str(text_file), samples=4, out=run)
    packing = pack(run, tmp_path / "archive")
    assert packing.tensors == 14
    assert packing.packed_bytes < 0.8 * packing.bytes
    back = unpack(tmp_path / "archive", tmp_path / "back")
    assert (back.bytes, back.packed_bytes, back.tensors) == (packing.bytes, packing.packed_bytes, packing.tensors)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()
    }
    claimed = json.loads((run / "admm_prune.json").read_text())["weights"]
    assert weights_sha256(tmp_path / "back") == claimed
    with pytest.raises(UserError, match="an archive, not a model folder: restore it with 'admm-prune unpack"):
        load(str(tmp_path / "archive"))
    for report in (write_report, lambda archive: write_difference(archive, archive, tmp_path / "page.html")):
        with pytest.raises(UserError, match="is an archive: restore it with 'admm-prune unpack"):
            report(tmp_path / "archive")  # another page than the one that was packed
    unpack(tmp_path / "archive", tmp_path / "again")
    with pytest.raises(UserError, match="packed already"):
        pack(tmp_path / "archive", tmp_path / "twice")


def test_a_dense_model_gains_nothing_and_says_so(model_folder: Path, tmp_path: Path) -> None:
    packing = pack(model_folder, tmp_path / "archive")
    assert packing.tensors == 0
    assert packing.ratio >= 1


def test_damage_is_found_and_nothing_is_left(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    prune(str(model_folder), method="magnitude", sparsity=0.5, data=str(text_file), samples=4, out=run)
    pack(run, archive)
    packed = archive / "model.safetensors.packed"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged|do not belong together"):
        unpack(archive, tmp_path / "back")
    packed.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="not a safetensors file"):
        unpack(archive, tmp_path / "back")
    packed.unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors: it is damaged"):
        unpack(archive, tmp_path / "back")
    content = json.loads((archive / PACK_MANIFEST).read_text())
    content["files"] = {"../escape.txt": content["files"]["config.json"]}
    (archive / PACK_MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match="outside the folder"):
        unpack(archive, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_wrong_input(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        pack(tmp_path / "none", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="nothing to pack"):
        pack(tmp_path / "bare", tmp_path / "out")
    with pytest.raises(UserError, match=r"is not an archive: it has no admm_prune_pack\.json"):
        unpack(model_folder, tmp_path / "out")
    with pytest.raises(UserError, match="is the folder itself, or in it"):
        pack(model_folder, model_folder / "packed")
    (tmp_path / "x.safetensors").write_text("no weights")
    with pytest.raises(UserError, match="is not a safetensors file"):
        pack_file(tmp_path / "x.safetensors", tmp_path / "y")
    save_file({"w": torch.zeros(4)}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="is not packed"):
        unpack_file(tmp_path / "z.safetensors", tmp_path / "y")


def test_a_name_that_is_taken_stays_whole(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(64), "w.bits": torch.ones(2)}, tmp_path / "w.safetensors")
    assert pack_file(tmp_path / "w.safetensors", tmp_path / "packed") == []
    unpack_file(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
