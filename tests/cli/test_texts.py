"""Which text a command reads: named for every model but the embedded one, by column and split, or that of a run."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import typer

import admm_prune
from admm_prune.cli.app import app
from admm_prune.data.sources import PYTHON_OBJECT, Corpus, read_corpus
from admm_prune.errors import UserError
from admm_prune.models.loading import load
from admm_prune.runs.recipe_file import read_packaged, read_recipe
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from tests.cli.outcome import Command, Refused

ROOT = Path(admm_prune.__file__).parent
READING = ["run", "compare", "eval", "capture", "plan", "reproduce"]
QUICK = ("--method", "magnitude", "--sparsity", "0.5", "--samples", "8", "--json")


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


OPTIONS = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in commands(typer.main.get_command(app))
}


def stories(text_file: Path) -> list[str]:
    return [str(document) for document in read_corpus(str(text_file)).documents]


@pytest.fixture
def rows(place: Path, text_file: Path) -> Path:
    """The stories in the column "story", beside another one of words."""
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps({"story": story, "title": "a"}) + "\n" for story in stories(text_file)))
    return path


@pytest.mark.parametrize("name", READING)
def test_every_command_that_reads_text_has_the_options_of_texts(name: str) -> None:
    assert {"--data", "--column", "--documents", "--eval-split"} <= OPTIONS[name]
    assert name == "eval" or {"--eval-data", "--split", "--eval-documents"} <= OPTIONS[name]


def test_every_option_that_a_message_names_exists() -> None:
    """Every word that begins with two dashes in a string of the package is an option of a command."""
    known = set.union(*OPTIONS.values()) | {"--help", "--version"}
    named: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= dict.fromkeys(re.findall(r"(?<![\w-])(?<!var\()--[a-z][a-z-]*\b", node.value), str(path))
    assert {"--column", "--data", "--stream"} <= named.keys()
    assert {option: path for option, path in named.items() if option not in known} == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--model", "MODEL", "--sparsity", "0.5", "--out", "out"),
        ("run", "--model", "MODEL", "--sparsity", "0.5", "--out", "out", "--stream", "--eval-data", "text.txt"),
        ("compare", "--model", "MODEL", "--sparsity", "0.5", "--out", "out"),
        ("capture", "--model", "MODEL", "--weight", "model.layers.0.mlp.up_proj.weight", "--out", "layer.safetensors"),
        ("eval", "MODEL"),
        ("eval", "MODEL", "--samples", "2"),
        ("run", "--recipe", "recipe.yaml", "--out", "out"),
        ("run", "--model", "MODEL", "--sparsity", "0.5", "--dry-run"),
        ("recipe", "check", "recipe.yaml"),
    ],
    ids=" ".join,
)
def test_a_model_without_a_text_is_refused(
    refused: Refused, place: Path, model_folder: Path, arguments: tuple[str, ...]
) -> None:
    (place / "recipe.yaml").write_text(f"model: {model_folder}\nsparsity: 0.5\n")
    given = [str(model_folder) if word == "MODEL" else word for word in arguments]
    refused(f"{model_folder}: name the text with --data: a file, a folder or a Hub dataset", *given)


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "nope"),
        ("run", "--model", "nope", "--sparsity", "0.5", "--out", "out"),
        ("compare", "--model", "./nope", "--sparsity", "0.5", "--out", "out"),
        ("capture", "--model", "nope", "--weight", "model.layers.0.mlp.up_proj.weight", "--out", "layer.safetensors"),
    ],
    ids=" ".join,
)
def test_a_model_that_does_not_exist_is_refused_before_its_missing_text(
    refused: Refused, place: Path, arguments: tuple[str, ...]
) -> None:
    refused("nope: no such folder here" if "nope" in arguments else "nope: there is no such model folder", *arguments)


def test_prune_has_no_default_text(model_folder: Path) -> None:
    loaded = load(str(model_folder))
    for how in ({"model": model_folder}, {"model": loaded.model, "tokenizer": loaded.tokenizer}):
        with pytest.raises(UserError, match="name the text with --data"):
            admm_prune.prune(**how, sparsity=0.5)  # type: ignore[arg-type]
    for text in ("The cat sat on the mat.\n" * 3, "The cat sat on the mat. " * 20):
        with pytest.raises(UserError, match=r"data is the name of a text, not .* data=\[text\]"):
            admm_prune.prune(model_folder, sparsity=0.5, data=text)


def test_a_relative_text_is_not_taken_from_another_folder(
    command: Command,
    place: Path,
    model_folder: Path,
    text_file: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "text.txt").write_text(text_file.read_text())
    start = ("run", "--model", model_folder, "--method", "magnitude", "--sparsity", 0.5, "--samples", 4)
    assert command(*start, "--data", "text.txt", "--out", "out", "-q").status == 0
    assert command("eval", "out").status == 0
    other = place / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    named = "; a relative path is one in the working folder: name a text with --data"
    refused(f"the text of its run, text.txt, is not there{named}", "eval", "../out")
    (other / "text.txt").write_text(text_file.read_text()[::-1])
    refused(f"){named}", "eval", "../out")
    assert command("eval", "../out", "--data", "text.txt").status == 0


def test_a_run_reads_the_column_and_the_number_of_documents(
    command: Command, place: Path, model_folder: Path, rows: Path, refused: Refused
) -> None:
    start = ("run", "--model", model_folder, "--data", rows, *QUICK)
    refused("no column 'text'; found story, title: choose one with --column", *start, "--out", "out")
    assert command(*start, "--column", "story", "--documents", "50", "--out", "out").status == 0
    manifest = json.loads((place / "out/admm_prune.json").read_text())
    assert (manifest["texts"]["calibration"]["documents"], manifest["texts"]["evaluation"]["documents"]) == (45, 5)
    recipe = read_recipe(place / "out")
    assert (recipe.text.column, recipe.text.documents) == ("story", 50)
    assert command("run", "--recipe", "out", "--out", "again", "--json").status == 0
    again = json.loads((place / "again/admm_prune.json").read_text())
    assert again == manifest

    told = command("eval", "out", "--json").json()
    assert told["perplexity"] == manifest["pruned"]["perplexity"], "the text of the run, cut as the run cut it"
    assert told["text"]["token_hash"] == manifest["texts"]["evaluation"]["token_hash"]
    assert command("eval", "out", "--samples", "2", "--json").json()["text"]["sequences"] == 2
    assert str(rows) in command("eval", "out").out
    whole = command("eval", "out", "--data", rows, "--column", "story", "--documents", "50", "--json").json()
    assert whole["text"]["documents"] == 50
    content = rows.read_text()
    rows.write_text("\n".join(content.splitlines()[:49]))  # edited since
    for more in ((), ("--samples", "2")):
        refused(f"out: {rows} is not the text that its run was evaluated on (token hash ", "eval", "out", *more)
    rows.unlink()
    refused(f"the text of its run, {rows}, is not there: name a text with --data", "eval", "out")
    (place / "out/admm_prune.json").write_text('{"settings": 3}')
    refused("does not say on which text the run evaluated: name one with --data", "eval", "out")


def test_the_evaluation_text_of_a_run_is_read_alone_and_once(
    command: Command, place: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is a text of its own, the calibration text may have been deleted."""
    shutil.copyfile(text_file, place / "calibration.txt")
    (place / "evaluation.txt").write_text(text_file.read_text()[5000:])
    texts = ("--data", "calibration.txt", "--eval-data", "evaluation.txt")
    assert command("run", "--model", model_folder, *texts, *QUICK, "--out", "out", "-q").status == 0
    manifest = json.loads((place / "out/admm_prune.json").read_text())
    (place / "calibration.txt").unlink()
    read: list[str] = []

    def reading(source: str, **how: Any) -> Corpus:
        read.append(source)
        return read_corpus(source, **how)

    monkeypatch.setattr("admm_prune.runs.texts.read_corpus", reading)
    assert command("eval", "out", "--json").json()["perplexity"] == manifest["pruned"]["perplexity"]
    assert read == ["evaluation.txt"]
    assert command("eval", "out", "--samples", "2", "--json").json()["text"]["sequences"] == 2
    assert read == ["evaluation.txt"] * 2
    assert command("eval", "out", "--documents", "3", "--json").json()["text"]["documents"] == 3
    assert read == ["evaluation.txt"] * 4, "other documents than those of the run"


def test_half_a_character_is_noted_in_the_manifest_and_logged(
    command: Command, place: Path, model_folder: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = place / "scraped.jsonl"
    lines = [json.dumps({"text": story}) for story in stories(text_file)]
    path.write_text("\n".join([*lines[:7], r'{"text": "half of an emoji \ud83d cut"}', *lines[7:]]))
    outcome = command("run", "--model", model_folder, "--data", "scraped.jsonl", *QUICK, "--out", "out")
    assert outcome.status == 0, outcome.err
    note = "scraped.jsonl: line 8: half a surrogate pair is replaced with U+FFFD"
    assert json.loads((place / "out/admm_prune.json").read_text())["texts"]["calibration"]["notes"] == [note]
    assert [record.getMessage() for record in caplog.records] == [f"note: {note}"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["plan", "capture", "compare"])
def test_other_commands_read_the_column(
    command: Command, place: Path, model_folder: Path, rows: Path, name: str
) -> None:
    options: dict[str, tuple[object, ...]] = {
        "plan": ("--sparsity", "0.5"),
        "capture": ("--weight", "model.layers.0.mlp.up_proj.weight", "--eval-samples", "2", "--out", "a.safetensors"),
        "compare": ("--methods", "magnitude", "--sparsity", "0.5", "--out", "out"),
    }
    start = (name, "--model", model_folder, "--data", rows, "--samples", "4", *options[name])
    refusal = command(*start)
    assert refusal.status == 2
    assert "choose one with --column" in refusal.err
    assert command(*start, "--column", "story").status == 0


@pytest.fixture
def loaded(model_folder: Path) -> Any:
    return load(str(model_folder))


def saved_parts(folder: Path, text_file: Path, **parts: slice) -> str:
    texts = stories(text_file)
    made = {name: datasets.Dataset.from_dict({"text": texts[part]}) for name, part in parts.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    return str(folder)


def test_splits_say_what_calibrates_and_what_evaluates(loaded: Any, tmp_path: Path, text_file: Path) -> None:
    source = saved_parts(tmp_path / "a", text_file, train=slice(40), validation=slice(40, 50), test=slice(50, 57))

    def found(source: str = source, **how: Any) -> tuple[int, int]:
        records = Texts(TextSettings(data=source, samples=4, **how), loaded).records()
        return records["calibration"].documents, records["evaluation"].documents

    assert found() == (40, 10)
    assert found(eval_split="test") == (40, 7)
    assert found(split="test", eval_split="train") == (7, 40)
    assert found(eval_documents=3, documents=20) == (20, 3)
    with pytest.raises(UserError, match="no split 'dev'; there are train, validation, test"):
        found(eval_split="dev")
    no_validation = saved_parts(tmp_path / "b", text_file, train=slice(40), test=slice(50, 57))
    assert found(no_validation) == (40, 7)
    alone = saved_parts(tmp_path / "c", text_file, train=slice(40))
    assert found(alone) == (36, 4)
    texts = Texts(TextSettings(data=alone, samples=4), loaded)
    assert texts.records()["evaluation"].notes == (
        f"{alone}: no split to evaluate on: the last tenth of what is read is held out",
    )


@pytest.mark.parametrize(
    "how", [{"split": "validation"}, {"split": "train", "eval_split": "train"}, {"split": "test", "eval_split": "test"}]
)
def test_the_split_of_the_calibration_text_is_not_evaluated_on(
    loaded: Any, tmp_path: Path, text_file: Path, how: dict[str, Any]
) -> None:
    parts = {"train": slice(30), "validation": slice(30, 45), "test": slice(45, 60)}
    source = saved_parts(tmp_path / "a", text_file, **parts)
    for data in (source, "embedded"):
        for further in ({}, {"eval_documents": 2}):
            with pytest.raises(UserError, match=f"the split '{how['split']}' is the calibration text: evaluate on"):
                Texts(TextSettings(data=data, samples=4, length=64, **how, **further), loaded)
    other = TextSettings(data=source, samples=4, eval_data=source, **how)
    assert any("contains the evaluation text" in note for note in Texts(other, loaded).records()["calibration"].notes)


def test_the_only_split_test_is_held_out_from_and_both_of_the_embedded_text_are_one(
    loaded: Any, tmp_path: Path, text_file: Path
) -> None:
    with pytest.raises(UserError, match=r"the split 'test' \(the same text as 'validation'\) is the calibration text"):
        Texts(TextSettings(data="embedded", samples=4, length=64, split="test"), loaded)
    no_validation = saved_parts(tmp_path / "b", text_file, train=slice(40), test=slice(50, 57))
    with pytest.raises(UserError, match="evaluate on another one with --eval-split"):
        Texts(TextSettings(data=no_validation, samples=4, split="test"), loaded)
    alone = saved_parts(tmp_path / "c", text_file, test=slice(40))
    records = Texts(TextSettings(data=alone, samples=4, split="test"), loaded).records()
    assert (records["calibration"].documents, records["evaluation"].documents) == (36, 4)


def test_a_note_says_that_the_evaluation_text_is_the_calibration_text(loaded: Any, text_file: Path) -> None:
    def notes(**how: Any) -> tuple[str, ...]:
        return Texts(TextSettings(data=str(text_file), samples=4, **how), loaded).records()["calibration"].notes

    assert notes() == ()
    for how in ({}, {"documents": 20}, {"eval_documents": 20}):
        assert any("contains the evaluation text" in note for note in notes(eval_data=str(text_file), **how))


def test_the_text_to_evaluate_on_may_have_other_columns(loaded: Any, rows: Path, text_file: Path) -> None:
    settings = TextSettings(
        data=str(rows), column="story", eval_data=str(text_file.with_name("stories.txt")), samples=4
    )
    assert len(Texts(settings, loaded).evaluation.rows) == 60
    other = rows.with_name("other.jsonl")
    other.write_text(json.dumps({"text": "the cat sat on the mat"}))
    settings = TextSettings(data=str(rows), column="story", eval_data=str(other), samples=4)
    assert len(Texts(settings, loaded).evaluation.rows) == 1


def test_an_option_that_the_text_has_no_use_for_is_refused(
    refused: Refused, command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    (place / "words.jsonl").write_text("".join(f"{json.dumps(story)}\n" for story in stories(text_file)))
    (place / "folder").mkdir()
    (place / "folder/a.txt").write_text("a story")
    run = ("run", "--model", model_folder, *QUICK, "--out", "out")
    for text in (text_file, "embedded", "folder", "words.jsonl"):
        for start in (run, ("eval", model_folder), ("plan", "--model", model_folder, "--sparsity", "0.5")):
            refused("leave --column out", *start, "--data", text, "--column", "story")
    refused("leave --column out", *run, "--data", "words.jsonl", "--eval-data", text_file, "--column", "story")
    refused("leave --column out", *run, "--data", "words.jsonl", "--eval-data", "words.jsonl", "--column", "story")
    for start in (run, ("eval", model_folder)):
        refused("there are no splits in it: leave --eval-split out", *start, "--data", text_file, "--eval-split", "dev")
    refused("there are no splits in it: leave --split out", *run, "--data", text_file, "--split", "test")
    assert not (place / "out").exists()
    assert command(*run, "--data", text_file, "--eval-documents", "2").status == 0
    manifest = json.loads((place / "out/admm_prune.json").read_text())
    assert manifest["texts"]["evaluation"]["documents"] == 2, "of those that are held out"


def test_the_split_of_a_text_that_is_replaced_goes_with_it() -> None:
    recipe = read_packaged("sparsegpt")
    assert recipe.text.eval_split == "test"
    for given in ({"eval_data": "mine.txt"}, {"data": "mine.txt"}):
        assert recipe.with_options(given).text.eval_split is None
    assert recipe.with_options({"eval_data": "mine.txt"}).text.documents == 20000
    assert recipe.with_options({"eval_data": "mine", "eval_split": "dev"}).text.eval_split == "dev"


def test_a_column_is_that_of_either_text(loaded: Any, rows: Path, text_file: Path) -> None:
    texts = stories(text_file)
    table = datasets.load_dataset("json", data_files=str(rows), split="train")
    assert len(Texts(TextSettings(data=str(text_file), eval_data=str(rows), column="story"), loaded).evaluation.rows)

    def found(data: Any, eval_data: Any, column: str) -> tuple[int, int]:
        names = TextSettings(data=PYTHON_OBJECT, eval_data=PYTHON_OBJECT, column=column, samples=4)
        records = Texts(names, loaded, {"data": data, "eval_data": eval_data}).records()
        return records["calibration"].documents, records["evaluation"].documents

    assert found(texts, table, "story") == (len(texts), len(texts))
    assert found(table, texts[:3], "story") == (len(texts), 3)
    assert found(table, [{"text": "the cat sat on the mat"}], "story") == (len(texts), 1)
    for plain in (texts, [[1, 2, 3]] * 9, [{"input_ids": [1, 2, 3]}] * 9):
        with pytest.raises(UserError, match="column 'story'"):
            found(plain, texts, "story")
        with pytest.raises(UserError, match="column 'story'"):
            admm_prune.prune(loaded.model, tokenizer=loaded.tokenizer, data=plain, column="story", **HOW)


HOW: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "samples": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def by_path(model_folder: Path, text_file: Path) -> Any:
    return admm_prune.prune(model_folder, data=text_file, **HOW)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["strings", "tokens", "dataset"])
def test_a_run_on_python_objects(
    command: Command,
    refused: Refused,
    place: Path,
    model_folder: Path,
    text_file: Path,
    loaded: Any,
    by_path: Any,
    kind: str,
) -> None:
    texts = stories(text_file)
    tokens = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    data: Any = {"strings": texts, "tokens": tokens, "dataset": datasets.Dataset.from_dict({"text": texts})}[kind]
    report = admm_prune.prune(model_folder, data=data, out=place / "out", **HOW)
    assert report.pruned.perplexity == by_path.pruned.perplexity
    records = json.loads((place / "out/admm_prune.json").read_text())["texts"]
    expected = by_path.manifest["texts"]
    for role in ("calibration", "evaluation"):
        assert records[role]["token_hash"] == expected[role]["token_hash"]
        assert records[role]["source"].startswith("<python object>")
        assert (records[role]["fingerprint"] == expected[role]["fingerprint"]) == (kind != "tokens")
    refused(
        "with data=<python object>: it cannot be repeated from a file; name the text",
        "run",
        "--recipe",
        "out",
        "--out",
        "again",
    )
    assert read_recipe(place / "out").with_options({"data": str(text_file)}).arguments()["data"] == str(text_file)
    refused("its run was given the text as a Python object: name a text with --data", "eval", "out")
    verified = command("verify", "out", "--json")
    assert verified.status == 3, verified.out  # no file has the text that the perplexity is of
    assert json.loads(verified.out)["verified"] is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (3, "data cannot be read from int"),
        ([1, 2], "item 1 is int"),
        ([[300]], "the model has 0 to 299"),
        ([], "empty"),
    ],
)
def test_python_objects_that_are_no_text(model_folder: Path, data: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        admm_prune.prune(model_folder, data=data, sparsity=0.5, method="magnitude", length=8, samples=1)
