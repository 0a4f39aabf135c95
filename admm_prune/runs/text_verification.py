"""The texts of a finished run read again, and what its model makes of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from admm_prune.data.sources import PYTHON_OBJECT, is_file_name
from admm_prune.errors import UserError
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import LoadedModel
from admm_prune.runs.folder import MANIFEST
from admm_prune.runs.folder_integrity import is_number
from admm_prune.runs.judging import beginning_continued
from admm_prune.runs.settings_verification import recipe_of
from admm_prune.runs.texts import Texts, TextSettings, read_judging_text
from admm_prune.runs.verification_report import Verification, in_full

Manifest = dict[str, Any]


def evaluation_text_is_there(manifest: Manifest) -> bool:
    """Whether the evaluation text is where the run read it; what is no path is taken for a name."""
    text = manifest["settings"]["text"]
    return _is_there(text.get("eval_data") or text.get("data") or "")


def check_text(report: Verification, loaded: LoadedModel, manifest: Manifest, data: str | None, where: str) -> None:
    """The record of the texts, the model's figures and its continuation.

    Args:
        data: the evaluation text, where it is not any more where the run read it.

    Raises:
        UserError: `data` is not the text of the run, or a text cannot be read.
    """
    settings = TextSettings(**manifest["settings"]["text"])
    if data is not None:
        evaluates = settings.eval_data is not None
        settings = replace(settings, eval_data=data) if evaluates else replace(settings, data=data)
    calibrates = _is_there(settings.data)
    texts = Texts(settings, loaded) if calibrates else None
    judging = read_judging_text(settings, loaded) if texts is None else texts.evaluation
    recorded = manifest["texts"]["evaluation"]["token_hash"]
    if judging.token_hash != recorded:
        message = f"the evaluation text is not the recorded one: token hash {recorded[:12]} became "
        message += judging.token_hash[:12]
        if data is not None:
            raise UserError(f"--data {data}: {message}")
        report.expect("evaluation text", False, where + message)
        return
    report.expect("evaluation text", True, "")
    if texts is None:
        report.by_fingerprint(f"{MANIFEST}: texts")
    else:
        _check_records(report, texts, manifest, moved=data is not None, where=where)
    figures = asdict(evaluate(loaded.model, judging))
    report.expect("figures", figures.keys() == manifest["pruned"].keys(), f"{where}other figures than a run writes")
    for name in figures.keys() & manifest["pruned"].keys():
        claimed, found = manifest["pruned"][name], figures[name]
        report.expect(
            name,
            same(claimed, found, tolerance=1e-6),
            f"{where}claimed {name} {in_full(claimed)}, recomputed {in_full(found)}",
        )
        if isinstance(found, float | int):
            report.numbers[f"{where}{name}"] = found
    if manifest["continuation"]:  # none is written of a model that was streamed
        prompt, continuation = beginning_continued(loaded, judging)
        report.agree("prompt", manifest["continuation"].get("prompt"), prompt, where)
        report.agree("continuation", manifest["continuation"].get("pruned"), continuation, where)


def same(claimed: Any, found: Any, tolerance: float = 1e-12) -> bool:
    """Equal; numbers to a relative tolerance; null for what is not finite."""
    if not isinstance(found, float):
        return bool(claimed == found) and isinstance(claimed, bool) == isinstance(found, bool)
    if claimed is None:
        return found - found != 0
    return is_number(claimed) and bool(abs(claimed - found) <= tolerance * abs(found))


def _check_records(report: Verification, texts: Texts, manifest: Manifest, *, moved: bool, where: str) -> None:
    """Every field of the record of the texts; of a text that moved all but its name."""
    recipe, claimed = recipe_of(manifest), manifest["texts"]
    records = texts.records() if recipe is None else texts.records(recipe.samples)
    found = {role: json.loads(json.dumps(asdict(record))) for role, record in records.items()}  # as a manifest has it
    report.expect("texts", found.keys() == claimed.keys(), f"{where}the texts recorded are {sorted(claimed)}")
    if recipe is None:  # how many sequences calibrated is not known
        del found["calibration"]
        report.by_fingerprint(f"{MANIFEST}: texts.calibration")
    for role in found.keys() & claimed.keys():
        names = sorted(found[role].keys() | claimed[role].keys())
        for name in names:
            if not (moved and name == "source"):
                report.agree(f"texts.{role}.{name}", claimed[role].get(name), found[role].get(name), where)


def _is_there(name: str) -> bool:
    return bool(name) and name != PYTHON_OBJECT and (not is_file_name(name) or Path(name).expanduser().exists())
