"""Processes that torchrun started: they meet, work as one run, and end together."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from admm_prune.models.parallel import LOST, LostProcessError, World
from admm_prune.runs.device import pick_device

_PATIENCE = timedelta(hours=12)  # one may solve a large layer while the others wait; a death is noticed at once

_store: Any = None  # of torchrun, which outlives any of its processes


def started() -> tuple[int, int]:
    """(the rank of this process, how many there are), as torchrun says it; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Generator[World]:
    """All processes of torchrun, as one world: over gloo on the CPU, over NCCL on CUDA devices, one a process.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: there is no such device; within it, `LostProcessError` where another process ended.
    """
    global _store  # noqa: PLW0603  # there is one group in a process, and its failures are reported after it is gone
    if started()[1] == 1:
        yield World()
        return
    backend = "gloo"
    if pick_device(device) == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    _store = store
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield World.here()
        dist.barrier()  # none leaves while another may still need it
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl", "peer")):
            raise LostProcessError(LOST) from error
        raise
    dist.destroy_process_group()


def speaks(error: Exception | None) -> bool:
    """Whether this process is the one to say why the run has failed: the first that knows."""
    rank, size = started()
    if size == 1 or _store is None:
        return rank == 0
    try:
        return int(_store.add("said", 1)) == 1
    except RuntimeError:  # whoever kept the store is gone too
        return isinstance(error, LostProcessError)
