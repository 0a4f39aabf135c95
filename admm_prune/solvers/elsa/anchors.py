"""The compact state: one tensor and one bit per weight instead of z and u.

At a dual update a = x + u splits into z = M a and u = (1 - M) a, whose supports are disjoint. The steps in between
need the anchor c = z - tau u = M a - tau (1 - M) a, to which x is pulled; tau rescales u when rho changes.
Both are recovered exactly from c and the bits of M: z = M c, tau u = -(1 - M) c. Only c and M are stored.

Sharded tensors: local shards, and collective communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from admm_prune.errors import UserError
from admm_prune.ops import bits, quantization
from admm_prune.ops.sharding import full_tensor, local
from admm_prune.solvers.elsa.settings import check_choice

AnchorFormat = Literal["full", "bfloat16", "int8"]
Rounding = Literal["nearest", "stochastic"]
State = dict[str, Any]
_ENTRIES = {"cpu": 1 << 18}  # processed at once, to stay in the cache
_ENTRIES_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Processes:
    """The processes over which the rows of a tensor are sharded, in the order of their ranks."""

    group: dist.ProcessGroup

    def all_reduce(self, counts: Tensor) -> Tensor:
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


def processes_of(x: Tensor) -> Processes | None:
    """The processes over which x is sharded; None if each has all of it.

    Raises:
        UserError: x is not sharded by rows over one dimension of its mesh.
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


def sharded_like(parameter: Tensor, shard: Tensor) -> Tensor:
    """A tensor with the rows and the sharding of `parameter`, from its local shard."""
    if not isinstance(parameter, DTensor):
        return shard
    shape = torch.Size((*parameter.shape[:1], *shard.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def all_gather(parameter: Tensor, shard: Tensor) -> Tensor:
    """Gathers all rows of the tensor of which `shard` is the local shard."""
    return full_tensor(sharded_like(parameter, shard))


def local_shard(parameter: Tensor, whole: Tensor) -> Tensor:
    """The rows of `whole` in the local shard; of a tensor that is sharded as `parameter` is, its own."""
    if isinstance(whole, DTensor):
        return whole.to_local()
    processes = processes_of(parameter)
    if processes is None:
        return whole
    rows = local(parameter).shape[0]
    start = int(processes.before(torch.tensor([rows], device=whole.device)))
    return whole[start : start + rows]


def totals(parameters: Sequence[Tensor], values: Tensor, *, least: bool = False) -> Tensor:
    """The sum, or the minimum, of row i of `values` over the processes that shard parameter i; one message per
    group."""
    divided: dict[Processes, list[int]] = {}
    for i, parameter in enumerate(parameters):
        processes = processes_of(parameter)
        if processes is not None:
            divided.setdefault(processes, []).append(i)
    for processes, rows in divided.items():
        values[rows] = (processes.least if least else processes.all_reduce)(values[rows])
    return values


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter under a constraint, and its optimizer state.

    Attributes:
        index: among all pruned parameters.
        transposed: stored as (in, out).
        stacked: a matrix for every expert of a mixture.
    """

    name: str
    index: int
    parameter: Tensor
    state: State
    transposed: bool
    stacked: bool

    @property
    def shard(self) -> Tensor:
        """The local shard."""
        return local(self.parameter.detach())

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return local(self.parameter.grad)

    @property
    def entries(self) -> int:
        """The number of entries in all processes."""
        return self.parameter.numel()

    @property
    def dense(self) -> bool:
        """Whether the support is everything: then there is no pull, because ADMM would pull x to its earlier values."""
        return bool(self.state["kept"] == self.entries)

    @property
    def packed_mask(self) -> Tensor:
        """M of the local shard, one bit for each entry."""
        return local(self.state["mask"])

    def mask(self, rows: slice = slice(None)) -> Tensor:
        return bits.unpack(self.packed_mask[rows], self.parameter.shape[-1])

    def set_mask(self, mask: Tensor) -> None:
        """Sets the mask of the local shard; the caller sets `kept`."""
        self.state["mask"] = sharded_like(self.parameter, bits.pack(mask))

    def restrict(self, x: Tensor) -> None:
        """x <- M x, in place, for a tensor of the local shard."""
        for rows in chunks(x):
            bits.restrict_(x[rows], local(self.state["mask"])[rows])


def check_masks(masks: Mapping[str, Tensor], weights: Sequence[Weight], *, complete: bool = False) -> None:
    """Raises UserError for a mask that matches no weight, and, with `complete`, for a weight without one."""
    by_name = {weight.name: weight for weight in weights}
    for name, mask in masks.items():
        if name not in by_name:
            raise UserError(f"a mask is given for {name}, which is not pruned: pruned are {', '.join(by_name)}")
        shape = by_name[name].parameter.shape
        if mask.shape != shape or mask.dtype != torch.bool:
            raise UserError(f"the mask of {name} must be boolean, of shape {tuple(shape)}")
    missing = [name for name in by_name if complete and name not in masks]
    if missing:
        raise UserError(f"no mask is given for {missing[0]}: give masks of all pruned weights")


def check_names(weights: Sequence[Weight]) -> None:
    """Raises UserError where two weights have one name, under which their masks are given and returned."""
    seen: set[str] = set()
    for weight in weights:
        if weight.name in seen:
            raise UserError(f"two parameters to prune are named {weight.name}: give each a name of its own")
        seen.add(weight.name)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations: float32 for narrow ones."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def chunks(x: Tensor) -> Iterator[slice]:
    """Runs of rows, so that temporaries stay small."""
    rows = x.shape[0]
    per_row = max(1, x.numel() // max(1, rows))
    step = max(1, _ENTRIES.get(x.device.type, _ENTRIES_ELSEWHERE) // per_row)
    return (slice(start, start + step) for start in range(0, rows, step))


@dataclass(frozen=True)
class Anchors:
    """The storage of anchors.

    Args:
        format: "full" in the precision of the computation; "bfloat16"; "int8" with a float32 scale per 256 entries.
        rounding: "stochastic" is unbiased.
    """

    format: AnchorFormat
    rounding: Rounding

    def __post_init__(self) -> None:
        check_choice("format of anchors", self.format, AnchorFormat)
        check_choice("rounding of anchors", self.rounding, Rounding)

    def write(self, weight: Weight, anchor: Tensor, generator: torch.Generator) -> None:
        """Stores c (the local shard)."""
        chance = generator if self.rounding == "stochastic" else None
        state = weight.state
        if self.format == "int8":
            codes, scales = quantization.to_int8(anchor.float(), chance)
            state["anchor"] = sharded_like(weight.parameter, codes)
            state["anchor_scale"] = sharded_like(weight.parameter, scales)
        elif self.format == "bfloat16":
            state["anchor"] = sharded_like(weight.parameter, quantization.to_bfloat16(anchor.float(), chance))
        else:
            state["anchor"] = sharded_like(weight.parameter, anchor)

    def stored(self, state: State) -> bool:
        """Whether the state has an anchor of this format, or none, as after a freeze."""
        if "anchor" not in state:
            return True
        dtype = local(state["anchor"]).dtype
        narrow = {"int8": torch.int8, "bfloat16": torch.bfloat16}
        return dtype == narrow[self.format] if self.format in narrow else dtype not in narrow.values()

    def read(self, weight: Weight, rows: slice = slice(None)) -> Tensor:
        """c, or some of its rows, in a dtype that adds to the working one without loss."""
        stored = local(weight.state["anchor"])[rows]
        if self.format == "int8":
            return quantization.from_int8(stored, local(weight.state["anchor_scale"])[rows])
        return stored

    def sum(self, weight: Weight) -> Tensor:
        """a = x + u."""
        x = weight.shard.to(working_dtype(weight.parameter.dtype))
        dual = self.read(weight).to(x.dtype).masked_fill(weight.mask(), 0)  # -u, except for a pending rescaling
        return torch.sub(x, dual, alpha=weight.state["lag"])

    def away(self, weight: Weight) -> Iterator[tuple[slice, Tensor]]:
        """(rows, x - c) in pieces."""
        x = weight.shard
        for rows in chunks(x):
            yield rows, x[rows].to(working_dtype(x.dtype)) - self.read(weight, rows)
