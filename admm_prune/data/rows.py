"""Rows of tables as documents: selection of the text column, and conversion of its content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from admm_prune.data.conversations import ChatText, Message, conversation_of, has_template, templated, untemplated
from admm_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = "text"
PEEK = 100  # rows inspected to find the column
_CHATS = ("messages", "conversations", "conversation")

LocatedRow = tuple[str, Any]  # where it is ("line 3"), and what


class Notes:
    """Assumptions and replacements of a reader: the first case of every kind, and the number of further ones."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._more: dict[str, int] = {}

    def add(self, kind: str, message: str) -> None:
        if kind in self._first:
            self._more[kind] = self._more.get(kind, 0) + 1
        else:
            self._first[kind] = message

    def collected(self) -> tuple[str, ...]:
        return tuple(
            f"{message} (and {self._more[kind]} more)" if kind in self._more else message
            for kind, message in self._first.items()
        )


class RowReader:
    """Converts rows to documents.

    Args:
        column: that holds the text; None for "text", or for the only column of text there is.
        tokenizer: whose chat template writes conversations; without one their messages are read as plain text.
        notes: are added to where a column was chosen, a character replaced, or a chat template missing.
    """

    def __init__(self, column: str | None, tokenizer: PreTrainedTokenizerBase | None, notes: Notes) -> None:
        self.requested_column, self._tokenizer, self.notes = column, tokenizer, notes

    def of(self, column: str) -> RowReader:
        """A reader of this column, which adds to the same notes."""
        return RowReader(column, self._tokenizer, self.notes)

    def documents(self, source: str, rows: Iterable[LocatedRow]) -> Iterator[str]:
        """The text of every row; a null counts as an empty document.

        Raises:
            UserError: there is no such column, or a row holds something else than text or a conversation.
        """
        rows = iter(rows)
        head = list(islice(rows, 1))
        if self.requested_column is None and not (head and isinstance(head[0][1], dict) and TEXT in head[0][1]):
            head += islice(rows, PEEK - 1)
        column = self.column(source, [row for _, row in head if isinstance(row, dict)])
        for where, row in chain(head, rows):
            yield self._document(row, column, f"{source}: {where}")

    def column(self, source: str, rows: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> str:
        """The column to read, by the first rows.

        Args:
            names: of all columns, where they are known without the rows.

        Raises:
            UserError: none of this name, or none that is the only one with text; the message lists the columns.
        """
        names = names or list(dict.fromkeys(name for row in rows for name in row))
        if self.requested_column is not None:
            if names and self.requested_column not in names:
                raise NoColumnError(source, self.requested_column, names)
            return self.requested_column
        if TEXT in names or not names:
            return TEXT
        chats = [name for name in names if _is_chat([row.get(name) for row in rows])]
        texts = [name for name in names if _is_text([row.get(name) for row in rows])]
        usual = [name for name in _CHATS if name in chats]
        candidates = usual[:1] or texts or chats
        if len(candidates) != 1:
            raise NoColumnError(source, TEXT, names)
        self.notes.add(
            f"column {candidates[0]}",
            f"{source}: there is no column 'text': '{_short(candidates[0])}' is read (--column names another)",
        )
        return candidates[0]

    def _document(self, row: Any, column: str, where: str) -> str:
        if isinstance(row, dict):
            if column not in row:
                raise NoColumnError(where, column, list(row))
            value, place = row[column], f"{where}: column {_short(column)!r}"
        elif self.requested_column is not None and isinstance(row, str | list):
            raise NoColumnError(where, column, None)
        else:
            value, place = row, where
        if value is None or (isinstance(row, dict) and value == []):
            return ""
        if isinstance(value, str):
            return self._encodable(value, where)
        conversation = conversation_of(value)
        if conversation is not None:
            return self._conversation(conversation, where, place)
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object with the key {column!r}")
        raise UserError(f"{place} holds {type(value).__name__}, not text")

    def _conversation(self, messages: Sequence[Message], where: str, place: str) -> str:
        if self._tokenizer is not None and has_template(self._tokenizer):
            return ChatText(self._encodable(templated(messages, self._tokenizer, place), where))
        text = untemplated(messages, place)
        self.notes.add(
            "no chat template",
            f"{place} is a conversation, and the model's tokenizer has no chat template: the messages are read as "
            "plain text with a blank line between them",
        )
        return self._encodable(text, where)

    def _encodable(self, text: str, where: str) -> str:
        """The text with U+FFFD in place of halves of surrogate pairs, which no tokenizer accepts."""
        clean = without_surrogates(text)
        if clean != text:
            self.notes.add("surrogate", f"{where}: half a surrogate pair is replaced with U+FFFD")
        return clean


def without_surrogates(text: str) -> str:
    """`text` in Unicode proper: pairs of surrogates joined, lone ones replaced with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class NoColumnError(UserError):
    """Rows do not have the requested column.

    Args:
        columns: the columns there are; None for text that has no columns at all.
    """

    def __init__(self, where: str, column: str, columns: Sequence[object] | None) -> None:
        self.plain = columns is None
        if columns is None:
            super().__init__(f"{where}: plain text, without a column {_short(column)!r}: leave --column out")
            return
        names = sorted(_short(name) for name in columns)
        listed = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "") if names else "none"
        super().__init__(f"{where}: no column {_short(column)!r}; found {listed}: choose one with --column")


def _short(name: object) -> str:
    """A column's name as a message can hold it: data that are damaged may have any text there."""
    text = " ".join(without_surrogates(str(name)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_chat(values: list[Any]) -> bool:
    present = [value for value in values if value is not None and value != []]
    return bool(present) and all(conversation_of(value) is not None for value in present)


def _is_text(values: list[Any]) -> bool:
    """Strings, at least one of which is not a number: all values of a CSV file are strings."""
    present = [value for value in values if value is not None]
    return all(isinstance(value, str) for value in present) and any(
        value.strip() and not _is_number(value) for value in present
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
