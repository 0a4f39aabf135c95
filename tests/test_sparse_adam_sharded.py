"""SparseAdam on parameters that FSDP2 shards: the masks of one process, whatever the number of processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from admm_prune import SparseAdam
from admm_prune.solvers.elsa.settings import Penalty


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, rank: int, processes: int, target: dict[str, object]) -> dict[str, torch.Tensor]:
    """Twelve samples a step in all, each process its share of them."""
    optimizer = SparseAdam(
        model,
        lr=0.01,
        interval=5,
        total_steps=40,
        penalty=Penalty(value=0.5, units="relative"),
        anchor="full",
        **target,
    )
    for step in range(40):
        inputs = torch.randn(12, 24, generator=torch.Generator().manual_seed(step))
        share = inputs[rank * 12 // processes : (rank + 1) * 12 // processes]
        nn.functional.mse_loss(model(share), share[:, :4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = optimizer.finalize()
    return {name: mask.full_tensor() if hasattr(mask, "full_tensor") else mask for name, mask in masks.items()}


def work(rank: int, processes: int, folder: str, target: dict[str, object]) -> None:
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="localhost", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    model = network()
    mesh = dist.init_device_mesh("cpu", (processes,))
    fully_shard(model, mesh=mesh)
    masks = train(model, rank, processes, target)
    if rank == 0:
        torch.save(masks, f"{folder}/masks.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "target", [{"sparsity": 0.8}, {"sparsity": 0.8, "scope": "model"}, {"pattern": (1, 3)}], ids=str
)
def test_shards_choose_what_one_process_chooses(tmp_path: Path, processes: int, target: dict[str, object]) -> None:
    alone = network()
    if "pattern" in target:
        target = {**target, "targets": ("0.weight", "2.weight")}
    expected = train(alone, 0, 1, target)
    mp.spawn(work, (processes, str(tmp_path), target), nprocs=processes)
    found = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
