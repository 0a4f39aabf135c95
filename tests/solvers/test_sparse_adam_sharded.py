"""SparseAdam in several processes: the masks of one, whatever their number; little said; a state to go on from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from admm_prune import SparseAdam
from admm_prune.solvers.elsa.settings import Penalty

STEPS = 40


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 16), nn.ReLU(), nn.Linear(16, 4))


def optimizer_of(model: nn.Module, target: dict[str, Any]) -> SparseAdam:
    how = {"lr": 0.01, "interval": 5, "total_steps": STEPS, "penalty": Penalty(value=0.5), "anchor": "full"}
    return SparseAdam(model, **{**how, **target})


def train(model: nn.Module, optimizer: SparseAdam, rank: int, processes: int, start: int, stop: int) -> None:
    """Twelve samples a step in all, each process its share of them."""
    for step in range(start, stop):
        inputs = torch.randn(12, 24, generator=torch.Generator().manual_seed(step))
        share = inputs[rank * 12 // processes : (rank + 1) * 12 // processes]
        nn.functional.mse_loss(model(share), share[:, :4]).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathered, under the names of the model that was wrapped."""
    return {
        name.removeprefix("module."): x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tensors.items()
    }


def sharded(processes: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (processes,)))
    return model


def replicated(processes: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network())


def in_processes(count: int, job: Callable[..., None], *arguments: Any) -> None:
    mp.spawn(_join, (count, job, *arguments), nprocs=count)


def _join(rank: int, processes: int, job: Callable[..., None], folder: str, *arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="localhost", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    job(rank, processes, folder, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def train_and_tell(rank: int, processes: int, folder: str, target: dict[str, Any], kind: str) -> None:
    model = sharded(processes) if kind == "fully_shard" else replicated(processes)
    # The names of a wrapped model's weights begin with "module.".
    patterns = {"targets": tuple(f"*{name}" for name in target["targets"])} if "targets" in target else {}
    optimizer = optimizer_of(model, {**target, **patterns})
    train(model, optimizer, rank, processes, 0, STEPS)
    rho = [weight.rho for update in optimizer.history for weight in update.weights.values()]
    masks = whole(optimizer.finalize())
    if rank == 0:
        torch.save({"masks": masks, "rho": torch.tensor(rho)}, f"{folder}/told.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", ["fully_shard", "DDP"])
@pytest.mark.parametrize(
    "target",
    [
        {"sparsity": 0.8},
        {"sparsity": 0.8, "scope": "model"},
        {"pattern": (1, 3), "targets": ("0.weight", "2.weight")},
        {"sparsity": 0.8, "penalty": float("inf"), "ramp": 1.0},
    ],
    ids=str,
)
def test_processes_choose_what_one_process_chooses(
    tmp_path: Path, processes: int, kind: str, target: dict[str, Any]
) -> None:
    alone = network()
    optimizer = optimizer_of(alone, target)
    train(alone, optimizer, 0, 1, 0, STEPS)
    expected = optimizer.finalize()
    in_processes(processes, train_and_tell, str(tmp_path), target, kind)
    told = torch.load(tmp_path / "told.pt", weights_only=True)
    assert told["masks"].keys() == expected.keys()
    assert all(torch.equal(told["masks"][name], expected[name]) for name in expected)
    rho = torch.tensor([weight.rho for update in optimizer.history for weight in update.weights.values()])
    assert torch.allclose(told["rho"], rho, rtol=1e-4)  # the penalty does not know how many processes there are


def count_bytes(rank: int, processes: int, folder: str) -> None:
    """A projection of 4 million sharded weights, and all that is said meanwhile."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (processes,)))
    optimizer = SparseAdam(model, sparsity=0.9, lr=0.01, interval=1, first_update=0)
    said = 0
    for name in ("all_reduce", "all_gather"):
        original = getattr(dist, name)

        def counting(*given: Any, _original: Any = original, **how: Any) -> Any:
            nonlocal said
            tensors = given[0] if isinstance(given[0], list) else [given[0]]
            said += sum(x.numel() * x.element_size() for x in tensors)
            return _original(*given, **how)

        setattr(dist, name, counting)
    model(torch.randn(8, 1024)).square().mean().backward()
    said = 0  # gradients are none of ours
    optimizer.step()
    assert len(optimizer.history) == 1
    assert 0 < said < 1_000_000, said


@pytest.mark.slow
def test_a_projection_says_less_than_a_megabyte(tmp_path: Path) -> None:
    in_processes(2, count_bytes, str(tmp_path))


def save_half_way(rank: int, processes: int, folder: str) -> None:
    model = sharded(processes)
    optimizer = optimizer_of(model, {"sparsity": 0.8, "anchor": "bfloat16"})
    train(model, optimizer, rank, processes, 0, 23)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    train(model, optimizer, rank, processes, 23, STEPS)
    masks = whole(optimizer.finalize())
    weights = whole(dict(model.named_parameters()))
    if rank == 0:
        torch.save({"masks": masks, "weights": {name: x.detach() for name, x in weights.items()}}, f"{folder}/whole.pt")


def go_on(rank: int, processes: int, folder: str) -> None:
    model = sharded(processes)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = optimizer_of(model, {"sparsity": 0.8, "anchor": "bfloat16"})
    optimizer.masks()  # allocates the state, so that there is something to load into
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, rank, processes, 23, STEPS)
    told = torch.load(f"{folder}/whole.pt", weights_only=True)
    masks = whole(optimizer.finalize())
    assert all(torch.equal(mask, told["masks"][name]) for name, mask in masks.items())
    for name, x in whole(dict(model.named_parameters())).items():
        assert torch.allclose(x, told["weights"][name], atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_a_distributed_checkpoint_goes_on_also_in_another_number_of_processes(tmp_path: Path, processes: int) -> None:
    in_processes(2, save_half_way, str(tmp_path))
    (tmp_path / "meeting").unlink(missing_ok=True)
    in_processes(processes, go_on, str(tmp_path))
