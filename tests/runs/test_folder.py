"""Output folders and files: whole or not at all, and JSON that every reader accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from admm_prune.errors import UserError
from admm_prune.runs.journal.folder import MANIFEST, check_output, output_folder, write_json


def fill(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    with output_folder(out) as folder:
        fill(folder, "1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == tmp_path.joinpath("a").stat().st_mode & 0o777, "as mkdir would make it"


def test_parents_made_for_a_run_that_fails_go_with_it_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "a/b/out") as folder:
        fill(folder, str(1 / 0))
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_what_stood_there_comes_back_when_the_last_move_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with output_folder(out) as folder:
        fill(folder, "old")
    move = Path.replace

    def fails_for_the_new(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise OSError(5, "Input/output error")
        return move(source, target)

    monkeypatch.setattr(Path, "replace", fails_for_the_new)
    with pytest.raises(UserError, match="Input/output error"), output_folder(out, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled_and_a_relative_one_is_found_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with output_folder(Path("out")) as folder:
        fill(folder, "1")
        monkeypatch.chdir("elsewhere")
    assert (tmp_path / "out" / MANIFEST).is_file()


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    check_output(tmp_path / "a/b")
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"a": [1.5, float("inf"), (float("nan"), "x")], "b": -float("inf"), "c": True})
    strict = json.loads((tmp_path / "f").read_text(), parse_constant=pytest.fail)
    assert strict == {"a": [1.5, None, [None, "x"]], "b": None, "c": True}
