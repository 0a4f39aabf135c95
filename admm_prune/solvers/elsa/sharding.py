"""Tensors that are sharded over processes: what lies here, and what the processes tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from admm_prune.errors import UserError


@dataclass(frozen=True)
class Processes:
    """The processes among which the rows of a tensor are divided, in the order of their ranks."""

    group: dist.ProcessGroup

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the processes."""
        summed = counts.clone()
        dist.all_reduce(summed, dist.ReduceOp.SUM, group=self.group)
        return summed

    def least(self, values: Tensor) -> Tensor:
        """The minimum over the processes."""
        lowest = values.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.group)
        return lowest

    def before(self, counts: Tensor) -> Tensor:
        """The sum over the processes of lower rank."""
        everywhere = [torch.empty_like(counts) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everywhere, counts, group=self.group)
        return torch.stack(everywhere)[: dist.get_rank(self.group)].sum(0)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def local(x: Tensor) -> Tensor:
    """The part of x that lies in this process, sharing its memory; x itself where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def processes_of(x: Tensor) -> Processes | None:
    """The processes that divide x; None where each has all of it.

    Raises:
        UserError: x is divided otherwise than by rows over one dimension of its mesh.
    """
    if not isinstance(x, DTensor):
        return None
    sharded = [(dim, placement) for dim, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not sharded:
        return None
    dim, placement = sharded[0]
    if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise UserError(f"a parameter is sharded as {x.placements}: only rows over one mesh dimension can be pruned")
    return Processes(x.device_mesh.get_group(dim))


def laid_out_as(parameter: Tensor, here: Tensor) -> Tensor:
    """A tensor with the rows of `parameter`, sharded as it is, from the part that lies in this process."""
    if not isinstance(parameter, DTensor):
        return here
    shape = torch.Size((*parameter.shape[:1], *here.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        here, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def gathered(parameter: Tensor, here: Tensor) -> Tensor:
    """All rows of what `here` holds a part of."""
    whole = laid_out_as(parameter, here)
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def own_rows(parameter: Tensor, whole: Tensor) -> Tensor:
    """The rows of `whole` that lie in this process."""
    processes = processes_of(parameter)
    if processes is None:
        return whole
    rows = local(parameter).shape[0]
    start = int(processes.before(torch.tensor([rows], device=whole.device)))
    return whole[start : start + rows]


def totals(parameters: Sequence[Tensor], values: Tensor, *, least: bool = False) -> Tensor:
    """Row i of `values` summed, or its minimum taken, over the processes that divide parameter i; a message a group."""
    divided: dict[Processes, list[int]] = {}
    for i, parameter in enumerate(parameters):
        processes = processes_of(parameter)
        if processes is not None:
            divided.setdefault(processes, []).append(i)
    for processes, rows in divided.items():
        values[rows] = (processes.least if least else processes.total)(values[rows])
    return values
