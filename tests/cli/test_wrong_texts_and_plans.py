"""Texts that are none, outputs that cannot be, plans that do not fit; and odd names that must not matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.cli.outcome import Command, Refused


def parquet(**columns: list[object]) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def folder(**files: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, data in files.items():
            (path / name.replace("_", ".")).write_bytes(data)

    return make


TEXTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "UTF-16": ("text.txt", content("the cat sat".encode("utf-16")), "not a text file (byte 0 is not UTF-8)"),
    "Latin-1": ("text.txt", content("naïve".encode("latin-1")), "not a text file (byte 2 is not UTF-8)"),
    "a folder with the name of a file": ("text.txt", folder(), "text.txt"),
    "an empty folder": ("texts", folder(), "texts"),
    "a folder without texts": ("texts", folder(notes_md=b"# notes"), "texts"),
    "a folder with an empty text": ("texts", folder(a_txt=b"", b_txt=b"\n \n"), "the text is empty"),
    "a folder with a broken text": ("texts", folder(a_txt=b"the cat", b_txt=b"\xff"), "b.txt: not a text file"),
    "a link to nowhere": ("text.txt", lambda path: path.symlink_to("nowhere"), "there is no such file"),
    "JSON without the key": (
        "text.jsonl",
        content(b'{"body": "a", "title": "b"}\n'),
        "no column 'text'; found body, title",
    ),
    "JSON with numbers": ("text.jsonl", content(b'{"text": 3}\n'), "column 'text' holds int, not text"),
    "JSON that is a list": ("text.jsonl", content(b'["a"]\n'), "line 1 is not a JSON object"),
    "JSON of a conversation without text": (
        "text.jsonl",
        content(b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n'),
        "column 'messages': a message has a part of type 'image': only text can be read",
    ),
    "JSON with a number too long": (
        "text.jsonl",
        content(b'{"text": ' + b"1" * 5000 + b"}"),
        "line 1 contains a number",
    ),
    "JSON that is nested": ("text.json", content(b"[" * 100_000), "nested too deeply"),
    "gzip that is none": ("text.jsonl.gz", content(b"{}"), "Not a gzipped file"),
    "JSON with nulls alone": ("text.jsonl", content(b'{"text": null}\n'), "the text is empty"),
    "parquet that is none": ("text.parquet", content(b"PAR1 not"), "not a readable parquet file"),
    "parquet without the column": ("text.parquet", parquet(body=["a"], title=["b"]), "no column 'text'; found body"),
    "parquet with numbers": ("text.parquet", parquet(text=[1, 2]), "column 'text' holds int, not text"),
    "parquet without rows": ("text.parquet", parquet(text=[]), "the text is empty"),
    "one word": ("text.txt", content(b"cat"), "no document has a token to score"),
    "no ending": ("text", content(b"the cat sat"), "unknown kind of file ''"),
}


@pytest.mark.parametrize(("name", "make", "reason"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_none(
    refused: Refused, place: Path, run: tuple[object, ...], name: str, make: Callable[[Path], object], reason: str
) -> None:
    make(place / name)
    refused(reason, *run, "--sparsity", "0.5", "--out", "out", "--data", name)


@pytest.mark.parametrize("kind", ["UTF-16", "JSON without the key", "parquet that is none", "an empty folder"])
def test_a_text_to_evaluate_on_that_is_none(refused: Refused, place: Path, run: tuple[object, ...], kind: str) -> None:
    name, make, reason = TEXTS[kind]
    make(place / name)
    refused(reason, *run, "--sparsity", "0.5", "--out", "out", "--eval-data", name)


PLANS: dict[str, tuple[list[str], str]] = {
    "no target": ([], "give either a sparsity such as 0.7 or a pattern such as 2:4"),
    "an unknown method": (["--sparsity", "0.5", "--method", "nonesuch"], "unknown method 'nonesuch'"),
    "an unknown GPU": (["--sparsity", "0.5", "--gpu", "tpu"], "gpu must be h100, h200 or a100, not 'tpu'"),
    "memory of no GPU": (["--sparsity", "0.5", "--device-memory", "24"], "--device-memory is that of a GPU: add"),
    "GPUs of no kind": (["--sparsity", "0.5", "--gpus", "8"], "--gpus needs the kind of GPU: add --gpu"),
    "no GPUs": (["--sparsity", "0.5", "--gpus", "0"], "Invalid value for '--gpus'"),
    "no memory": (["--sparsity", "0.5", "--memory", "0"], "Invalid value for '--memory'"),
    "memory that is a word": (["--sparsity", "0.5", "--memory", "much"], "Invalid value for '--memory'"),
    "training from disk": (["--sparsity", "0.5", "--method", "elsa", "--stream"], "elsa trains all weights at once"),
    "padding from disk": (
        ["--sparsity", "0.5", "--method", "struprune-padded", "--stream"],
        "pads to the widest block",
    ),
    "a length beyond the context": (["--sparsity", "0.5", "--length", "65"], "beyond the model's context of 64 tokens"),
    "a pattern that does not divide": (["--pattern", "2:7"], "pattern 2:7 needs a width that 7 divides"),
    "units of a local method": (["--sparsity", "0.5", "--unit", "bytes"], "admm removes no structured groups"),
    "steps of a local method": (["--sparsity", "0.5", "--steps", "3"], "admm does not train"),
    "a dtype that is none": (["--sparsity", "0.5", "--dtype", "int8"], "dtype must be float32, bfloat16 or float16"),
    "more than there is": (["--sparsity", "0.5", "--memory", "0.01"], "admm does not fit"),
    "more than a GPU has": (
        ["--model", "embedded", "--sparsity", "0.5", "--gpu", "h100", "--device-memory", "0.001"],
        "on the device",
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("options", "reason"), PLANS.values(), ids=PLANS)
def test_a_plan_that_cannot_be(refused: Refused, model_folder: Path, options: list[str], reason: str) -> None:
    refused(reason, "plan", "--model", model_folder, "--samples", "8", *options)


@pytest.mark.parametrize("model", ["no/such/folder", "empty", "file"])
def test_a_plan_of_no_model(refused: Refused, place: Path, model: str) -> None:
    (place / "empty").mkdir()
    (place / "file").write_text("weights")
    refused(model, "plan", "--model", model, "--sparsity", "0.5")


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("file/out", "file is not a writable folder"),
        ("file", "file is a file or a link, not a folder"),
        ("/proc/out", "/proc is not a writable folder"),
        ("/dev/null/out", "/dev/null is not a writable folder"),
        ("/dev/null", "/dev/null is a file or a link, not a folder"),
    ],
)
def test_a_streamed_output_below_what_is_no_folder(
    refused: Refused, place: Path, run: tuple[object, ...], out: str, reason: str
) -> None:
    """Whoever runs this, root too, cannot write there."""
    (place / "file").write_text("a file")
    refused(reason, *run, "--stream", "--sparsity", "0.5", "--out", out)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_names_in_any_script_with_blanks_work(
    command: Command, place: Path, model_folder: Path, text_file: Path, stream: str
) -> None:
    shutil.copytree(model_folder, place / "модель ☃ v1.0")
    shutil.copyfile(text_file, place / "naïve 文.txt")
    out = place / "résultat 'quoted' 結果"
    options = ("--method", "magnitude", "--sparsity", "0.5", "--json")
    told = command("run", stream, "--model", "модель ☃ v1.0", "--data", "naïve 文.txt", "--out", out, *options).json()
    assert told["out"] == str(out)
    assert json.loads((out / "admm_prune.json").read_text())["settings"]["model"] == "модель ☃ v1.0"
    assert command("eval", out, "--data", "naïve 文.txt", "--json").json()["sparsity"] == pytest.approx(0.5, abs=0.01)
