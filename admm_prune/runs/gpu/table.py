"""The benchmark as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from admm_prune.runs.gpu.ceilings import Ceilings
from admm_prune.runs.gpu.rows import Row

_HIDDEN = {"kernels", "status", "sparsity"}


def rendered(content: dict[str, Any], rows: Sequence[Row], ceilings: Ceilings) -> str:
    """Header, ceilings, a block for each section, what was to be shown, and the model of time and memory."""
    about = content["environment"]
    lines = [
        f"{content['date']}, {about['device']}, torch {about['versions'].get('torch')}, kernels: {about['kernels']}",
        content["command"],
        *([content["gap"]] if content["gap"] else []),
        "",
        "ceilings measured in this run: "
        + ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings.operations.items())
        + f", read {ceilings.read / 1e9:.0f} GB/s, copy {ceilings.copied / 1e9:.0f} GB/s",
        "floor: operations and bytes at these ceilings, the shorter hidden behind the longer; reached: floor / time;",
        "* marks baselines, which are written for this benchmark or are torch's own.",
    ]
    for section in dict.fromkeys(row.section for row in rows):
        own = [row for row in rows if row.section == section]
        wide = max(len(row.name) for row in own) + 4
        case = max(len(row.case) for row in own) + 2
        lines += [
            "",
            f"{section}",
            f"{'':{wide}}{'':{case}}{'ms':>11}{'floor':>10}{'reached':>9}{'GB':>8}{'error':>11}",
        ]
        lines += [_line(row, wide, case) for row in own]
    judged = "to be shown" + (", but not by tiny shapes" if content["gap"] else "")
    lines += ["", judged, *(_claim_line(claim) for claim in content["claims"])]
    return "\n".join([*lines, *_model_lines(content["model"])]) + "\n"


def _line(row: Row, wide: int, case: int) -> str:
    name = f"{row.name}{' *' if row.baseline else ''}"
    start = f"{name:{wide}}{row.case:{case}}"
    if row.status != "measured" or row.seconds is None:
        return f"{start}{row.status}: {row.note}"
    floor = "" if row.floor_seconds is None else f"{1e3 * row.floor_seconds:.3f}"
    reached = "" if row.reached is None else f"{row.reached:.2f}"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
    error = "" if row.error is None else f"{row.error:.4e}"
    more = ", ".join(f"{key} {_figure(value)}" for key, value in row.more.items() if key not in _HIDDEN)
    text = f"{start}{1e3 * row.seconds:>11.3f}{floor:>10}{reached:>9}{peak:>8}{error:>11}  {more}"
    return (text + (f"; {row.note}" if row.note else "")).rstrip(" ;")


def _claim_line(claim: dict[str, Any]) -> str:
    value = claim["value"]
    verdict = "" if claim["met"] is None else " (met)" if claim["met"] else " (NOT met)"
    said = "not measured" if value is None else f"{_figure(value)}{verdict}"
    return f"{claim['what']}: {said}; asked: {claim['asked']}"


def _model_lines(model: dict[str, Any]) -> list[str]:
    if not model["layers"] and not model["models"]:
        return []
    lines = ["", "time of a layer = overhead + floor / reached, fitted over the shapes and targets above"]
    lines += [
        f"{name:12} overhead {1e3 * fit['overhead']:.2f} ms, reached {fit['reached']:.2f}, {fit['rows']} rows, "
        f"worst {fit['worst']:.0%} off"
        for name, fit in model["layers"].items()
    ]
    lines += ["", "whole models, local pruning (predicted; largest: the precision that takes most of the floor)"]
    lines += [
        f"{m['method']:12}{m['shape']:6}{m['parameters'] / 1e9:>6.1f} B {m['seconds']:>10.1f} s, floor "
        f"{m['floor_seconds']:.1f} s, bound by {m['bound']} ({m['largest_part']}), beyond the weights "
        f"({m['weights_bytes'] / 1e9:.0f} GB, or one block of them) {m['working_bytes'] / 1e9:.1f} GB; "
        f"time from {m['from']}, memory {'counted' if m['working_from'] == 'counted' else 'from blocks'}"
        for m in model["models"]
    ]
    grown = model["structured_peak"]
    if grown is not None:
        lines += [
            "",
            f"struprune's peak beyond the model grows as parameters^{grown['exponent']:.2f}, {grown['rows']} rows",
        ]
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
