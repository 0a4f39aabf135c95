"""Structured pruning from disk to disk, with one block in memory at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.streaming import ModelOnDisk
from admm_prune.recipes.recipe import OnProgress, Outcome, Request
from admm_prune.recipes.struprune import StruPrune
from admm_prune.recipes.targets import Target
from admm_prune.runs.folder import output_folder

_BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "generation_config.json")


def prune_from_disk(
    source: Path,
    out: Path,
    calibration: Sequences,
    sparsity: float,
    *,
    recipe: StruPrune | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: OnProgress | None = None,
) -> Outcome:
    """Prunes a model folder into another one that `from_pretrained` loads, without ever holding the whole model.

    At any time there are in memory: one block, its statistics, the hidden states of the calibration tokens, and what is
    outside of the blocks. Nothing is evaluated: that needs the model.

    Args:
        source: a model folder with safetensors.
        out: written whole or not at all.
        sparsity: the fraction to go, 0 < sparsity < 1.
        recipe: `StruPrune()` by default; its form must not be "padded".
        progress: called with (steps done, steps, what is at work).

    Raises:
        UserError: the model, the text or the folders cannot be used.
    """
    recipe = recipe or StruPrune()
    if recipe.form == "padded":
        raise UserError("padding needs the widest block, which is known only at the end: choose per-layer or uniform")
    if not 0 < sparsity < 1:
        raise UserError(f"sparsity must lie between 0 and 1, not {sparsity}")
    on_disk = ModelOnDisk(source, device)
    request = Request(target=Target(sparsity), calibration=calibration, seed=seed, on_progress=progress)
    recipe.check(on_disk.model, request.target)
    with output_folder(out) as folder:
        curves = recipe.measure(on_disk.model, request, on_disk)
        on_disk.output = folder
        outcome = recipe.prune(on_disk.model, request, curves, on_disk)
        on_disk.finish()
        for pattern in _BESIDE:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    return outcome
