"""Several methods on one model and one text, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from admm_prune.errors import UserError
from admm_prune.models import evaluate as evaluation
from admm_prune.models.evaluate import Evaluation
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.recipes.catalogue import Target, method_named
from admm_prune.recipes.layerwise import check_target, prune_layerwise
from admm_prune.runs import pruning
from admm_prune.runs.device import check_dtype, pick_device
from admm_prune.runs.folder import MANIFEST, check_output, output_folder, write_json
from admm_prune.runs.manifest import manifest
from admm_prune.runs.report import write_report
from admm_prune.runs.texts import TextSettings, read_texts


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pruned model: its figures, and the perplexity of the copy that was saved and loaded again."""

    method: str
    target: str
    sparsity: float
    perplexity: float
    bits_per_char: float
    relative_error: float  # mean over the pruned matrices
    seconds: float
    reloaded_perplexity: float
    folder: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    model: str
    parameters: int
    dense: Evaluation
    rows: list[Row]
    manifest: dict[str, Any]

    def is_best(self, row: Row) -> bool:
        """True where no other method reached a lower perplexity at the row's target."""
        rivals = [other.perplexity for other in self.rows if other.target == row.target]
        return not any(rival < row.perplexity for rival in rivals) and math.isfinite(row.perplexity)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dense": asdict(self.dense),
            "rows": [asdict(row) for row in self.rows],
            **self.manifest,
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    model: str
    methods: tuple[str, ...]
    targets: tuple[Target, ...]
    text: TextSettings
    device: str = "auto"
    dtype: str | None = None


def compare(
    settings: ComparisonSettings, out: Path, progress: Callable[[int, int, str], None] | None = None
) -> Comparison:
    """Prunes the model by every method to every target, from the same text, and writes all of it to `out`.

    Every pruned model is saved, loaded again from its folder and evaluated again: the two perplexities must be equal.

    Args:
        progress: called with (runs done, runs, what is at work).

    Raises:
        UserError: the model, a method, a target, the text or `out` cannot be used.
        RuntimeError: a saved model does not give the figures that it had in memory.
    """
    methods = [method_named(name) for name in dict.fromkeys(settings.methods)]
    if not methods:
        raise UserError("give at least one method, such as --methods wanda,admm")
    # Targets are told apart by what the report and the folders call them.
    targets = list({target.label: target for target in settings.targets}.values())
    check_output(out)
    device = pick_device(settings.device)
    check_dtype(settings.dtype)
    loaded = load(settings.model, device=device, dtype=settings.dtype)
    jobs = [(method, target) for target in targets for method in methods]
    for method, target in jobs:
        check_target(decoder_blocks(loaded.model), method, target)
    texts = read_texts(settings.text, loaded)
    dense = evaluation.evaluate(loaded.model, texts.evaluation)
    record = manifest(settings, texts.records, loaded.revision)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    rows = []
    with output_folder(out) as folder:
        for done, (method, target) in enumerate(jobs):
            label = f"{method.name} {target.label}"
            if progress is not None:
                progress(done, len(jobs), label)
            pruned = load(settings.model, device=device, dtype=settings.dtype)
            began = time.perf_counter()
            layers = prune_layerwise(pruned.model, texts.calibration, method, target)
            seconds = time.perf_counter() - began
            report = pruning.Report(
                method=method.name,
                target=target.label,
                sparsity=evaluation.sparsity(decoder_blocks(pruned.model)),
                dense=dense,
                pruned=evaluation.evaluate(pruned.model, texts.evaluation),
                layers=layers,
                seconds=seconds,
                manifest=record,
                model=pruned.model,
            )
            place = folder / "models" / f"{method.name}-{target.label.replace(':', 'of').replace('%', '')}"
            place.mkdir(parents=True)
            pruning.save_run(pruned, report, place)
            again = evaluation.evaluate(load(str(place), device=device).model, texts.evaluation)
            if repr(again) != repr(report.pruned):  # as text, where nan equals nan
                raise RuntimeError(f"{label}: saved and loaded, {again} is not {report.pruned}")
            rows.append(_row(report, again, str(place.relative_to(folder))))
        comparison = Comparison(model=settings.model, parameters=parameters, dense=dense, rows=rows, manifest=record)
        write_json(folder / MANIFEST, comparison.as_json())
        write_report(comparison.as_json(), [comparison.is_best(row) for row in rows], folder)
        if progress is not None:
            progress(len(jobs), len(jobs), "")
    return comparison


def _row(report: pruning.Report, again: Evaluation, folder: str) -> Row:
    return Row(
        method=report.method,
        target=report.target,
        sparsity=report.sparsity,
        perplexity=report.pruned.perplexity,
        bits_per_char=report.pruned.bits_per_char,
        relative_error=sum(layer.relative_error for layer in report.layers) / len(report.layers),
        seconds=report.seconds,
        reloaded_perplexity=again.perplexity,
        folder=folder,
    )
