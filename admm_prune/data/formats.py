"""Local files of text by their endings: plain, JSON, CSV, Parquet, compressed or not, and folders of `save_to_disk`."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from admm_prune.data.hub import first_line, quiet
from admm_prune.data.rows import TEXT, LocatedRow, NoColumnError, RowReader
from admm_prune.errors import UserError, optional_module

SEPARATOR = "<|endoftext|>"
EXTENSIONS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LARGEST = 2**30  # bytes of a line, and of a compressed file that is read whole: a small file may expand to any size
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_DESCRIBING = frozenset({_SAVED, _SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"})


class NoSplitError(UserError):
    """A dataset has splits, but not the requested one."""

    def __init__(self, source: str, split: str, available: list[str]) -> None:
        self.available = tuple(available)
        super().__init__(
            f"{source}: no split '{split}'; there are {', '.join(available) or 'none'}: "
            "choose with --split (calibration) or --eval-split"
        )


def kind_of(path: Path) -> tuple[str, str]:
    """The ending of a file and that of its compression, in lower case: (".jsonl", ".gz"), (".txt", "")."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def is_readable(path: Path) -> bool:
    """True where a file's name ends as one that can be read."""
    ending, compression = kind_of(path)
    return ending in EXTENSIONS and not (compression and ending == ".parquet")


def saved_dataset(path: Path) -> bool:
    """True for a folder that `save_to_disk` of a `Dataset` or a `DatasetDict` wrote."""
    return (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file()


def has_splits(path: Path) -> bool:
    """True for a folder of a saved `DatasetDict`."""
    return (path / _SAVED_SPLITS).is_file()


def files_in(folder: Path) -> list[Path]:
    """The readable files below a folder in the order of their paths; hidden files and metadata are left out.

    Raises:
        UserError: there are none.
    """
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if is_readable(file)
        and file.name not in _DESCRIBING
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    if not files:
        raise UserError(f"{folder}: the folder contains no {', '.join(EXTENSIONS)} file")
    return files


def file_documents(path: Path, reader: RowReader) -> Iterator[str]:
    """The documents of one file.

    Raises:
        UserError: it is of no known kind, it cannot be read, or a row holds no text.
    """
    if not is_readable(path):
        kinds = ", ".join(EXTENSIONS)
        raise UserError(f"{path}: unknown kind of file '{''.join(kind_of(path))}': give {kinds} or a folder of them")
    match kind_of(path)[0]:
        case ".txt":
            return _txt_documents(path)
        case ".jsonl":
            return reader.documents(str(path), _json_lines(path, _lines(path)))
        case ".json":
            return reader.documents(str(path), _json_rows(path))
        case ".parquet":
            return _parquet_documents(path, reader)
        case ending:
            return reader.documents(str(path), _csv_rows(path, "\t" if ending == ".tsv" else None))


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    """A file's bytes, decompressed; any error while reading is a UserError."""
    try:
        with path.open("rb") as raw:
            match kind_of(path)[1]:
                case ".gz":
                    stream: Any = gzip.GzipFile(fileobj=raw)
                case ".bz2":
                    stream = bz2.BZ2File(raw)
                case ".xz":
                    stream = lzma.LZMAFile(raw)  # noqa: SIM115  # closed with `raw`
                case ".zst":
                    stream = io.BufferedReader(optional_module("pyarrow").CompressedInputStream(raw, "zstd"))
                case _:
                    stream = raw
            yield stream
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
    except _damaged() as error:
        raise UserError(f"{path}: cannot be decompressed: damaged or cut short ({first_line(error)})") from error


def _read_text(path: Path) -> str:
    compressed = bool(kind_of(path)[1])
    with _opened(path) as stream:
        data = stream.read(LARGEST + 1) if compressed else stream.read()
    if compressed and len(data) > LARGEST:
        raise UserError(
            f"{path}: expands to more than {LARGEST >> 20} MiB: give it uncompressed, or in rows (.jsonl.gz)"
        )
    return _decoded(data, str(path))


def _decoded(data: bytes, where: str, encoding: str = "utf-8-sig") -> str:
    """Text in UTF-8; a byte order mark at its beginning is left out.

    Raises:
        UserError: it is not text.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        advice = ": it looks like UTF-16, save it as UTF-8" if wide else ""
        raise UserError(f"{where}: not a text file (byte {error.start} is not UTF-8){advice}") from error
    if "\0" in text:
        raise UserError(f"{where}: not a text file (NUL at character {text.index(chr(0))})")
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file, which end in LF: JSON strings may hold U+2028, which ends a line in Python."""
    with _opened(path) as stream:
        number = 0
        while line := stream.readline(LARGEST + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > LARGEST:
                raise UserError(f"{where} is longer than {LARGEST >> 20} MiB")
            yield number, _decoded(line, where, "utf-8-sig" if number == 1 else "utf-8")


def _txt_documents(path: Path) -> Iterator[str]:
    text = _read_text(path)
    if SEPARATOR not in text:
        yield text
        return
    for document in text.split(SEPARATOR):
        yield document.strip("\r\n")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg})") from error
    except ValueError as error:  # a whole number of more digits than Python converts
        raise UserError(f"{where} contains a number that cannot be read ({first_line(error)})") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[LocatedRow]:
    for number, line in lines:
        if line.strip():
            yield f"line {number}", _parsed(line, f"{path}: line {number}")


def _json_rows(path: Path) -> Iterator[LocatedRow]:
    """Rows of an array, of the one array in an object ({"data": [...]}), or of lines, as many .json files hold them; an
    object with a text of its own is one row, whatever lists it has beside."""
    lines = _lines(path)
    head: list[tuple[int, str]] = []
    begun: list[str] = []  # the first two lines that are not blank
    for number, line in _bounded(path, lines):
        head.append((number, line))
        if line.strip():
            begun.append(line)
        if len(begun) == 2:
            break
    if len(begun) == 2 and _is_object(begun[0]):
        yield from _json_lines(path, chain(head, lines))
        return
    text = "".join(line for _, line in _bounded(path, chain(head, lines)))
    if not text.strip():
        return
    content = _parsed(text, f"{path}: the file")
    if isinstance(content, dict):
        inner = [value for value in content.values() if _is_table(value)]
        if isinstance(content.get(TEXT), str):
            content = [content]
        else:
            content = content["data"] if _is_table(content.get("data")) else inner[0] if len(inner) == 1 else [content]
    if not isinstance(content, list):
        raise UserError(f"{path}: a .json file contains an array of rows, not one {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        yield f"row {number}", row


def _bounded(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines that are kept in memory together: up to a limit for a compressed file."""
    size = 0
    for number, line in lines:
        size += len(line)
        if kind_of(path)[1] and size > LARGEST:
            raise UserError(f"{path}: expands to more than {LARGEST >> 20} MiB: give it uncompressed, or as .jsonl.gz")
        yield number, line


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(value: object) -> bool:
    """A list of rows, not the messages of one conversation."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict | str):
        return False
    return isinstance(value[0], str) or not (
        {"role", "content"} <= value[0].keys() or {"from", "value"} <= value[0].keys()
    )


@contextmanager
def _any_field_size() -> Generator[None]:
    """The csv module refuses fields of more than 128 KiB, a limit that is set for the whole process."""
    before = csv.field_size_limit(LARGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimiter(header: str) -> str:
    """Comma; or the semicolon or tab that spreadsheets write in its place, where the header has no comma."""
    return next((delimiter for delimiter in ",;\t" if delimiter in header), ",")


def _csv_rows(path: Path, delimiter: str | None) -> Iterator[LocatedRow]:
    """Rows under the names of the first line; None takes the delimiter from that line."""
    numbered = _lines(path)
    head = list(islice(numbered, 1))
    if delimiter is None:
        delimiter = _delimiter(head[0][1] if head else "")
    lines = csv.reader((line for _, line in chain(head, numbered)), delimiter=delimiter)
    names: list[str] | None = None
    while True:
        try:
            with _any_field_size():
                row = next(lines, None)
        except csv.Error as error:
            raise UserError(f"{path}: line {lines.line_num} is not CSV ({error})") from error
        if row is None:
            return
        if names is None:
            names = row or None
        elif row:
            if any(row[len(names) :]):  # empty fields at the end are harmless
                raise UserError(
                    f"{path}: line {lines.line_num} has {len(row)} fields, the first line {len(names)}: quote the text"
                )
            yield f"line {lines.line_num}", {**dict.fromkeys(names), **dict(zip(names, row, strict=False))}


def _damaged() -> tuple[type[Exception], ...]:
    """The errors of a damaged file; those of pyarrow, which few formats need, if it was imported."""
    pyarrow = sys.modules.get("pyarrow")
    return (EOFError, zlib.error, lzma.LZMAError, *([] if pyarrow is None else [pyarrow.ArrowException]))


def _parquet_documents(path: Path, reader: RowReader) -> Iterator[str]:
    parquet = optional_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            sample: list[dict[str, Any]] = (
                [] if TEXT in names else next((b.to_pylist() for b in file.iter_batches(batch_size=100)), [])
            )
            column = reader.column(str(path), sample, names)
            batches = file.iter_batches(columns=[column], batch_size=1000)
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            rows = ((f"row {number}", {column: value}) for number, value in enumerate(values, start=1))
            yield from reader.of(column).documents(str(path), rows)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise many kinds of errors
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def saved_documents(path: Path, split: str, reader: RowReader) -> Iterator[str]:
    """The rows of a folder of `save_to_disk`.

    Raises:
        NoSplitError: the folder has splits, and not this one.
        UserError: it cannot be read, or a row holds no text.
    """
    datasets = optional_module("datasets")

    try:
        with quiet():
            dataset: Any = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise NoSplitError(str(path), split, [str(name) for name in dataset])
            dataset = dataset[split]
        yield from dataset_documents(dataset, str(path), reader)
    except UserError:
        raise
    except Exception as error:  # as for parquet
        raise UserError(f"{path}: not a readable folder of save_to_disk ({first_line(error)})") from error


def dataset_documents(dataset: Any, source: str, reader: RowReader) -> Iterator[str]:
    """The rows of a `datasets.Dataset` or an `IterableDataset`; images and sounds are not decoded."""
    names: list[str] = list(dataset.column_names or ())
    if dataset.features is not None:
        media = [name for name, feature in dataset.features.items() if hasattr(feature, "decode_example")]
        dataset = dataset.select_columns([name for name in names if name not in media]) if media else dataset
    column = reader.requested_column or (TEXT if TEXT in names else None)
    if column is not None and names:
        if column not in names:
            raise NoColumnError(source, column, names)
        dataset = dataset.select_columns([column])
    rows = ((f"row {number}", dict(row)) for number, row in enumerate(dataset, start=1))
    yield from reader.documents(source, rows)
