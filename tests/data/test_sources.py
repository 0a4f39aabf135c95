from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from admm_prune.data import sources
from admm_prune.data.sources import Corpus, hold_out, read_corpus
from admm_prune.errors import UserError

STORIES = ("one story", "another\n\nstory", "the third: naïve ☃")


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(source: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_corpus(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_without_separator_is_one_document_verbatim(tmp_path: Path) -> None:
    text = "\n first line\r\nsecond \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = read_corpus(str(tmp_path / "a.txt"))
    assert corpus.documents == (text,)
    assert corpus.characters == len(text)


def test_separated_documents_lose_the_separator_and_its_newlines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "<|endoftext|>\n \n<|endoftext|>", encoding="utf-8")
    assert read_corpus(str(path)).documents == STORIES


def test_jsonl_and_parquet_give_the_column_asked_for_without_its_blanks(tmp_path: Path) -> None:
    rows = [*STORIES, " ", None]
    jsonl = write_jsonl(tmp_path / "a.jsonl", *({"story": row, "text": "no"} for row in rows))
    parquet = write_parquet(tmp_path / "a.parquet", story=rows, text=["no"] * len(rows))
    assert read_corpus(str(jsonl), column="story").documents == STORIES
    assert read_corpus(str(parquet), column="story").documents == STORIES


def test_jsonl_rows_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a\u2028b\x85c"})
    assert read_corpus(str(path)).documents == ("a\u2028b\x85c",)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("last")
    write_jsonl(tmp_path / "b" / "x.jsonl", {"text": "middle"})
    write_parquet(tmp_path / "a.parquet", text=["first"])
    (tmp_path / "README.md").write_text("not text to learn from")
    assert read_corpus(str(tmp_path)).documents == ("first", "middle", "last")


def test_limit_counts_documents_that_are_not_blank(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in ("", *STORIES)))
    assert read_corpus(str(path), limit=2).documents == STORIES[:2]


def test_the_embedded_corpus_parts_held_out_modules() -> None:
    train = set(read_corpus("embedded", limit=50).documents)
    validation = read_corpus("embedded", split="validation")
    assert validation.documents == tuple(sources.standard_library_documents(held_out=True))
    assert validation == Corpus("embedded", read_corpus("embedded", split="test").documents)
    assert train.isdisjoint(validation.documents)


def test_the_fingerprint_tells_texts_and_cuts_apart() -> None:
    prints = [Corpus("x", documents).fingerprint for documents in (("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"))]
    assert len(set(prints)) == 4
    assert Corpus("y", ("ab", "c")).fingerprint == prints[0]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The Hub's place is taken by a local dataset folder; `datasets` itself is the real one."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", text=[*STORIES, " "])
    write_parquet(folder / "test-0.parquet", text=["held out"])
    load: Callable[..., Any] = datasets.load_dataset
    calls: list[tuple[Any, ...]] = []

    def local(path: str, name: str | None = None, **options: Any) -> Any:
        calls.append((path, name, options.get("streaming", False)))
        return load(str(folder), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(sources, "check_hub", lambda *_: None)
    return calls


def test_hub_datasets_are_streamed_by_split_up_to_a_limit(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_corpus("owner/name:config").documents == STORIES
    assert read_corpus("owner/name", split="test").documents == ("held out",)
    assert read_corpus("owner/name", limit=2) == Corpus("owner/name", STORIES[:2])
    assert hub == [("owner/name", "config", True), ("owner/name", None, True), ("owner/name", None, True)]
    monkeypatch.setattr(sources, "HUB_DOCUMENTS", 2)
    capped = read_corpus("owner/name")
    assert capped.documents == STORIES[:2]
    (note,) = capped.notes
    assert note.startswith("owner/name: the first 2 documents of the split 'train' are read (--documents ")
    monkeypatch.setattr(sources, "HUB_DOCUMENTS", 3)
    assert read_corpus("owner/name") == Corpus("owner/name", STORIES), "all there are: nothing to note"


def test_a_dataset_in_the_cache_is_read_from_there(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "owner___name").mkdir()
    assert read_corpus("owner/name").documents == STORIES
    assert hub == [("owner/name", None, False)]


def test_short_names_stand_for_hub_datasets(hub: list[tuple[Any, ...]]) -> None:
    for name in ("c4", "wikitext2", "wikitext"):
        read_corpus(name, limit=1)
    wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1", True)
    assert hub == [("allenai/c4", "en", True), wikitext, wikitext]


def test_hub_refusals(hub: list[tuple[Any, ...]]) -> None:
    assert "no column 'body'; found text" in refusal("owner/name", column="body")
    assert "no split 'nosuch'; there are train, test: choose with --split" in refusal("owner/name", split="nosuch")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "the Hub cannot be reached"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\nor so"),
            "doesn't exist",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample: x"),
            "name one of its configurations ['a', 'b'], as owner/name:NAME",
        ),
        (RuntimeError("scripts are no longer supported"), "scripts are no longer supported"),
    ],
)
def test_what_the_hub_raises_becomes_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(sources, "check_hub", lambda *_: None)
    assert said in refusal("owner/name")


def test_refusals_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("a,b")
    assert "no such file" in refusal(tmp_path / "missing.txt")
    assert "no such file or folder" in refusal(tmp_path / "missing")
    assert "the name of the text is empty" in refusal("")
    assert "unknown kind of file '.docx'" in refusal(tmp_path / "a.docx")
    assert "contains no .txt, .jsonl, .json, .csv, .tsv, .parquet" in refusal(tmp_path)
    assert "no split 'dev'" in refusal("embedded", split="dev")


def test_refusals_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for blank in ("", " \n\t", "\n<|endoftext|>\n"):
        path.write_text(blank)
        assert "text is empty" in refusal(path)
    path.write_bytes(b"abc\0def")
    assert "not a text file (NUL at character 3)" in refusal(path)
    path.write_bytes(b"abc\xff\xfe")
    assert "not a text file (byte 3 is not UTF-8)" in refusal(path)


def test_refusals_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": \n')
    assert "line 3 is not JSON" in refusal(path)
    path.write_text("[1, 2]\n")
    assert "line 1 is not a JSON object" in refusal(path)
    write_jsonl(path, {"text": "fine"}, {"title": "a", "body": "b"})
    assert "line 2: no column 'text'; found body, title" in refusal(path)
    write_jsonl(path, {"text": ["a"]})
    assert "column 'text' holds list" in refusal(path)


def test_refusals_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", title=["a"], body=["b"])
    assert "no column 'text'; found body, title" in refusal(path)
    write_parquet(path, text=[1])
    assert "holds int" in refusal(path)
    path.write_bytes(b"PAR1 and then nothing")
    assert "not a readable parquet file" in refusal(path)


@pytest.mark.parametrize(
    ("document", "last"),
    [
        ("word " * 1800 + "\n" + "word " * 200, "word " * 200),  # a line break within 1 % before the cut
        ("A Title\n" + "word " * 2000, None),  # one line beneath a title
        ("word " * 300 + "\n" + "word " * 2000, None),
        ("字" * 1000, "字" * 100),  # no space
        ("\n" + "x" * 999, "x" * 100),
    ],
)
def test_a_tenth_of_a_text_is_held_out_wherever_its_lines_break(document: str, last: str | None) -> None:
    first, held_out = (part.documents[0] for part in hold_out(Corpus("x", (document,))))
    assert isinstance(first, str)
    assert isinstance(held_out, str)
    assert first + held_out == document
    if last is None:
        assert 0.1 <= len(held_out) / len(document) <= 0.11
        assert held_out.startswith(" word")
    else:
        assert held_out == last


@pytest.mark.parametrize(("count", "said"), [(1, "10%"), (2, "50%"), (7, "14%"), (40, "10%")])
def test_the_names_of_both_parts_say_how_much_was_held_out(count: int, said: str) -> None:
    first, held_out = hold_out(Corpus("x", ("abcde fghij\n" * 100,) * count))
    assert (first.name, held_out.name) == (f"x (all but the last {said})", f"x (last {said})")
