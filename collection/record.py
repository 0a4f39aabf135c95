"""The table of records: the least value known and the largest bound proved of every problem, each checked first.

    python -m collection.record PROBLEM_ID SOLUTION [CERTIFICATE] [--holder NAME]

The checker recomputes the value and the bound; only what is better than the record is kept. "-" in place of SOLUTION
offers a certificate alone. In a stack of rows every row is compared on its own, and the better rows are put together.
The files of committed problems are kept in `solutions/`; those of others in `built/solutions/`, with their SHA-256 in
the table: the command under `settings` makes them again. Several commands may offer records at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from admm_prune.errors import UserError
from collection import build, checker
from collection.checker import Problem
from collection.files import write_certificate, write_solution

TABLE = build.FOLDER / "records.csv"
NOTES = ("solver", "settings", "seconds", "date", "holder")  # of a solution and of a certificate
COLUMNS = (
    *("id", "energy", "value", "bound", "gap", "worst_row_gap"),
    *(f"value_{name}" for name in (*NOTES, "sha256")),
    *(f"bound_{name}" for name in (*NOTES, "sha256")),
)
_BETTER = 1e-7  # relative: less is rounding, and no record
Row = dict[str, str]


def records(table: Path = TABLE) -> dict[str, Row]:
    """The rows of the table by problem."""
    if not table.exists():
        return {}
    return {row["id"]: row for row in csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))}


def write_records(rows: Mapping[str, Row], table: Path = TABLE) -> None:
    """In the order of the manifest."""
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
    """Held by one process at a time: the others wait for the file."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def place_of(problem: str, kind: str) -> Path:
    """Where the solution or the certificate of a record is."""
    layer, _, name = problem.partition("/")
    committed = build.manifest()[layer]["committed"]
    root = build.FOLDER / ("solutions" if committed else "built/solutions")
    return root / layer / f"{name}.{kind}.safetensors"


def offer(
    problem: str, solution: Path | None, certificate: Path | None = None, holder: str = "admm-prune"
) -> list[str]:
    """Checks the files and keeps what is better than the record; a line for what was done with each.

    Raises:
        UserError: no such problem, or it is not built.
        CheckError: a file is refused.
    """
    loaded = build.load(problem)
    checker.check(build.place_of(problem.partition("/")[0]), solution, certificate, problem)
    with locked(TABLE):  # from the comparison with the record until both the files and the table are replaced
        rows = records()
        row = rows.get(problem, dict.fromkeys(COLUMNS, "") | {"id": problem})
        row["energy"] = f"{checker.energy(loaded):.10g}"
        lines = []
        if solution is not None:
            lines.append(_offer_solution(loaded, row, solution, holder))
        if certificate is not None:
            lines.append(_offer_certificate(loaded, row, certificate, holder))
        row["gap"], row["worst_row_gap"] = _gaps(loaded, row)
        if row["value"] or row["bound"]:
            write_records({**rows, problem: row})
    return lines


def _offer_solution(problem: Problem, row: Row, path: Path, holder: str) -> str:
    kept = place_of(problem.id, "solution")
    weight, notes = checker.load_weight(path, problem), checker.read(path, "solution")[1]
    reached = checker.value(problem, weight)
    if problem.is_stack and kept.exists():
        known = checker.load_weight(kept, problem)
        better = reached.rows[:, 1] < checker.value(problem, known).rows[:, 1] * (1 - _BETTER)
        weight = np.where(better[:, None], weight, known)
        notes = _joined(notes, row, "value", better)
        reached = checker.value(problem, weight)
    if row["value"] and reached.upper >= float(row["value"]) * (1 - _BETTER):
        return f"{problem.id}: the value {reached.upper:.9g} is not below the record {row['value']}"
    final = write_solution(kept, problem, weight, notes)
    row["value"] = f"{final.upper:.10g}"
    _fill(row, "value", notes, holder, checker.tensor_hash(checker.read(kept, "solution")[0]))
    return f"{problem.id}: value {row['value']} by {row['value_solver']}"


def _offer_certificate(problem: Problem, row: Row, path: Path, holder: str) -> str:
    kept = place_of(problem.id, "certificate")
    tensors, notes = checker.read(path, "certificate")
    kind, proved = notes["kind"], checker.bound(problem, path)
    if problem.is_stack and kept.exists():
        known, before = checker.read(kept, "certificate"), checker.bound(problem, kept)
        assert proved.rows is not None
        assert before.rows is not None
        better = proved.rows > before.rows * (1 + _BETTER)
        parts = [(_as_tree(tensors, kind), better), (_as_tree(known[0], known[1]["kind"]), ~better)]
        kind, tensors = "tree", _merged(parts)
        notes = _joined(notes, row, "bound", better)
        proved = checker.tree_bound(problem, tensors)
    if row["bound"] and proved.value <= float(row["bound"]) * (1 + _BETTER):
        return f"{problem.id}: the bound {proved.value:.9g} is not above the record {row['bound']}"
    stated = {name: notes[name] for name in NOTES if name in notes}
    final = write_certificate(kept, problem, kind, tensors, stated)
    row["bound"] = f"{final.value:.10g}"
    _fill(row, "bound", notes, holder, checker.tensor_hash(checker.read(kept, "certificate")[0]))
    return f"{problem.id}: bound {row['bound']} by {row['bound_solver']}"


def _fill(row: Row, what: str, notes: Mapping[str, str], holder: str, digest: str) -> None:
    row.update({f"{what}_{name}": notes.get(name, "") for name in NOTES})
    row[f"{what}_holder"], row[f"{what}_sha256"] = notes.get("holder", holder), digest


def _joined(notes: Mapping[str, str], row: Row, what: str, better: NDArray[np.bool_]) -> dict[str, str]:
    """The notes of rows put together: those of the new file where all rows are its own."""
    if better.all():
        return dict(notes)
    joined = dict(notes)
    for name, between in (("solver", " + "), ("settings", " && ")):
        parts = dict.fromkeys([*row[f"{what}_{name}"].split(between), notes.get(name, "")])
        joined[name] = between.join(filter(None, parts))
    return joined


def _gaps(problem: Problem, row: Row) -> tuple[str, str]:
    """(gap of the sums, largest gap of a row of a stack); empty where value or bound is missing."""
    if not row["value"] or not row["bound"]:
        return "", ""
    gap = f"{checker.gap(float(row['value']), float(row['bound'])):.4g}"
    if not problem.is_stack:
        return gap, ""
    reached = checker.value(problem, checker.load_weight(place_of(problem.id, "solution"), problem))
    proved = checker.bound(problem, place_of(problem.id, "certificate"))
    assert proved.rows is not None
    gaps = [checker.gap(upper, lower) for upper, lower in zip(reached.rows[:, 1], proved.rows, strict=True)]
    return gap, f"{max(gaps):.4g}"


def _as_tree(tensors: Mapping[str, NDArray[Any]], kind: str) -> dict[str, NDArray[Any]]:
    """The leaves of a certificate of a stack; a dual one has one leaf in each row, in which all is open."""
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
    """One tree certificate with some rows of each."""
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
    parser.add_argument("--holder", default="admm-prune", help="who is to be named")
    given = parser.parse_args(arguments)
    solution = None if given.solution == "-" else Path(given.solution)
    try:
        lines = offer(given.problem, solution, given.certificate, given.holder)
    except (UserError, checker.CheckError) as error:
        sys.exit(f"record: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
