"""Checks that a folder holds exactly the files that a run wrote, each with its fingerprint."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError
from admm_prune.runs.card import CARD
from admm_prune.runs.claims import entries, has_own_digest, read_json
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS
from admm_prune.runs.report.pages import PLOT, REPORT
from admm_prune.verify.report import Verification

Manifest = dict[str, Any]
_OF_THE_HUB = (".gitattributes", ".cache", ".cache/huggingface")  # that its client adds to a downloaded folder
_CODE = (".py", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".so")  # what can run code when it is loaded


def check_manifest(report: Verification, manifest: Manifest, known: frozenset[str]) -> None:
    """Checks the manifest's own fingerprint, and unknown or missing keys."""
    report.expect(
        f"fingerprint of {MANIFEST}",
        has_own_digest(manifest),
        f"{MANIFEST} was altered after it was written: its fingerprint does not match",
    )
    for name in sorted(manifest.keys() - known):
        report.expect("fields", False, f"{MANIFEST} has the field '{name}', which no run writes")
    for name in sorted(known - manifest.keys()):
        report.expect("fields", False, f"{MANIFEST} lacks the field '{name}'")


def check_files(report: Verification, folder: Path, manifest: Manifest, models: frozenset[str]) -> bool:
    """Checks every entry of a folder against the manifest; False if a file of the model was altered.

    Args:
        models: subfolders that are checked as runs of their own.
    """
    files: dict[str, str] = manifest["files"]
    pages = _check_times(report, folder, manifest)
    expected = {*files, *manifest.get("weights", {}), *pages, MANIFEST, TIMINGS}
    parents = {parent.as_posix() for name in (*expected, *models) for parent in Path(name).parents}
    sound, present = True, set()
    for name, mode in entries(folder):
        if name in _OF_THE_HUB or name.startswith(".cache/huggingface/"):
            continue
        if stat.S_ISDIR(mode):
            if not (name in parents or any(name == model or name.startswith(f"{model}/") for model in models)):
                sound = report.expect("files", False, f"the folder {name} was not written by the run")
            continue
        if any(name.startswith(f"{model}/") for model in models) and name not in files:
            continue
        if not stat.S_ISREG(mode):
            sound = report.expect("files", False, f"{name} is a link or a special file, not a file written by the run")
        elif name not in expected:
            danger = ", and loading it can run code" if Path(name).suffix in _CODE else ""
            sound = report.expect("files", False, f"{name} was not written by the run{danger}")
        present.add(name)
    if CARD in files and not (CARD in present and file_sha256(folder / CARD) == files[CARD]):  # people edit their cards
        report.left_out.append(f"{report.where}{CARD}, which was {'edited' if CARD in present else 'removed'}")
        files = {name: digest for name, digest in files.items() if name != CARD}
    for name in sorted({*files, *pages, TIMINGS} - present):
        sound = report.expect("files", False, f"{name} is missing")
    for name in sorted(files.keys() & present):
        same = (folder / name).is_file() and file_sha256(folder / name) == files[name]
        sound &= report.expect("files", same, f"{name} is not the file that was written")
    for name in sorted(pages.keys() & present):
        same = (folder / name).is_file() and file_sha256(folder / name) == pages[name]
        report.expect("pages", same, f"{name} is not the page that was written; 'admm-prune report' rewrites it")
    report.by_fingerprint(*sorted(files), *sorted(pages), TIMINGS)
    return sound


def _check_times(report: Verification, folder: Path, manifest: Manifest) -> dict[str, str]:
    """Checks the file of times, with its own fingerprint and those of the pages that show times; returns the latter."""
    if not stat.S_ISREG((folder / TIMINGS).lstat().st_mode if (folder / TIMINGS).exists() else 0):
        return {}
    try:
        content = read_json(folder / TIMINGS)
    except UserError as error:
        report.expect("times", False, str(error))
        return {}
    pages = content.get("pages") if isinstance(content, dict) else None
    expected = {REPORT, PLOT} if "rows" in manifest else {REPORT}
    if not isinstance(pages, dict) or pages.keys() != expected:
        report.expect("times", False, f"{TIMINGS} is not what a run writes: it must name {sorted(expected)}")
        return {}
    report.expect(
        "times", has_own_digest(content), f"{TIMINGS} was altered after it was written: its fingerprint does not match"
    )
    if "rows" not in manifest:
        layers, names = content.get("layers"), [layer["name"] for layer in manifest["layers"]]
        report.expect(
            "times",
            isinstance(layers, dict) and layers.keys() == set(names) and all(map(is_number, layers.values())),
            f"{TIMINGS} does not have one time for each layer of {MANIFEST}",
        )
        report.expect("times", is_number(content.get("seconds")), f"{TIMINGS} has no seconds")
    return {str(name): str(digest) for name, digest in pages.items()}


def leaves(content: Any, place: str = "") -> list[str]:
    """The places of all values of a JSON content, as in "layers[].name"; of a list's items once."""
    if isinstance(content, dict) and content:
        places = [leaf for key, item in content.items() for leaf in leaves(item, f"{place}.{key}" if place else key)]
    elif isinstance(content, list) and content:
        places = [leaf for item in content for leaf in leaves(item, f"{place}[]")]
    else:
        places = [place]
    return list(dict.fromkeys(places))


def remaining(content: Manifest, recomputed: frozenset[str]) -> list[str]:
    """The fields of a manifest that are not recomputed, a whole branch by its name where none of it is."""

    def covered(place: str) -> bool:
        return any(place == name or place.startswith((f"{name}.", f"{name}[")) for name in recomputed)

    names = []
    for key, item in content.items():
        below = leaves({key: item})
        rest = [place for place in below if not covered(place)]
        names += [key] if len(rest) == len(below) else rest
    return names


def is_number(value: Any) -> bool:
    """A finite number of JSON, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
