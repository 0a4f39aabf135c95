"""Layer-wise pruning: every weight by its own local problem, block after block, on the inputs of the pruned prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream, SharedInput
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.point import Point
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.catalogue import Method, Target
from admm_prune.solvers.doctor import diagnose


@dataclass(frozen=True)
class LayerReport:
    """What became of one weight. Errors are relative, undamped, in float64, of the weights as written back."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    relative_error: float
    relative_error_validation: float | None
    status: str
    iterations: int
    seconds: float
    tokens: int
    notes: tuple[str, ...]
    diagnosis: tuple[str, ...]  # codes of `solvers.doctor`


def prune_layerwise(
    model: nn.Module,
    sequences: Sequences,
    method: Method,
    target: Target,
    *,
    ridge: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[LayerReport]:
    """Prunes every matrix in the model's decoder blocks, in place.

    For each block: replay it on what the pruned blocks before it put out, take one Gram for each shared input, solve
    the layer problems, write back, replay the pruned block to get the next block's inputs.

    Args:
        sequences: calibration text.
        ridge: in place of the method's own.
        progress: called with (blocks done, blocks, name of the block at work).

    Raises:
        UserError: the model has no decoder blocks that can be read, or a weight does not admit the target.
    """
    blocks = decoder_blocks(model)
    check_target(blocks, method, target)
    device = next(model.parameters()).device
    stream = BlockStream(model, blocks, sequences, device)
    reports = []
    for index, block in enumerate(blocks):
        if progress is not None:
            progress(index, len(blocks), block.name)
        for shared in stream.collect(index):
            reports += [_prune_weight(weight, shared, method, target, ridge) for weight in shared.weights]
        stream.advance(index)
    if progress is not None:
        progress(len(blocks), len(blocks), "")
    return reports


def check_target(blocks: Iterable[Block], method: Method, target: Target) -> None:
    """Refuses a target before any weight is touched.

    Raises:
        UserError: a weight does not admit it; the message names the weight.
    """
    constraint = method.constraint(target)
    for view in (view for block in blocks for view in block.weights):
        try:
            constraint.contains(Point(weight=torch.zeros(1, view.shape[1])))
        except ValueError as error:
            raise UserError(f"{view.name}: {error}") from error


def _prune_weight(
    weight: WeightView, shared: SharedInput, method: Method, target: Target, ridge: float | None
) -> LayerReport:
    began = time.perf_counter()
    statistics = shared.statistics
    dense = weight.read().clone()  # what is read shares memory with the parameter, which is about to be overwritten
    asked = method.ridge if ridge is None else ridge
    try:
        problem = LayerReconstruction(
            dense,
            statistics.gram,
            method.constraint(target),
            ridge=asked,
            damping=method.damping,
        )
        result = method.make().solve(problem)
        weight.write(result.solution["weight"])
    except (ValueError, LinAlgError) as error:
        raise UserError(f"{weight.name}: {error}") from error
    written = Point(weight=weight.read().to(problem.weight.dtype))
    validation = statistics.validation
    return LayerReport(
        name=weight.name,
        shape=(dense.shape[0], dense.shape[1]),
        sparsity=written.sparsity(),
        relative_error=problem.relative_error(written),
        relative_error_validation=None if validation is None else problem.relative_error(written, validation),
        status=result.status.name,
        iterations=result.iterations,
        seconds=time.perf_counter() - began,
        tokens=statistics.tokens,
        notes=result.notes,
        diagnosis=tuple(
            finding.code
            for finding in diagnose(
                result,
                width=dense.shape[1],
                tokens=statistics.tokens,
                dead=int(problem.dead.sum()),
                ridge_asked=asked,
                ridge_used=problem.ridge,
            )
        ),
    )
