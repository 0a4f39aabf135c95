"""One run: a model, a method and a target in; a pruned model, its figures and its folder out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admm_prune.data.sequences import Packing
from admm_prune.errors import UserError
from admm_prune.models import evaluate as evaluation
from admm_prune.models.evaluate import Evaluation
from admm_prune.models.loading import LoadedModel, load, save
from admm_prune.models.structure import decoder_blocks
from admm_prune.recipes.catalogue import Target, method_named, parse_target
from admm_prune.recipes.layerwise import LayerReport, check_target, prune_layerwise
from admm_prune.runs.claims import weights_sha256
from admm_prune.runs.device import check_dtype, pick_device
from admm_prune.runs.folder import MANIFEST, check_output, output_folder, write_json
from admm_prune.runs.manifest import manifest
from admm_prune.runs.texts import TextSettings, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did. `model` is the pruned model itself; everything else is written to the manifest."""

    method: str
    target: str
    sparsity: float
    dense: Evaluation
    pruned: Evaluation
    layers: list[LayerReport]
    seconds: float
    manifest: dict[str, Any]
    model: PreTrainedModel = field(repr=False)
    out: Path | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "target": self.target,
            "sparsity": self.sparsity,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "layers": [asdict(layer) for layer in self.layers],
            "seconds": round(self.seconds, 3),
            **self.manifest,
        }


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that a run depends on, as the manifest records it."""

    model: str
    method: str
    target: Target
    text: TextSettings
    ridge: float | None = None
    device: str = "cpu"
    dtype: str | None = None


def prune(
    model: str | Path | PreTrainedModel,
    *,
    method: str = "admm",
    sparsity: float | None = None,
    pattern: str | None = None,
    data: str = "embedded",
    eval_data: str | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    samples: int = 128,
    eval_samples: int | None = None,
    length: int | None = None,
    packing: Packing = "auto",
    seed: int = 0,
    ridge: float | None = None,
    device: str = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prunes a language model and says what that cost.

    Args:
        model: "embedded", a folder, a Hub id, or a module with its `tokenizer`; a module is pruned in place.
        method: a name that `admm-prune list` prints.
        sparsity: the fraction of every matrix to go, 0 to 1; or
        pattern: "N:M", N kept of every M consecutive inputs.
        data, eval_data, samples, eval_samples, length, packing, seed: see `TextSettings`.
        out: a folder for the pruned model and its manifest, written whole or not at all.
        ridge: in place of the method's own; finite, not negative.
        device: "auto", "cpu" or "cuda"; a module stays where it is.
        dtype: "float32", "bfloat16" or "float16"; as stored by default. A module keeps its own.
        progress: called with (blocks done, blocks, name of the block at work).

    Raises:
        UserError: something in the arguments cannot be used; the message is one line.
    """
    target = parse_target(sparsity, pattern)
    chosen = method_named(method)
    check_ridge(ridge)
    text = TextSettings(
        data=data,
        eval_data=eval_data,
        samples=samples,
        eval_samples=eval_samples,
        length=length,
        packing=packing,
        seed=seed,
    )
    if out is not None:
        check_output(Path(out))
    loaded = _loaded(model, tokenizer, pick_device(device), dtype)
    check_target(decoder_blocks(loaded.model), chosen, target)
    texts = read_texts(text, loaded)
    settings = RunSettings(
        model=loaded.source, method=method, target=target, text=text, ridge=ridge, device=device, dtype=dtype
    )
    began = time.perf_counter()
    dense = evaluation.evaluate(loaded.model, texts.evaluation)
    layers = prune_layerwise(loaded.model, texts.calibration, chosen, target, ridge=ridge, progress=progress)
    report = Report(
        method=method,
        target=target.label,
        sparsity=evaluation.sparsity(decoder_blocks(loaded.model)),
        dense=dense,
        pruned=evaluation.evaluate(loaded.model, texts.evaluation),
        layers=layers,
        seconds=time.perf_counter() - began,
        manifest=manifest(settings, texts.records, loaded.revision),
        model=loaded.model,
        out=None if out is None else Path(out),
    )
    if out is not None:
        with output_folder(Path(out)) as folder:
            report = save_run(loaded, report, folder)
    return report


def save_run(loaded: LoadedModel, report: Report, folder: Path) -> Report:
    """Writes the model as a plain `save_pretrained` folder, with the manifest and the weights' fingerprints beside it.

    Returns:
        The report as written.
    """
    save(loaded, folder, {"method": report.method, "target": report.target, "sparsity": report.sparsity})
    written = replace(report, manifest={**report.manifest, "weights": weights_sha256(folder)})
    write_json(folder / MANIFEST, written.as_json())
    return written


def check_ridge(ridge: float | None) -> None:
    """Raises UserError unless `ridge` is finite and not negative, or None."""
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise UserError(f"ridge must be a finite number that is not negative, not {ridge}")


def _loaded(model: str | Path | PreTrainedModel, tokenizer: Any, device: str, dtype: str | None) -> LoadedModel:
    check_dtype(dtype)
    if isinstance(model, str | Path):
        return load(str(model), device=device, dtype=dtype)
    if tokenizer is None:
        raise UserError("a model given as a module needs its tokenizer beside it")
    if model.training:
        raise UserError("the model is in training mode, where it drops activations at random: call model.eval() first")
    return LoadedModel(model, tokenizer, type(model).__name__, None)
