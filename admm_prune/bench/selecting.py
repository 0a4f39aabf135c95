"""Selecting the largest of as many scores as a 6.5 B model has, compared with one memory read and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from admm_prune.bench.baselines import Work, seconds_of
from admm_prune.bench.rows import Case, Figures, SharedData
from admm_prune.ops import backend, bits, selection

SECTION = "selection"
KEPT = 0.3


def cases(entries: int, device: torch.device) -> Iterator[Case]:
    """Ours at `entries`; topk and sort at what fits: an index beside each score takes three times as much."""
    rows, width = max(1, entries // 4096), min(4096, entries)
    scores = SharedData(_scores, rows, width, device)
    whole = 4.0 * rows * width
    yield _case("threshold", scores, selection.threshold, 4.0, whole)
    yield _case("mask", scores, selection.largest, 5.0, 1.6 * whole)
    yield _case("2:4 mask", scores, lambda s, k: selection.largest_per_group(s, 2, 4), 5.0, 1.6 * whole)
    yield _case("row by row", scores, lambda s, k: selection.largest_per_row(s, round(KEPT * width)), 5.0, 1.6 * whole)
    yield _case("mask, packed", scores, lambda s, k: bits.pack(selection.largest(s, k)), 4.125, 1.7 * whole)
    scores.release()
    fewer = SharedData(_scores, max(1, rows // 13), width, device)
    part = whole / 13
    yield _case("mask", fewer, selection.largest, 5.0, 1.6 * part)
    yield _case("torch.topk", fewer, _by_topk, 5.0, 9 * part, baseline=True)
    yield _case("torch.sort", fewer, _by_sort, 5.0, 9 * part, baseline=True)
    fewer.release()


def _scores(rows: int, width: int, device: torch.device) -> Tensor:
    g = torch.Generator(device).manual_seed(0)
    return torch.empty(rows, width, device=device).normal_(generator=g).abs_()


def _case(
    name: str,
    scores: SharedData[Tensor],
    select: Callable[[Tensor, int], Tensor],
    moved: float,
    needs: float,
    *,
    baseline: bool = False,
) -> Case:
    entries = scores.rows * scores.width

    def run() -> Figures:
        held = scores()
        keep = round(KEPT * entries)
        seconds = seconds_of(lambda: select(held, keep), held.device, repeats=3)
        one_read = seconds_of(held.sum, held.device, repeats=3)
        more = {"reads of memory": seconds / one_read, "kernels": backend.described(held.device)}
        return Figures(seconds=seconds, work=Work({}, moved * entries), more=more)

    return Case(
        section=SECTION, name=name, case=f"{entries:.2e} scores", run=run, needs=needs, limit=20.0, baseline=baseline
    )


def _by_topk(score: Tensor, keep: int) -> Tensor:
    indices = torch.topk(score.view(-1), keep, sorted=False).indices
    return torch.zeros(score.numel(), dtype=torch.bool, device=score.device).index_fill_(0, indices, True)


def _by_sort(score: Tensor, keep: int) -> Tensor:
    return score >= score.view(-1).sort(descending=True).values[keep - 1]
