"""Tensors that may be sharded over processes (DTensor): the local shard, and all rows."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """The local shard of x, sharing its memory; x itself if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x: Tensor) -> Tensor:
    """All of x, gathered from all processes, which call it together; x itself if it is not sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x
