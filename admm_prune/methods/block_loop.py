"""The loop over the blocks of a model: load a block, process it, commit the result, advance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from admm_prune.methods.base import LayerReport, Runtime, Task
from admm_prune.models.activation_store import ActivationStore
from admm_prune.models.capture import BlockStream
from admm_prune.models.streaming import Offloading
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.statistics import UNWEIGHTED, TokenWeighting


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The result of one block.

    Attributes:
        layers: a report of each of its weights.
        details: JSON values.
        tensors: data of the block that is needed later, beside its weights.
    """

    layers: list[LayerReport] = field(default_factory=list)
    details: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


# Processes one block, which is loaded: prunes it in place, or measures it. It may advance the stream itself, if the
# next block is to see the outputs of this one before it was changed.
Visitor = Callable[[BlockStream, int, Block], BlockResult]


def for_each_block(
    model: nn.Module,
    task: Task,
    runtime: Runtime,
    process_block: Visitor,
    *,
    part: str = "blocks",
    changes: bool = True,
    dense_inputs: bool = False,
    reshape: Callable[[int], None] | None = None,
    steps: tuple[int, int] | None = None,
    note: str = "",
    weighting: TokenWeighting = UNWEIGHTED,
) -> list[BlockResult]:
    """Visits every block in order, on what the blocks before put out, and hands each to the runtime's journal.

    Blocks that the journal has already are not visited again.

    Args:
        part: under which the journal keeps it.
        changes: the visitor changes the blocks: their weights are kept. A block's weights in the journal are the only
            copy where the model is not in memory.
        dense_inputs: the visitor advances the stream before it changes a block. Finished blocks that run again, because
            no activations were saved, then run before they are restored.
        reshape: brings a block that was finished earlier, by its index, into the shapes that it was given then.
        steps: (done before, in all) of the whole recipe, for its progress.
        note: added to the name of the current block in progress messages.
        weighting: of the tokens in Grams.

    Raises:
        UserError: the text or a block cannot be used, or the journal not be written.
    """
    blocks = decoder_blocks(model)
    offloading, journal = runtime.offloading, runtime.journal
    if changes and not (offloading.keeps_changes or journal.keeps):
        raise ValueError("a model that is not in memory needs a journal, or its pruned blocks are lost")
    block_results = [
        BlockResult(
            layers=[LayerReport.from_json(layer) for layer in content["layers"]],
            details=content["details"],
            tensors={} if changes else load_file(journal.tensor_file(part, index)),
        )
        for index, content in enumerate(journal.finished(part))
    ]
    before, total = steps or (0, len(blocks))
    stream = None
    if len(block_results) < len(blocks):
        if weighting.score is not None:
            runtime.report_progress(before + len(block_results), total, "token scores")
        # Before the finished blocks are restored: token scores are those of the model as it was.
        stream = BlockStream(
            model,
            blocks,
            task.calibration,
            offloading.device(model),
            offloading=offloading,
            activation_store=ActivationStore(runtime.activation_bytes, journal.scratch()),
            world=runtime.world,
            sparing=offloading.is_offloaded,
            weighting=weighting,
        )
    saved = journal.resume_point(part) if stream is not None and block_results else None
    # Activations are saved and used by single-process runs only: the sequences are distributed differently otherwise.
    rerun = stream if saved is None or runtime.world.size > 1 else None
    for index, block in enumerate(blocks[: len(block_results)]):
        if dense_inputs and rerun is not None:
            _advance(rerun, offloading, index)
        if changes:
            if reshape is not None:
                reshape(index)
            offloading.restore(index, block, journal.tensor_file(part, index))
        if not dense_inputs and rerun is not None:
            _advance(rerun, offloading, index)
    if stream is not None:
        if saved is not None and rerun is None:
            stream.resume(len(block_results), saved)
        # Where blocks read what others wrote, a resumed run needs more than activations.
        saves = runtime.world.size == 1 and not stream.shares_state
        for index in range(len(block_results), len(blocks)):
            block = blocks[index]
            runtime.report_progress(before + index, total, f"{block.name}{note}")
            with offloading.block(index):
                result = process_block(stream, index, block)
                result = replace(result, details=json.loads(json.dumps(result.details)))  # as it would be read back
                if stream.position == index:
                    stream.advance(index)
                journal.commit(
                    part,
                    index,
                    {"layers": [layer.as_json() for layer in result.layers], "details": result.details},
                    tensors=_weights(block) if changes else result.tensors,
                    activations=stream.activations if saves else None,
                )
            if changes and not offloading.keeps_changes:
                offloading.restore(index, block, journal.tensor_file(part, index))
            block_results.append(result)
            if result.layers:
                runtime.record(_figures(result.layers), index)
    return block_results


def _advance(stream: BlockStream, offloading: Offloading, index: int) -> None:
    with offloading.block(index):
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
