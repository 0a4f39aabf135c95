"""The table of records: the least known value and the largest proved bound of every problem, checked before entry.

    python -m collection.record PROBLEM_ID SOLUTION [CERTIFICATE] [--holder NAME]

The checker recomputes the value and the bound, and only improvements of the record are kept. "-" in place of SOLUTION
offers a certificate alone. In a stack of rows every row is compared separately, and the better rows are combined; if
the files of the record are not available, or not those of the table, the sums are compared instead. Values are rounded
up to ten digits, and bounds down. The files of committed problems are in `solutions/`, those of others in
`built/solutions/`, with their SHA-256 in the table; the command under `settings` makes them again. Several commands may
offer records concurrently.

A problem that was built on another machine differs from that of the manifest by rounding. Solutions and certificates
are checked with the problem that they were made for, whose fingerprint is in the table, and must then be better than
the record by more than the rounding. The gap is that of both records, each with its own problem.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from admm_prune.errors import UserError
from benchmarks.journal import number
from collection import build, checker
from collection.checker import Array, CheckError, Problem
from collection.files import write_certificate, write_solution

TABLE = build.FOLDER / "records.csv"
NOTES = ("solver", "settings", "seconds", "date", "holder")  # of a solution and of a certificate
COLUMNS = (
    *("id", "energy", "value", "bound", "gap", "worst_row_gap"),
    *(f"value_{name}" for name in (*NOTES, "sha256", "problem")),
    *(f"bound_{name}" for name in (*NOTES, "sha256", "problem")),
)
_KEPT = {"value": "solution", "bound": "certificate"}  # the files behind the columns
_BETTER = 1e-7  # relative: less is rounding, and no record
_BETTER_REBUILT = 1e-5  # of a problem with other rounding
_LONGEST_NOTE = 4000  # characters
Row = dict[str, str]


def records(table: Path = TABLE) -> dict[str, Row]:
    """The rows of the table by problem."""
    if not table.exists():
        return {}
    return {row["id"]: row for row in csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))}


def write_records(rows: Mapping[str, Row], table: Path = TABLE) -> None:
    """Writes the table atomically, with rows in the order of the manifest."""
    order = {problem: place for place, problem in enumerate(build.problem_ids())}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows.values(), key=lambda row: order.get(row["id"], len(order))))
    temporary = table.with_name(f".{table.name}.tmp")
    temporary.write_text(buffer.getvalue(), encoding="utf-8")
    temporary.replace(table)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context that one process at a time can enter; others wait."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def place_of(problem: str, kind: str) -> Path:
    """The path of the solution or the certificate of a record."""
    layer, _, name = problem.partition("/")
    committed = build.manifest()[layer]["committed"]
    root = build.FOLDER / ("solutions" if committed else "built/solutions")
    return root / layer / f"{name}.{kind}.safetensors"


@dataclass(frozen=True, eq=False)
class _Offer:
    """The outcome of comparing a file with the record.

    Attributes:
        line: a description of the outcome.
        rows: the values or bounds of the rows in the new record; None if the record does not change.
        changes: the new columns in the row of the table; empty if the record does not change.
        write: replaces the file of the record.
    """

    line: str
    rows: Array | None = None
    changes: Row = field(default_factory=dict)
    write: Callable[[], object] = lambda: None


def offer(problem: str, solution: Path | None, certificate: Path | None = None, holder: str | None = None) -> list[str]:
    """Checks the files, and keeps those that are better than the record.

    Args:
        holder: the name to record; by default that in the files, or this project.

    Returns:
        One line for each file about what was done with it.

    Raises:
        UserError: there is no such problem, or it is not built.
        CheckError: a file is rejected, or a bound would be above a value; nothing is changed.
    """
    loaded = build.load(problem)
    checker.check(build.place_of(problem.partition("/")[0]), solution, certificate, problem)
    with locked(TABLE):  # from the comparison with the record until both the files and the table are replaced
        rows = records()
        row = rows.get(problem, dict.fromkeys(COLUMNS, "") | {"id": problem})
        before = dict(row)
        energy = checker.energy(loaded)
        row["energy"] = row["energy"] or f"{energy:.10g}"
        if abs(float(row["energy"]) - energy) > build.SAME_ENERGY * energy:
            raise CheckError(f"{problem}: the record is that of other data, of the energy {row['energy']}: remove it")
        offers = [
            None if solution is None else _offer_solution(loaded, row, solution, holder),
            None if certificate is None else _offer_certificate(loaded, row, certificate, holder),
        ]
        better = {what: given for what, given in zip(_KEPT, offers, strict=True) if given is not None and given.changes}
        if better:
            for what, given in better.items():
                row |= given.changes | {f"{what}_problem": loaded.fingerprint}
            row["gap"], row["worst_row_gap"] = _gaps(loaded, before, row, better)
            for what, given in better.items():  # nothing above has changed a file
                given.write()
                kind = _KEPT[what]
                row[f"{what}_sha256"] = checker.tensor_hash(checker.read(place_of(problem, kind), kind)[0])
            write_records({**rows, problem: row})
    return [given.line for given in offers if given is not None]


def _offer_solution(problem: Problem, row: Row, path: Path, holder: str | None) -> _Offer:
    kept = place_of(problem.id, "solution")
    weight, notes = checker.load_weight(path, problem), _named(checker.read(path, "solution")[1], holder)
    weight = weight.astype(np.float32).astype(np.float64)  # as it is stored
    reached = checker.value(problem, weight)
    better = not row["value"] or reached.upper < _beyond(float(row["value"]), -1, _margin(problem, row, "value"))
    if problem.is_stack and _is_recorded(problem.id, row, "value"):
        known = checker.load_weight(kept, problem)
        before = checker.value(problem, known).rows[:, 1]
        of_rows = reached.rows[:, 1] < _beyond(before, -1)
        weight = np.where(of_rows[:, None], weight, known)
        notes = _joined(notes, row, "value", of_rows)
        reached, better = checker.value(problem, weight), bool(of_rows.any())
    if not better:
        line = f"{problem.id}: the value {reached.upper:.9g} is not below the record {row['value']}"
        return _Offer(line)
    changes = {"value": checker.decimal_text(reached.upper, "value"), **_described("value", notes)}
    line = f"{problem.id}: value {changes['value']} by {changes['value_solver']}"
    return _Offer(line, reached.rows[:, 1], changes, partial(write_solution, kept, problem, weight, notes))


def _offer_certificate(problem: Problem, row: Row, path: Path, holder: str | None) -> _Offer:
    kept = place_of(problem.id, "certificate")
    tensors, notes = checker.read(path, "certificate")
    kind, proved, notes = notes["kind"], checker.bound(problem, path), _named(notes, holder)
    better = not row["bound"] or proved.value > _beyond(float(row["bound"]), 1, _margin(problem, row, "bound"))
    if problem.is_stack and _is_recorded(problem.id, row, "bound"):
        known, before = checker.read(kept, "certificate"), checker.bound(problem, kept)
        assert proved.rows is not None
        assert before.rows is not None
        of_rows = proved.rows > _beyond(before.rows, 1)
        parts = [(_as_tree(tensors, kind), of_rows), (_as_tree(known[0], known[1]["kind"]), ~of_rows)]
        kind, tensors = "tree", _merged(parts)
        notes = _joined(notes, row, "bound", of_rows)
        proved, better = checker.bound_of(problem, kind, tensors, path), bool(of_rows.any())
    if not better:
        line = f"{problem.id}: the bound {proved.value:.9g} is not above the record {row['bound']}"
        return _Offer(line)
    stated = {name: notes[name] for name in NOTES if name in notes}
    changes = {"bound": checker.decimal_text(proved.value, "bound"), **_described("bound", notes)}
    line = f"{problem.id}: bound {changes['bound']} by {changes['bound_solver']}"
    return _Offer(line, proved.rows, changes, partial(write_certificate, kept, problem, kind, tensors, stated))


def _beyond(numbers: Any, sign: int, margin: float = _BETTER) -> Any:
    """Numbers moved up (sign 1) or down (sign -1) by a relative margin for rounding, which a record must exceed."""
    return numbers + sign * margin * np.abs(numbers)


def _margin(problem: Problem, row: Row, what: str) -> float:
    return _BETTER if row[f"{what}_problem"] == problem.fingerprint else _BETTER_REBUILT


def _is_recorded(problem: str, row: Row, what: str) -> bool:
    """Whether the file behind a column is available, and is the one whose hash is in the table."""
    kind = _KEPT[what]
    kept = place_of(problem, kind)
    return kept.exists() and checker.tensor_hash(checker.read(kept, kind)[0]) == row[f"{what}_sha256"]


def _kept_values(problem: Problem, row: Row) -> Array | None:
    """The values of the rows of the record's solution, if its file is available."""
    if not _is_recorded(problem.id, row, "value"):
        return None
    return checker.value(problem, checker.load_weight(place_of(problem.id, "solution"), problem)).rows[:, 1]


def _kept_bounds(problem: Problem, row: Row) -> Array | None:
    if not _is_recorded(problem.id, row, "bound"):
        return None
    return checker.bound(problem, place_of(problem.id, "certificate")).rows


def _named(notes: Mapping[str, str], holder: str | None) -> dict[str, str]:
    return {**notes, "holder": holder or notes.get("holder") or "admm-prune"}


def _described(what: str, notes: Mapping[str, str]) -> Row:
    """The notes of a file as columns of the table, each on one line and without "|"."""
    texts = {name: checker.one_line(notes.get(name, "").replace("|", "/")) for name in NOTES}
    return {f"{what}_{name}": text[:_LONGEST_NOTE] for name, text in texts.items()}


def _joined(notes: Mapping[str, str], row: Row, what: str, better: NDArray[np.bool_]) -> dict[str, str]:
    """The notes for combined rows: of all files that contributed, or of the new file if all its rows are better."""
    if better.all():
        return dict(notes)
    joined = dict(notes)
    for name, between in (("solver", " + "), ("holder", " + "), ("settings", " && ")):
        parts = dict.fromkeys([*row[f"{what}_{name}"].split(between), notes.get(name, "")])
        joined[name] = between.join(filter(None, parts))
    seconds = [number(row[f"{what}_seconds"]), number(notes.get("seconds", ""))]
    joined["seconds"] = "" if None in seconds else f"{sum(filter(None, seconds)):.3g}"
    return joined


def _gaps(problem: Problem, before: Row, row: Row, better: Mapping[str, _Offer]) -> tuple[str, str]:
    """(gap of the sums, largest gap of a row in a stack); each is empty if a value or bound for it is missing.

    Args:
        before: the row of the table, whose hashes name the files that are replaced later.
        row: the new row.
        better: the offers in it.

    Raises:
        CheckError: a bound is above the value.
    """
    if not row["value"] or not row["bound"]:
        return "", ""
    margin = 0.0 if row["value_problem"] == row["bound_problem"] else _BETTER_REBUILT
    if float(row["bound"]) > _beyond(float(row["value"]), 1, margin):
        raise CheckError(f"{problem.id}: the bound {row['bound']} is above the value {row['value']}: report this error")
    gap = f"{checker.gap(float(row['value']), float(row['bound'])):.4g}"
    if not problem.is_stack:
        return gap, ""
    reached = better["value"].rows if "value" in better else _kept_values(problem, before)
    proved = better["bound"].rows if "bound" in better else _kept_bounds(problem, before)
    if reached is None or proved is None:
        return gap, ""
    if (above := np.flatnonzero(proved > reached)).size:
        raise CheckError(f"{problem.id}: the bound of row {above[0]} is above its value: report this error")
    return gap, f"{max(map(checker.gap, reached, proved)):.4g}"


def _as_tree(tensors: Mapping[str, NDArray[Any]], kind: str) -> dict[str, NDArray[Any]]:
    """The leaves of a certificate of a stack; a dual one has one leaf per row, in which no entry is fixed."""
    if kind == "tree":
        found = dict(tensors)
        for name in ("row_of_leaf", "diagonal_of_leaf"):
            found.setdefault(name, np.zeros(len(tensors["leaves"]), dtype=np.int64))
        return found
    rows = len(tensors["shift"])
    return {
        "leaves": np.zeros(tensors["shift"].shape, dtype=np.int8),
        "row_of_leaf": np.arange(rows),
        "diagonal": tensors["diagonal"],
        "diagonal_of_leaf": tensors.get("diagonal_of_row", np.zeros(rows, dtype=np.int64)),
        "shift": tensors["shift"],
    }


def _merged(parts: list[tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]]) -> dict[str, NDArray[Any]]:
    """One tree certificate, with the given rows of each of the parts."""
    names = ("leaves", "row_of_leaf", "diagonal", "diagonal_of_leaf", "shift")
    chosen: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    count = 0
    for tree, rows in parts:
        mine = rows[tree["row_of_leaf"]]
        used, index = np.unique(tree["diagonal_of_leaf"][mine], return_inverse=True)
        taken = {
            **{name: tree[name][mine] for name in ("leaves", "shift")},
            "row_of_leaf": tree["row_of_leaf"][mine].astype(np.int32),
            "diagonal": tree["diagonal"][used],
            "diagonal_of_leaf": (index + count).astype(np.int32),
        }
        count += len(used)
        for name, tensor in taken.items():
            chosen[name].append(tensor)
    return {name: np.concatenate(tensors) for name, tensors in chosen.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", help="id, such as stories260k.2.q_proj/row-50")
    parser.add_argument("solution", help="file, or - for none")
    parser.add_argument("certificate", nargs="?", type=Path)
    parser.add_argument("--holder", help="the name to record; by default that in the files, or admm-prune")
    given = parser.parse_args(arguments)
    solution = None if given.solution == "-" else Path(given.solution)
    try:
        lines = offer(given.problem, solution, given.certificate, given.holder)
    except (UserError, CheckError) as error:
        sys.exit(f"record: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
