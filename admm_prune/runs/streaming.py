"""Whether a model is taken from disk block by block, or loaded as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from admm_prune.errors import UserError
from admm_prune.methods.base import Recipe
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.struprune.struprune import StruPrune
from admm_prune.models.checkpoint import weight_bytes
from admm_prune.runs.machine import free_bytes

Stream = Literal["auto"] | bool
_COMFORT = 0.5  # of the free memory, that weights may take: statistics of a block and activations come on top


def decide(stream: Stream, model: object, recipe: Recipe, written: bool, device: str) -> bool:
    """Whether to stream.

    Args:
        stream: what the user says; "auto" streams a folder whose weights would not fit comfortably.
        model: a name, a folder, or a module.
        written: the result goes to a folder.
        device: where the weights would go.

    Raises:
        UserError: it is asked for and cannot be done.
    """
    if stream not in ("auto", True, False):
        raise UserError(f"stream must be auto, True or False, not {stream!r}")
    why = _why_not(model, recipe, written)
    if stream is True and why is not None:
        raise UserError(f"cannot stream: {why}")
    if stream != "auto":
        return stream
    return why is None and weight_bytes(Path(str(model)).expanduser()) > _COMFORT * free_bytes(device)


def default_activation_bytes(device: str) -> int:
    """A quarter of what is free on the host, where activations live whatever the device."""
    return free_bytes("cpu") // 4


def _why_not(model: object, recipe: Recipe, written: bool) -> str | None:
    if not isinstance(model, str | Path):
        return "the model is in memory already: give its folder"
    if not written:
        return "the pruned model has to go to a folder: give --out"
    if isinstance(recipe, Trained):
        return f"{recipe.name} trains all weights at once: choose a method that goes block by block"
    if isinstance(recipe, StruPrune) and recipe.form == "padded":
        return f"{recipe.name} pads to the widest block, which is known only at the end: choose struprune"
    return None
