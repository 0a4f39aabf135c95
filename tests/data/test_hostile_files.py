"""Random bytes and damaged files of every kind: what is read is text, and all else is refused by a UserError."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from admm_prune.data.sequences import encode
from admm_prune.data.sources import read_corpus
from admm_prune.errors import UserError

ROWS = [{"id": i, "text": f"story {i} ☃", "messages": [{"role": "user", "content": "hello"}]} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps({"data": ROWS}).encode()
CSV = b"id,text\n" + b"".join(f'{row["id"]},"{row["text"]}"\n'.encode() for row in ROWS)
KINDS = (
    ".txt",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt.gz",
    ".jsonl.gz",
    ".json.zst",
    ".csv.xz",
    ".txt.bz2",
)


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


VALID = {
    ".txt": "a story ☃<|endoftext|>another".encode(),
    ".jsonl": LINES,
    ".json": ARRAY,
    ".csv": CSV,
    ".tsv": CSV.replace(b",", b"\t"),
    ".parquet": parquet(),
    ".jsonl.gz": gzip.compress(LINES),
    ".json.bz2": bz2.compress(ARRAY),
    ".csv.xz": lzma.compress(CSV),
    ".jsonl.zst": bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True)),
}


def is_read_or_refused(path: Path, tokenizer: PreTrainedTokenizerFast, column: str | None = None) -> bool:
    """True where it is read; nothing but a UserError of one line comes out otherwise."""
    try:
        corpus = read_corpus(str(path), column=column, tokenizer=tokenizer)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert message.encode()
        return False
    assert len(corpus.fingerprint) == 64
    encode(corpus.documents[:3], tokenizer)
    return True


def mutated(data: bytes, seed: int) -> bytes:
    """Cut short, with bytes changed, left out, doubled or put in."""
    draw = random.Random(seed)
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        at = draw.randrange(len(content)) if content else 0
        match draw.randrange(6):
            case 0:
                content[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del content[at : at + draw.choice((1, 4, 100))]
            case 2:
                content[at:at] = content[max(0, at - 50) : at]
            case 3:
                content[at:at] = draw.choice(
                    (b"\0", b"\xff", b'"', b"[", b"{", b"\\ud83d", b"\r", b"\n", b"1e999", b"null")
                )
            case 4 if draw.random() < 0.3:
                del content[at:]
            case _:
                content[at : at + 1] = bytes([content[at] ^ 1 << draw.randrange(8)]) if content else b""
    return bytes(content)


@given(data=st.binary(max_size=200), kind=st.sampled_from(KINDS))
@settings(max_examples=150)
def test_random_bytes(
    tmp_path_factory: pytest.TempPathFactory, chatting: PreTrainedTokenizerFast, data: bytes, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"random{kind}"
    path.write_bytes(data)
    is_read_or_refused(path, chatting)


HUGE = "a number of 5000 digits"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud83d") | st.just(HUGE),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("text", "role", "content", "from", "value", "messages", "data")), inner, max_size=3
        )
    ),
    max_leaves=12,
)


def written(value: object) -> str:
    """JSON, of numbers too that `json.dumps` refuses for their length."""
    if value == HUGE:
        return "1" * 5000
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


@given(rows=st.lists(json_values, max_size=4), column=st.sampled_from((None, "text", "messages")), whole=st.booleans())
@settings(max_examples=150)
def test_any_json(
    tmp_path_factory: pytest.TempPathFactory,
    chatting: PreTrainedTokenizerFast,
    rows: list[object],
    column: str | None,
    whole: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / ("any.json" if whole else "any.jsonl")
    path.write_text(written(rows) if whole else "\n".join(map(written, rows)))
    is_read_or_refused(path, chatting, column)


def try_damaged(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str, count: int) -> None:
    path = folder / f"a{kind}"
    read = 0
    for seed in range(count):
        path.write_bytes(mutated(VALID[kind], seed))
        read += is_read_or_refused(path, tokenizer, None if seed % 3 else "messages")
    path.write_bytes(VALID[kind])
    assert is_read_or_refused(path, tokenizer)
    assert read < count


@pytest.mark.parametrize("kind", VALID)
def test_damaged_files(tmp_path: Path, chatting: PreTrainedTokenizerFast, kind: str) -> None:
    try_damaged(tmp_path, chatting, kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_many_damaged_files(tmp_path: Path, chatting: PreTrainedTokenizerFast, kind: str) -> None:
    try_damaged(tmp_path, chatting, kind, 2000)


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_damaged_folders_of_save_to_disk(tmp_path: Path, chatting: PreTrainedTokenizerFast, file: str) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    valid = (tmp_path / "saved" / file).read_bytes()
    for seed in range(25):
        shutil.copytree(tmp_path / "saved", tmp_path / str(seed))  # an arrow file is mapped: not to be written over
        (tmp_path / str(seed) / file).unlink()
        (tmp_path / str(seed) / file).write_bytes(mutated(valid, seed))
        is_read_or_refused(tmp_path / str(seed), chatting)
