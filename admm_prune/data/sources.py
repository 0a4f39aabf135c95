"""Text from local files, folders, Hub datasets, Python objects and the embedded corpus, as documents.

A part of a local text is held out for evaluation. The embedded corpus is the Python standard library's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admm_prune.data.conversations import ChatText
from admm_prune.data.formats import (
    NoSplitError,
    dataset_documents,
    file_documents,
    files_in,
    is_readable,
    kind_of,
    saved_dataset,
    saved_documents,
)
from admm_prune.data.hub import check_hub, expanded, first_line, is_repository, quiet
from admm_prune.data.rows import NoColumnError, Notes, RowReader
from admm_prune.errors import UserError, optional_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_ONE_IN = 10
EMBEDDED = "embedded"
PYTHON_OBJECT = "<python object>"  # the name of a text that was passed from Python
SHORT_NAMES = {
    "c4": "allenai/c4:en",
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
HUB_DOCUMENTS = 20_000  # documents of a Hub dataset that are read by default
Document = str | tuple[int, ...]


def is_held_out(module: str) -> bool:
    """sha256(module name) mod 10 == 0: a tenth of the modules."""
    return hashlib.sha256(module.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def standard_library_modules() -> Iterator[tuple[str, str]]:
    """Yields (dotted module name, source text) in the order of the names."""
    packed = files("admm_prune").joinpath("assets/standard_library/modules.jsonl.gz").read_bytes()
    for line in gzip.decompress(packed).decode().split("\n"):  # not splitlines(): modules hold form feeds and U+2028
        if line:
            row = json.loads(line)
            yield row["module"], row["text"]


def standard_library_documents(held_out: bool) -> list[str]:
    """The text of the held-out modules, or of all the others, one document a module."""
    return [text for name, text in standard_library_modules() if is_held_out(name) == held_out]


@dataclass(frozen=True)
class Corpus:
    """Documents under a name; none of them is blank.

    Attributes:
        documents: text; or the ids of tokens, where such were passed from Python.
        notes: assumptions and replacements made in reading.
    """

    name: str
    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the documents, each after its length, so that no two ways to cut a text share one."""
        digest = hashlib.sha256()
        for document in self.documents:
            # No text in UTF-8 begins with the byte FF.
            data = document.encode() if isinstance(document, str) else b"\xff" + repr(document).encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    @property
    def characters(self) -> int:
        """The number of characters; of tokens if the documents are ids."""
        return sum(map(len, self.documents))


def read_corpus(
    source: str,
    *,
    split: str = "train",
    column: str | None = None,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """The documents of `source`, in their order, blank ones dropped.

    Args:
        source: "embedded" (CPython's standard library, part of this package), a file (.txt, .jsonl, .json, .csv, .tsv,
            .parquet; all but the last also with .gz, .bz2, .xz or .zst), a folder of such files (read in the order of
            their paths) or of `save_to_disk`, a Hub id "owner/name" or "owner/name:config", or one of `SHORT_NAMES`.
            In a `.txt` file `<|endoftext|>` separates documents.
        split: the split of a Hub dataset or of a saved `DatasetDict`; "train" (modules not held out), "validation" or
            "test" (held-out modules) of the embedded corpus. Other files and folders have no splits and ignore it.
        column: of rows that holds the text or the conversation; by default "text", or the only column that holds text.
        limit: read this many documents and no more; of a Hub dataset, which is streamed, 20,000 by default.
        tokenizer: whose chat template writes conversations as text; without one the messages are read as plain text.

    Raises:
        NoSplitError: the source has splits, and not this one.
        NoColumnError: there is no such column, or the source is plain text.
        UserError: there is no such source, it cannot be read as text, or it holds no text.
    """
    if not source.strip():
        raise UserError("the name of the text is empty: name it with --data")
    path = expanded(source)
    notes = Notes()
    reader = RowReader(column, tokenizer, notes)
    if column is not None and not _has_columns(source):
        raise NoColumnError(source, column, None)
    if source == EMBEDDED:
        documents = _embedded_documents(split)
    elif _exists(path):
        documents = _local_documents(path, split, reader)
    elif is_readable(path):
        raise UserError(f"{source}: there is no such file")
    else:
        return _capped(source, _hub_documents(source, split, reader), limit, split, notes)
    return collected(source, islice(_filled(documents), limit), notes)


def is_file_name(source: str) -> bool:
    """True where `source` must be a path: it is absolute, has the extension of a readable file, or is no Hub id."""
    path = expanded(source)
    return path.is_absolute() or is_readable(path) or not is_repository(_repository(source)[0])


def collected(name: str, documents: Iterator[Document], notes: Notes) -> Corpus:
    """A corpus of these documents.

    Raises:
        UserError: there are none.
    """
    chosen = tuple(documents)
    if not chosen:
        raise UserError(f"{name}: the text is empty: no document has a character that is not blank")
    return Corpus(name, chosen, notes.collected())


def _filled(documents: Iterator[str]) -> Iterator[Document]:
    return (document for document in documents if document.strip())


def _capped(source: str, documents: Iterator[str], limit: int | None, split: str, notes: Notes) -> Corpus:
    """The first documents of a dataset of any size."""
    filled = _filled(documents)
    chosen = list(islice(filled, HUB_DOCUMENTS if limit is None else limit))
    if limit is None and next(filled, None) is not None:
        notes.add(
            "documents",
            f"{source}: the first {len(chosen)} documents of the split '{split}' are read (--documents and "
            "--eval-documents set other numbers)",
        )
    return collected(source, iter(chosen), notes)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or one that holds a NUL
        return False


def _has_columns(source: str) -> bool:
    """False where `source` is plain text: the embedded corpus, a .txt file, or a folder of such files alone."""
    path = expanded(source)
    if source == EMBEDDED:
        return False
    if not _exists(path) or (path.is_dir() and saved_dataset(path)):
        return True
    return any(kind_of(file)[0] != ".txt" for file in (files_in(path) if path.is_dir() else [path]))


def _embedded_documents(split: str) -> Iterator[str]:
    if split not in ("train", "validation", "test"):
        raise UserError(f"the embedded corpus has no split {split!r}: choose train, validation or test")
    yield from standard_library_documents(held_out=split != "train")


def _local_documents(path: Path, split: str, reader: RowReader) -> Iterator[str]:
    if not path.is_dir():
        yield from file_documents(path, reader)
    elif saved_dataset(path):
        yield from saved_documents(path, split, reader)
    else:
        for file in files_in(path):
            yield from file_documents(file, reader)


def _hub_documents(source: str, split: str, reader: RowReader) -> Iterator[str]:
    repository, config = _repository(source)
    if not is_repository(repository):
        raise UserError(f"{source}: there is no such file or folder")
    try:
        with quiet():
            splits = _opened_dataset(repository, config or None)
            if split not in splits:
                raise NoSplitError(source, split, list(splits))
            yield from dataset_documents(splits[split], source, reader)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"{source}: not a local file or folder, and the Hub cannot be reached ({first_line(error)})"
        ) from error
    except Exception as error:  # the client raises errors of four libraries; the caller needs one line
        if "Config name is missing" in str(error):
            names = " ".join(str(error).split()).partition("available configs:")[2].partition("Example")[0].strip()
            raise UserError(f"{source}: name one of its configurations {names}, as {source}:NAME") from error
        raise UserError(f"{source}: cannot be read from the Hub ({first_line(error)})") from error


def _repository(source: str) -> tuple[str, str]:
    """The Hub id and the configuration in the name of a text; a URL has none."""
    repository, _, config = SHORT_NAMES.get(source, source).partition(":")
    return ("", "") if config.startswith("//") else (repository, config)


def _opened_dataset(repository: str, config: str | None) -> Any:
    """The splits of a Hub dataset: from the local cache if it is complete there, else streamed."""
    datasets = optional_module("datasets")
    if Path(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___")).exists():
        local = datasets.DownloadConfig(local_files_only=True)
        try:
            return datasets.load_dataset(repository, config, download_config=local)
        except Exception:  # of another configuration or version: nothing of it is downloaded whole
            pass
    check_hub(repository, "dataset")
    return datasets.load_dataset(repository, config, streaming=True)


def hold_out(corpus: Corpus, fraction: float = 0.1) -> tuple[Corpus, Corpus]:
    """Cuts the last documents off, about `fraction` of them and at least one: (the others, those cut off).

    A text of one document is cut at the last line break before its last `fraction`, or the last space where there is no
    line break within 1 % of the text; where there is no space either, and in one of tokens, anywhere. The names say
    which part of the documents, or of the only one, was cut off.
    """
    name, documents = corpus.name, corpus.documents
    if len(documents) == 1:
        at, cut = _cut(documents[0], fraction), 1
        held_out = 1 - at / max(1, len(documents[0]))
        documents = (_part(documents[0], 0, at), _part(documents[0], at, None))
    else:
        cut = len(documents) - max(1, round(len(documents) * fraction))
        held_out = 1 - cut / max(1, len(documents))
    first, last = documents[:cut], documents[cut:]
    return (
        replace(corpus, name=f"{name} (all but the last {held_out:.0%})", documents=first),
        replace(corpus, name=f"{name} (last {held_out:.0%})", documents=last),
    )


def _cut(document: Document, fraction: float) -> int:
    at = max(1, round(len(document) * (1 - fraction)))
    if not isinstance(document, str):
        return at
    earliest = max(1, at - len(document) // 100)
    line = document.rfind("\n", earliest - 1, at) + 1
    return line or max(document.rfind(" ", earliest, at), 0) or at


def _part(document: Document, start: int, end: int | None) -> Document:
    part = document[start:end]
    return ChatText(part) if isinstance(document, ChatText) and isinstance(part, str) else part
