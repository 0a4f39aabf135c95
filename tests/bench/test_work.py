"""The least work and the memory that the benchmark publishes, beside cases computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from admm_prune.bench.baselines import Ceilings, Work
from admm_prune.bench.blocks import block_work, structured_work, working_bytes
from admm_prune.bench.layers import solver_work
from admm_prune.bench.training import ModelShape
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Wanda
from admm_prune.solvers.schedules import LogSpaced

# Matrices (out, in): 6 x 4, 3 x 4 twice, 4 x 6; 8 x 4 twice, 4 x 8. 24 + 12 + 12 + 24 + 32 + 32 + 32 = 168 entries.
SHAPE = ModelShape("tiny", hidden=4, inner=8, heads=2, key_heads=1, head=3, blocks=5, vocabulary=10)
SOLVER = replace(ADMM(), fast_until=2, penalty=LogSpaced(0.1, 1.0, over=9, every=3), refit=True, refit_iterations=4)


def same(found: Work, operations: dict[str, float], moved: float) -> None:
    assert found.operations == pytest.approx(operations)
    assert found.moved == pytest.approx(moved)


def test_of_a_layer_of_3_x_5() -> None:
    same(solver_work("wanda", Wanda(), 3, 5, 0), {}, 9 * 15)
    same(solver_work("sparsegpt", SparseGPT(), 3, 5, 0), {"float32": 15 * 5 + 2 / 3 * 125}, 8 * 15)


def test_of_iterations_of_admm() -> None:
    """7 iterations: 2 in bfloat16 and 5 split, 3 penalties; the refit 5 products. A product is 2 x 15 x 5 = 150."""
    seven = {"bfloat16": 2 * 150, "bfloat16x3": 5 * 150 + 3 * 250, "float32": 3 * 250 / 3 + 5 * 150}
    same(solver_work("admm", SOLVER, 3, 5, 7), seven, 67 * 15 * 7)
    one = {"bfloat16": 150, "bfloat16x3": 250, "float32": 250 / 3 + 5 * 150}
    same(solver_work("admm", SOLVER, 3, 5, 1), one, 67 * 15)
    bare = replace(SOLVER, refit=False)
    same(solver_work("admm", bare, 3, 5, 7), {**seven, "float32": 250}, 67 * 15 * 7)


def test_of_a_block() -> None:
    """Two forwards of 1024 tokens and 132 entries of Grams (16 + 36 + 16 + 64), added up twice; stacks of 12 x 4,
    4 x 6, 16 x 4 and 4 x 8."""
    shared, added = 2 * 2 * 1024 * 168 + 1024 * 132, 2 * 12 * 132
    same(block_work(SHAPE, "magnitude", 1024), {"bfloat16": shared}, added + 9 * 168)
    sweep = 48 * 4 + 24 * 6 + 64 * 4 + 32 * 8
    factors = 2 / 3 * (4**3 + 6**3 + 4**3 + 8**3)
    same(block_work(SHAPE, "sparsegpt", 1024), {"bfloat16": shared, "float32": sweep + factors}, added + 8 * 168)


def test_of_structured_pruning() -> None:
    """Five forwards of 5 blocks, and Grams of 6 and 8 inputs twice."""
    same(structured_work(SHAPE, 10), {"float32": 5 * (5 * 2 * 10 * 168 + 2 * 10 * (36 + 64))}, 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        (SHAPE, torch.bfloat16, 2 * 2 * 10 * 4 + 8 * 132 + 24 * 64 + 28 * 64),
        (SHAPE, torch.float32, 2 * 4 * 10 * 4 + 8 * 132 + 24 * 64 + 28 * 64),
        # Queries, keys and values are the largest stack: 12 x 4.
        (replace(SHAPE, inner=2), torch.bfloat16, 2 * 2 * 10 * 4 + 8 * 72 + 24 * 36 + 28 * 48),
    ],
)
def test_memory_of_a_block(shape: ModelShape, dtype: torch.dtype, expected: float) -> None:
    assert working_bytes(shape, 10, dtype) == expected


def test_the_least_time_is_that_of_operations_or_of_bytes() -> None:
    ceilings = Ceilings({"float32": 10.0, "bfloat16": 100.0}, read=8.0, copied=4.0)
    work = Work({"float32": 20.0}, 4.0) + Work({"bfloat16": 100.0}, 4.0) * 2
    same(work, {"float32": 20.0, "bfloat16": 200.0}, 12.0)
    assert (ceilings.floor(work), ceilings.bound(work)) == (4.0, "operations")
    moving = Work({"float32": 20.0}, 12.0)
    assert (ceilings.floor(moving), ceilings.bound(moving)) == (3.0, "bytes")
