"""SparseAdam's step and the norms of its gradients, over all tensors at once.

The reference implementations are torch's Adam and the loops of `solvers.elsa`.

A table on the device has a row for each tensor: the addresses of what belongs to it, and its numbers. A program takes
some runs of one tensor, 256 entries of a row each, which share a scale in 8 bits. So a launch serves all tensors whose
dtypes agree, and each state is read once and written once.

Rounding draws 32 bits for each entry from a hash of its place and the seed (Wellons, Prospecting for hash functions,
2018), 16 for the weight and 16 for the second moment: other numbers than the reference's, with the same mean. Of the
generators at hand Philox takes a hundred operations for an entry with 64-bit places, more than the rest of the step.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from admm_prune.ops import quantization
from admm_prune.ops.quantization import Stored
from admm_prune.ops.triton.places import bit_of

_RUNS = 4  # of 256 entries, that a program takes at once
_PROGRAMS, _MOST_TURNS = 4096, 64  # programs that a large model is shared by, at least; turns of one, at most
_FIELDS = 16  # of a row of the table
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
FIRST_STEP, SECOND_STEP = (step / math.log(2.0) for step in (quantization.SIGNED_STEP, quantization.UNSIGNED_STEP))


@triton.jit
def _first(codes, scale, STEP: tl.constexpr):
    """STEP: of the binary logarithm, here and below."""
    size = tl.abs(codes.to(tl.float32))
    level = tl.where(size > 0.0, tl.exp2((size - 127.0) * STEP), 0.0)
    return tl.where(codes < 0, -level, level) * scale


@triton.jit
def root_of(codes, scale, STEP: tl.constexpr):
    size = codes.to(tl.float32)
    return tl.where(size > 0.0, tl.exp2((size - 255.0) * STEP), 0.0) * scale


@triton.jit
def _round_half_even(x):
    below = tl.floor(x)
    rest = x - below
    odd = (below - 2.0 * tl.floor(below * 0.5)) != 0.0
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    return tl.where(up, below + 1.0, below)


@triton.jit
def _mixed(x):
    """A bijection of uint32 in which every bit of x changes every bit of the result with a chance of one half."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _draws(seed, place):
    """32 random bits for each place of a tensor, from a seed of 64 bits."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    upper = ((place >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mixed(_mixed((place & 0xFFFFFFFF).to(tl.uint32) ^ low) + (high ^ _mixed(upper)))


@triton.jit
def _number(table, field):
    """A float32 in the lower half of a field."""
    return tl.load(table + field).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _pointer(table, field, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + field).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _runs(run, width, scales, count, ALIGNED: tl.constexpr):
    """Of some runs of a tensor: row, columns, which entries there are, and where they lie."""
    row = run // scales
    column = (run - row * scales)[:, None] * 256 + tl.arange(0, 256)[None, :]
    start = row * width
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return row[:, None], column, (column < width) & (run < count)[:, None], start[:, None] + column


@triton.jit
def _gradient(at, bits_at, row, column, packed, place, there, SUPPORT: tl.constexpr):
    g = tl.load(at + place, mask=there, other=0.0).to(tl.float32)
    if SUPPORT:
        g = tl.where(bit_of(bits_at, row, column, packed, there), g, g * 0.0)  # NaN and Inf off the support show
    return g


@triton.jit
def adam_kernel(
    table_at,
    programs_at,
    turns,
    factor,
    beta1,
    beta2,
    rest1,
    rest2,
    decay,
    eps,
    X: tl.constexpr,
    G: tl.constexpr,
    ANCHOR: tl.constexpr,
    PULLED: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    SUPPORT: tl.constexpr,
    MOMENT_CODES: tl.constexpr,
    FIRST_TYPE: tl.constexpr,
    SECOND_TYPE: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    SECOND_STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    RUNS: tl.constexpr,
):
    table = table_at + tl.load(programs_at + 2 * tl.program_id(0)).to(tl.int64) * 16
    x_at = _pointer(table, 0, X, ALIGNED)
    gradient_at = _pointer(table, 1, G, ALIGNED)
    first_at = _pointer(table, 2, FIRST_TYPE, ALIGNED)
    second_at = _pointer(table, 3, SECOND_TYPE, ALIGNED)
    first_scale_at = _pointer(table, 4, tl.float32, False)
    second_scale_at = _pointer(table, 5, tl.float32, False)
    anchor_at = _pointer(table, 6, ANCHOR, ALIGNED)
    anchor_scale_at = _pointer(table, 7, tl.float32, False)
    bits_at = _pointer(table, 8, tl.uint8, False)
    width = tl.load(table + 9)
    count = tl.load(table + 10)
    packed = tl.load(table + 11)
    rho = _number(table, 12)
    rate = _number(table, 13)
    root_correction = _number(table, 14)
    seed = tl.load(table + 15)
    scales = (width + 255) // 256
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    start = tl.load(programs_at + 2 * tl.program_id(0) + 1).to(tl.int64)
    for turn in range(turns):
        run = start + turn * RUNS + tl.arange(0, RUNS)
        run_there = run < count
        row, column, there, place = _runs(run, width, scales, count, ALIGNED)
        x = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
        g = _gradient(gradient_at, bits_at, row, column, packed, place, there, SUPPORT) * factor
        if PULLED:
            c = tl.load(anchor_at + place, mask=there, other=0.0).to(tl.float32)
            if ANCHOR_CODES:
                c *= (tl.load(anchor_scale_at + run, mask=run_there, other=0.0) / 127.0)[:, None]
            g += rho * (x - c)
        if MOMENT_CODES:
            m_scale = tl.load(first_scale_at + run, mask=run_there, other=0.0)
            v_scale = tl.load(second_scale_at + run, mask=run_there, other=0.0)
            m = _first(tl.load(first_at + place, mask=there, other=0), m_scale[:, None], FIRST_STEP)
            root = root_of(tl.load(second_at + place, mask=there, other=0), v_scale[:, None], SECOND_STEP)
            v = root * root
        else:
            m = tl.load(first_at + place, mask=there, other=0.0)
            v = tl.load(second_at + place, mask=there, other=0.0)
        x = x * decay
        m = m + rest1 * (g - m)
        v = v * beta2 + rest2 * g * g
        root = tl.sqrt(v)
        x = x - rate * (m / (root / root_correction + eps))
        if MOMENT_CODES or tl.bfloat16 == X:
            drawn = _draws(seed, place)
        if MOMENT_CODES:
            tiny = 1.1754943508222875e-38
            m_size = tl.abs(m)
            m_scale = tl.max(tl.where(there, m_size, 0.0), axis=1)
            v_scale = tl.max(tl.where(there, root, 0.0), axis=1)
            m_log = tl.log2(tl.maximum(m_scale, tiny))
            v_log = tl.log2(tl.maximum(v_scale, tiny))
            m_level = (tl.log2(tl.maximum(m_size, 1e-45)) - m_log[:, None]) / FIRST_STEP + 127.0
            m_level = tl.where(m == 0.0, 0.0, tl.minimum(tl.maximum(_round_half_even(m_level), 0.0), 127.0))
            v_level = (tl.log2(tl.maximum(root, 1e-45)) - v_log[:, None]) / SECOND_STEP + 255.0
            v_level = tl.floor(v_level + (drawn >> 16).to(tl.float32) * (1.0 / 65536.0))
            v_level = tl.where(root == 0.0, 0.0, tl.minimum(tl.maximum(v_level, 1.0), 255.0))
            tl.store(first_at + place, tl.where(m < 0.0, -m_level, m_level).to(tl.int8), mask=there)
            tl.store(second_at + place, v_level.to(tl.uint8), mask=there)
            tl.store(first_scale_at + run, m_scale, mask=run_there)
            tl.store(second_scale_at + run, v_scale, mask=run_there)
        else:
            tl.store(first_at + place, m, mask=there)
            tl.store(second_at + place, v, mask=there)
        if tl.bfloat16 == X:
            # Noise below the last kept bit, then a cut: up with the probability of the part cut off. Of a NaN, in which
            # GPUs set all bits but the sign, the noise would make -0.
            noise = (drawn & 0xFFFF).to(tl.int32)
            cut = ((x.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
            x = tl.where(x == x, cut, x)
        tl.store(x_at + place, x.to(X), mask=there)


@triton.jit
def squares_kernel(
    table_at,
    programs_at,
    turns,
    sums_at,
    G: tl.constexpr,
    SUPPORT: tl.constexpr,
    ALIGNED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The sum of the squared gradients in the runs of each program."""
    table = table_at + tl.load(programs_at + 2 * tl.program_id(0)).to(tl.int64) * 16
    gradient_at = _pointer(table, 1, G, ALIGNED)
    bits_at = _pointer(table, 8, tl.uint8, False)
    width = tl.load(table + 9)
    count = tl.load(table + 10)
    packed = tl.load(table + 11)
    scales = (width + 255) // 256
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    start = tl.load(programs_at + 2 * tl.program_id(0) + 1).to(tl.int64)
    squares = tl.zeros((RUNS, 256), tl.float32)
    for turn in range(turns):
        run = start + turn * RUNS + tl.arange(0, RUNS)
        row, column, there, place = _runs(run, width, scales, count, ALIGNED)
        g = _gradient(gradient_at, bits_at, row, column, packed, place, there, SUPPORT)
        squares += g * g
    tl.store(sums_at + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit
def norms_kernel(sums_at, begin_at, norms_at, BLOCK: tl.constexpr):
    """The root of the sum over the programs of each tensor, in float64 and in one order."""
    begin = tl.load(begin_at + tl.program_id(0))
    end = tl.load(begin_at + tl.program_id(0) + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(sums_at + place, mask=place < end, other=0.0).to(tl.float64)
    tl.store(norms_at + tl.program_id(0), tl.sqrt(tl.sum(total)))


# A launch passes plain numbers for constants, and options that are not parameters of the kernel.
# pyright: reportArgumentType=false, reportCallIssue=false


@dataclass(frozen=True)
class Update:
    """A tensor and what its step needs.

    Attributes:
        x: float32, bfloat16 (rounded at random) or float16; contiguous, as everything here is.
        steps: done, this one included.
        rho, anchor: the pull rho (x - c); None for none.
        support: packed, off which the gradient counts as zero; None for everywhere.
        seed: 56 bits.
    """

    x: Tensor
    gradient: Tensor
    first: Stored | None = None
    second: Stored | None = None
    steps: int = 1
    rho: float = 0.0
    anchor: Stored | None = None
    support: Tensor | None = None
    seed: int = 0

    @property
    def width(self) -> int:
        return self.x.shape[-1] if self.x.ndim else 1

    @property
    def runs(self) -> int:
        """Of 256 entries, all of which are in one row."""
        return self.x.numel() // max(1, self.width) * -(-self.width // quantization.BLOCK)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the updates of one launch agree in."""
        anchor = None if self.anchor is None else (self.anchor.values.dtype, self.anchor.scales is not None)
        moments = None if self.first is None else self.first.values.dtype
        return self.x.dtype, self.gradient.dtype, anchor, moments, self.support is None

    @property
    def aligned(self) -> bool:
        """Whether 16 entries can be taken at once: they start at multiples of 16 bytes."""
        stored = (self.first, self.second, self.anchor)
        tensors = (self.x, self.gradient, *(one.values for one in stored if one is not None))
        return self.width % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in tensors)

    def row(self, rate: float, root_correction: float) -> list[int]:
        """Of the table."""
        none = self.x.data_ptr()
        stored = [none if one is None else one.values.data_ptr() for one in (self.first, self.second, self.anchor)]
        scales = [
            none if one is None or one.scales is None else one.scales.data_ptr()
            for one in (self.first, self.second, self.anchor)
        ]
        bits = none if self.support is None else self.support.data_ptr()
        packed = 0 if self.support is None else self.support.shape[-1]
        first, second, anchor = stored
        row = [self.x.data_ptr(), self.gradient.data_ptr(), first, second, scales[0], scales[1], anchor, scales[2]]
        return [*row, bits, self.width, self.runs, packed, *map(_as_int, (self.rho, rate, root_correction)), self.seed]


def _as_int(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@lru_cache(maxsize=64)
def _shared(runs: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """How programs share some tensors, given their numbers of runs: the tensor and the first run of each program, the
    first program of each tensor and the number of programs, and the turns of a program."""
    turns = 1
    while turns < _MOST_TURNS and sum(runs) > _PROGRAMS * _RUNS * 2 * turns:
        turns *= 2
    counts = [-(-count // (_RUNS * turns)) for count in runs]
    begin = [0, *accumulate(counts)]
    sizes = torch.tensor(counts)
    tensor = torch.repeat_interleave(torch.arange(len(runs)), sizes)
    first = (torch.arange(begin[-1]) - torch.tensor(begin[:-1]).repeat_interleave(sizes)) * (_RUNS * turns)
    programs = torch.stack([tensor, first], dim=1).int().to(device)
    return programs, torch.tensor(begin, dtype=torch.int64, device=device), turns


def _table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """On a device by a copy that the host does not wait for."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _by_kind(updates: Sequence[Update]) -> list[list[Update]]:
    kinds: dict[tuple[Any, ...], list[Update]] = {}
    for update in updates:
        kinds.setdefault(update.kind, []).append(update)
    return list(kinds.values())


def step_(updates: Sequence[Update], *, factor: float, settings: dict[str, Any]) -> None:
    """g <- factor g + rho (x - c), then x, m and v as torch's AdamW has them; the gradients are not changed.

    One launch for each kind of update.

    Args:
        settings: lr, betas, eps and weight_decay.
    """
    beta1, beta2 = settings["betas"]
    lr = float(settings["lr"])
    for group in _by_kind(updates):
        one = group[0]
        assert one.first is not None
        assert one.second is not None
        rows = [u.row(lr / (1.0 - beta1**u.steps), (1.0 - beta2**u.steps) ** 0.5) for u in group]
        programs, _, turns = _shared(tuple(u.runs for u in group), one.x.device)
        adam_kernel[(len(programs),)](
            _table(rows, one.x.device),
            programs,
            turns,
            factor,
            beta1,
            beta2,
            1.0 - beta1,
            1.0 - beta2,
            1.0 - lr * settings["weight_decay"],
            settings["eps"],
            X=_TYPES[one.x.dtype],
            G=_TYPES[one.gradient.dtype],
            ANCHOR=tl.float32 if one.anchor is None else _TYPES[one.anchor.values.dtype],
            PULLED=one.anchor is not None,
            ANCHOR_CODES=one.anchor is not None and one.anchor.scales is not None,
            SUPPORT=one.support is not None,
            MOMENT_CODES=one.first.scales is not None,
            FIRST_TYPE=_TYPES[one.first.values.dtype],
            SECOND_TYPE=_TYPES[one.second.values.dtype],
            FIRST_STEP=FIRST_STEP,
            SECOND_STEP=SECOND_STEP,
            ALIGNED=all(u.aligned for u in group),
            RUNS=_RUNS,
            num_warps=4,
        )


def norms(updates: Sequence[Update]) -> Tensor:
    """The norm of each gradient on its support (n,), float64, on the device: squares summed in float32 by programs,
    then in float64."""
    result = torch.empty(len(updates), dtype=torch.float64, device=updates[0].x.device)
    place = {id(update): i for i, update in enumerate(updates)}
    for group in _by_kind(updates):
        one = group[0]
        programs, begin, turns = _shared(tuple(u.runs for u in group), one.x.device)
        sums = torch.empty(len(programs), dtype=torch.float32, device=one.x.device)
        squares_kernel[(len(programs),)](
            _table([u.row(0.0, 1.0) for u in group], one.x.device),
            programs,
            turns,
            sums,
            G=_TYPES[one.gradient.dtype],
            SUPPORT=one.support is not None,
            ALIGNED=all(u.aligned for u in group),
            RUNS=_RUNS,
            num_warps=4,
        )
        places = [place[id(u)] for u in group]
        into = result if places == list(range(len(updates))) else torch.empty_like(result[: len(group)])
        norms_kernel[(len(group),)](sums, begin, into, BLOCK=256)
        if into is not result:
            result[torch.tensor(places, device=result.device)] = into
    return result
