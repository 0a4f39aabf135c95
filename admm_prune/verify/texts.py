"""The texts of a finished run read again, and what its model makes of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from admm_prune.data.sources import PYTHON_OBJECT, is_file_name
from admm_prune.errors import UserError
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import LoadedModel
from admm_prune.runs.journal.folder import MANIFEST, finite
from admm_prune.runs.manifest import TextRecord
from admm_prune.runs.texts import Texts, TextSettings, judging_text
from admm_prune.runs.validation import beginning_continued
from admm_prune.verify.integrity import is_number
from admm_prune.verify.report import Verification, in_full
from admm_prune.verify.settings import recipe_of

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
    moved = None
    if data is not None:
        moved = _Moved(settings, data)
        change: dict[str, Any] = {moved.setting: data}
        settings = replace(settings, **change)
    recipe = recipe_of(manifest)
    if _is_there(settings.data):
        texts = Texts(settings, loaded)
        judging = texts.evaluation
        records = texts.records() if recipe is None else texts.records(recipe.samples)
        if recipe is None:  # how many sequences calibrated is not known
            del records["calibration"]
    else:
        judging, record = judging_text(settings, loaded)
        records = {"evaluation": record}
    recorded = manifest["texts"]["evaluation"]["token_hash"]
    if judging.token_hash != recorded:
        message = f"the evaluation text is not the recorded one: token hash {recorded[:12]} became "
        message += judging.token_hash[:12]
        if data is not None:
            raise UserError(f"--data {data}: {message}")
        report.expect("evaluation text", False, where + message)
        return
    report.expect("evaluation text", True, "")
    _check_records(report, records, manifest, moved, where)
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


@dataclass(frozen=True)
class _Moved:
    """A text of these settings that is read from another place now, `data`."""

    settings: TextSettings
    data: str

    @property
    def setting(self) -> str:
        return "data" if self.settings.eval_data is None else "eval_data"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("calibration", "evaluation") if self.setting == "data" else ("evaluation",)

    @property
    def recorded(self) -> str:
        return str(getattr(self.settings, self.setting))

    @property
    def incomparable(self) -> set[str]:
        """The fields of a record that depend on the place; those of a Python object say nothing of a file."""
        return {"source", *(("fingerprint", "documents", "notes") if self.recorded == PYTHON_OBJECT else ())}


def _check_records(
    report: Verification, records: dict[str, TextRecord], manifest: Manifest, moved: _Moved | None, where: str
) -> None:
    """Every field of the records of the texts that could be read."""
    claimed = manifest["texts"]
    report.expect(
        "texts",
        claimed.keys() == {"calibration", "evaluation"},
        f"{where}the texts recorded are {in_full(sorted(claimed))}",
    )
    report.by_fingerprint(*(f"{MANIFEST}: texts.{role}" for role in sorted(claimed.keys() - records.keys())))
    for role in sorted(records.keys() & claimed.keys()):
        found, recorded = finite(asdict(records[role])), claimed[role]  # no tuples, as in JSON
        left_out: set[str] = set()
        if moved is not None and role in moved.roles:
            left_out = moved.incomparable
            report.by_fingerprint(*(f"{MANIFEST}: texts.{role}.{name}" for name in sorted(left_out)))
            found["notes"] = [note.replace(moved.data, moved.recorded) for note in found["notes"]]
        for name in sorted((found.keys() | recorded.keys()) - left_out):
            report.agree(f"texts.{role}.{name}", recorded.get(name), found.get(name), where)


def _is_there(name: str) -> bool:
    return bool(name) and name != PYTHON_OBJECT and (not is_file_name(name) or Path(name).expanduser().exists())
