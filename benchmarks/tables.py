"""The leaderboard's rows with their ratios, and its text table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.configurations import YARDSTICK
from benchmarks.journal import Record, number
from benchmarks.published import published

Row = dict[str, Any]

_TEXTS = {"layer", "fingerprint", "pattern", "solver", "settings", "status", "notes", "feasible"}
_WHOLE = {"rows", "width", "iterations", "repeats"}


def leaderboard_rows(records: Iterable[Record], peaks: dict[tuple[str, str, str], float], instances: Row) -> list[Row]:
    """Records of `solves.csv` as numbers, with these columns more:

    peak_mib                            where it was measured
    ratio, ratio_holdout                errors relative to those of the ALPS preset on the same layer and pattern, here
    published_alps[_holdout]            relative to those of ALPS's own code, where it was run on this layer
    published_sparsegpt[_holdout]       relative to those of SparseGPT's own code

    Args:
        peaks: by (layer, pattern, solver).
        instances: the published instance that a layer is, or None, by layer.
    """
    rows = [{name: _value(name, text) for name, text in record.items()} for record in records]
    yardsticks = {(row["layer"], row["pattern"]): row for row in rows if row["solver"] == YARDSTICK}
    for row in rows:
        place = (row["layer"], row["pattern"])
        row["peak_mib"] = peaks.get((*place, row["solver"]))
        references = published(instances.get(row["layer"]), row["pattern"])
        yardstick = yardsticks.get(place, {})
        for suffix, field in (("", "calibration"), ("_holdout", "holdout")):
            error = row[f"relative_error{suffix}"]
            row[f"ratio{suffix}"] = _ratio(error, yardstick.get(f"relative_error{suffix}"))
            for solver in ("alps", "sparsegpt"):
                reference = getattr(references[solver], field) if solver in references else None
                row[f"published_{solver}{suffix}"] = _ratio(error, reference)
    return rows


def text_table(rows: Sequence[Row], headline: str) -> str:
    """One block a layer and one for all: ratio to the ALPS preset, the same held out, and cost, for every pattern."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    wide = max([len(solver) for solver in solvers] + [6])
    lines = [
        headline,
        f"err, out: error relative to the ALPS preset ('{YARDSTICK}') in this run, on the calibration and the held-out",
        "Gram; cost: seconds in products H W^T of the layer's shape, measured beside each solve.",
        "!: failed or not feasible; ~: the machine was busy, the CPU time of this solve is below 0.8 of its seconds.",
    ]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = {(row["solver"], row["pattern"]): row for row in rows if row["layer"] == layer}
        shape = next(iter(cells.values()))
        lines += ["", f"{layer} ({shape['rows']} x {shape['width']})", _head(wide, patterns)]
        lines += [_line(solver, wide, [cells.get((solver, pattern)) for pattern in patterns]) for solver in solvers]
    lines += ["", *_summary(rows, solvers, wide), *_published_block(rows, solvers, wide)]
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[Row], solvers: Sequence[str], wide: int) -> list[str]:
    titles = "err mean  err max  out mean  out max  cost med  cost max   CPU med   CPU max  MiB max"
    lines = [
        "all layers and patterns: geometric mean and greatest ratio; median and greatest cost, by seconds as above",
        "and by CPU time without evaluations of the objective; greatest extra memory",
        f"{'':{wide}}  {titles}",
    ]
    for solver in solvers:
        mine = [row for row in rows if row["solver"] == solver]
        cells = []
        for name in ("ratio", "ratio_holdout"):
            values = _finite(row[name] for row in mine)
            cells += [_cell(geometric_mean(values), 8), _cell(max(values, default=None), 7)]
        for name in ("cost", "cost_cpu"):
            costs = _finite(row[name] for row in mine)
            cells += [_cell(median(costs) if costs else None, 8, 1), _cell(max(costs, default=None), 8, 1)]
        cells += [_cell(max(_finite(row["peak_mib"] for row in mine), default=None), 7, 1)]
        lines.append(f"{solver:{wide}}  " + "  ".join(cells))
    return lines


def _published_block(rows: Sequence[Row], solvers: Sequence[str], wide: int) -> list[str]:
    known = [row for row in rows if row["published_alps"] is not None]
    if not known:
        return []
    titles = "  ".join(("ALPS mean", "     max", "out mean", "     max", "SparseGPT mean", "     max"))
    lines = ["", "relative to the authors' own code, on the instances it was run on", f"{'':{wide}}  {titles}"]
    for solver in solvers:
        cells = []
        for name, width in (("published_alps", 9), ("published_alps_holdout", 8), ("published_sparsegpt", 14)):
            values = _finite(row[name] for row in known if row["solver"] == solver)
            cells += [_cell(geometric_mean(values), width), _cell(max(values, default=None), 8)]
        lines.append(f"{solver:{wide}}  " + "  ".join(cells))
    return lines


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing, or of what has no logarithm."""
    if not values or min(values) <= 0:
        return None
    return math.exp(sum(map(math.log, values)) / len(values))


def _head(wide: int, patterns: Sequence[str]) -> str:
    names = "".join(f"  |{pattern:^21}" for pattern in patterns)
    columns = "  |  err    out     cost " * len(patterns)
    return f"{'':{wide}}{names}\n{'':{wide}}{columns}"


def _line(solver: str, wide: int, cells: Sequence[Row | None]) -> str:
    line = f"{solver:{wide}}"
    for row in cells:
        if row is None:
            line += f"  |{'':21}"
            continue
        mark = "!" if row["feasible"] != "True" else "~" if _disturbed(row) else " "
        line += f"  |{_cell(row['ratio'], 6)} {_cell(row['ratio_holdout'], 6)} {_cell(row['cost'], 6, 1)}{mark}"
    return line


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None or math.isnan(value) else f'{value:.{digits}f}':>{width}}"


def _disturbed(row: Row) -> bool:
    spent = row["cpu_seconds"] + row["evaluation_seconds"]
    return bool(row["seconds"] > 0.005 and spent < 0.8 * row["seconds"])


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _ratio(error: float | None, reference: float | None) -> float | None:
    return None if error is None or not reference else error / reference


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    value = number(text)
    return int(value) if name in _WHOLE and value is not None else value
