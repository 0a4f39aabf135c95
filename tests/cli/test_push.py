"""push against a stand-in of the Hub: what arrives there, verified after a download; refusals in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import admm_prune
from admm_prune import Report, UserError, load_report
from admm_prune.inference.packing import pack, unpack
from admm_prune.runs.hub import push_to_hub
from tests.cli.outcome import Command, Refused
from tests.stand_in_hub import OWNER, StandInHub, hub

__all__ = ["hub"]  # a fixture


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Report:
    """A run. Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "pruned"
    return admm_prune.prune(
        model_folder, data=str(text_file), samples=4, eval_samples=2, method="wanda", sparsity=0.5, out=out,
        device="cpu",
    )  # fmt: skip


def test_a_run_arrives_and_is_verified_after_a_download(
    command: Command, hub: StandInHub, report: Report, tmp_path: Path
) -> None:
    assert report.out is not None
    outcome = command("push", report.out, "tester/tiny-pruned", "--private", "--message", "First")
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{hub.url}/tester/tiny-pruned\n", "")
    repository = hub.repositories["tester/tiny-pruned"]
    assert repository.visibility == "private"
    assert repository.commits == [("main", "First")]
    local = {path.name: path.read_bytes() for path in report.out.iterdir()}
    assert repository.files.keys() == local.keys()
    assert {name for name in local if repository.files[name] != local[name]} == {"README.md"}
    card = ModelCard(repository.files["README.md"].decode())
    assert 'from_pretrained("tester/tiny-pruned")' in card.text
    place = repository.download(tmp_path / "downloaded")
    verified = command("verify", place, "--json").json()
    assert verified["outcome"] == "verified"
    assert verified["left_out"] == ["README.md, which was edited"]
    assert load_report(place).as_json() == load_report(report.out).as_json()


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bars_of_the_client_are_as_before(hub: StandInHub, report: Report, shown: bool) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    assert report.out is not None
    before = are_progress_bars_disabled()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        push_to_hub(report.out, "tester/bars")
        assert are_progress_bars_disabled() != shown
        with pytest.raises(UserError):
            push_to_hub(report.out, "a/b/c")
        assert are_progress_bars_disabled() != shown
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def test_an_edited_card_is_named_and_no_reason_to_reject(command: Command, report: Report, tmp_path: Path) -> None:
    assert report.out is not None
    place = Path(shutil.copytree(report.out, tmp_path / "run"))
    assert command("verify", place, "--quick", "--json").json()["left_out"] == ["the perplexity (--quick)"]
    (place / "README.md").write_text("# Mine\n")
    edited = command("verify", place, "--quick", "--json").json()
    assert edited["outcome"] == "verified"
    assert "README.md, which was edited" in edited["left_out"]
    (place / "README.md").unlink()
    assert "README.md, which was removed" in command("verify", place, "--quick", "--json").json()["left_out"]
    (place / "README.md").symlink_to("config.json")
    assert command("verify", place, "--quick").status == 1


def test_again_to_the_same_repository_from_python(hub: StandInHub, report: Report, tmp_path: Path) -> None:
    assert report.push_to_hub("tiny") == f"{hub.url}/{OWNER}/tiny"
    assert hub.requests.count("put") == 1
    edited = Path(shutil.copytree(report.out or "", tmp_path / "edited"))
    (edited / "README.md").write_text("---\nlicense: mit\n---\n# PATH_OR_REPO_ID is mine\n")
    url = load_report(edited).push_to_hub(f"{OWNER}/tiny", create_pr=True)
    assert url == f"{hub.url}/{OWNER}/tiny/discussions/2"
    assert hub.requests.count("put") == 1, "the weights are there already"
    files = hub.repositories[f"{OWNER}/tiny"].files
    assert files["README.md"] == (edited / "README.md").read_bytes(), "a card of one's own is not changed"


def test_an_archive_arrives_and_unpacks(hub: StandInHub, report: Report, tmp_path: Path) -> None:
    assert report.out is not None
    pack(report.out, tmp_path / "archive")
    push_to_hub(tmp_path / "archive", "packed", revision="main")
    place = hub.repositories[f"{OWNER}/packed"].download(tmp_path / "downloaded")
    unpack(place, tmp_path / "back")
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (report.out / weights).read_bytes()


REFUSALS: dict[str, tuple[tuple[int, str], str]] = {
    "create": ((403, "You don't have the rights"), "the token has no permission to write there"),
    "preupload": ((404, "Repository not found"), "Repository not found"),
    "commit": ((409, "a conflict"), "a conflict"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_hub_refuses_is_one_line(kind: str, hub: StandInHub, report: Report, refused: Refused) -> None:
    hub.refuses[kind], reason = REFUSALS[kind]
    refused(f"cannot push to org/tiny: {reason}", "push", report.out, "org/tiny")


def test_a_wrong_token_is_one_line(
    hub: StandInHub, report: Report, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("log in with 'hf auth login', or set HF_TOKEN", "push", report.out, "org/tiny")


def test_no_answer_and_offline_are_one_line(
    hub: StandInHub, report: Report, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("cannot push to org/tiny: ", "push", report.out, "org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("unset HF_HUB_OFFLINE", "push", report.out, "org/tiny")


def _comparison(place: Path) -> Path:
    place.mkdir()
    (place / "admm_prune.json").write_text('{"rows": [], "settings": {}}')
    return place


def _benchmark(place: Path) -> Path:
    place.mkdir()
    (place / "admm_prune.json").write_text('{"rows": [], "environment": {}}')
    return place


def _linked(place: Path) -> Path:
    place.mkdir()
    (place / "admm_prune.json").write_text('{"settings": {}}')
    (place / "secret").symlink_to("/etc/hostname")
    return place


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "none": (lambda place: place / "none", "there is no such folder"),
    "benchmark": (
        lambda place: _benchmark(place / "bench"),
        "was written neither by 'admm-prune run' nor by 'admm-prune pack'",
    ),
    "foreign": (lambda place: place, "was written neither by 'admm-prune run' nor by 'admm-prune pack'"),
    "comparison": (lambda place: _comparison(place / "compared"), "is a comparison: push one of its models"),
    "link": (lambda place: _linked(place / "linked"), "is a link: only files are pushed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_run_is_not_pushed(name: str, hub: StandInHub, place: Path, refused: Refused) -> None:
    make, reason = WRONG[name]
    refused(reason, "push", make(place), "org/tiny")
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/..", "-x-/", ""])
def test_a_name_that_no_repository_can_have(repo_id: str, hub: StandInHub, report: Report, refused: Refused) -> None:
    refused("cannot push to ", "push", report.out, "--", repo_id)
    assert "commit" not in hub.requests


def test_a_report_without_a_folder_is_not_pushed(report: Report) -> None:
    with pytest.raises(UserError, match="call prune with out="):
        Report(**{**vars(report), "out": None}).push_to_hub("x")
