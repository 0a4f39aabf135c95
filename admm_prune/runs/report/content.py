"""Content of a report, computed from manifests and from the weights in safetensors files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.models.evaluate import METRICS, RANKING
from admm_prune.runs.journal.folder import flattened

Manifest = dict[str, Any]
_NUMBER = re.compile(r"\d+(\.\d+)?")
_SEVERITIES = ("error", "warning", "info", "good")
Layer = Mapping[str, Any]  # of a manifest
TILES = 16
_COLUMNS = (  # of a layer in the CSV table, after its name and shape
    *("sparsity", "relative_error", "relative_error_validation", "objective", "bound"),
    *("ridge", "damping", "iterations", "seconds", "status"),
)


@dataclass
class Advice:
    """One kind of diagnosis over all layers.

    Attributes:
        said: the text of the finding for the first layer.
        layers: with this finding.
    """

    code: str
    severity: str
    said: str
    advice: str
    layers: list[str] = field(default_factory=list)


def advice_of(layers: Iterable[Mapping[str, Any]]) -> list[Advice]:
    """The findings on all layers by kind, the gravest first, then the most frequent."""
    by_code: dict[str, Advice] = {}
    for layer in layers:
        for finding in layer["diagnosis"]:
            kind = by_code.setdefault(
                finding["code"],
                Advice(finding["code"], finding["severity"], finding["finding"], finding["advice"]),
            )
            kind.layers.append(layer["name"])
            if _SEVERITIES.index(finding["severity"]) < _SEVERITIES.index(kind.severity):
                kind.severity, kind.said, kind.advice = finding["severity"], finding["finding"], finding["advice"]
    return sorted(by_code.values(), key=lambda kind: (_SEVERITIES.index(kind.severity), -len(kind.layers)))


def notes_of(manifest: Manifest) -> list[tuple[str, int]]:
    """The notes of the run and of its layers: (note, number of layers), 0 for the run. Of notes that differ in numbers
    alone, the first one stands for all."""
    notes: dict[str, list[str]] = {}
    for layer in manifest["layers"]:
        advised = {finding["finding"] for finding in layer["diagnosis"]}  # is shown already
        for note in layer["notes"]:
            if note not in advised:
                notes.setdefault(_NUMBER.sub("0", note), []).append(note)
    alike = [(some[0] if len(set(some)) == 1 else f"{some[0]}, for instance", len(some)) for some in notes.values()]
    return [*((note, 0) for note in dict.fromkeys(manifest["notes"])), *alike]


def label_of(target: str, sparsity: float, selection: Mapping[str, Any]) -> str:
    """The target; where targets, ignore or overrides choose the weights, the fraction of all of them that was pruned,
    such as "4.7%"."""
    return f"{100 * sparsity:.1f}%" if any(selection.values()) else target


def options_of(settings: Mapping[str, Any]) -> list[str]:
    """The options by which a run differs from its method alone, as on the command line."""
    texts = {name: settings.get(name) for name in ("problem", "constraint", "allocation", "coordinate", "refit")}
    lists = {name: value if isinstance(value, str) else ",".join(value) for name, value in texts.items() if value}
    return [f"--{name} {text}" for name, text in lists.items()]


def best_of_target(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each row of a comparison has the best first primary metric at its target; None is never the best."""
    sign = 1 if METRICS[RANKING].lower_is_better else -1
    best: dict[str, float] = {}
    for row in rows:
        if row[RANKING] is not None:
            best[row["target"]] = min(sign * row[RANKING], best.get(row["target"], math.inf))
    return [row[RANKING] is not None and sign * row[RANKING] == best[row["target"]] for row in rows]


def place_of(name: str) -> tuple[int, str]:
    """(the number of the block, the matrix within it): (3, "mlp.up_proj") of "model.layers.3.mlp.up_proj.weight"."""
    match = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    block, rest = (int(match[1]), match[2]) if match else (0, name)
    return block, rest.removesuffix(".weight")


@dataclass(frozen=True)
class Change:
    """A number in two runs; None where one of them has none."""

    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a and self.b is not None else None


def figures_of(a: Manifest, b: Manifest) -> list[Change]:
    """The figures of two runs as wholes."""
    places: dict[str, tuple[str, ...]] = {
        f"{metric.name}, {which}": (which, name)
        for name, metric in METRICS.items()
        for which in (("dense", "pruned") if metric.primary else ("pruned",))
    }
    places |= {"sparsity": ("sparsity",), "seconds of pruning": ("timings", "seconds")}
    layer_errors = [[layer["relative_error"] for layer in run["layers"]] for run in (a, b)]
    changes = [Change(name, _at(a, place), _at(b, place)) for name, place in places.items()]
    return [*changes, Change("mean relative error of the layers", *(mean_error(errors) for errors in layer_errors))]


def layers_of(a: Manifest, b: Manifest, field: str) -> list[Change]:
    """A field of every layer of either run, in the order of the first."""
    first, second = ({layer["name"]: layer.get(field) for layer in run["layers"]} for run in (a, b))
    return [Change(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])]


def unlike(a: Manifest, b: Manifest) -> list[tuple[str, Any, Any]]:
    """(name, in a, in b) of every setting, text, version and note that is not the same in both runs."""
    keys = ("budget", "settings", "model_revision", "texts", "environment", "notes")
    first, second = (flattened({key: run.get(key) for key in keys}) for run in (a, b))
    values = [(name, *(run.get(name, "not there") for run in (first, second))) for name in first | second]
    return [(name, one, other) for name, one, other in values if one != other]


def mean_error(errors: Sequence[float | None]) -> float | None:
    """The mean over the layers of a model; None unless every one has an error."""
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known and len(known) == len(errors) else None


def worst_first(layers: Iterable[Layer]) -> list[Layer]:
    """The layers by their relative error, the largest first; those without one last, the densest of them first."""

    def key(layer: Layer) -> tuple[bool, float, float]:
        error = layer["relative_error"]
        return error is None, -(error or 0.0), layer["sparsity"]

    return sorted(layers, key=key)


def as_csv(layers: Iterable[Layer]) -> str:
    """A table of all layers in their order in the model, for spreadsheets."""
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", "block", "matrix", "rows", "columns", *_COLUMNS])
    for layer in layers:
        values = ["" if layer.get(name) is None else layer[name] for name in _COLUMNS]
        writer.writerow([layer["name"], *place_of(layer["name"]), *layer["shape"], *values])
    return text.getvalue()


@dataclass(frozen=True)
class Sublayer:
    """The number of groups removed from a sublayer of a block."""

    name: str
    removed: int
    left: int

    @property
    def part(self) -> float:
        return self.removed / ((self.removed + self.left) or 1)


def allocation_of(details: Manifest) -> list[Sublayer]:
    """The number of groups removed from every sublayer by a structured method; empty for others."""
    removed = details.get("removed", {})
    return [Sublayer(name, removed.get(name, 0), left) for name, left in details.get("units", {}).items()]


def _at(content: Any, place: Sequence[str]) -> float | None:
    for key in place:
        content = content[key]
    return None if content is None else float(content)


@dataclass(frozen=True)
class Tiles:
    """The fraction of remaining weights in tiles of one matrix.

    Attributes:
        share: (tiles down, tiles across), 0 to 1, at most 16 either way.
        height, width: of the stored matrix, as parts of the dense one: below 1 where rows or columns were removed.
    """

    share: np.ndarray[Any, Any]
    height: float
    width: float


class Weights:
    """The matrices of a saved model by the names of its layers, as (out, in)."""

    def __init__(self, folder: Path, layers: Iterable[Layer]) -> None:
        self._layers = {layer["name"]: layer for layer in layers}
        self._file: dict[str, Path] = {}
        self._transposed = False
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                for name in set(file.keys()) & set(self._layers):
                    self._file[name] = path
                    rows, columns = file.get_slice(name).get_shape()
                    dense = self._layers[name]["shape"]
                    # All of a model's matrices are stored in the same orientation, which a square one does not show.
                    self._transposed |= [columns, rows] == dense != [rows, columns]

    def read(self, name: str) -> Tensor | None:
        """None where the files hold no such matrix, which may be under another name."""
        path = self._file.get(name)
        if path is None:
            return None
        with _opened(path) as file:
            stored: Tensor = file.get_tensor(name)
        return stored.T if self._transposed else stored

    def tiles(self, name: str) -> Tiles | None:
        weight = self.read(name)
        if weight is None:
            return None
        remaining = (weight != 0).numpy()
        sizes = [-(-(n - np.arange(min(TILES, n))) // min(TILES, n)) for n in remaining.shape]  # the first are larger
        for axis, size in enumerate(sizes):
            remaining = np.add.reduceat(remaining, np.cumsum(size) - size, axis=axis, dtype=np.int64)
        (rows, columns), dense = weight.shape, self._layers[name]["shape"]
        return Tiles(remaining / np.outer(*sizes), rows / dense[0], columns / dense[1])


def overlap(a: Weights, b: Weights, names: Iterable[str]) -> dict[str, float]:
    """|A and B| / |A or B| of the supports, for every matrix that both hold in one shape; 1 where both are empty."""
    overlaps = {}
    for name in names:
        first, second = a.read(name), b.read(name)
        if first is None or second is None or first.shape != second.shape:
            continue
        support, other_support = first != 0, second != 0
        union = int((support | other_support).sum())
        overlaps[name] = int((support & other_support).sum()) / union if union else 1.0
    return overlaps


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
