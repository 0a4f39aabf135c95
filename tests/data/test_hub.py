"""A Hub out of reach is told at once; one that answers is left to tell what is wrong; what is cached needs none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from admm_prune.data.hub import check_hub, quiet
from admm_prune.data.sources import read_corpus
from admm_prune.errors import UserError
from admm_prune.models import loading
from admm_prune.models.loading import load


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the Hub answers, and returns what it was asked."""

    def set_answer(error: Exception | None) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        def repo_info(self: Any, repository: str, *, repo_type: str, timeout: float) -> None:
            asked.append((repository, repo_type))
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
        return asked

    return set_answer


@pytest.mark.parametrize("error", [None, HFValidationError("a bad name")], ids=str)
def test_an_answer_is_enough_whatever_it_is(answer: Any, error: Exception | None) -> None:
    asked = answer(error)
    check_hub("owner/name", "dataset")
    assert asked == [("owner/name", "dataset")]


@pytest.mark.parametrize(
    "error", [OSError("[Errno -2] Name or service not known"), OfflineModeIsEnabled("offline\nmode")], ids=repr
)
def test_no_answer_is_a_connection_error_in_one_line(answer: Any, error: Exception) -> None:
    answer(error)
    with pytest.raises(ConnectionError, match=r"^(\[Errno -2\] Name or service not known|offline)$"):
        check_hub("owner/name", "model")


@pytest.mark.parametrize("shown", [True, False])
def test_muting_restores_the_progress_bars_of_the_client(shown: bool) -> None:
    before = huggingface_hub.utils.are_progress_bars_disabled()
    try:
        for on in (shown, not shown):
            switch = huggingface_hub.utils.enable_progress_bars if on else huggingface_hub.utils.disable_progress_bars
            switch()
            with quiet():
                assert huggingface_hub.utils.are_progress_bars_disabled()
            assert huggingface_hub.utils.are_progress_bars_disabled() != on
    finally:
        (huggingface_hub.utils.disable_progress_bars if before else huggingface_hub.utils.enable_progress_bars)()


@pytest.mark.parametrize("name", ["nonesuch", "nobody/nonesuch"])
def test_an_unknown_name_does_not_wait_for_a_hub_out_of_reach(
    answer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def wait(seconds: float) -> None:
        raise AssertionError(f"{seconds} s were slept")

    answer(OSError("no route"))
    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(UserError, match=rf"^{name}: no such folder here, .* no connection to the Hub \(no route\)$"):
        load(name)
    with pytest.raises(UserError, match=rf"^{name}: not a local file .* the Hub cannot be reached \(no route\)$"):
        read_corpus(name)


def test_what_is_in_the_cache_needs_no_hub(answer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = answer(OSError("no route"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(loading, "fetch", lambda *_: tmp_path)
    monkeypatch.setattr(loading, "_load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        load("owner/name")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    cached = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["cached"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: cached)
    (tmp_path / "owner___name").mkdir()
    assert read_corpus("owner/name").documents == ("cached",)
    assert asked == []
