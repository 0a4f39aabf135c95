"""One layer of a dense model as a layer problem file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from admm_prune.data.layer_file import LayerFile
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.recipes.parts import LAYER, LayerProblem
from admm_prune.runs.device import check_dtype, pick_device
from admm_prune.runs.folder import check_output_file
from admm_prune.runs.texts import Texts, TextSettings


def capture_layer(
    model: str,
    weight: str,
    text: TextSettings,
    out: Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    problem: str = LAYER,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> LayerFile:
    """Writes the problem of one weight, all blocks dense, and returns it.

    Args:
        problem: the objective that the Grams are for, by name: it may weigh the tokens.
        overwrite: replace an earlier layer file `out`, which is refused otherwise.
        progress: called with (blocks done, blocks to go through, name of the block at work).

    Raises:
        UserError: the model has no such block matrix, no such problem, the text cannot be used, the file
            cannot be written.
    """
    check_output_file(out, overwrite=overwrite)
    place = pick_device(device)
    weigh = LayerProblem.of(problem).token_weights
    check_dtype(dtype)
    loaded = load(model, device=place, dtype=dtype)
    blocks = decoder_blocks(loaded.model)
    home = next((i for i, block in enumerate(blocks) if weight in [view.name for view in block.weights]), None)
    if home is None:
        examples = ", ".join(view.name for view in blocks[0].weights)
        raise UserError(f"the model has no block matrix '{weight}'; in its first block there are {examples}")
    texts = Texts(text, loaded)
    records = texts.records()
    stream = BlockStream(loaded.model, blocks, texts.calibration(), loaded.model.device, holdout=texts.evaluation)
    for index in range(home + 1):
        if progress is not None:
            progress(index, home + 1, blocks[index].name)
        if index < home:
            stream.advance(index)
    shared = next(s for s in stream.collect(home, weigh=weigh) if weight in [view.name for view in s.weights])
    view = next(view for view in shared.weights if view.name == weight)
    statistics = shared.statistics
    layer = LayerFile(
        weight=view.read().float().cpu(),
        gram=statistics.gram.cpu(),
        gram_validation=None if statistics.validation is None else statistics.validation.cpu(),
        gram_holdout=None if statistics.holdout is None else statistics.holdout.cpu(),
        metadata={
            "model": loaded.source,
            "weight": weight,
            "problem": problem,
            "tokens": str(statistics.tokens),
            "tokens_validation": str(statistics.validation_tokens),
            "tokens_holdout": str(statistics.holdout_tokens),
            "calibration": records["calibration"].token_hash,
            "holdout": records["evaluation"].token_hash,
        },
    )
    layer.save(out)
    return layer
