"""The stages of the joint steps of a block: coordinated attention and the blockwise refit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from admm_prune.methods.base import Task
from admm_prune.methods.coordination import ITERATIONS, ROUNDS
from admm_prune.methods.joint import Joint
from admm_prune.methods.local import Method
from admm_prune.methods.refit import DESCENT
from admm_prune.models.activation_store import BatchState, StopForwardError
from admm_prune.models.attention import AttentionViews, attention_views
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block
from admm_prune.plan.counting import Cost, Counting, Stage, Work, measured_cost
from admm_prune.plan.trials import LayerTrial, estimated
from admm_prune.problems.attention import AttentionOutput, sample_size

PARTS = "weights, gradients and moments"
# Of the pruned matrices in float32: start, point, best point, gradient as made and as it is returned, two moments, mask
# and those in the block.
_COPIES = 9
# Passes of the attention over the tokens, beside those that mix its inputs: head outputs of the dense values, of the
# start, and of the values of each round.
_PASSES = 2 + ROUNDS
_HELD_OUT_PASSES = 2 + ROUNDS
_FITS = 2 * ROUNDS  # of V by conjugate gradients: free and on its support
_FLOAT = 4  # bytes


def coordinating(
    stream: BlockStream, counting: Counting, index: int, block: Block, method: Method, task: Task
) -> Iterator[Stage]:
    """Value and output projections together."""
    views = attention_views(block)[0]
    inputs, states = views.value.shape[1], stream.states(index)
    first = states["calibration"][0]
    mixing = _mixing(counting, index, block, views, first, backward=False)
    mixed, tokens, held_out = (
        views.heads * inputs,
        _tokens(states["calibration"]),
        _tokens(states.get("validation", ())),
    )
    batches, held_out_batches = (count / first.mask.numel() for count in (tokens, held_out))
    with measured_cost(counting) as forward:
        stream.preview(index)
    biases = views.value.bias is not None or views.output.bias is not None
    sampled_batches = min(batches, math.ceil(sample_size(tokens, inputs) / first.mask.numel()))
    sampled = sampled_batches * first.mask.numel()
    of_sample = -(-inputs // views.size) + biases  # inputs are mixed in columns, as many as a head has at once
    work = mixing.work * (_PASSES * batches + of_sample * sampled_batches)
    work += mixing.work * (_HELD_OUT_PASSES * held_out_batches + 3)  # 3: are they linear?
    work += forward.work * (batches + held_out_batches)  # the dense outputs
    held = 0
    if mixed <= AttentionOutput.widest:
        twice = 2 * first.mask.numel()  # mixed inputs of a batch: in parts, and joined
        held = _FLOAT * mixed * (mixed + views.output.shape[0] + twice)
        width = views.output.shape[1]
        iterations = _FITS * (ITERATIONS + 1) * 2 * (views.size * mixed**2 + width**2 * inputs)
        below = mixed * (mixed + inputs) + 2 * mixed * views.output.shape[0]  # of the Gram, and with the targets
        work += Work.of(products_float32=sampled * below + iterations)
    else:
        adjoint = _mixing(counting, index, block, views, first, backward=True)
        work += adjoint.work * (_FITS * sampled_batches)
        work += (mixing.work + adjoint.work) * (_FITS * (ITERATIONS + 1) * sampled_batches)
    parts = {
        "tokens of the attention": (tokens + held_out) * _FLOAT * (inputs + views.output.shape[0]),
        "mixed Gram": held,
        "forward pass of a batch": forward.peak,
    }
    for view in (views.value, views.output):
        shape = view.shape
        target = task.target.at(view.name) or task.target
        trial = LayerTrial(method, target, task.ridge, (shape[0],), shape[1], torch.float32, validation=False)
        work += estimated(trial).work * (1 + ROUNDS)
    values, outputs = views.value.shape, views.output.shape
    each = 2 * values[0] * values[1] + outputs[1] * (2 * outputs[0] + outputs[1])  # X V^T, Y^T Z and Z^T Z
    work += Work.of(products_float32=tokens * each * _PASSES, products_float64=tokens * inputs**2)
    yield Stage(name="coordinated attention", parts=parts, work=work)


def _mixing(
    counting: Counting, index: int, block: Block, views: AttentionViews, state: BatchState, *, backward: bool
) -> Cost:
    """The cost of the head outputs of a batch for given values, or of their adjoint."""
    seen: list[Tensor] = []

    def replace_values(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(torch.zeros_like(output).requires_grad_(backward))
        return seen[0]

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise StopForwardError

    hooks = (
        views.value.module.register_forward_hook(replace_values),
        views.output.module.register_forward_pre_hook(stop),
    )
    try:
        with measured_cost(counting) as cost, torch.set_grad_enabled(backward):
            with suppress(StopForwardError):
                state.replay(block, index, finite=False)
            if backward:
                torch.autograd.grad(seen[1], seen[0], torch.zeros_like(seen[1]))
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return cost


def _tokens(states: Collection[BatchState]) -> int:
    return sum(state.mask.numel() for state in states)


def refitting(stream: BlockStream, counting: Counting, index: int, block: Block) -> Stage:
    """The descent: forward and backward passes of batches of the block."""
    states = stream.states(index)
    state = states["calibration"][0]
    mean = _tokens(states["calibration"]) / (len(states["calibration"]) * state.mask.numel())  # the last may be smaller
    parameters = list({id(view.parameter): view.parameter for view in block.weights}.values())
    with measured_cost(counting) as forward:
        stream.preview(index)
    with measured_cost(counting) as cost, torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        torch.autograd.grad(state.replay(block, index, finite=False).square().sum(), parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    validation = _tokens(states.get("validation", states["calibration"])) / state.mask.numel()
    losses = 2 if all(parameter.dtype is torch.float32 for parameter in parameters) else 3  # the rounded weights too
    work = cost.work * (DESCENT.max_iterations * mean) + forward.work * (losses * validation)
    held = _COPIES * _FLOAT * sum(parameter.numel() for parameter in parameters)
    return Stage(name="refit", parts={PARTS: held, "activations of a step": cost.peak}, work=work)


def measuring(stream: BlockStream, counting: Counting, index: int, names: Collection[str]) -> Stage:
    """The errors of matrices that were fitted again: statistics of their inputs, collected while the stream advances,
    and energies of two differences."""
    parts = 2 if "validation" in stream.states(index) else 1
    with measured_cost(counting) as cost:
        shared = stream.collect(index, names, advance=True)
        views = list(chain.from_iterable(one.weights for one in shared))
        del shared
    energies = 2 * parts * sum(view.shape[0] * view.shape[1] ** 2 for view in views)
    work = cost.work + Work.of(products_float64=energies)
    return Stage(name="errors of fitted matrices", parts={"Grams": cost.peak}, work=work)


def coordinated(joint: Joint, block: Block, layers: Collection[str]) -> AttentionViews | None:
    """The attention of a block whose value and output projections are solved together; None where they are not.

    Which projection gives the values, a run tells by their numbers: here it is the first that can be.

    Args:
        layers: the names of the matrices to prune.
    """
    if not joint.coordinate:
        return None
    views = attention_views(block)[0]
    return views if {views.value.name, views.output.name} <= set(layers) else None


def joint_stages(
    joint: Joint,
    stream: BlockStream,
    counting: Counting,
    index: int,
    block: Block,
    method: Method,
    task: Task,
    layers: Collection[str],
) -> Iterator[Stage]:
    """The stages of a block beyond those of the method itself.

    Args:
        layers: the names of the matrices that the method prunes as layers.
    """
    fitted: set[str] = set()
    views = coordinated(joint, block, layers)
    if views is not None:
        yield from coordinating(stream, counting, index, block, method, task)
        fitted = {views.value.name, views.output.name}
    if joint.refit:
        width = block.weights[0].shape[1]
        outputs = {"targets": task.calibration.tokens * _FLOAT * width}
        yield refitting(stream, counting, index, block).beside(outputs)
        fitted = {view.name for view in block.weights if task.target.at(view.name) is not None}
    if fitted:
        dense = {"dense matrices": sum(view.parameter.nbytes for view in block.weights if view.name in fitted)}
        yield measuring(stream, counting, index, fitted & set(layers)).beside(dense)
