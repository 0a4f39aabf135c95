"""Re-checks a finished run or comparison from its folder alone: weights, sparsity, config, perplexity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from admm_prune.data.sequences import Sequences
from admm_prune.data.sources import PYTHON_OBJECT, is_file_name
from admm_prune.errors import UserError
from admm_prune.models import evaluate as evaluation
from admm_prune.models.loading import METADATA_KEY, LoadedModel, load
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.recipes.targets import Target
from admm_prune.runs.claims import weights_sha256
from admm_prune.runs.device import pick_device
from admm_prune.runs.folder import MANIFEST
from admm_prune.runs.reports.content import mean_error
from admm_prune.runs.reports.pages import read_manifest
from admm_prune.runs.texts import Texts, TextSettings, read_judging_text
from admm_prune.runs.verification import Verification

Manifest = dict[str, Any]
_COUNTED = ("Unstructured(", "RowWise(", "NofM(")  # sets whose target every matrix meets by itself
_FIGURES = ("perplexity", "bits_per_char", "tokens", "characters")


def verify_folder(folder: Path, *, data: str | None = None, quick: bool = False, device: str = "auto") -> Verification:
    """Re-checks what 'admm-prune run' or 'admm-prune compare' wrote.

    Args:
        data: the evaluation text, where it is not any more where the run read it.
        quick: leave the perplexity out.

    Raises:
        UserError: no finished run, or `data` is not the text of the run.
    """
    manifest = read_manifest(folder)
    place = pick_device(device)
    comparing = "rows" in manifest
    report = Verification(path=folder, kind="comparison" if comparing else "run")
    if not quick and data is None and _location(manifest) is None:
        report.unchecked.append("perplexity: its text is not where the run read it; name it with --data")
        quick = True
    elif quick:
        report.unchecked.append("perplexity: left out by --quick")
    try:
        if comparing:
            _verify_comparison(report, folder, manifest, data, quick, place)
        else:
            _verify_run(report, folder, manifest, data, quick, place, "")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is no manifest of this release ({type(error).__name__}: {error})"
        ) from error
    report.unchecked.append(
        "the figures of the dense model and the layers' errors: they need what is not in the folder"
    )
    return report


def _verify_comparison(
    report: Verification, folder: Path, manifest: Manifest, data: str | None, quick: bool, device: str
) -> None:
    named = {row["folder"] for row in manifest["rows"]}
    found = {path.relative_to(folder).as_posix() for path in (folder / "models").glob("*") if path.is_dir()}
    for missing in sorted(named - found):
        report.expect("models", False, f"the table has a row for {missing}, which is not there")
    for extra in sorted(found - named):
        report.expect("models", False, f"{extra} has no row in the table")
    for row in manifest["rows"]:
        where = f"{row['folder']}: "
        if row["folder"] not in found:
            continue
        content = read_manifest(folder / row["folder"])
        told = {
            "method": content["method"],
            "target": content["target"],
            "sparsity": content["sparsity"],
            "perplexity": content["pruned"]["perplexity"],
            "reloaded_perplexity": content["pruned"]["perplexity"],
            "bits_per_char": content["pruned"]["bits_per_char"],
            "relative_error": mean_error([layer["relative_error"] for layer in content["layers"]]),
        }
        for name, value in told.items():
            report.expect(
                f"row {name}",
                _same(row[name], value),
                f"{where}the table says {name} {row[name]}, the model's manifest {value}",
            )
        report.expect(
            "dense figures", content["dense"] == manifest["dense"], f"{where}other figures of the dense model"
        )
        _verify_run(report, folder / row["folder"], content, data, quick, device, where)


def _verify_run(
    report: Verification, folder: Path, manifest: Manifest, data: str | None, quick: bool, device: str, where: str
) -> None:
    if not _verify_weights(report, folder, manifest, where):
        return
    told = {key: manifest[key] for key in ("method", "target", "sparsity")}
    try:
        config = json.loads((folder / "config.json").read_bytes()).get(METADATA_KEY)
    except (OSError, ValueError, AttributeError) as error:
        report.expect("config.json", False, f"{where}config.json cannot be read: {error}")
        return
    report.expect(
        "config.json", config == told, f"{where}config.json says {config}, {MANIFEST} {told}: they must agree"
    )
    loaded = load(str(folder), device=device)
    _verify_sparsity(report, loaded, manifest, where)
    if quick:
        return
    judging = _judging_text(manifest, loaded, data)
    recorded = manifest["texts"]["evaluation"]["token_hash"]
    if judging.token_hash != recorded:
        message = (
            f"the evaluation text is not the recorded one: token hash {recorded[:12]} became {judging.token_hash[:12]}"
        )
        if data is not None:
            raise UserError(f"--data {data}: {message}")
        report.expect("evaluation text", False, where + message)
        return
    report.expect("evaluation text", True, "")
    figures = evaluation.evaluate(loaded.model, judging)
    for name in _FIGURES:
        report.expect(
            name,
            _same(manifest["pruned"][name], getattr(figures, name), tolerance=1e-6),
            f"{where}claimed {name} {manifest['pruned'][name]}, recomputed {getattr(figures, name)}",
        )
        report.numbers[f"{where}{name}"] = getattr(figures, name)


def _verify_weights(report: Verification, folder: Path, manifest: Manifest, where: str) -> bool:
    """Files, fingerprints and finite values; False where the model had better not be loaded."""
    claimed = manifest["weights"]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not report.expect(
        "weight files", names == sorted(claimed), f"{where}weights claimed in {sorted(claimed)}, found in {names}"
    ):
        return False
    try:
        found = weights_sha256(folder)
    except (SafetensorError, OSError) as error:
        return report.expect("weight files", False, f"{where}the weights cannot be read: {error}")
    sound = True
    for name in names:
        then, now = claimed[name]["tensors"], found[name]["tensors"]
        changed = [key for key in then if key in now and then[key] != now[key]]
        for key in changed:
            report.expect("tensors", False, f"{where}the tensor {key} in {name} is not the one that was saved")
        for key in sorted(then.keys() ^ now.keys()):
            sound = report.expect(
                "tensors", False, f"{where}{name} {'lacks' if key in then else 'has gained'} the tensor {key}"
            )
        report.expect(
            "tensors",
            bool(changed) or then.keys() != now.keys() or claimed[name]["sha256"] == found[name]["sha256"],
            f"{where}{name} is not the file that was saved, though its tensors are",
        )
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                finite = bool(torch.isfinite(file.get_tensor(key)).all())
                sound &= report.expect("finite values", finite, f"{where}the tensor {key} holds NaN or Inf")
    return sound


def _verify_sparsity(report: Verification, loaded: LoadedModel, manifest: Manifest, where: str) -> None:
    views = {view.name: view for block in decoder_blocks(loaded.model) for view in block.weights}
    claims = {layer["name"]: layer for layer in manifest["layers"]}
    report.expect(
        "layers",
        claims.keys() == views.keys(),
        f"{where}the layers claimed are not those of the model: {sorted(claims.keys() ^ views.keys())[:3]}",
    )
    target = _target(manifest)
    if target is None:
        report.expect("target", False, f"{where}the target {manifest['target']} is not among the settings")
        return
    left = {name: int(view.read().count_nonzero()) for name, view in views.items()}
    sizes = {name: claim["shape"][0] * claim["shape"][1] for name, claim in claims.items()}  # of the dense weights
    for name in views.keys() & claims.keys():
        report.expect(
            "sparsity of every matrix",
            abs((1 - claims[name]["sparsity"]) * sizes[name] - left[name]) < 0.5,
            f"{where}{name}: claimed sparsity {claims[name]['sparsity']}, found {1 - left[name] / sizes[name]}",
        )
    total, kept = sum(sizes.values()), sum(left.values())
    report.expect(
        "block weights",
        manifest["block_weights"] == total,
        f"{where}claimed {manifest['block_weights']} weights in the dense blocks, the layers' shapes hold {total}",
    )
    found = 1 - kept / total
    report.numbers[f"{where}sparsity"] = found
    report.expect(
        "sparsity",
        abs(manifest["sparsity"] - found) * total < 0.5,
        f"{where}claimed sparsity {manifest['sparsity']}, found {found}",
    )
    own = {name: found for name in views if (found := target.at(name)) is not None}
    missed = {
        name: _missed(views[name], left[name], sizes.get(name, views[name].read().numel()), one)
        for name, one in own.items()
    }
    constraint = manifest["settings"].get("constraint")
    if constraint is not None and not constraint.startswith(_COUNTED):
        missed = {}
        report.unchecked.append(f"{where}the target: only the set {constraint} can tell")
    elif manifest["budget"] == "model" and target.pattern is None:
        asked = sum((one.sparsity or 0.0) * sizes[name] for name, one in own.items() if name in sizes)
        missed = {"all matrices together": _too_few(total - kept, total, asked, target)}
    elif manifest["budget"] not in ("matrix", "model"):
        missed = {}
        report.unchecked.append(f"{where}the target: it is a fraction of the {manifest['budget']}, not of the weights")
    for name, how in missed.items():
        report.expect("target", how is None, f"{where}{name}: {how}")


def _missed(view: WeightView, left: int, size: int, target: Target) -> str | None:
    """How a matrix of so many dense weights misses its target."""
    if target.pattern is None:
        return _too_few(size - left, size, (target.sparsity or 0.0) * size, target)
    kept, group = target.pattern
    over = int((view.read().unflatten(1, (-1, group)).count_nonzero(dim=2) > kept).sum())
    return f"{over} groups keep more than {kept} of {group}" if over else None


def _too_few(zeros: int, size: int, asked: float, target: Target) -> str | None:
    """How zeros miss a sparsity by more than one weight. Zeros that the dense weights had may come on top."""
    return f"{zeros} zeros of {size}, {target.label} asks for {asked:.0f}" if zeros < asked - 1 else None


def _target(manifest: Manifest) -> Target | None:
    """The target in full; its label is rounded."""
    settings = manifest["settings"]
    for content in settings.get("targets") or [settings["target"]]:
        pattern = content["pattern"]
        layers = tuple((name, own) for name, own in content["layers"])
        target = Target(content["sparsity"], None if pattern is None else (pattern[0], pattern[1]), layers)
        if target.label == manifest["target"]:
            return target
    return None


def _judging_text(manifest: Manifest, loaded: LoadedModel, data: str | None) -> Sequences:
    settings = TextSettings(**manifest["settings"]["text"])
    if settings.eval_data is not None:
        return read_judging_text(replace(settings, eval_data=data or settings.eval_data), loaded)
    return Texts(replace(settings, data=data or settings.data), loaded).evaluation


def _location(manifest: Manifest) -> str | None:
    """Where the evaluation text was read; None where that is a path at which nothing is now."""
    text = manifest.get("settings", {}).get("text", {})
    name = text.get("eval_data") or text.get("data") or ""
    gone = is_file_name(name) and not Path(name).expanduser().exists()
    return None if gone or name == PYTHON_OBJECT else name


def _same(claimed: Any, found: Any, tolerance: float = 1e-12) -> bool:
    """Equal; numbers to a relative tolerance; null for what is not finite."""
    if not isinstance(found, float):
        return bool(claimed == found)
    if claimed is None:
        return found - found != 0
    return isinstance(claimed, float | int) and abs(claimed - found) <= tolerance * abs(found)
