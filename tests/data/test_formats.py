"""Files of every kind and what scraped ones hold: read as far as they are text, else refused in one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from admm_prune.data import formats
from admm_prune.data.sources import Corpus, read_corpus
from admm_prune.errors import UserError

STORIES = ("one story", "another\n\nstory", 'the third: "naïve" ☃, with\r\na comma')
ROWS = [{"id": str(i), "text": story} for i, story in enumerate(STORIES)]


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


ARRAY = json.dumps(ROWS).encode()
FILES: dict[str, bytes] = {
    "rows.jsonl": lines(*ROWS),
    "crlf.jsonl": lines(*ROWS).replace(b"\n", b"\r\n"),
    "mark.jsonl": b"\xef\xbb\xbf" + lines(*ROWS),
    "rows.jsonl.gz": gzip.compress(lines(*ROWS)),
    "parts.jsonl.gz": gzip.compress(lines(ROWS[0])) + gzip.compress(lines(*ROWS[1:])),
    "rows.jsonl.bz2": bz2.compress(lines(*ROWS)),
    "rows.jsonl.xz": lzma.compress(lines(*ROWS)),
    "rows.jsonl.zst": zstd(lines(*ROWS)),
    "ROWS.JSONL.GZ": gzip.compress(lines(*ROWS)),
    "array.json": ARRAY,
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "inner.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "other.json": json.dumps({"version": "a", "rows": ROWS, "authors": []}).encode(),
    "strings.json": json.dumps(STORIES).encode(),
    "array.json.gz": gzip.compress(ARRAY),
    "lines.json": lines(*ROWS),  # as C4 comes
    "lines.json.gz": gzip.compress(lines(*ROWS)),
    "text.txt.gz": gzip.compress("<|endoftext|>".join(STORIES).encode()),
    "mark.txt": b"\xef\xbb\xbf" + "<|endoftext|>".join(STORIES).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_its_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert read_corpus(str(tmp_path / name)) == Corpus(str(tmp_path / name), STORIES)


@pytest.mark.parametrize("beside", [{"tags": ["a", "b"]}, {"data": [{"text": "other"}]}])
def test_an_object_with_a_text_is_one_row_whatever_lists_it_has(tmp_path: Path, beside: dict[str, object]) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"title": "t", "text": STORIES[0], **beside}))
    assert read_corpus(str(tmp_path / "a.json")).documents == STORIES[:1]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_tables_give_the_column_of_text(tmp_path: Path, name: str, delimiter: str) -> None:
    plain = tmp_path / "plain"
    table(plain, delimiter)
    data = plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_corpus(str(tmp_path / name)).documents == STORIES
    assert read_corpus(str(tmp_path / name), column="id").documents == ("0", "1", "2")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_file_may_have_the_delimiter_of_a_spreadsheet(tmp_path: Path, delimiter: str) -> None:
    table(tmp_path / "a.csv", delimiter)
    corpus = read_corpus(str(tmp_path / "a.csv"))
    assert corpus.documents == STORIES
    assert corpus.notes == ()


def test_a_field_of_a_table_may_be_longer_than_the_csv_module_takes_by_itself(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text('text\n"' + "the cat " * 50_000 + '"\n')
    assert len(read_corpus(str(tmp_path / "a.csv")).documents[0]) == 400_000
    assert csv.field_size_limit() == before


def test_a_folder_holds_files_of_all_kinds_and_descriptions_that_are_not_read(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.jso", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("no text of the folder")
    (tmp_path / "a.json").write_bytes(json.dumps(["first"]).encode())
    (tmp_path / "b.csv").write_text("text,n\nsecond,1\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines({"text": "third"})))
    assert read_corpus(str(tmp_path)).documents == ("first", "second", "third")


def test_saved_datasets_are_read_by_split(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": list(STORIES), "n": [1, 2, 3]})
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(tmp_path / "parts")
    assert read_corpus(str(tmp_path / "one")).documents == STORIES
    assert read_corpus(str(tmp_path / "one"), split="test").documents == STORIES
    assert read_corpus(str(tmp_path / "parts")).documents == STORIES
    assert read_corpus(str(tmp_path / "parts"), split="test", limit=1).documents == STORIES[:1]
    with pytest.raises(formats.NoSplitError, match=r"no split 'validation'; there are train, test"):
        read_corpus(str(tmp_path / "parts"), split="validation")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"not a readable folder of save_to_disk \(.+\)$"):
        read_corpus(str(tmp_path / "one"))


COLUMNS: dict[str, tuple[object, str | None]] = {
    "the only string": ({"content": "a story", "id": 3}, "content"),
    "the only string that is no number": ({"content": "a story", "id": "3"}, "content"),
    "text before others": ({"content": "no", "text": "a story"}, None),
}


@pytest.mark.parametrize("case", COLUMNS)
@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet", "dataset"])
def test_the_column_is_text_or_the_only_one_with_text(tmp_path: Path, case: str, write: str) -> None:
    row, noted = COLUMNS[case]
    assert isinstance(row, dict)
    path = tmp_path / f"a.{write}"
    if write == "jsonl":
        path.write_bytes(lines(row, row))
    elif write == "csv":
        path.write_text("\n".join([",".join(row), *[",".join(map(str, row.values()))] * 2]))
    elif write == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    else:
        datasets.Dataset.from_list([row, row]).save_to_disk(path)
    corpus = read_corpus(str(path))
    assert corpus.documents == ("a story", "a story")
    expected = f"{path}: there is no column 'text': '{noted}' is read (--column names another)"
    assert corpus.notes == (() if noted is None else (expected,))


def test_columns_of_any_name_are_listed_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"a\nb","' + "c" * 500 + '",' + ",".join(f"n{i:02}" for i in range(40)) + "\nx,y\n")
    with pytest.raises(UserError) as caught:
        read_corpus(str(path), column="text")
    assert str(caught.value).startswith(f"{path}: no column 'text'; found a b, {'c' * 57}..., n00, n01, ")
    assert str(caught.value).endswith("n27, ...: choose one with --column")


def test_two_columns_of_text_need_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"title": "a", "body": "b"}))
    with pytest.raises(UserError, match=r"no column 'text'; found body, title: choose one with --column$"):
        read_corpus(str(path))
    assert read_corpus(str(path), column="body").documents == ("b",)


HALF = r'{"text": "an emoji \ud83d cut"}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_half_a_surrogate_pair_is_replaced_and_noted(tmp_path: Path, name: str) -> None:
    whole = r'{"text": "\ud83d\ude00"}'
    text = f"[{whole}, {HALF}, {HALF}]" if name == "a.json" else f"{whole}\n{HALF}\n{HALF}\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    corpus = read_corpus(str(tmp_path / name))
    assert corpus.documents == ("\U0001f600", *["an emoji \ufffd cut"] * 2)
    where = "row 2" if name == "a.json" else "line 2"
    note = f"{tmp_path / name}: {where}: half a surrogate pair is replaced with U+FFFD (and 1 more)"
    assert corpus.notes == (note,)
    assert len(corpus.fingerprint) == 64


def parquet(values: pyarrow.Array) -> Callable[[Path], Any]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)


broken_text = pyarrow.StringArray.from_buffers(
    1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xed\xa0")
)
REFUSED: dict[str, tuple[str, bytes | Callable[[Path], Any], str]] = {
    "a number too long": (
        "a.jsonl",
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
        "line 1 contains a number that cannot",
    ),
    "deep nesting": ("a.jsonl", b'{"text": ' + b"[" * 200_000, "line 1 is nested too deeply"),
    "deep nesting in an array": ("a.json", b"[" * 200_000, "the file is nested too deeply"),
    "bytes that are no text": ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not a text file (byte 10 is not UTF-8)"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "looks like UTF-16, save it as UTF-8"),
    "a mark within": ("a.jsonl", b'{"text": "a"}\n\xef\xbb\xbf{"text": "a"}\n', "line 2 is not JSON"),
    "NUL in a table": ("a.csv", b"text\n\0", "line 2: not a text file (NUL at character 0)"),
    "a table without rows": ("a.csv", b"text,n\n", "the text is empty"),
    "an empty file": ("a.json", b"", "the text is empty"),
    "an empty array": ("a.json", b"[]", "the text is empty"),
    "rows that are numbers": ("a.json", b"[1, 2]", "row 1 is not a JSON object with the key 'text'"),
    "a number alone": ("a.json", b"3", "contains an array of rows, not one int"),
    "an empty row": ("a.jsonl", b"{}\n", "line 1: no column 'text'; found none"),
    "commas that are not quoted": (
        "a.csv",
        b'text\n"the cat, and a mat"\nthe cat, and a mat\n',
        "line 3 has 2 fields, the first line 1: quote the text",
    ),
    "a tab in a text": ("a.tsv", b"n\ttext\n1\tthe\tcat\n", "line 2 has 3 fields, the first line 2"),
    "an open quote": ("a.csv", b'text\r"a\rb', "a.csv: line "),
    "cut short": ("a.jsonl.gz", gzip.compress(lines(*ROWS) * 99)[:60], "cannot be decompressed: damaged or cut short"),
    "cut short, zstd": ("a.jsonl.zst", zstd(lines(*ROWS) * 99)[:60], "a.jsonl.zst: "),
    "not gzip": ("a.txt.gz", b"plain text", "cannot be read (Not a gzipped file"),
    "not bzip2": ("a.txt.bz2", b"plain text", "cannot be read (Invalid data stream"),
    "not xz": ("a.txt.xz", b"plain text", "cannot be decompressed"),
    "not zstd": ("a.txt.zst", b"plain text", "a.txt.zst: cannot be "),
    "compressed what is not read so": ("a.parquet.gz", b"", "unknown kind of file '.parquet.gz'"),
    "bytes": ("a.parquet", parquet(pyarrow.array([b"a"])), "column 'text' holds bytes, not text"),
    "no UTF-8": ("a.parquet", parquet(broken_text), "not a readable parquet file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, reason = REFUSED[case]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises(UserError) as caught:
        read_corpus(str(path))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_expands_without_end_is_read_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST", 2**20)
    for name, content in (
        ("a.txt.gz", b"a" * 2**24),
        ("a.jsonl.gz", b'{"text": "' + b"a" * 2**24),
        ("a.json.gz", b"\n" + (b" " * 999 + b"\n") * 2**12),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=r"more than 1 MiB|longer than 1 MiB"):
            read_corpus(str(tmp_path / name))
    rows = lines(*[{"text": "a" * 1000}] * 5000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows))
    assert len(read_corpus(str(tmp_path / "b.jsonl.gz"), limit=3).documents) == 3
