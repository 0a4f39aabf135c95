"""Reloads a saved model folder and compares it with the model it was written from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from admm_prune.data.hub import quiet
from admm_prune.data.sequences import Batch
from admm_prune.errors import UserError
from admm_prune.models import modeling_per_layer
from admm_prune.models.evaluate import streamed
from admm_prune.models.loading import LoadedModel, explained, load, open_on_disk
from admm_prune.models.structure import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype", "auto_map", "admm_prune"}
_CLOSE = 64  # times the unit roundoff, relative to the largest logit: products added in another order


def check_reloaded(
    ours: LoadedModel, folder: Path, ids: Tensor, *, whole: bool = True, trust_remote_code: bool = False
) -> None:
    """Loads a folder that was written from a model, and raises an error unless it is the same model.

    Every parameter and the logits of a sequence must be bitwise the same. Logits that differ by rounding
    alone (other alignment of memory, kernels that add in no fixed order) pass where the config says the same.

    Args:
        ours: the model in memory, or on disk with its blocks finished.
        folder: as `loading.save` wrote it.
        ids: (n,) tokens.
        whole: `from_pretrained` loads it beside `ours`; else one block of it is in memory at a time, its names and
            shapes checked against the class.
        trust_remote_code: run code that came with the model, and is in the folder now.

    Raises:
        UserError: it cannot be loaded, or it is another model; the message states the difference.
    """
    try:
        saved = _loaded(ours, folder, whole=whole, trust_remote_code=trust_remote_code)
    except UserError as error:
        why = str(error).replace(f"{folder}: ", "").replace(f"{folder}/", "")  # a temporary place
        raise UserError(
            f"nothing was saved: what was written cannot be loaded again ({why}); use another method, or report this"
        ) from error
    difference = _difference(ours, saved, ids)
    if difference is not None:
        raise UserError(f"nothing was saved: what was written is not the model in memory ({difference}); report this")


def _loaded(ours: LoadedModel, folder: Path, *, whole: bool, trust_remote_code: bool) -> LoadedModel:
    """Loads the folder as a user would, on the device and with the kernels of `ours`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model: Any = ours.model
    device = ours.offloading.device(model)
    if type(model).__module__ == modeling_per_layer.__name__:
        _check_class_file(folder)
    elif (
        not ours.offloading.is_offloaded
        and not trust_remote_code
        and type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        # A custom class that no auto class knows: it loads its own folder.
        with explained(str(folder), folder), quiet():
            reloaded: Any = type(model).from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
        return replace(ours, model=reloaded.to(device))
    try:
        opens = load if whole else open_on_disk
        saved = opens(str(folder), device=device, trust_remote_code=trust_remote_code)
    except UserError:
        if whole or ours.offloading.is_offloaded:
            raise
        # Some classes cannot be built without weights: such a model needs a second copy in memory.
        saved = load(str(folder), device=device, trust_remote_code=trust_remote_code)
    for kernels in ("attn_implementation", "experts_implementation"):
        implementation = getattr(model.config, f"_{kernels}", None)
        if implementation is not None and implementation != getattr(saved.model.config, f"_{kernels}", None):
            getattr(saved.model, f"set_{kernels}")(implementation)
    return saved


def _check_class_file(folder: Path) -> None:
    """Checks the code saved with a model of different widths; users load it by that file, this package by its class."""
    source = Path(str(modeling_per_layer.__file__))
    written = folder / source.name
    if not written.is_file() or written.read_bytes() != source.read_bytes():
        raise UserError(f"{folder}: {source.name} is missing or differs")


def _difference(ours: LoadedModel, saved: LoadedModel, ids: Tensor) -> str | None:
    """The difference between two models, in words; None if they are the same."""
    cast = False
    for (entered, names), (entered_saved, saved_names) in zip(_parts(ours), _parts(saved), strict=True):
        if names != saved_names:
            other = sorted(set(names) ^ set(saved_names)) or names
            return f"one has the parameter {other[0]}, the other has not"
        with entered, entered_saved:
            for name in names:
                a, b = (one.model.get_parameter(name).detach() for one in (ours, saved))
                cast |= a.dtype != b.dtype
                if a.shape != b.shape or not torch.equal(a.to(b.device, b.dtype), b):
                    return f"{name} differs"
    a, b = (_logits(one, ids).float().cpu() for one in (ours, saved))
    if bool(((a == b) | (a.isnan() & b.isnan())).all()) or cast:
        return None
    if _settings(ours.model) == _settings(saved.model) and torch.equal(a.isfinite(), b.isfinite()):
        a, b = (x.where(x.isfinite(), torch.zeros(())) for x in (a, b))
        if float((a - b).abs().max()) <= _CLOSE * torch.finfo(saved.model.dtype).eps * float(a.abs().max()):
            return None
    return "the parameters are the same, the logits are not"


def _parts(loaded: LoadedModel) -> Iterator[tuple[AbstractContextManager[None], list[str]]]:
    """Every block, then the rest of the model: a context that loads it, and the names of its parameters."""
    blocks = decoder_blocks(loaded.model)
    inside = tuple(f"{block.name}." for block in blocks)
    for index, block in enumerate(blocks):
        yield loaded.offloading.block(index), [f"{block.name}.{name}" for name, _ in block.module.named_parameters()]
    names = [name for name, _ in loaded.model.named_parameters() if not name.startswith(inside)]
    yield loaded.offloading.outside(), names


@torch.no_grad()
def _logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """(1, n, vocabulary)."""
    model: Any = loaded.model
    device = loaded.offloading.device(model)
    batch = Batch(ids[None], torch.tensor([len(ids)]))

    def logits_of(piece: Batch) -> Tensor:
        logits: Tensor = model(input_ids=piece.input_ids.to(device), use_cache=False).logits
        return logits

    if not loaded.offloading.is_offloaded:
        return logits_of(batch)
    (streamed_logits,) = streamed(model, [batch], loaded.offloading, logits_of)
    return streamed_logits


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
