"""Activations past the memory limit: in files, which are replaced and never written over while they are mapped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from admm_prune.models.activation_store import ActivationStore

_PUT_BACK = """
import torch
from admm_prune.models.activation_store import ActivationStore

store = ActivationStore(limit=0)
x = torch.arange(1 << 16, dtype=torch.float32)
store.put("hidden", x)
store.put("hidden", store.get("hidden"))  # as of a block that returns its input
assert torch.equal(store.get("hidden"), x)
"""


def test_a_tensor_from_a_file_can_be_put_back_under_its_name() -> None:
    subprocess.run([sys.executable, "-c", _PUT_BACK], check=True)  # in a process of its own, which it may kill


def test_earlier_tensors_stay_what_they_were(tmp_path: Path) -> None:
    store = ActivationStore(limit=0, folder=tmp_path)
    store.put("hidden", torch.ones(1 << 16))
    before = store.get("hidden")
    store.put("hidden", torch.zeros(4, dtype=torch.bfloat16))
    assert torch.equal(before, torch.ones(1 << 16))
    assert torch.equal(store.get("hidden"), torch.zeros(4, dtype=torch.bfloat16))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_file_goes_when_its_tensor_is_held_again(tmp_path: Path) -> None:
    store = ActivationStore(limit=100, folder=tmp_path)
    store.put("hidden", torch.ones(1000))
    store.put("hidden", torch.zeros(10))
    assert store.held_bytes == 40
    assert torch.equal(store.get("hidden"), torch.zeros(10))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
