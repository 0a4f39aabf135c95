"""The stages of the joint steps of a block: coordinated attention and the blockwise refit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from admm_prune.methods.base import Task
from admm_prune.methods.coordination import ITERATIONS, ROUNDS
from admm_prune.methods.joint import Joint
from admm_prune.methods.local import Method
from admm_prune.methods.refit import STEPS
from admm_prune.models.attention import attention_views
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block
from admm_prune.plan.counting import Counting, Stage, Work, measured_cost
from admm_prune.plan.trials import LayerTrial, estimated
from admm_prune.problems.attention import AttentionOutput
from admm_prune.statistics import SUM_BYTES

PARTS = "weights, gradients and moments"
_COPIES = 6  # of the pruned matrices in float32: start, point, gradient, two moments, and those in the block
_PASSES = 8 + 3 * ROUNDS  # of the attention over all tokens, beside those that mix its inputs
_FLOAT = 4  # bytes


def coordinating(
    stream: BlockStream, counting: Counting, index: int, block: Block, method: Method, task: Task
) -> Iterator[Stage]:
    """Value and output projections as one; a pass of the attention is counted as one of the block."""
    views = attention_views(block)[0]
    text, inputs = task.calibration, views.value.shape[1]
    mixed, tokens = views.heads * inputs, text.tokens
    with measured_cost(counting) as forward:
        stream.preview(index)
    passes = -(-inputs // views.size) + _PASSES
    batches = -(-len(text.rows) // text.batch_size)
    work = forward.work * (passes * batches)
    held = 0
    if mixed <= AttentionOutput.widest:
        held = (SUM_BYTES + 2 * _FLOAT) * mixed**2
        iterations = 2 * ROUNDS * ITERATIONS * 2 * views.size * mixed**2
        work += Work.of(products_float32=tokens * mixed**2 * 1.25 + iterations)
    else:
        work += forward.work * (2 * ROUNDS * ITERATIONS * 3 * batches)  # mixing and its adjoint
    parts = {
        "tokens of the attention": tokens * _FLOAT * (inputs + views.output.shape[0]),
        "mixed Gram": held,
        "forward pass of a batch": forward.peak,
    }
    for view in (views.value, views.output):
        shape = view.shape
        target = task.target.at(view.name) or task.target
        trial = LayerTrial(method, target, task.ridge, (shape[0],), shape[1], torch.float32, validation=False)
        work += estimated(trial).work * (1 + ROUNDS)
    yield Stage(name="attention as one", parts=parts, work=work)


def refitting(stream: BlockStream, counting: Counting, index: int, block: Block) -> Stage:
    """The descent: forward and backward passes of batches of the block."""
    state = stream.states(index)["calibration"][0]
    parameters = list({id(view.parameter): view.parameter for view in block.weights}.values())
    with measured_cost(counting) as cost, torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        torch.autograd.grad(state.replay(block, index, finite=False).square().sum(), parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    held = _COPIES * _FLOAT * sum(parameter.numel() for parameter in parameters)
    return Stage(name="refit", parts={PARTS: held, "activations of a step": cost.peak}, work=cost.work * STEPS)


def joint_stages(
    joint: Joint, stream: BlockStream, counting: Counting, index: int, block: Block, method: Method, task: Task
) -> Iterator[Stage]:
    """The stages of a block beyond those of the method itself."""
    if joint.coordinate:
        yield from coordinating(stream, counting, index, block, method, task)
    if joint.refit:
        width = block.weights[0].shape[1]
        outputs = {"targets": task.calibration.tokens * _FLOAT * width}
        yield refitting(stream, counting, index, block).beside(outputs)
