"""Text passed from Python: strings, data sets, rows, and tokens in lists, tensors or batches of a loader."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from io import IOBase
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from admm_prune.data.formats import NoSplitError, dataset_documents
from admm_prune.data.rows import NoColumnError, Notes, RowReader, without_surrogates
from admm_prune.data.sources import HUB_DOCUMENTS, PYTHON_OBJECT, Corpus, Document, collected
from admm_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAKEN = (
    "give a path, a Hub id, a list of strings or of lists of token ids, a datasets.Dataset, or an iterable of batches "
    "with input_ids"
)


def check_object(data: object, name: str = "data") -> None:
    """Refuses what cannot be text, before any work.

    Raises:
        UserError: it is of another type than `corpus_of` takes.
    """
    # A set has no order; a file and a data frame are iterables of lines and of names.
    wrong = isinstance(data, bytes | bytearray | set | frozenset | IOBase) or not isinstance(data, Iterable)
    unknown = isinstance(data, Mapping) and not _is_dataset(data) and "input_ids" not in data
    if wrong or unknown or hasattr(data, "itertuples"):
        raise UserError(f"{name} cannot be read from {type(data).__name__}: {_TAKEN}")


def is_split_dataset(data: object) -> bool:
    """True for a dictionary of data sets by split."""
    return isinstance(data, Mapping) and _is_dataset(data)


def corpus_of(
    data: Any,
    *,
    split: str = "train",
    column: str | None = None,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """The documents of a Python object.

    Args:
        data: a `datasets.Dataset`, `IterableDataset`, or a dictionary of them by split; or an iterable, such as a list
            or a loader, of strings, rows with a column of text, conversations, sequences of token ids, tensors of them
            (n,) or (b, n), or batches with "input_ids" and, for padded ones, "attention_mask"; or one such batch, as a
            tokenizer returns.
        split, column, tokenizer: as for `read_corpus`.
        limit: maximum number of documents; 20,000 by default for data without a length.

    Raises:
        UserError: it is something else, or holds no text.
    """
    check_object(data)
    notes = Notes()
    reader = RowReader(column, tokenizer, notes)
    if is_split_dataset(data):
        if split not in data:
            raise NoSplitError(PYTHON_OBJECT, split, list(data))
        data = data[split]
    elif isinstance(data, Mapping):
        data = [data]
    documents: Iterator[Document]
    if _is_dataset(data) and not _has_tokens(data, column):
        documents = iter(dataset_documents(data, PYTHON_OBJECT, reader))
    else:
        documents = _documents(data, reader)
    filled = (document for document in documents if (document.strip() if isinstance(document, str) else document))
    cap = limit if limit is not None or isinstance(data, Sized) else HUB_DOCUMENTS
    chosen = list(islice(filled, cap))
    if limit is None and cap is not None and next(filled, None) is not None:
        notes.add("documents", f"{PYTHON_OBJECT}: the first {cap} documents are taken (documents= sets another number)")
    if len({isinstance(document, str) for document in chosen}) > 1:
        raise UserError(f"{PYTHON_OBJECT}: text and tokens are mixed: give one of them")
    return collected(PYTHON_OBJECT, iter(chosen), notes)


def check_ids(corpus: Corpus, vocabulary: int) -> None:
    """Refuses tokens that the model does not have.

    Args:
        vocabulary: the number of rows of the model's embedding.

    Raises:
        UserError: an id is negative or too large.
    """
    for number, document in enumerate(corpus.documents, start=1):
        if isinstance(document, tuple) and not 0 <= min(document) <= max(document) < vocabulary:
            wrong = min(document) if min(document) < 0 else max(document)
            raise UserError(
                f"{corpus.name}: document {number} contains the token {wrong}: the model has 0 to {vocabulary - 1}"
            )


def _is_dataset(data: object) -> bool:
    datasets = sys.modules.get("datasets")  # a module that was not imported has no instances
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return datasets is not None and isinstance(data, tuple(getattr(datasets, kind) for kind in kinds))


def _has_tokens(data: Any, column: str | None) -> bool:
    names = data.column_names
    if names is None:  # of a streamed dataset after map(): its rows alone tell
        names = next(iter(data.take(1)), {})
    return "input_ids" in names and (column == "input_ids" or (column is None and "text" not in names))


def _documents(data: Iterable[Any], reader: RowReader) -> Iterator[Document]:
    items = chain.from_iterable(map(_unbatched, _batches(data))) if isinstance(data, DataLoader) else iter(data)
    first = next(items, None)
    items = chain([] if first is None else [first], items)
    if _is_row(first):
        rows = ((f"item {n}", dict(item) if isinstance(item, Mapping) else item) for n, item in enumerate(items, 1))
        yield from reader.documents(PYTHON_OBJECT, rows)
        return
    column, columns = reader.requested_column, list(first) if isinstance(first, Mapping) else None
    if first is not None and column is not None and (columns is None or column != "input_ids"):
        raise NoColumnError(PYTHON_OBJECT, column, columns)
    for number, item in enumerate(items, start=1):
        rows_of_item = None if isinstance(item, str) else _token_rows(item)
        if isinstance(item, str):
            yield without_surrogates(item)
        elif rows_of_item is not None:
            yield from map(tuple, rows_of_item)
        else:
            raise UserError(
                f"{PYTHON_OBJECT}: item {number} is {type(item).__name__}, neither text nor tokens: {_TAKEN}"
            )


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    return map(_untransposed, loader) if loader.collate_fn is default_collate else iter(loader)


def _untransposed(item: Any) -> Any:
    """A batch of lists from torch's default collation, which makes one tensor of every position, by its rows again."""
    if isinstance(item, Mapping):
        return {name: _untransposed(value) for name, value in item.items()}
    if isinstance(item, list) and item and all(isinstance(part, Tensor) and part.ndim == 1 for part in item):
        return torch.stack(item, dim=1)
    return item


def _unbatched(item: Any) -> Iterable[Any]:
    """The strings or rows in a batch of text; anything else as it is."""
    if _is_batch_of_text(item):
        return tuple(item)
    if (
        isinstance(item, Mapping)
        and "input_ids" not in item
        and any(_is_batch_of_text(value) for value in item.values())
    ):
        columns = list(item.values())
        if all(isinstance(column, list | tuple | Tensor) for column in columns) and len({*map(len, columns)}) == 1:
            return (dict(zip(item, row, strict=True)) for row in zip(*columns, strict=True))
    return (item,)


def _is_batch_of_text(item: Any) -> bool:
    return isinstance(item, list | tuple) and bool(item) and all(isinstance(part, str) for part in item)


def _is_row(item: Any) -> bool:
    """A row of a table, or a conversation."""
    if isinstance(item, Mapping):
        return "input_ids" not in item
    return isinstance(item, list) and bool(item) and isinstance(item[0], Mapping)


def _token_rows(item: Any) -> list[list[int]] | None:
    """The sequences of ids in an item, without padding; None where it holds none."""
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            return None
        rows, mask = _token_rows(item["input_ids"]), item.get("attention_mask")
        if rows is None or mask is None:
            return rows
        mask_rows = _token_rows(_whole_numbers(mask))
        # Without its mask the padding of a batch would be read as text.
        if mask_rows is None or [len(row) for row in rows] != [len(row) for row in mask_rows]:
            return None
        return [[t for t, real in zip(*pair, strict=True) if real] for pair in zip(rows, mask_rows, strict=True)]
    if isinstance(item, Tensor):
        return _rows_of(item.detach().cpu().numpy()) if item.dtype != torch.bfloat16 else None
    if isinstance(item, np.ndarray):
        return _rows_of(item)
    if not isinstance(item, Sequence) or isinstance(item, str | bytes):
        return None
    if not item:
        return []
    if all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in item):
        return [[int(token) for token in item]]
    if isinstance(item[0], Tensor) and item[0].ndim == 2:  # (ids, labels), as loaders of tensors give
        # The padding that a mask without its name marks would be read as text.
        return None if any(map(_is_mask, item[1:])) else _token_rows(item[0])
    nested = [_token_rows(row) for row in item]
    if all(rows is not None and len(rows) <= 1 for rows in nested):
        return [rows[0] for rows in nested if rows]
    return None


def _is_mask(x: Any) -> bool:
    """Zeros and ones, both of them."""
    return isinstance(x, Tensor) and set(x.unique().tolist()) == {0, 1}


def _whole_numbers(mask: Any) -> Any:
    """An attention mask as whole numbers: it may also consist of booleans or floats."""
    if isinstance(mask, Tensor):
        return (mask != 0).long()
    if isinstance(mask, np.ndarray):
        return (mask != 0).astype(np.int64)
    if isinstance(mask, Sequence) and not isinstance(mask, str | bytes):
        return [_whole_numbers(part) for part in mask]
    return int(bool(mask)) if isinstance(mask, bool | int | float | np.generic) else mask


def _rows_of(ids: np.ndarray[Any, Any]) -> list[list[int]] | None:
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        return None
    return [[int(token) for token in row] for row in np.atleast_2d(ids)]
