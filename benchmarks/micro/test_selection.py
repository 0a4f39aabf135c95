"""Selecting the largest scores: ours beside torch's own ways, and the projections built on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from admm_prune.ops import selection
from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, NofM, RowWise, SparseSet, Unstructured
from benchmarks.micro.rates import Layer, Measure

KEPT = 0.3


def by_topk(score: Tensor, keep: int) -> Tensor:
    indices = torch.topk(score.reshape(-1), keep, sorted=False).indices
    return torch.zeros(score.numel(), dtype=torch.bool).index_fill_(0, indices, True).view_as(score)


def by_sort(score: Tensor, keep: int) -> Tensor:
    return score >= score.reshape(-1).sort(descending=True).values[keep - 1]


@pytest.mark.parametrize("select", [selection.largest, by_topk, by_sort], ids=["ours", "topk", "sort"])
def test_largest(measure: Measure, layer: Layer, select: Callable[[Tensor, int], Tensor]) -> None:
    """Lower bound: every score read once, every bit of the mask (a byte) written once."""
    score = layer.weight.abs()
    keep = round(KEPT * score.numel())
    mask = measure(lambda: select(score, keep), moved=5 * score.numel())
    assert int(mask.sum()) == keep


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "topk"])
def test_largest_per_row(measure: Measure, layer: Layer, ours: bool) -> None:
    """Lower bound: as for the whole matrix."""
    score = layer.weight.abs()
    keep = round(KEPT * layer.width)

    def rows_by_topk() -> Tensor:
        indices = score.topk(keep, sorted=False).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, indices, True)

    call = (lambda: selection.largest_per_row(score, keep)) if ours else rows_by_topk
    mask = measure(call, moved=5 * score.numel())
    assert bool((mask.sum(1) == keep).all())


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "topk"])
def test_two_of_four(measure: Measure, layer: Layer, ours: bool) -> None:
    """Lower bound: as for the whole matrix."""
    score = layer.weight.abs()
    grouped = score.unflatten(-1, (-1, 4))

    def groups_by_topk() -> Tensor:
        indices = grouped.topk(2, sorted=False).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, indices, True).flatten(-2)

    call = (lambda: selection.largest_per_group(score, 2, 4)) if ours else groups_by_topk
    mask = measure(call, moved=5 * score.numel())
    assert int(mask.sum()) == score.numel() // 2


@pytest.mark.parametrize(
    "constraint", [Unstructured(0.7), RowWise(0.7), NofM(2, 4), Blocks(0.5, 4, 4)], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
def test_projection(measure: Measure, layer: Layer, constraint: SparseSet, weighted: bool) -> None:
    """Lower bound: the point read once (and the metric), its projection written once."""
    point = Point(weight=layer.weight)
    metric = Point(weight=layer.hessian.diagonal().expand_as(layer.weight)) if weighted else None
    projected = measure(lambda: constraint.project(point, metric), moved=8 * layer.weight.numel())
    assert constraint.contains(projected)
