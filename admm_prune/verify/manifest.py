"""The fields that a manifest has: those of the dataclasses that are written into it, no more and no fewer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from admm_prune.methods.base import LayerReport
from admm_prune.methods.struprune.selectors import Selection
from admm_prune.methods.target import Target
from admm_prune.models.evaluate import Evaluation
from admm_prune.runs.compare import ComparisonSettings
from admm_prune.runs.journal.folder import MANIFEST
from admm_prune.runs.manifest import TextRecord, environment
from admm_prune.runs.prune import RunSettings
from admm_prune.runs.texts import TextSettings
from admm_prune.verify.report import Verification

Manifest = dict[str, Any]


def check_fields(report: Verification, manifest: Manifest, where: str) -> None:
    """Reports every object of the manifest whose fields are not those that a run writes."""
    settings = manifest["settings"]
    compared = "methods" in settings
    wanted: list[tuple[str, Any, set[str]]] = [
        ("settings", settings, _names(ComparisonSettings if compared else RunSettings)),
        ("settings.text", settings["text"], _names(TextSettings)),
        ("settings.selection", settings["selection"], _names(Selection)),
        *(("a target", target, _names(Target)) for target in settings.get("targets") or [settings["target"]]),
        ("environment", manifest["environment"], set(environment())),
        ("dense", manifest["dense"], _names(Evaluation)),
        *((f"texts.{role}", record, _names(TextRecord)) for role, record in manifest["texts"].items()),
    ]
    if "rows" not in manifest:
        layers = _names(LayerReport) - {"seconds"}  # these are in the file of times
        wanted += [
            ("pruned", manifest["pruned"], _names(Evaluation)),
            *((f"layers: {layer['name']}", layer, layers) for layer in manifest["layers"]),
            *((f"weights: {name}", file, {"sha256", "tensors"}) for name, file in manifest["weights"].items()),
        ]
        if manifest["continuation"]:
            wanted.append(("continuation", manifest["continuation"], {"prompt", "dense", "pruned"}))
    for name, content, keys in wanted:
        found = set(content) if isinstance(content, dict) else set()
        report.expect(
            "fields",
            found == keys,
            f"{where}{MANIFEST}: {name} has not the fields that a run writes: {sorted(found ^ keys)[:3]}",
        )


def _names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}
