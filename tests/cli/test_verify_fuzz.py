"""Every field and every tensor of what verify takes, altered one at a time: rejected, or named as not recomputed.

Twice each: as an accident leaves it, which a fingerprint must show; and as a forger does, who renews the fingerprints,
so that only what is recomputed, or named in the report, stands in the way.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError
from admm_prune.methods.local import method_named
from admm_prune.methods.target import Target
from admm_prune.models import loading
from admm_prune.models.loading import LoadedModel
from admm_prune.runs.card import CARD
from admm_prune.runs.claims import CLAIMS_DIGEST, claims_sha256, with_digest
from admm_prune.runs.layer import solve_path
from admm_prune.verify import run
from admm_prune.verify.layer import verify_layer
from admm_prune.verify.report import Verdict, Verification
from admm_prune.verify.run import verify_folder
from tests.cli import alterations

MANIFEST, TIMINGS = "admm_prune.json", "timings.json"
FEW = 12  # alterations of a kind in the fast suite
REJECTED, WRONG_INPUT, NAMED = "rejected", "refused as wrong input", "named as not recomputed"
WITH_TEXT = ("pruned", "texts", "continuation")  # recomputed only where the text is read


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory, narrow_model: Path, text_file: Path) -> Path:
    """A run, and a comparison of two models, of a model of one block of width 16. Not to be written to."""
    from admm_prune.runs.compare import ComparisonSettings, compare
    from admm_prune.runs.prune import prune
    from admm_prune.settings import Settings

    place = tmp_path_factory.mktemp("originals")
    text = {"data": str(text_file), "samples": 4, "eval_samples": 2}
    prune(str(narrow_model), method="wanda", sparsity=0.5, out=place / "run", device="cpu", **text)
    settings = ComparisonSettings(
        run=Settings(str(narrow_model), device="cpu", **text), methods=("magnitude", "wanda"), targets=(Target(0.5),)
    )
    compare(settings, place / "comparison")
    for name in ("run", "comparison"):
        assert verify_folder(place / name, device="cpu").verdict is Verdict.VERIFIED
    return place


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose files have not changed since it was loaded is not loaded again."""
    kept: dict[object, LoadedModel] = {}

    def load(source: str, *, device: str, trust_remote_code: bool) -> LoadedModel:
        assert not trust_remote_code
        files = sorted(path for path in Path(source).iterdir() if path.name not in (MANIFEST, TIMINGS))
        state = (source, *((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files))
        if state not in kept:
            kept[state] = loading.load(source, device=device)
        return kept[state]

    monkeypatch.setattr(run, "load", load)


def outcome_of(check: Callable[[], Verification], *places: str) -> str:
    """How an altered file fares.

    Args:
        places: where it was altered, as verify would name it.

    Raises:
        AssertionError: verify passes it and names none of the places.
        Exception: whatever is no UserError: a traceback for the user.
    """
    report = None
    try:
        report = check()
    except UserError as error:
        one_line = "\n" not in str(error)
    else:
        one_line = not any("\n" in failure for failure in report.failures)
    assert one_line
    if report is None:
        return WRONG_INPUT
    if report.verdict is Verdict.REJECTED:
        return REJECTED
    named = any(_covers(name, place) for name in report.fingerprinted for place in places)
    noted = any(re.search(rf"\b{re.escape(place)}\b", note) for note in report.unchecked for place in places)
    assert named or noted, f"{places} altered, and verify passes it"
    return NAMED


def _covers(name: str, place: str) -> bool:
    """Whether a name of the report, such as "admm_prune.json: settings", is of this place, of what holds it, or of what
    it holds, where a list or an object took the place of a value."""
    return place == name or place.startswith((f"{name}.", f"{name}[")) or name.startswith((f"{place}.", f"{place}["))


def some(items: Iterator[Any], whole: bool) -> list[Any]:
    """All of them; in the fast suite a few, drawn."""
    found = list(items)
    return found if whole else random.Random(0).sample(found, min(FEW, len(found)))


def sizes(counts: Counter[str]) -> None:
    print(f"{sum(counts.values())} alterations: {dict(counts)}")


SCOPE = [pytest.param(False, id="a few"), pytest.param(True, id="all", marks=pytest.mark.slow)]


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("forged", [False, True], ids=["accident", "forged"])
@pytest.mark.parametrize("name", ["run", "comparison", "comparison/models/wanda-50"])
def test_every_field_of_a_manifest(copy: Callable[[str], Path], name: str, forged: bool, whole: bool) -> None:
    root = copy(name.partition("/")[0])
    folder = root.parent / name
    path = folder / MANIFEST
    original = json.loads(path.read_text())
    counts: Counter[str] = Counter()
    for alteration in some(alterations.of_json(original), whole):
        content = alteration.content
        if forged:
            if alteration.neutral or not isinstance(content, dict) or alteration.name in ("sha256", ""):
                continue
            content = with_digest(content)
        alterations.written(path, content)
        quick = not (forged and str((*alteration.place, "")[0]) in WITH_TEXT)
        field = f"{MANIFEST}: {alteration.name}"
        outcome = outcome_of(lambda quick=quick: verify_folder(folder, quick=quick, device="cpu"), field)
        assert forged or outcome != NAMED, f"{field} ({alteration.how}): the fingerprint does not show it"
        counts[outcome] += 1
    sizes(counts)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("name", ["run", "comparison", "comparison/models/wanda-50"])
def test_every_field_of_the_times_and_of_the_model_files(copy: Callable[[str], Path], name: str, whole: bool) -> None:
    root = copy(name.partition("/")[0])
    folder = root.parent / name
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.json")):
        if path.name == MANIFEST:
            continue
        before = path.read_bytes()
        for alteration in some(_shortened(path, json.loads(before)), whole):
            alterations.written(path, alteration.content)
            outcome = outcome_of(lambda: verify_folder(root, quick=True, device="cpu"))
            assert outcome != NAMED
            counts[outcome] += 1
        path.write_bytes(before)
    assert verify_folder(root, quick=True, device="cpu").failures == []
    sizes(counts)


def _shortened(path: Path, content: Any) -> Iterator[alterations.Alteration]:
    """The vocabulary is one field: its entries are alike, and the file is bound as a whole."""
    if path.name == "tokenizer.json":
        content = {**content, "model": {**content["model"], "vocab": dict(list(content["model"]["vocab"].items())[:3])}}
    return alterations.of_json(content)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_forged_times_and_pages_are_named(copy: Callable[[str], Path], name: str, whole: bool) -> None:
    folder = copy(name)
    path = folder / TIMINGS
    original = json.loads(path.read_text())
    counts: Counter[str] = Counter()
    for alteration in some(alterations.of_json(original), whole):
        if isinstance(alteration.content, dict) and alteration.name != "sha256":
            alterations.written(path, with_digest(alteration.content))
            counts[outcome_of(lambda: verify_folder(folder, quick=True, device="cpu"), TIMINGS)] += 1
    sizes(counts)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("file", [MANIFEST, TIMINGS, "config.json"])
def test_what_a_lenient_reader_of_json_lets_pass(copy: Callable[[str], Path], name: str, file: str) -> None:
    folder = copy(name)
    path = folder / file if file != "config.json" or name == "run" else folder / "models/wanda-50" / file
    text = path.read_text()
    for how, altered in alterations.of_text(text):
        path.write_text(altered)
        assert outcome_of(lambda: verify_folder(folder, quick=True, device="cpu")) != NAMED, how


@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("name", ["run", "comparison/models/magnitude-50"])
def test_every_tensor(copy: Callable[[str], Path], name: str, whole: bool) -> None:
    root = copy(name.partition("/")[0])
    path = root.parent / name / "model.safetensors"
    before = path.read_bytes()
    counts: Counter[str] = Counter()
    for how, alter in some(alterations.of_tensors(path), whole):
        path.write_bytes(before)
        alter()
        if path.read_bytes() == before:
            continue
        outcome = outcome_of(lambda: verify_folder(root, quick=True, device="cpu"))
        assert outcome == REJECTED, how
        counts[outcome] += 1
    sizes(counts)


def added(folder: Path) -> dict[str, Callable[[], object]]:
    """Files that no run writes."""
    inside = [folder, *(folder / "models").glob("wanda-50")]
    makers: dict[str, Callable[[], object]] = {}
    for place in inside:
        for name in (
            "payload.pkl",
            "modeling_tiny.py",
            "pytorch_model.bin",
            "notes.txt",
            ".hidden",
            "more.safetensors",
        ):
            makers[f"{place.name}/{name}"] = lambda path=place / name: path.write_bytes(b"x")
        makers[f"{place.name}/link"] = lambda path=place / "link": path.symlink_to("config.json")
        makers[f"{place.name}/dangling"] = lambda path=place / "dangling": path.symlink_to("nowhere")
        makers[f"{place.name}/empty folder"] = lambda path=place / "empty": path.mkdir()
        makers[f"{place.name}/folder"] = lambda path=place / "code": (path.mkdir(), (path / "a.py").write_text(""))
        makers[f"{place.name}/pipe"] = lambda path=place / "pipe": os.mkfifo(path)
    if (folder / "models").is_dir():
        makers["models/a file"] = lambda: (folder / "models/a.py").write_text("")
        makers["models/a model"] = lambda: shutil.copytree(folder / "models/wanda-50", folder / "models/wanda-60")
    return makers


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_every_added_file_is_named(originals: Path, tmp_path: Path, name: str, whole: bool) -> None:
    for number, what in enumerate(some(iter(added(originals / name)), whole)):
        folder = Path(shutil.copytree(originals / name, tmp_path / f"{number}"))
        added(folder)[what.replace(name, f"{number}", 1) if what.startswith(f"{name}/") else what]()
        assert outcome_of(lambda folder=folder: verify_folder(folder, quick=True, device="cpu")) == REJECTED, what


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_every_file_deleted_linked_or_altered_by_a_byte(
    originals: Path, tmp_path: Path, name: str, whole: bool
) -> None:
    files = sorted(path for path in (originals / name).rglob("*") if path.is_file())
    files = [path for path in files if path.name != CARD]  # which its owner may edit
    for number, path in enumerate(some(iter(files), whole)):
        relative = path.relative_to(originals / name)
        folder = Path(shutil.copytree(originals / name, tmp_path / f"{number}"))
        mine = folder / relative
        check = lambda folder=folder: outcome_of(lambda: verify_folder(folder, quick=True, device="cpu"))  # noqa: E731
        content = mine.read_bytes()
        mine.unlink()
        assert check() != NAMED, f"{relative} deleted"
        mine.symlink_to(path)
        assert check() != NAMED, f"{relative} replaced by a link to the same"
        mine.unlink()
        for at in {0, len(content) // 2, len(content) - 2}:
            mine.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert check() != NAMED, f"{relative}, byte {at}"


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("whole", SCOPE)
def test_every_field_of_a_recipe(copy: Callable[[str], Path], whole: bool) -> None:
    import yaml

    folder = copy("run")
    path = folder / "recipe.yaml"
    manifest = json.loads((folder / MANIFEST).read_text())
    for alteration in some(alterations.of_json(yaml.safe_load(path.read_text())), whole):
        path.write_text(yaml.safe_dump(alteration.content))
        assert outcome_of(lambda: verify_folder(folder, quick=True, device="cpu")) == REJECTED
        files = {**manifest["files"], path.name: file_sha256(path)}  # as a forger does
        alterations.written(folder / MANIFEST, with_digest({**manifest, "files": files}))
        assert outcome_of(lambda: verify_folder(folder, quick=True, device="cpu")) == REJECTED
        alterations.written(folder / MANIFEST, manifest)


SOLVES = {
    "admm": ("admm", Target(0.5), False),
    "another target": ("wanda", Target(0.5), True),
    "a pattern": ("admm", Target(None, (2, 4)), False),
    "brute force": ("brute-force", Target(0.5), False),
    "nothing pruned": ("admm", Target(0.0), False),
}  # fmt: skip


@pytest.mark.parametrize("whole", SCOPE)
@pytest.mark.parametrize("case", SOLVES.values(), ids=SOLVES)
@pytest.mark.parametrize("forged", [False, True], ids=["accident", "forged"])
def test_every_claim_of_a_solved_layer(
    tmp_path: Path,
    layer_tensors: dict[str, torch.Tensor],
    case: tuple[str, Target, bool],
    forged: bool,
    whole: bool,
) -> None:
    name, target, cross = case
    layer, path = tmp_path / "layer.safetensors", tmp_path / "v.safetensors"
    tensors, metadata = dict(layer_tensors), {}
    if cross:
        tensors["cross_gram"] = 1.1 * tensors["gram"]
        metadata = {
            "target_energy": repr(2 * float((tensors["weight"] @ tensors["gram"]).mul(tensors["weight"]).sum()))
        }
    save_file(tensors, layer, metadata)
    solve_path(layer, method_named(name), [target], out=path, device="cpu")
    assert verify_layer(path).verdict is Verdict.VERIFIED
    with safe_open(path, framework="pt") as file:
        claims = dict(file.metadata())
    weight = load_file(path)
    counts: Counter[str] = Counter()
    for key, how, altered in some(_claims_altered(claims), whole):
        if forged:
            if key == CLAIMS_DIGEST:
                continue
            altered[CLAIMS_DIGEST] = claims_sha256(altered)
        save_file(weight, path, altered)
        outcome = outcome_of(lambda: verify_layer(path, layer), key)
        assert forged or outcome != NAMED, f"{key} ({how}): the fingerprint does not show it"
        counts[outcome] += 1
    save_file(weight, path, claims)
    before = path.read_bytes()
    for how, alter in some(alterations.of_tensors(path), whole):
        path.write_bytes(before)
        alter()
        if path.read_bytes() != before:
            assert outcome_of(lambda: verify_layer(path, layer)) != NAMED, how
            counts[REJECTED] += 1
    sizes(counts)


def _claims_altered(claims: dict[str, str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    for key, text in claims.items():
        new = [f"{text}x", "", "nan", "inf", "-1", "other", "solver", "set", "row", "matrix", "group", "STALLED"]
        with suppress(ValueError):
            new += [repr(float(text) * 1.001 + 1e-3), repr(float(text) * 0.999), repr(float(text) * 1000 + 1)]
        for value in new:
            if value != text:
                yield key, value, {**claims, key: value}
        yield key, "removed", {name: value for name, value in claims.items() if name != key}
    yield "another", "added", {**claims, "another": "1"}
    for key in ("bound", "bound_kind", "constraint", "problem", "relative_error_holdout"):
        if key not in claims:
            yield key, "added", {**claims, key: "1.0" if key in ("bound", "relative_error_holdout") else "other"}
