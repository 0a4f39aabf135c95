"""The settings of a run and the fingerprints of its texts, recomputed from the manifest."""

from __future__ import annotations

import ast
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from admm_prune.data.hub import expanded
from admm_prune.data.sources import PYTHON_OBJECT, is_file_name
from admm_prune.errors import UserError
from admm_prune.methods.allocation.rules import AllocationRule
from admm_prune.methods.base import Recipe, TextUse
from admm_prune.methods.joint import Joint
from admm_prune.methods.local import REFERENCES
from admm_prune.methods.parts import SetFamily, declared
from admm_prune.methods.registry import RECIPES, composed, recipe_named, with_joint
from admm_prune.methods.selection import Selection
from admm_prune.methods.struprune.struprune import configured
from admm_prune.methods.target import Target
from admm_prune.models.loading import LoadedModel
from admm_prune.problems import constraints
from admm_prune.problems.constraints import SparseSet
from admm_prune.runs.journal.folder import MANIFEST, finite
from admm_prune.runs.manifest import TextRecord
from admm_prune.runs.recipe_file import RECIPE, content_of, written
from admm_prune.runs.texts import Texts, validation_text
from admm_prune.settings import TextSettings
from admm_prune.verify.figures import check_figures, device_of, elsewhere
from admm_prune.verify.report import Verification, in_full, shown

Manifest = dict[str, Any]
_PARTS = ("solver", "problem", "constraint")
_SETS = {name: getattr(constraints, name) for name in ("Unstructured", "RowWise", "NofM", "Groups", "Blocks")}


def recipe_of(manifest: Manifest) -> Recipe | None:
    """The recipe of the settings; None if it was built from objects, or a part is not installed."""
    settings = manifest["settings"]
    try:
        if "methods" in settings:
            recipe = recipe_named(manifest["method"])
            steps = settings["steps"] if "steps" in recipe.options else None
            parts = {name: settings.get(name) for name in _PARTS if recipe.prunes}
            unit, multiple = (settings[name] if name in recipe.options else None for name in ("unit", "multiple"))
            name = recipe.name
        else:
            parts = {name: settings[name] for name in _PARTS}
            steps, unit, multiple = (settings[name] for name in ("steps", "unit", "multiple"))
            name = settings["method"]
        if any(part is not None and not re.fullmatch(r"[\w-]+", part) for part in parts.values()):
            return None
        return configured(composed(name, steps=steps, **parts), unit, multiple)
    except UserError:
        return None


def made_set(described: str) -> SetFamily | None:
    """The constraint of a manifest: a name, or the repr of one of this package's sets."""
    try:
        if re.fullmatch(r"[\w-]+", described):
            return SetFamily.of(described)
        made = _built_in(described)
        return None if made is None else SetFamily.of(made)
    except UserError:
        return None


def target_of(manifest: Manifest, model: nn.Module) -> Target | None:
    """The target in full; its label is rounded. None where the settings have none of this label for the model.

    A run records the target of every layer. A comparison records its settings, and the selection.
    """
    settings = manifest["settings"]
    if "methods" not in settings:
        targets = [_target(settings["target"])]
    elif (recipe := recipe_of(manifest)) is not None and not recipe.prunes:  # one row, whatever the targets
        targets = [Target(0.0)]
    else:
        selection = _selection(settings)
        try:
            targets = [selection.applied(model, _target(content)) for content in settings["targets"]]
        except UserError:
            return None
    return next((target for target in targets if target.label == manifest["target"]), None)


def _target(content: Any) -> Target:
    pattern = content["pattern"]
    layers = tuple((name, target) for name, target in content["layers"])
    return Target(content["sparsity"], None if pattern is None else (pattern[0], pattern[1]), layers)


def _selection(settings: Any) -> Selection:
    chosen = settings["selection"]
    return Selection(
        tuple(chosen["targets"]), tuple(chosen["ignore"]), tuple((name, target) for name, target in chosen["overrides"])
    )


def check_settings(report: Verification, model: nn.Module, manifest: Manifest) -> None:
    """Method and budget against the recipe of the settings, and the layers' targets against the selection."""
    settings, recipe = manifest["settings"], recipe_of(manifest)
    named = [settings.get("method"), settings.get("solver")] if "method" in settings else [manifest["method"]]
    strange = [name for name in named if name not in {None, *RECIPES, *REFERENCES} and re.fullmatch(r"[\w-]+", name)]
    if strange and strange[0] not in declared("solvers"):
        report.open(f"method: '{shown(strange[0])}' is not among the methods installed here")
    if recipe is None:
        report.by_fingerprint(*(f"{MANIFEST}: {name}" for name in ("method", "budget", "text_use")))
    else:
        report.agree("method", manifest["method"], recipe.name)
        allocated = settings.get("allocation") is not None and recipe.prunes
        report.agree("budget", manifest["budget"], "model" if allocated else recipe.budget)
        report.agree("text_use", manifest["text_use"], _text_use(settings, recipe))
    target = target_of(manifest, model)
    if target is None or "target" not in settings:
        return  # reported elsewhere
    if manifest["details"].get("units"):  # methods that remove groups take no selection
        report.agree("selection", settings["target"]["layers"], [])
        return
    try:
        layers = _selection(settings).applied(model, Target(target.sparsity, target.pattern)).layers
    except UserError as error:
        report.expect("selection", False, f"the selection does not fit the model: {error}")
        return
    report.agree("selection", settings["target"]["layers"], [list(pair) for pair in layers])


def _text_use(settings: Any, recipe: Recipe) -> TextUse:
    recipe = with_joint(recipe, Joint.of(settings["coordinate"], settings["refit"]))
    rule = AllocationRule.named(settings["allocation"], settings["allocation_passes"]) if recipe.prunes else None
    return recipe.text_use if rule is None else rule.text_use(recipe)


def check_recipe_file(report: Verification, folder: Path, manifest: Manifest) -> None:
    """Checks that the recipe file is exactly that of the settings. Models of a comparison have none."""
    if "target" not in manifest["settings"]:
        return
    try:
        content = (folder / RECIPE).read_bytes()
    except OSError as error:
        report.expect(RECIPE, False, f"{RECIPE} cannot be read: {error.strerror or error}")
        return
    expected = written(content_of(manifest["settings"])).encode()
    report.expect(RECIPE, content == expected, f"{RECIPE} is not the recipe of the settings in {MANIFEST}")


def _built_in(described: str) -> SparseSet | None:
    """A set of this package from its repr, such as "RowWise(sparsity=0.5)"; only constants are evaluated."""
    try:
        call = ast.parse(described, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            return None
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        made: SparseSet = _SETS[call.func.id](**given)
    except (SyntaxError, ValueError, TypeError, KeyError):
        return None
    return made


def evaluation_text_is_there(manifest: Manifest) -> bool:
    """Whether the evaluation text is still available; what is not a path is treated as a Hub id."""
    text = manifest["settings"]["text"]
    return _is_there(text.get("eval_data") or text.get("data") or "")


def check_text(report: Verification, folder: Path, loaded: LoadedModel, manifest: Manifest, data: str | None) -> None:
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
        validation = texts.evaluation
        records = texts.records() if recipe is None else texts.records(recipe.samples)
        if recipe is None:  # the number of calibration sequences is unknown
            del records["calibration"]
    else:
        validation, record = validation_text(settings, loaded)
        records = {"evaluation": record}
    recorded = manifest["texts"]["evaluation"]["token_hash"]
    if validation.token_hash != recorded:
        message = f"the evaluation text is not the recorded one: token hash {recorded[:12]} became "
        message += validation.token_hash[:12]
        if data is not None:
            raise UserError(f"--data {data}: {message}")
        if _is_another(manifest["texts"]["evaluation"], records["evaluation"]):
            report.open(f"perplexity: {message}: name it with --data")
            report.by_fingerprint(*(f"{MANIFEST}: {name}" for name in ("pruned", "texts", "continuation")))
        else:
            report.expect("evaluation text", False, message)
        return
    report.expect("evaluation text", True, "")
    _check_records(report, records, manifest, moved)
    check_figures(report, loaded, validation, manifest, elsewhere(manifest, folder, device_of(loaded.model)))


@dataclass(frozen=True)
class _Moved:
    """The settings of a text that is now read from another place, `data`."""

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
    report: Verification, records: dict[str, TextRecord], manifest: Manifest, moved: _Moved | None
) -> None:
    """Every field of the records of the texts that could be read."""
    claimed = manifest["texts"]
    report.expect(
        "texts", claimed.keys() == {"calibration", "evaluation"}, f"the texts recorded are {in_full(sorted(claimed))}"
    )
    report.by_fingerprint(*(f"{MANIFEST}: texts.{role}" for role in sorted(claimed.keys() - records.keys())))
    for role in sorted(records.keys() & claimed.keys()):
        recomputed, recorded = finite(asdict(records[role])), claimed[role]  # no tuples, as in JSON
        if moved is None and _is_another(recorded, records[role]):
            report.open(f"texts.{role}: the {role} text is not the recorded one any more")
            report.by_fingerprint(f"{MANIFEST}: texts.{role}")
            continue
        left_out: set[str] = set()
        if moved is not None and role in moved.roles:
            left_out = moved.incomparable
            report.by_fingerprint(*(f"{MANIFEST}: texts.{role}.{name}" for name in sorted(left_out)))
            recomputed["notes"] = [note.replace(moved.data, moved.recorded) for note in recomputed["notes"]]
        for name in sorted((recomputed.keys() | recorded.keys()) - left_out):
            report.agree(f"texts.{role}.{name}", recorded.get(name), recomputed.get(name))


def _is_another(recorded: Manifest, now: TextRecord) -> bool:
    """Whether the text that is now in the place of the run's is another one, which refutes nothing that a run wrote."""
    return bool(recorded["fingerprint"] != now.fingerprint and recorded["token_hash"] != now.token_hash)


def _is_there(name: str) -> bool:
    return bool(name) and name != PYTHON_OBJECT and (not is_file_name(name) or expanded(name).exists())
