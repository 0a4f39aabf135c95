"""A CSV file to which rows are added as soon as they are measured, so that an interrupted benchmark can continue."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KEY = ("layer", "fingerprint", "pattern", "solver", "settings")
Record = dict[str, str]


class Journal:
    """Rows of strings under fixed columns. Rows that belong together have the same key and are written at once.

    Args:
        path: made with the first row; a last line that was cut short is dropped.
        columns: beside those of the key.
        key: the columns that tell rows apart.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str] = KEY) -> None:
        self.path, self.key, self.columns = path, tuple(key), (*key, *columns)
        self.records: list[Record] = []
        if path.exists():
            self._read()

    def find(self, key: Mapping[str, str]) -> list[Record]:
        """All rows of a key, oldest first."""
        return [record for record in self.records if all(record[name] == key[name] for name in self.key)]

    def add(self, key: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows of one key to the file."""
        records = [{name: _text({**key, **row}[name]) for name in self.columns} for row in rows]
        begins = not self.path.exists()
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, lineterminator="\n")
        if begins:
            writer.writeheader()
        writer.writerows(records)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(buffer.getvalue())
        self.records += records

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        reader = csv.DictReader(io.StringIO(whole))
        if tuple(reader.fieldnames or ()) != self.columns:
            raise ValueError(f"{self.path} has other columns than this version writes: choose another folder")
        self.records = list(reader)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A whole csv file at once; the columns are those of the first row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def number(text: str) -> float | None:
    """A figure of a record; None where it was not measured."""
    return float(text) if text else None


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)
