"""Solvers that work on some rows or entries at a time, beside all of them at once: the numbers are made small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from admm_prune import SparseAdam
from admm_prune.ops import library_adam
from admm_prune.problems.constraints import NofM, RowWise, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers import local_search
from admm_prune.solvers.elsa import anchors
from admm_prune.solvers.elsa.anchors import AnchorFormat
from admm_prune.solvers.elsa.moments import MomentFormat
from tests.catalogue import layer
from tests.unchanged import unchanged

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", [RowWise(0.5), NofM(2, 4), Unstructured(0.6)], ids=str)
@pytest.mark.parametrize(("rows", "table"), [(1, 1), (5, 1 << 22), (1024, 1), (7, 300)])
def test_local_search(
    rows: int,
    table: int,
    constraint: RowWise | NofM | Unstructured,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = layer(constraint, rows=13, width=32, tokens=100)
    problem = LayerReconstruction(wide.weight.to(dtype), wide.hessian.to(dtype), constraint)
    whole = local_search.LocalSearch().solve(problem)
    assert whole.best_iteration > 0
    monkeypatch.setattr(local_search, "_ROWS", rows)
    monkeypatch.setattr(local_search, "_TABLE", table)
    with unchanged(problem.weight, problem.hessian, problem.minimizer):
        parts = local_search.LocalSearch().solve(problem)
    assert problem.constraint.contains(parts.solution)
    if dtype == torch.float64:
        torch.testing.assert_close(parts.solution["weight"], whole.solution["weight"])
    assert parts.objective == pytest.approx(whole.objective, rel=1e-8 if dtype == torch.float64 else 0.02)


SHAPE = (41, 128)  # as many entries as moments in 8 bits need


def trained(dtype: torch.dtype, anchor: AnchorFormat, moments: MomentFormat) -> tuple[Tensor, Tensor]:
    """(a parameter after steps towards a target, the target), with noise that depends on the step alone."""
    start, target = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (100, 101))
    x = nn.Parameter(start.to(dtype))
    optimizer = SparseAdam(
        [x], sparsity=0.5, penalty=0.5, lr=0.05, total_steps=24, interval=4, anchor=anchor, moments=moments, clip=None
    )
    for step in range(24):
        noise = 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        x.grad = (x.detach().float() - target + noise).to(dtype)
        optimizer.step()
    optimizer.finalize()
    return x.detach(), target


@pytest.mark.parametrize("entries", [1, 512, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("anchor", "moments"), [("full", "full"), ("bfloat16", "full"), ("int8", "int8")])
def test_sparse_adam(
    anchor: AnchorFormat, moments: MomentFormat, dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, target = trained(dtype, anchor, moments)
    monkeypatch.setitem(anchors._ENTRIES, "cpu", entries)
    parts, _ = trained(dtype, anchor, moments)
    assert int(parts.count_nonzero()) == int(whole.count_nonzero()) == parts.numel() // 2
    if moments == "full" and dtype != torch.bfloat16:
        assert torch.equal(parts, whole)
        return
    # Rounding at random draws other numbers where the pieces are others.
    losses = [float((x.double() - target).square().mean()) for x in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert float(((parts != 0) == (whole != 0)).float().mean()) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_the_library_in_whole_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    whole, target = trained(dtype, "full", "bitsandbytes")
    monkeypatch.setitem(anchors._ENTRIES, "cpu", 2 * library_adam.BLOCK)
    parts, _ = trained(dtype, "full", "bitsandbytes")
    if dtype == torch.float32:
        assert torch.equal(parts, whole)
    losses = [float((x.double() - target).square().mean()) for x in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("shape", [(1,), (7,), (0, 4), (5, 0), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("entries", [1, 4, 10**6])
def test_chunks_are_all_rows_once(entries: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(anchors._ENTRIES, "cpu", entries)
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    pieces = [x[rows] for rows in anchors.chunks(x)]
    assert torch.equal(torch.cat(pieces) if pieces else x, x)
    per_row = x.numel() // max(1, len(x))
    assert all(piece.numel() <= max(entries, per_row) for piece in pieces)
