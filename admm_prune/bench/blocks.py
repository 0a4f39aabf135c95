"""Whole blocks: local pruning of a shape by two of its blocks, and the memory of structured pruning over sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from admm_prune.bench.baselines import Work, synchronize
from admm_prune.bench.layers import solver_work
from admm_prune.bench.rows import Case, Figures, peak_of
from admm_prune.bench.training import ModelShape, llama
from admm_prune.data.sequences import Row, Sequences
from admm_prune.methods.base import Recipe, Task
from admm_prune.methods.layerwise import Layerwise
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.struprune.struprune import StruPrune
from admm_prune.methods.target import Target

SECTION, STRUCTURED = "models", "struprune 30 %"
BEYOND = "peak bytes beyond the model"


def local_cases(
    shape: ModelShape, device: torch.device, *, samples: int, length: int, methods: tuple[str, ...], dtype: torch.dtype
) -> Iterator[Case]:
    """Two blocks pruned layer by layer; time scales with the number of blocks, except for the embeddings."""
    for name in methods:
        yield _local_case(shape, device, samples, length, name, dtype)


def _local_case(
    shape: ModelShape, device: torch.device, samples: int, length: int, name: str, dtype: torch.dtype
) -> Case:
    measured = min(2, shape.blocks)

    def run() -> Figures:
        model = llama(shape, measured, device, dtype).eval().requires_grad_(False)
        recipe = Layerwise(LOCAL_METHODS[name])
        with peak_of(device) as peaks:
            seconds = _pruned(model, recipe, Target(0.7), shape, samples, length, device)
        more: dict[str, Any] = {
            **({BEYOND: peaks[0]} if peaks else {}),
            "tokens": samples * length,
            "seconds a block": seconds / measured,
            "seconds for all blocks": seconds / measured * shape.blocks,
            "blocks of the shape": shape.blocks,
        }
        return Figures(seconds=seconds, work=block_work(shape, name, samples * length) * measured, more=more)

    return Case(
        section=SECTION,
        name=f"{name} 70 %, layer by layer",
        case=f"{shape.name}, {measured} of {shape.blocks} blocks, {samples} x {length} tokens",
        run=run,
        needs=dtype.itemsize * (measured * shape.block + 2.0 * shape.vocabulary * shape.hidden)
        + working_bytes(shape, samples * length, dtype),
        limit=120.0,
    )


def working_bytes(shape: ModelShape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Memory of pruning a block beyond the weights: hidden states before and after it, all its Grams in float64 and
    one more in float32 with its operator, and the largest stack of weights with the state of its solve."""
    widths = (shape.hidden, shape.heads * shape.head, shape.hidden, shape.inner)
    stack = max(2 * shape.inner * shape.hidden, (shape.heads + 2 * shape.key_heads) * shape.head * shape.hidden)
    return (
        2.0 * dtype.itemsize * tokens * shape.hidden
        + 8.0 * sum(d * d for d in widths)
        + 24.0 * max(widths) ** 2
        + 28.0 * stack
    )


def block_work(shape: ModelShape, name: str, tokens: int) -> Work:
    """A block: two passes of its forward, Grams of its four inputs (half of a product), and its solves.

    Inputs in bfloat16 are multiplied as they are (`GramAccumulator`): 512 tokens at once in float32, and the products,
    4 bytes written and read for each entry of half a Gram, are added to a sum in float64, 16 bytes.
    """
    inputs = (shape.hidden, shape.heads * shape.head, shape.hidden, shape.inner)
    entries = float(sum(d * d for d in inputs))
    work = Work({"bfloat16": 2 * 2.0 * tokens * shape.block + tokens * entries}, tokens / 512 * 12.0 * entries)
    query, key = shape.heads * shape.head, shape.key_heads * shape.head
    stacked = ((query + 2 * key, inputs[0]), (shape.hidden, inputs[1]), (2 * shape.inner, inputs[2]))
    solver = LOCAL_METHODS[name].make()
    iterations = getattr(solver, "max_iterations", 0)
    for rows, width in (*stacked, (shape.hidden, inputs[3])):
        work = work + solver_work(name, solver, rows, width, iterations)
    return work


def structured_cases(sizes: list[ModelShape], device: torch.device, *, samples: int, length: int) -> Iterator[Case]:
    """StruPrune's peak beyond the model itself, over models that grow in width and depth together."""
    for shape in sizes:
        yield _structured_case(shape, device, samples, length)


def _structured_case(shape: ModelShape, device: torch.device, samples: int, length: int) -> Case:
    def run() -> Figures:
        model = llama(shape, shape.blocks, device, torch.float32).eval().requires_grad_(False)
        with peak_of(device) as peaks:
            seconds = _pruned(model, StruPrune(form="padded"), Target(0.3), shape, samples, length, device)
        more: dict[str, Any] = {"parameters": shape.parameters, **({BEYOND: peaks[0]} if peaks else {})}
        return Figures(seconds=seconds, work=structured_work(shape, samples * length), more=more)

    return Case(
        section=SECTION,
        name=STRUCTURED,
        case=f"{shape.parameters:.2e} parameters, {samples} x {length} tokens",
        run=run,
        needs=12.0 * shape.parameters,
        limit=40.0,
    )


def structured_work(shape: ModelShape, tokens: int) -> Work:
    """StruPrune, all blocks: in the first pass a forward for the statistics and one for the next inputs, in the second
    one for each sublayer's and one for the next inputs, in float32; Grams of both outputs twice."""
    grams = (shape.heads * shape.head) ** 2 + shape.inner**2
    block = Work({"float32": 5 * 2.0 * tokens * shape.block + 2 * float(tokens) * grams})
    return block * shape.blocks


def _pruned(
    model: nn.Module, recipe: Recipe, target: Target, shape: ModelShape, samples: int, length: int, device: torch.device
) -> float:
    """Seconds that a recipe took."""
    generator = torch.Generator().manual_seed(0)
    rows = tuple(Row(torch.randint(shape.vocabulary, (length,), generator=generator), length) for _ in range(samples))
    task = Task(target=target, calibration=Sequences(rows, "windows", length, None, 1))
    synchronize(device)
    began = time.perf_counter()
    recipe.prune(model, task)
    synchronize(device)
    return time.perf_counter() - began


def growing(widths: tuple[int, ...]) -> list[ModelShape]:
    """Llamas with a block for every 128 of their width, as in the memory benchmark."""
    return [
        ModelShape(f"width {w}", w, 64 * round(w / 24), w // 64, max(1, w // 128), 64, max(1, w // 128), 4096)
        for w in widths
    ]
