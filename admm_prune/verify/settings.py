"""The settings of a finished run against what stands beside them: its method, its set, its target, its recipe file."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from torch import nn

from admm_prune.errors import UserError
from admm_prune.methods.base import Recipe
from admm_prune.methods.elsa.elsa import TunedDense
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.local import REFERENCES
from admm_prune.methods.parts import SetFamily, declared
from admm_prune.methods.registry import RECIPES, composed, recipe_named
from admm_prune.methods.struprune.selectors import Selection
from admm_prune.methods.struprune.struprune import configured
from admm_prune.methods.target import Target
from admm_prune.problems import constraints
from admm_prune.problems.constraints import SparseSet
from admm_prune.runs.journal.folder import MANIFEST
from admm_prune.runs.recipe_file import RECIPE, content_of, written
from admm_prune.verify.report import Verification, shown

Manifest = dict[str, Any]
_PARTS = ("solver", "problem", "constraint")
_SETS = {name: getattr(constraints, name) for name in ("Unstructured", "RowWise", "NofM", "Groups", "Blocks")}


def recipe_of(manifest: Manifest) -> Recipe | None:
    """The recipe that the settings name; None where it was put together from objects, or a part is not installed."""
    settings = manifest["settings"]
    try:
        if "methods" in settings:
            recipe = recipe_named(manifest["method"])
            steps = settings["steps"] if isinstance(recipe, Trained) else None
            return recipe_named(manifest["method"], steps)
        parts = {name: settings[name] for name in _PARTS}
        if any(part is not None and not re.fullmatch(r"[\w-]+", part) for part in parts.values()):
            return None
        recipe = composed(settings["method"], steps=settings["steps"], **parts)
        return configured(recipe, settings["unit"], settings["multiple"])
    except UserError:
        return None


def made_set(described: str) -> SetFamily | None:
    """The sparse sets that a manifest describes: a name, or one of this package's sets as it prints itself."""
    try:
        if re.fullmatch(r"[\w-]+", described):
            return SetFamily.of(described)
        made = _built_in(described)
        return None if made is None else SetFamily.of(made)
    except UserError:
        return None


def target_of(manifest: Manifest, model: nn.Module) -> Target | None:
    """The target in full; its label is rounded. None where the settings have none of this label for the model.

    A run records the target of every layer. A comparison records what was asked for, and the selection beside it.
    """
    settings = manifest["settings"]
    if "methods" not in settings:
        targets = [_target(settings["target"])]
    elif isinstance(recipe_of(manifest), TunedDense):  # one row, whatever the targets
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
    layers = tuple((name, own) for name, own in content["layers"])
    return Target(content["sparsity"], None if pattern is None else (pattern[0], pattern[1]), layers)


def _selection(settings: Any) -> Selection:
    chosen = settings["selection"]
    return Selection(
        tuple(chosen["targets"]), tuple(chosen["ignore"]), tuple((name, own) for name, own in chosen["overrides"])
    )


def check_settings(report: Verification, model: nn.Module, manifest: Manifest, where: str) -> None:
    """Method and budget against the recipe of the settings, and the layers' targets against the selection."""
    settings, recipe = manifest["settings"], recipe_of(manifest)
    named = [settings.get("method"), settings.get("solver")] if "method" in settings else [manifest["method"]]
    strange = [name for name in named if name not in {None, *RECIPES, *REFERENCES} and re.fullmatch(r"[\w-]+", name)]
    if strange and strange[0] not in declared("solvers"):
        report.open(f"{where}method: '{shown(strange[0])}' is not among the methods installed here")
    if recipe is None:
        report.by_fingerprint(f"{MANIFEST}: method", f"{MANIFEST}: budget")
    else:
        report.agree("method", manifest["method"], recipe.name, where)
        report.agree("budget", manifest["budget"], recipe.budget, where)
    target = target_of(manifest, model)
    if target is None or "target" not in settings:
        return  # reported elsewhere
    if manifest["details"].get("units"):  # methods that remove units take no selection
        report.agree("selection", settings["target"]["layers"], [], where)
        return
    try:
        layers = _selection(settings).applied(model, Target(target.sparsity, target.pattern)).layers
    except UserError as error:
        report.expect("selection", False, f"{where}the selection does not fit the model: {error}")
        return
    report.agree("selection", settings["target"]["layers"], [list(pair) for pair in layers], where)


def check_recipe_file(report: Verification, folder: Path, manifest: Manifest, where: str) -> None:
    """The recipe is that of the settings, to the byte. Models of a comparison have none."""
    if "target" not in manifest["settings"]:
        return
    try:
        found = (folder / RECIPE).read_bytes()
    except OSError as error:
        report.expect(RECIPE, False, f"{where}{RECIPE} cannot be read: {error.strerror or error}")
        return
    wanted = written(content_of(manifest["settings"])).encode()
    report.expect(RECIPE, found == wanted, f"{where}{RECIPE} is not the recipe of the settings in {MANIFEST}")


def _built_in(described: str) -> SparseSet | None:
    """A set of this package from its repr, such as "RowWise(sparsity=0.5)"; nothing is evaluated but constants."""
    try:
        call = ast.parse(described, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            return None
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        made: SparseSet = _SETS[call.func.id](**given)
    except (SyntaxError, ValueError, TypeError, KeyError):
        return None
    return made
