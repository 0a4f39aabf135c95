"""The result of a verification (recomputed, checked by fingerprint, not checked), and the fields of a manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from admm_prune.methods.base import LayerReport
from admm_prune.methods.selection import Selection
from admm_prune.methods.target import Target
from admm_prune.models.evaluate import Evaluation
from admm_prune.runs.compare import RECORDED
from admm_prune.runs.journal.folder import MANIFEST
from admm_prune.runs.manifest import TextRecord, environment
from admm_prune.settings import TextSettings, recorded_names

TOLERANCE = 1e-6  # relative, between a claimed number and the recomputed one
Manifest = dict[str, Any]


class Verdict(Enum):
    """The outcome of a verification. The value is its name in JSON.

    VERIFIED: every claim was recomputed or agrees with its fingerprint.
    INCOMPLETE: no claim was refuted, but one that matters could not be checked; the report names it.
    REJECTED: a claim does not hold, or a file is not what was written.
    """

    VERIFIED = "verified"
    INCOMPLETE = "incomplete"
    REJECTED = "rejected"

    @property
    def exit_status(self) -> int:
        return {Verdict.VERIFIED: 0, Verdict.REJECTED: 1, Verdict.INCOMPLETE: 3}[self]


@dataclass(kw_only=True)
class Verification:
    """The report of a verification.

    Attributes:
        kind: "layer", "run" or "comparison".
        checked: claims that were recomputed and compared.
        fingerprinted: fields and files that cannot be recomputed; unless a failure is reported they agree with their
            fingerprint.
        failures: a sentence for every claim that does not hold.
        unchecked: claims that could not be checked, and why. The verdict is then at best INCOMPLETE.
        left_out: checks that were skipped, and why: at the caller's request, or because they hold in the environment of
            the run alone.
        notes: on checks that are not exact.
        certificates: sentences on the weight beyond its claims.
        numbers: recomputed, by name.
        where: put before every failure and note, such as the model of a comparison.
    """

    path: Path
    kind: str
    checked: list[str] = field(default_factory=list)
    fingerprinted: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    certificates: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    def at(self, where: str) -> Verification:
        """This report, with another text before failures and notes."""
        return replace(self, where=where)

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return Verdict.REJECTED
        return Verdict.INCOMPLETE if self.unchecked else Verdict.VERIFIED

    @property
    def verified(self) -> bool:
        return self.verdict is Verdict.VERIFIED

    def expect(self, what: str, holds: bool, otherwise: str) -> bool:
        """Records a check, and the failure where it does not hold."""
        if what not in self.checked:
            self.checked.append(what)
        if not holds:
            self.failures.append(f"{self.where}{otherwise}")
        return holds

    def compare(self, what: str, claimed: Any, recomputed: Any, slack: float = 0.0) -> bool:
        """Compares a claim: numbers to 1e-6 relative and `slack` absolute, all else exactly."""
        same = claimed == recomputed
        if isinstance(claimed, float | int) and isinstance(recomputed, float | int) and math.isfinite(recomputed):
            same = same or abs(claimed - recomputed) <= TOLERANCE * abs(recomputed) + slack
        return self.expect(what, bool(same), f"claimed {what} {shown(claimed)}, recomputed {shown(recomputed)}")

    def agree(self, what: str, claimed: Any, recomputed: Any) -> bool:
        """Compares a claim exactly, types included: True is not 1, and 1 is not 1.0."""
        same = repr(claimed) == repr(recomputed)
        return self.expect(what, same, f"claimed {what} {shown(claimed)}, recomputed {shown(recomputed)}")

    def by_fingerprint(self, *names: str) -> None:
        """Records claims that are covered by a fingerprint alone."""
        self.fingerprinted += [name for name in dict.fromkeys(names) if name not in self.fingerprinted]

    def open(self, note: str) -> None:
        """Records a claim that could not be checked."""
        note = f"{self.where}{note}"
        if note not in self.unchecked:
            self.unchecked.append(note)

    def note(self, note: str) -> None:
        """Records what a check allowed."""
        self.notes.append(f"{self.where}{note}")

    def summary(self) -> str:
        """The verdict in a line."""
        if self.verdict is Verdict.REJECTED:
            return f"rejected: {len(self.failures)} claims do not hold"
        if self.verdict is Verdict.INCOMPLETE:
            return f"incomplete: nothing was refuted, but {len(self.unchecked)} claims could not be checked"
        return f"verified, without {' and '.join(self.left_out)}" if self.left_out else "verified"

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON. "verified" is null where the verdict is INCOMPLETE."""
        lists = ("failures", "checked", "fingerprinted", "unchecked", "left_out", "notes", "certificates")
        return {
            "path": str(self.path),
            "kind": self.kind,
            "outcome": self.verdict.value,
            "verified": None if self.verdict is Verdict.INCOMPLETE else self.verified,
            **{name: getattr(self, name) for name in lists},
            **self.numbers,
        }


def same_fraction(claimed: float, recomputed: float) -> bool:
    """Whether two quotients of the same counts are equal, with a tolerance between rounding and one count."""
    return bool(abs(claimed - recomputed) <= 1e-12)


def shown(value: Any) -> str:
    """A number with the digits that a comparison needs; anything else in one line, truncated."""
    return f"{value:.9g}" if isinstance(value, float) else "none" if value is None else in_full(value)


def in_full(value: Any) -> str:
    """A value as Python prints it, in one line, truncated."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_fields(report: Verification, manifest: Manifest) -> None:
    """Reports every object of the manifest with missing or unknown fields."""
    settings = manifest["settings"]
    compared = "methods" in settings
    expected: list[tuple[str, Any, set[str]]] = [
        ("settings", settings, RECORDED if compared else recorded_names()),
        ("settings.text", settings["text"], _names(TextSettings)),
        ("settings.selection", settings["selection"], _names(Selection)),
        *(("a target", target, _names(Target)) for target in settings.get("targets") or [settings["target"]]),
        ("environment", manifest["environment"], set(environment("cpu"))),
        ("dense", manifest["dense"], _names(Evaluation)),
        *((f"texts.{role}", record, _names(TextRecord)) for role, record in manifest["texts"].items()),
    ]
    if manifest["tasks"] is not None:
        expected.append(("tasks", manifest["tasks"], {"results", "versions", "shots", "limit", "lm_eval"}))
    if "rows" not in manifest:
        layers = _names(LayerReport) - {"seconds"}  # these are in the file of times
        expected += [
            ("pruned", manifest["pruned"], _names(Evaluation)),
            *((f"layers: {layer['name']}", layer, layers) for layer in manifest["layers"]),
            *((f"weights: {name}", file, {"sha256", "tensors"}) for name, file in manifest["weights"].items()),
        ]
        if manifest["continuation"]:
            expected.append(("continuation", manifest["continuation"], {"prompt", "dense", "pruned"}))
    for name, content, keys in expected:
        present = set(content) if isinstance(content, dict) else set()
        report.expect(
            "fields",
            present == keys,
            f"{MANIFEST}: {name} does not have the fields that a run writes: {sorted(present ^ keys)[:3]}",
        )


def _names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}
