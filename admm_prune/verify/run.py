"""Verifies a finished run or comparison from its folder alone: files, weights, sparsity, settings, perplexity."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from admm_prune.errors import MissingExtraError, RemoteCodeError, UserError
from admm_prune.methods.target import Target
from admm_prune.models.archive import PACK_MANIFEST
from admm_prune.models.evaluate import METRICS
from admm_prune.models.loading import METADATA_KEY, LoadedModel, load
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.point import Point
from admm_prune.result import Status
from admm_prune.runs.claims import DIGEST, read_json, weights_sha256
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS
from admm_prune.runs.machine import pick_device
from admm_prune.runs.report.content import mean_error
from admm_prune.runs.report.pages import read_manifest
from admm_prune.verify.figures import same
from admm_prune.verify.integrity import check_files, check_manifest, is_number, remaining
from admm_prune.verify.report import Verification, check_fields, in_full, same_fraction
from admm_prune.verify.settings import (
    check_recipe_file,
    check_settings,
    check_text,
    evaluation_text_is_there,
    made_set,
    target_of,
)

Manifest = dict[str, Any]

_RECORD = {"settings", "model_revision", "texts", "environment", "files", DIGEST}
RUN_FIELDS = frozenset({
    "method", "target", "budget", "text_use", "block_weights", "sparsity", "dense", "pruned", "tasks", "layers",
    "notes", "details", "continuation", "weights", *_RECORD,
})  # fmt: skip
COMPARISON_FIELDS = frozenset({"model", "parameters", "dense", "tasks", "rows", *_RECORD})

# Fields of a manifest that are recomputed; of texts and figures only where the perplexity is.
_RECOMPUTED = frozenset({
    "method", "target", "budget", "text_use", "block_weights", "sparsity", "layers[].name", "layers[].sparsity",
    "settings.target", "weights", "files", DIGEST,
})  # fmt: skip
_WITH_TEXT = frozenset({"pruned", "texts", "continuation.prompt", "continuation.pruned"})
_RECOMPUTED_OF_TABLE = frozenset({
    "model", "parameters", "dense", "settings", "model_revision", "environment", "texts", "files", DIGEST,
    *(f"rows[].{name}" for name in (
        "method", "target", "sparsity", *METRICS, "relative_error", "reloaded_perplexity", "folder", "tasks"
    )),
})  # fmt: skip

_LOADING = ("transformers", "torch", "safetensors", "tokenizers")  # packages that load a model
Opened = Callable[[str], LoadedModel]  # loads a folder

_NOT_HERE = (RemoteCodeError, MissingExtraError)  # what is missing is a permission or a package, not in the folder
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, OSError, re.error)


def verify_folder(
    folder: Path,
    *,
    data: str | None = None,
    quick: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Verification:
    """Verifies the output of 'admm-prune run' or 'admm-prune compare'.

    Args:
        data: the evaluation text, if it is no longer where the run read it.
        quick: skip the checks that need the text: the perplexity, the continuation and the record of the texts.
        trust_remote_code: allow running code that comes with the models.

    Raises:
        UserError: no finished run, `data` is not the text of the run, or a model needs its own code without
            `trust_remote_code`.
    """
    if (folder / PACK_MANIFEST).is_file():
        raise UserError(f"{folder} is an archive: restore it with 'admm-prune unpack {folder} OUT' and verify that")
    manifest = read_manifest(folder)
    opened = partial(load, device=pick_device(device), trust_remote_code=trust_remote_code)
    comparing = "rows" in manifest
    report = Verification(path=folder, kind="comparison" if comparing else "run")
    check = _verify_comparison if comparing else _verify_run
    try:
        if quick:
            report.left_out.append("the perplexity (--quick)")
        elif data is None and not evaluation_text_is_there(manifest):
            report.open("perplexity: its text is not where the run read it; name it with --data")
            quick = True
        check(report, folder, manifest, data, quick, opened)
    except _NOT_HERE as error:
        if not report.failures:
            raise
        report.open(str(error))
    except UserError as error:
        if not report.failures:
            raise
        report.expect("manifest", False, str(error))
    except _MALFORMED as error:
        what = f"{folder / MANIFEST} is not a manifest of this release ({type(error).__name__}: {in_full(error)})"
        if not report.failures:
            raise UserError(what) from error
        report.expect("manifest", False, what)
    return report


def _verify_comparison(
    report: Verification, folder: Path, manifest: Manifest, data: str | None, quick: bool, opened: Opened
) -> None:
    check_manifest(report, manifest, COMPARISON_FIELDS)
    named = [str(row["folder"]) for row in manifest["rows"]]
    present = {path.relative_to(folder).as_posix() for path in (folder / "models").glob("*") if path.is_dir()}
    for missing in sorted(set(named) - present):
        report.expect("models", False, f"the table has a row for {missing}, which is not there")
    for extra in sorted(present - set(named)):
        report.expect("models", False, f"{extra} has no row in the table")
    report.expect("models", len(set(named)) == len(named), "the table has two rows for one model")
    sealed = {f"{name}/{MANIFEST}" for name in named}
    report.expect("models", sealed == manifest["files"].keys(), f"{MANIFEST} must name the manifests of its models")
    check_files(report, folder, manifest, frozenset(present & set(named)))
    check_fields(report, manifest)
    report.by_fingerprint(*(f"{MANIFEST}: {name}" for name in remaining(manifest, _RECOMPUTED_OF_TABLE)))
    report.agree("model", manifest["model"], manifest["settings"]["model"])
    _check_methods_and_targets(report, manifest)
    texts = {repr(text) for role, text in manifest["texts"].items() if role.startswith("calibration")}
    calibrations = {
        repr(read_manifest(folder / row["folder"])["texts"]["calibration"])
        for row in manifest["rows"]
        if row["folder"] in present
    }
    roles = {role for role in manifest["texts"] if role == "evaluation" or role.startswith("calibration")}
    report.expect(
        "calibration texts",
        texts == calibrations and roles == manifest["texts"].keys(),
        f"{MANIFEST}: the calibration texts are not those of the models",
    )
    for row in manifest["rows"]:
        if row["folder"] in present:
            _verify_row(report, folder, manifest, row, data, quick, opened)


def _check_methods_and_targets(report: Verification, manifest: Manifest) -> None:
    """The rows against the methods and targets of the settings."""
    settings = manifest["settings"]
    requested = set(settings["methods"])
    methods = {row["method"] for row in manifest["rows"]}
    report.expect(
        "methods of the table",
        requested <= methods if settings["baselines"] else requested == methods,
        f"the settings name the methods {sorted(requested)}, the table {sorted(methods)}",
    )
    pairs = [(row["method"], row["target"]) for row in manifest["rows"]]
    report.expect("rows", len(set(pairs)) == len(pairs), "a method has two rows for one target")


def _verify_row(
    report: Verification, folder: Path, manifest: Manifest, row: Manifest, data: str | None, quick: bool, opened: Opened
) -> None:
    """A row of the table against the manifest of its model, and the model itself."""
    report = report.at(f"{row['folder']}: ")
    content = read_manifest(folder / row["folder"])
    claims = {
        "method": content["method"],
        "target": content["target"],
        "sparsity": content["sparsity"],
        **{name: content["pruned"][name] for name in METRICS},
        "reloaded_perplexity": content["pruned"]["perplexity"],
        "relative_error": mean_error([layer["relative_error"] for layer in content["layers"]]),
        "tasks": content["tasks"],
    }
    for name, value in claims.items():
        report.expect(
            f"row {name}",
            same(row[name], value),
            f"the table says {name} {in_full(row[name])}, the model's manifest {in_full(value)}",
        )
    report.expect(
        "row fields",
        row.keys() == {*claims, "seconds", "folder"},
        "the fields of the row are not those that a comparison writes",
    )
    _check_seconds(report, folder / row["folder"] / TIMINGS, row["seconds"])
    report.expect("dense figures", content["dense"] == manifest["dense"], "the figures of the dense model differ")
    for name in ("settings", "model_revision", "environment"):
        report.agree(name, content[name], manifest[name])
    report.agree("evaluation text", content["texts"]["evaluation"], manifest["texts"]["evaluation"])
    loaded = _verify_run(report, folder / row["folder"], content, data, quick, opened)
    if loaded is not None and content["budget"] in ("matrix", "model") and not content["details"].get("units"):
        parameters = sum(p.numel() for p in loaded.model.parameters())
        report.agree("parameters", manifest["parameters"], parameters)
    elif "parameters" not in report.checked:
        report.by_fingerprint(f"{MANIFEST}: parameters")


def _check_seconds(report: Verification, timings: Path, claimed: Any) -> None:
    """The seconds of a row against the model's own file of times, which rounds them to milliseconds; a row has none
    where pruning was interrupted and resumed."""
    if claimed is None:
        return
    try:
        seconds = read_json(timings).get("seconds")
    except (UserError, AttributeError):
        return  # reported with the files
    near = is_number(claimed) and is_number(seconds) and abs(claimed - seconds) <= 1e-3
    report.expect("row seconds", near, f"the table says {in_full(claimed)} seconds, {TIMINGS} {in_full(seconds)}")


def _verify_run(
    report: Verification, folder: Path, manifest: Manifest, data: str | None, quick: bool, opened: Opened
) -> LoadedModel | None:
    """A run's folder; returns its model where that could be loaded."""
    check_manifest(report, manifest, RUN_FIELDS)
    sound = check_files(report, folder, manifest, frozenset())
    check_fields(report, manifest)
    recomputed = _RECOMPUTED if quick else _RECOMPUTED | _WITH_TEXT
    report.by_fingerprint(*(f"{MANIFEST}: {name}" for name in remaining(manifest, recomputed)))
    sound &= _verify_weights(report, folder, manifest)
    sound &= _verify_config(report, folder, manifest)
    check_recipe_file(report, folder, manifest)
    _verify_layer_claims(report, manifest)
    if not sound:
        return None  # other files or tensors, or NaN, are not loaded; altered numbers are, to find what they change
    try:
        loaded = opened(str(folder))
    except _NOT_HERE:
        raise
    except UserError as error:
        _judge_unloadable(report, manifest, error)
        return None
    check_settings(report, loaded.model, manifest)
    _verify_sparsity(report, loaded, manifest)
    if not quick:
        check_text(report, folder, loaded, manifest, data)
    return loaded


def _judge_unloadable(report: Verification, manifest: Manifest, error: UserError) -> None:
    """The model is as it was saved but cannot be loaded: refuted only by the versions that the run loaded it with."""
    differing = [name for name in _LOADING if manifest["environment"]["versions"].get(name) != version(name)]
    if not differing:
        report.expect("model", False, f"the model cannot be loaded: {error}")
        return
    name = differing[0]
    then, now = manifest["environment"]["versions"].get(name), version(name)
    report.open(f"model: it cannot be loaded with {name} {now}, where the run had {in_full(then)}: {error}")


def _verify_config(report: Verification, folder: Path, manifest: Manifest) -> bool:
    """Its metadata against the manifest; False where it cannot be read."""
    claims = {key: manifest[key] for key in ("method", "target", "sparsity")}
    try:
        config = read_json(folder / "config.json").get(METADATA_KEY)
    except (UserError, AttributeError) as error:
        return report.expect("config.json", False, f"config.json cannot be read: {error}")
    report.expect(
        "config.json",
        config == claims,
        f"config.json says {in_full(config)}, {MANIFEST} {in_full(claims)}: they must agree",
    )
    return True


def _verify_layer_claims(report: Verification, manifest: Manifest) -> None:
    """Checks the claims on layer problems for consistency; the layers' inputs are not available."""
    for layer in manifest["layers"]:
        name, objective, bound = layer["name"], layer["objective"], layer["bound"]
        status = layer["status"]
        report.expect(
            "status of every layer",
            status is None or status in Status.__members__,
            f"{name}: there is no status {in_full(status)}",
        )
        report.expect(
            "bound of every layer below its objective",
            bound is None or (is_number(bound) and is_number(objective) and bound <= objective * (1 + 1e-6) + 1e-12),
            f"{name}: claimed bound {in_full(bound)} lies above the objective {in_full(objective)}",
        )


def _verify_weights(report: Verification, folder: Path, manifest: Manifest) -> bool:
    """Files, fingerprints and finite values; False where the model is not to be loaded."""
    claimed = manifest["weights"]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not report.expect(
        "weight files", names == sorted(claimed), f"weights claimed in {sorted(claimed)}, found in {names}"
    ):
        return False
    try:
        actual = weights_sha256(folder)
    except (SafetensorError, OSError) as error:
        return report.expect("weight files", False, f"the weights cannot be read: {error}")
    sound = True
    for name in names:
        before, now = claimed[name]["tensors"], actual[name]["tensors"]
        changed = [key for key in before if key in now and before[key] != now[key]]
        for key in changed:
            report.expect("tensors", False, f"the tensor {key} in {name} is not the one that was saved")
        for key in sorted(before.keys() ^ now.keys()):
            sound = report.expect(
                "tensors", False, f"{name} {'lacks' if key in before else 'has in addition'} the tensor {key}"
            )
        report.expect(
            "tensors",
            bool(changed) or before.keys() != now.keys() or claimed[name]["sha256"] == actual[name]["sha256"],
            f"{name} is not the file that was saved, though its tensors are",
        )
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                finite = bool(torch.isfinite(file.get_tensor(key)).all())
                sound &= report.expect("finite values", finite, f"the tensor {key} contains NaN or Inf")
    return sound


def _verify_sparsity(report: Verification, loaded: LoadedModel, manifest: Manifest) -> None:
    views = {view.name: view for block in decoder_blocks(loaded.model) for view in block.weights}
    claims = {layer["name"]: layer for layer in manifest["layers"]}
    report.expect(
        "layers",
        claims.keys() == views.keys() and len(claims) == len(manifest["layers"]),
        f"the layers claimed are not those of the model: {sorted(claims.keys() ^ views.keys())[:3]}",
    )
    target = target_of(manifest, loaded.model)
    if target is None:
        report.expect("target", False, f"the target {manifest['target']} is not among the settings")
        return
    left = {name: int(view.read().count_nonzero()) for name, view in views.items()}
    sizes = {name: claim["shape"][0] * claim["shape"][1] for name, claim in claims.items()}  # of the dense weights
    target = _allocated(report, manifest, target, sizes)
    structured = bool(manifest["details"].get("units"))  # rows and columns were removed
    for name in views.keys() & claims.keys():
        shape = list(views[name].shape)
        report.expect(
            "shape of every matrix",
            all(a <= b for a, b in zip(shape, claims[name]["shape"], strict=True))
            if structured
            else shape == claims[name]["shape"],
            f"{name}: claimed shape {claims[name]['shape']}, found {shape}",
        )
        claimed, sparsity = claims[name]["sparsity"], 1 - left[name] / sizes[name]
        report.expect(
            "sparsity of every matrix",
            same_fraction(claimed, sparsity),
            f"{name}: claimed sparsity {in_full(claimed)}, found {sparsity}",
        )
    if structured:
        report.by_fingerprint(f"{MANIFEST}: layers[].shape")
    total, nonzeros = sum(sizes.values()), sum(left.values())
    report.expect(
        "block weights",
        manifest["block_weights"] == total,
        f"claimed {manifest['block_weights']} weights in the dense blocks, the layers' shapes hold {total}",
    )
    sparsity = 1 - nonzeros / total
    report.numbers[f"{report.where}sparsity"] = sparsity
    report.expect(
        "sparsity",
        same_fraction(manifest["sparsity"], sparsity),
        f"claimed sparsity {in_full(manifest['sparsity'])}, found {sparsity}",
    )
    for name, how in _misses(report, manifest, target, views, left, sizes).items():
        report.expect("target", how is None, f"{name}: {how}")


def _allocated(report: Verification, manifest: Manifest, target: Target, sizes: dict[str, int]) -> Target:
    """The target with those of the matrices by the allocation, which together remove what it asks for; as it is
    without an allocation."""
    allocated = manifest["details"].get("allocation")
    if allocated is None:
        return target
    try:
        result = replace(target, layers=tuple((dict(target.layers) | allocated["targets"]).items()))
        targets = {name: one for name in sizes if (one := result.at(name)) is not None}
    except (AttributeError, KeyError, TypeError, UserError) as error:
        report.expect("allocation", False, f"the targets of the allocation cannot be read: {error}")
        return target
    total = sum(sizes[name] for name in targets)
    removed = sum(one.removed_from(sizes[name]) for name, one in targets.items())
    least = target.removed_from(total)
    report.expect(
        "allocation",
        removed >= least,
        f"the targets of the allocation remove {removed} weights, where {target.label} of them are {least}",
    )
    return result


def _misses(
    report: Verification,
    manifest: Manifest,
    target: Target,
    views: dict[str, WeightView],
    left: dict[str, int],
    sizes: dict[str, int],
) -> dict[str, str | None]:
    """The matrices that miss the target or are outside their constraint, and how."""
    targets = {name: layer_target for name in views if (layer_target := target.at(name)) is not None}
    described = manifest["settings"].get("constraint")
    if described is not None and target.pattern is None:
        family = made_set(described)
        if family is None:
            report.open(f"target: the set {described} is not installed")
            return {}
        try:
            held = {name: family.at(one).contains(Point(weight=views[name].read())) for name, one in targets.items()}
        except Exception as error:  # whatever a plug-in raises
            report.open(f"target: the set {described} cannot be evaluated ({type(error).__name__}: {error})")
            return {}
        return {
            name: None if inside else f"it is not in the set {described} at {targets[name].label}"
            for name, inside in held.items()
        }
    if manifest["budget"] == "model" and not manifest["details"].get("allocation") and target.pattern is None:
        requested = sum((one.sparsity or 0.0) * sizes[name] for name, one in targets.items() if name in sizes)
        total = sum(sizes.values())
        return {"all matrices together": _too_few(total - sum(left.values()), total, requested, target)}
    if manifest["budget"] not in ("matrix", "model"):
        report.open(f"target: it is a fraction of the {manifest['budget']}, not of the weights")
        return {}
    return {
        name: _missed(views[name], left[name], sizes.get(name, views[name].read().numel()), one)
        for name, one in targets.items()
    }


def _missed(view: WeightView, left: int, size: int, target: Target) -> str | None:
    """A description of how a matrix misses its target; None if it does not."""
    if target.pattern is None:
        return _too_few(size - left, size, (target.sparsity or 0.0) * size, target)
    keep, group = target.pattern
    over = int((view.read().unflatten(1, (-1, group)).count_nonzero(dim=2) > keep).sum())
    return f"{over} groups keep more than {keep} of {group}" if over else None


def _too_few(zeros: int, size: int, requested: float, target: Target) -> str | None:
    """A description of how zeros miss a sparsity by more than one weight; the dense weights may have added zeros."""
    return f"{zeros} zeros of {size}, {target.label} asks for {requested:.0f}" if zeros < requested - 1 else None
