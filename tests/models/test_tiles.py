"""Tensors that are compared or written in pieces, with pieces smaller than they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from admm_prune.models import checkpoint
from admm_prune.models.archive import write_tensors
from admm_prune.models.checkpoint import Checkpoint

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def opened(folder: Path, one: Tensor, other: Tensor) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file({"one": one, "other": other}, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [1, 8, 1 << 24])
def test_tied_parameters_are_compared_to_the_last_row(
    piece: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", piece)
    one = torch.arange(28.0).reshape(7, 4).to(dtype)
    assert opened(tmp_path, one, one.clone())._equal("one", "other", dtype)
    for row in range(7):
        other = one.clone()
        other[row, row % 4] += 1
        assert not opened(tmp_path, one, other)._equal("one", "other", dtype)
    assert not opened(tmp_path, one, one[:6].clone())._equal("one", "other", dtype)
    assert opened(tmp_path, one, one.float().clone())._equal("one", "other", dtype)


@pytest.mark.parametrize("extra", [-1, 0, 5])
def test_tensors_larger_than_a_piece_are_written_whole(extra: int, tmp_path: Path) -> None:
    large = torch.arange((1 << 24) + extra).to(torch.uint8).view(-1, 1)
    content = {"large": large, "small": torch.ones(3, 2).T, "scalar": torch.tensor(2.5, dtype=torch.float64)}
    write_tensors(tmp_path / "x.safetensors", content)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == content.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in content.items())
