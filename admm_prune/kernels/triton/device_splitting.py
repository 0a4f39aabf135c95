"""Device code: ADMM between two products. Launched by `splitting`; a program takes a part of one row.

`rows` share a row of the metric.
"""

from __future__ import annotations

import triton
import triton.language as tl

from admm_prune.kernels.triton.device_places import part_of_row


@triton.jit
def to_target_kernel(z_at, d_at, offset_at, width, tau, relaxation, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    _row, _column, there, place = part_of_row(width, BLOCK)
    z = tl.load(z_at + place, mask=there)
    d = tl.load(d_at + place, mask=there)
    dual = z * tau
    tl.store(z_at + place, dual + d * (1.0 - relaxation - tau), mask=there)
    target = d * (1.0 + tau) - dual
    if OFFSET:
        target -= tl.load(offset_at + place, mask=there)
    tl.store(d_at + place, target, mask=there)


@triton.jit
def relax_kernel(
    z_at,
    x_at,
    offset_at,
    root_at,
    score_at,
    rows,
    width,
    relaxation,
    OFFSET: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, there, place = part_of_row(width, BLOCK)
    x = tl.load(x_at + place, mask=there)
    if OFFSET:
        x += tl.load(offset_at + place, mask=there)
        tl.store(x_at + place, x, mask=there)
    z = tl.load(z_at + place, mask=there) + relaxation * x
    tl.store(z_at + place, z, mask=there)
    score = z
    if ROOT:
        score = z * tl.load(root_at + (row // rows) * width + column, mask=there)
    tl.store(score_at + place, tl.abs(score), mask=there)


@triton.jit
def settle_kernel(
    z_at,
    mask_at,
    before_at,
    d_at,
    x_at,
    root_at,
    parts_at,
    rows,
    width,
    CHANGES: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, there, place = part_of_row(width, BLOCK)
    mask = tl.load(mask_at + place, mask=there, other=0)
    z = tl.load(z_at + place, mask=there, other=0.0)
    d = tl.where(mask != 0, z, z * 0.0)  # NaN and Inf off the support are seen
    tl.store(d_at + place, d, mask=there)
    away = tl.load(x_at + place, mask=there, other=0.0) - d
    if ROOT:
        root = tl.load(root_at + (row // rows) * width + column, mask=there, other=0.0)
        away *= root
        d *= root
    part = parts_at + (row * tl.num_programs(1) + tl.program_id(1)) * 4
    if CHANGES:
        before = tl.load(before_at + place, mask=there, other=0)
        tl.store(part, tl.sum(((mask != 0) & (before == 0)).to(tl.int32)).to(tl.float32))
        tl.store(part + 1, tl.sum((mask != 0).to(tl.int32)).to(tl.float32))
    tl.store(part + 2, tl.sum(away * away))
    tl.store(part + 3, tl.sum(d * d))
