"""The loop over the blocks of a model: load a block, process it, commit the result, advance to the next one."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from admm_prune.methods.base import Journal, LayerReport, Runtime, Task
from admm_prune.models.activation_store import ActivationStore
from admm_prune.models.capture import BlockStream
from admm_prune.models.streaming import Offloading
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.statistics import UNWEIGHTED, TokenWeighting


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The result of one block.

    Attributes:
        layers: a report for each of its weights.
        details: further results, as JSON values.
        tensors: measurements of the block, by name; kept in the journal where the block itself is not changed.
    """

    layers: list[LayerReport] = field(default_factory=list)
    details: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


# Prunes or measures one block, whose weights are loaded. It may advance the stream before it changes the block, so that
# the next block reads the outputs of the unchanged one; otherwise `for_each_block` advances it afterwards.
ProcessBlock = Callable[[BlockStream, int, Block], BlockResult]


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """The settings of one pass over the blocks.

    Args:
        part: the name of the pass in the journal.
        changes: whether blocks are changed. Their weights are then written to the journal, which holds the only copy
            where the model is not in memory.
        dense_inputs: whether `process_block` advances the stream before it changes a block. A resumed run without saved
            activations then replays finished blocks before it restores their weights, not after.
        reshape: called with the index of a finished block, to give it the shapes that it had when it was saved.
        steps: (steps done by earlier passes, steps of the whole method), for the progress; by default (0, blocks).
        note: appended to the name of the block in progress messages.
        weighting: the weights of the tokens in the Gram matrices.
        advancing: entered with the index of a block and its result while the stream advances beyond the block, if
            `process_block` has not advanced it, also in a resumed run: for weights that the block has only then.
    """

    part: str = "blocks"
    changes: bool = True
    dense_inputs: bool = False
    reshape: Callable[[int], None] | None = None
    steps: tuple[int, int] | None = None
    note: str = ""
    weighting: TokenWeighting = UNWEIGHTED
    advancing: Callable[[int, BlockResult], AbstractContextManager[None]] = lambda index, result: nullcontext()


DEFAULT_PASS = PassSettings()


def for_each_block(
    model: nn.Module,
    task: Task,
    runtime: Runtime,
    process_block: ProcessBlock,
    settings: PassSettings = DEFAULT_PASS,
) -> list[BlockResult]:
    """Processes the blocks in order, each on the outputs of the blocks before it, and commits every result.

    Blocks whose results are already in the journal are restored from it, and not processed again.

    Returns:
        The result of every block, in order.

    Raises:
        UserError: the text or a block cannot be used, or the journal cannot be written.
    """
    blocks = decoder_blocks(model)
    offloading, journal = runtime.offloading, runtime.journal
    if settings.changes and not (offloading.keeps_changes or journal.keeps):
        raise ValueError("a model that is not in memory needs a journal, or its pruned blocks are lost")
    results = _finished(journal, settings)
    done, total = settings.steps or (0, len(blocks))
    stream = None
    if len(results) < len(blocks):
        if settings.weighting.score is not None:
            runtime.report_progress(done + len(results), total, "token scores")
        # Before the finished blocks are restored: token scores are computed with the weights that the model has now.
        stream = _stream(model, blocks, task, runtime, settings.weighting)
    _restore(blocks, results, stream, runtime, settings)
    if stream is None:
        return results
    for index in range(len(results), len(blocks)):
        runtime.report_progress(done + index, total, f"{blocks[index].name}{settings.note}")
        result = _process(process_block, stream, index, blocks[index], runtime, settings)
        results.append(result)
        if result.layers:
            runtime.record(_figures(result.layers), index)
    return results


def _finished(journal: Journal, settings: PassSettings) -> list[BlockResult]:
    """The results that an interrupted run has committed."""
    return [
        BlockResult(
            layers=[LayerReport.from_json(layer) for layer in content["layers"]],
            details=content["details"],
            tensors={} if settings.changes else load_file(journal.tensor_file(settings.part, index)),
        )
        for index, content in enumerate(journal.finished(settings.part))
    ]


def _stream(
    model: nn.Module, blocks: list[Block], task: Task, runtime: Runtime, weighting: TokenWeighting
) -> BlockStream:
    offloading = runtime.offloading
    return BlockStream(
        model,
        blocks,
        task.calibration,
        offloading.device(model),
        offloading=offloading,
        activation_store=ActivationStore(runtime.activation_bytes, runtime.journal.scratch()),
        world=runtime.world,
        sparing=offloading.is_offloaded,
        weighting=weighting,
    )


def _restore(
    blocks: list[Block],
    results: list[BlockResult],
    stream: BlockStream | None,
    runtime: Runtime,
    settings: PassSettings,
) -> None:
    """Restores the weights of the finished blocks, and advances the stream, if there is one, to the block after them.

    The stream continues from the saved activations, or replays the finished blocks where none were saved.
    """
    offloading, journal = runtime.offloading, runtime.journal
    saved = journal.resume_point(settings.part) if stream is not None and results else None
    # Saved activations fit a single process only: several processes distribute the sequences differently.
    if runtime.world.size > 1:
        saved = None
    replayed = stream if saved is None else None
    for index, (block, result) in enumerate(zip(blocks, results, strict=False)):
        if settings.dense_inputs and replayed is not None:
            _advance(replayed, offloading, index, nullcontext())
        if settings.changes:
            if settings.reshape is not None:
                settings.reshape(index)
            offloading.restore(index, block, journal.tensor_file(settings.part, index))
        if not settings.dense_inputs and replayed is not None:
            _advance(replayed, offloading, index, settings.advancing(index, result))
    if stream is not None and saved is not None:
        stream.resume(len(results), saved)


def _process(
    process_block: ProcessBlock, stream: BlockStream, index: int, block: Block, runtime: Runtime, settings: PassSettings
) -> BlockResult:
    """Processes one block, advances the stream beyond it and commits the result."""
    offloading, journal = runtime.offloading, runtime.journal
    # Where blocks read state that earlier ones wrote, activations alone do not suffice to resume a run.
    saves_activations = runtime.world.size == 1 and not stream.shares_state
    with offloading.block(index):
        result = process_block(stream, index, block)
        result = replace(result, details=json.loads(json.dumps(result.details)))  # as a resumed run reads them
        if stream.position == index:
            with settings.advancing(index, result):
                stream.advance(index)
        journal.commit(
            settings.part,
            index,
            {"layers": [layer.as_json() for layer in result.layers], "details": result.details},
            tensors=_weights(block) if settings.changes else result.tensors,
            activations=stream.activations if saves_activations else None,
        )
    if settings.changes and not offloading.keeps_changes:
        offloading.restore(index, block, journal.tensor_file(settings.part, index))
    return result


def _advance(stream: BlockStream, offloading: Offloading, index: int, advancing: AbstractContextManager[None]) -> None:
    with offloading.block(index), advancing:
        stream.advance(index)


def _figures(layers: list[LayerReport]) -> dict[str, float]:
    """The figures reported for a finished block."""
    size = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    figures = {
        "block/sparsity": 1.0 - sum(layer.nonzeros for layer in layers) / size,
        "block/seconds": sum(layer.seconds for layer in layers),
        "block/iterations": float(max(layer.iterations for layer in layers)),
    }
    return figures | ({"block/relative_error": sum(errors) / len(errors)} if errors else {})


def _weights(block: Block) -> dict[str, Tensor]:
    return {f"{block.name}.{name}": parameter.detach() for name, parameter in block.module.named_parameters()}
