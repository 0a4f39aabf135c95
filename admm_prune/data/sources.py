"""Text in: local files, folders, Hub datasets and the embedded corpus, as documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from admm_prune.data import standard_library
from admm_prune.data.hub import check_hub, first_line, is_repository, quiet
from admm_prune.errors import UserError

EMBEDDED = "embedded"
SEPARATOR = "<|endoftext|>"
EXTENSIONS = (".txt", ".jsonl", ".parquet")
SHORT_NAMES = {"c4": "allenai/c4:en", "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}


@dataclass(frozen=True)
class Corpus:
    """Documents under a name; none of them is blank."""

    name: str
    documents: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the documents, each after its length, so that no two ways to cut a text share one."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def read_corpus(source: str, *, split: str = "train", column: str = "text", limit: int | None = None) -> Corpus:
    """The documents of `source`, in their order, blank ones dropped.

    Args:
        source: "embedded" (CPython's standard library, part of this package), a `.txt`, `.jsonl` or `.parquet` file, a
            folder of such files (read in the order of their paths), a Hub id "owner/name" or "owner/name:config", or
            the short names "c4" and "wikitext2". In a `.txt` file `<|endoftext|>` separates documents.
        split: the split of a Hub dataset; "train" (modules not held out), "validation" or "test" (held-out modules)
            of the embedded corpus. A local file has no splits and ignores it.
        column: the key that holds the text in `.jsonl`, `.parquet` and Hub datasets.
        limit: read this many documents and no more; a Hub dataset is then streamed.

    Raises:
        UserError: there is no such source, it cannot be read as text, or it holds no text.
    """
    path = Path(source).expanduser()
    if source == EMBEDDED:
        documents = _embedded_documents(split)
    elif path.exists():
        documents = _local_documents(path, column)
    elif path.suffix in EXTENSIONS:
        raise UserError(f"{source}: there is no such file")
    else:
        documents = _hub_documents(source, split, column, limit)
    chosen = tuple(islice((document for document in documents if document.strip()), limit))
    if not chosen:
        raise UserError(f"{source}: the text is empty: no document has a character that is not blank")
    return Corpus(name=source, documents=chosen)


def _embedded_documents(split: str) -> Iterator[str]:
    if split not in ("train", "validation", "test"):
        raise UserError(f"the embedded corpus has no split {split!r}: choose train, validation or test")
    yield from standard_library.documents(held_out=split != "train")


def _local_documents(path: Path, column: str) -> Iterator[str]:
    if not path.is_dir():
        yield from _file_documents(path, column)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix in EXTENSIONS and file.is_file())
    if not files:
        raise UserError(f"{path}: the folder holds no {', '.join(EXTENSIONS)} file")
    for file in files:
        yield from _file_documents(file, column)


def _file_documents(path: Path, column: str) -> Iterator[str]:
    match path.suffix:
        case ".txt":
            return _txt_documents(path)
        case ".jsonl":
            return _jsonl_documents(path, column)
        case ".parquet":
            return _parquet_documents(path, column)
        case other:
            kinds = ", ".join(EXTENSIONS)
            raise UserError(f"{path}: unknown kind of file {other!r}: give {kinds} or a folder of them")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    if "\0" in text:
        raise UserError(f"{path}: not a text file (NUL at character {text.index(chr(0))})")
    return text


def _txt_documents(path: Path) -> Iterator[str]:
    text = _read_text(path)
    if SEPARATOR not in text:
        yield text
        return
    for document in text.split(SEPARATOR):
        yield document.strip("\r\n")


def _jsonl_documents(path: Path, column: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that Python takes for line ends.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not a JSON object with the key {column!r}")
        yield _text_of(row, column, f"{path}: line {number}")


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(_lacks(str(path), column, names))
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _text_of({column: value}, column, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def _hub_documents(source: str, split: str, column: str, limit: int | None) -> Iterator[str]:
    repository, _, config = SHORT_NAMES.get(source, source).partition(":")
    if not is_repository(repository):
        raise UserError(f"{source}: there is no such file or folder")
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    try:
        with quiet():
            if not Path(HF_DATASETS_CACHE, repository.replace("/", "___")).exists():
                check_hub(repository, "dataset")
            # Without a limit the data are kept in the local cache; with one, only what is read is fetched.
            rows: Any = datasets.load_dataset(repository, config or None, split=split, streaming=limit is not None)
            for row in rows:
                yield _text_of(row, column, source)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"{source}: not a local file or folder, and the Hub cannot be reached ({first_line(error)})"
        ) from error
    except Exception as error:  # the client raises errors of four libraries; the caller needs one line
        raise UserError(f"{source}: cannot be read from the Hub ({first_line(error)})") from error


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    """row[column]; a null counts as an empty document."""
    if column not in row:
        raise UserError(_lacks(where, column, list(row)))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value or ""


def _lacks(where: str, column: str, found: list[str]) -> str:
    return f"{where}: no column {column!r}; found {', '.join(sorted(found)) or 'none'}: choose one with --column"
