"""Comparisons: what is best, what the report shows, and that a model which reloads differently is never reported."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError
from admm_prune.methods.target import Target
from admm_prune.models.evaluate import Evaluation
from admm_prune.models.loading import LoadedModel, load
from admm_prune.runs import compare as comparison
from admm_prune.runs.compare import Comparison, ComparisonSettings, Row, compare
from admm_prune.settings import Settings
from admm_prune.verify.report import Verdict
from admm_prune.verify.run import verify_folder
from tests.runs.html_page import read_page
from tests.runs.interruption import Interruption

DENSE = Evaluation(
    perplexity=4.0, bits_per_char=1.0, tokens=1000, characters=2000, packing="windows", length=64, truncated_tokens=0,
    protocol="a <protocol>.",
)  # fmt: skip


def row(method: str, target: str, perplexity: float) -> Row:
    return Row(
        method=method, target=target, sparsity=0.5, perplexity=perplexity, bits_per_char=1.5, relative_error=0.1,
        seconds=1.0, reloaded_perplexity=perplexity, folder=f"models/{method}",
    )  # fmt: skip


def result(*rows: Row) -> Comparison:
    return Comparison(model="tiny", parameters=1234567, dense=DENSE, rows=list(rows), manifest={})


def test_the_best_is_the_lowest_of_its_target() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        row("a", "50%", 5.0),
        row("b", "50%", nan),
        row("c", "50%", 6.0),
        row("a", "2:4", inf),
        row("b", "2:4", inf),
    ]
    assert [result(*rows).is_best(r) for r in rows] == [True, False, False, False, False]
    tied = [row("a", "50%", 5.0), row("b", "50%", 5.0)]
    assert [result(*tied).is_best(r) for r in tied] == [True, True]


@pytest.fixture
def settings(model_folder: Path, text_file: Path) -> ComparisonSettings:
    return ComparisonSettings(
        run=Settings(str(model_folder), data=str(text_file), samples=8),
        methods=("magnitude", "sparsegpt"),
        targets=(Target(sparsity=0.5), Target(sparsity=0.6)),
    )


def resumed(settings: ComparisonSettings, resume: bool = True) -> ComparisonSettings:
    return replace(settings, run=replace(settings.run, resume=resume))


def test_a_model_that_reloads_to_other_figures_is_a_defect_and_never_reported(
    tmp_path: Path, settings: ComparisonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = comparison.evaluation.evaluate, []

    def drifting(*arguments: Any, **how: Any) -> Evaluation:
        calls.append(arguments)
        figures = evaluate(*arguments, **how)
        return replace(figures, perplexity=figures.perplexity + 1e-9 * len(calls))

    monkeypatch.setattr(comparison.evaluation, "evaluate", drifting)
    with pytest.raises(UserError, match="magnitude 50%: nothing was saved: loaded again"):
        compare(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def untimed(place: Path) -> dict[str, Any]:
    """What a comparison wrote, without seconds: its manifest, and the fingerprints of its models."""
    content = json.loads((place / "admm_prune.json").read_text())
    del content["sha256"]  # over the seconds too
    for found in content["rows"]:
        del found["seconds"]
    content["files"] = {
        name: digest for name, digest in content["files"].items() if not name.endswith(("timings.json", ".html"))
    }
    weights = sorted(place.glob("models/*/model.safetensors"))
    return {"manifest": content, "weights": {str(p.relative_to(place)): file_sha256(p) for p in weights}}


@pytest.mark.slow
def test_a_comparison_that_breaks_off_after_any_record_goes_on_and_ends_as_it_would_have(
    tmp_path: Path, settings: ComparisonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After blocks within a row, after rows, and before all is put in its place."""
    settings = replace(settings, targets=settings.targets[:1])
    compare(settings, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        records = Interruption(patch)
        while True:
            try:
                compare(resumed(settings, records.calls > 0), out)
                break
            except KeyboardInterrupt:
                assert not out.exists()
    assert records.calls == 1 + 2 * (2 + 1)  # the dense model; for every row two blocks and the row itself
    assert untimed(out) == untimed(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    with monkeypatch.context() as patch:
        Interruption(patch, "output")
        with pytest.raises(KeyboardInterrupt):
            compare(settings, tmp_path / "second")
    compare(resumed(settings), tmp_path / "second")
    assert untimed(tmp_path / "second") == untimed(tmp_path / "whole")


def test_a_row_that_was_resumed_has_no_seconds(
    tmp_path: Path, settings: ComparisonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last process would be less than those of the other rows."""
    settings, out = replace(settings, targets=settings.targets[:1]), tmp_path / "out"
    with monkeypatch.context() as patch:
        Interruption(patch, after=2)  # the dense model, and the first block of the first row
        with pytest.raises(KeyboardInterrupt):
            compare(settings, out)
    first, second = compare(resumed(settings), out).rows
    assert first.seconds is None
    assert second.seconds is not None
    said = "No seconds and MiB are given where pruning was interrupted and resumed"
    assert said in (out / "report.html").read_text()
    assert verify_folder(out, quick=True).verdict is not Verdict.REJECTED
    compare(settings, tmp_path / "whole")
    assert said not in (tmp_path / "whole/report.html").read_text()


def test_a_comparison_goes_on_where_the_journal_of_a_row_was_being_deleted(
    tmp_path: Path, settings: ComparisonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, out = replace(settings, targets=settings.targets[:1]), tmp_path / "out"

    def interrupted(home: Path) -> None:
        (home / "header").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("admm_prune.runs.journal.journal._remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(settings, out)
    assert [row.method for row in compare(resumed(settings), out).rows] == ["magnitude", "sparsegpt"]


def test_the_seconds_of_a_row_are_those_of_the_allocation_too(tmp_path: Path, settings: ComparisonSettings) -> None:
    run = replace(settings.run, allocation="fisher")
    compare(replace(settings, run=run, methods=("magnitude",), targets=settings.targets[:1]), tmp_path / "out")
    (row,) = json.loads((tmp_path / "out/admm_prune.json").read_text())["rows"]
    phases = json.loads((tmp_path / "out/models/magnitude-50/timings.json").read_text())["phases"]
    parts = [one["seconds"] for one in phases if one["name"] in ("allocating the budget", "pruning")]
    assert len(parts) == 2
    assert row["seconds"] == pytest.approx(sum(parts), abs=2e-3)


def test_no_other_copy_of_the_model_is_held_when_one_is_loaded(
    tmp_path: Path, settings: ComparisonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    held: list[int] = []

    def counted(*arguments: Any, **how: Any) -> LoadedModel:
        gc.collect()
        held.append(sum(model() is not None for model in loaded))
        opened = load(*arguments, **how)
        loaded.append(weakref.ref(opened.model))
        return opened

    monkeypatch.setattr(comparison, "load", counted)
    compare(settings, tmp_path / "out")
    assert held == [0] * (1 + 2 * 4), "the dense model, and for every row a copy of it and the saved model"


def test_a_comparison_is_resumed_only_with_what_it_was_begun_with(tmp_path: Path, settings: ComparisonSettings) -> None:
    def interrupts(done: int, total: int, at_work: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(settings, tmp_path / "out", interrupts)
    with pytest.raises(UserError, match="unfinished run: continue with --resume"):
        compare(settings, tmp_path / "out")
    with pytest.raises(UserError, match="was begun with methods"):
        compare(resumed(replace(settings, methods=("magnitude",))), tmp_path / "out")
    with pytest.raises(UserError, match="nothing to resume"):
        compare(resumed(settings), tmp_path / "other")
    first = tmp_path / "out.partial/checkpoints/models/magnitude-50/model.safetensors"
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"magnitude-50 is damaged or gone: delete .*out\.partial to start over"):
        compare(resumed(settings), tmp_path / "out")
    first.write_bytes(content)
    assert [row.method for row in compare(resumed(settings), tmp_path / "out").rows] == [
        "magnitude",
        "sparsegpt",
    ] * 2


def test_a_comparison_reads_texts_from_python_and_no_module(
    tmp_path: Path, settings: ComparisonSettings, text_file: Path
) -> None:
    texts = text_file.read_text().split("<|endoftext|>")
    passed = replace(settings, run=replace(settings.run, data=texts[:-9], eval_data=texts[-9:]), methods=("wanda",))
    compare(passed, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/admm_prune.json").read_text())
    assert manifest["settings"]["text"]["data"] == manifest["settings"]["text"]["eval_data"] == "<python object>"
    with pytest.raises(UserError, match="contains an earlier result"):
        compare(passed, tmp_path / "out")
    compare(replace(passed, run=replace(passed.run, overwrite=True)), tmp_path / "out")
    loaded = load(str(settings.run.model))
    with pytest.raises(UserError, match="give its folder or Hub id, not a module"):
        replace(settings, run=replace(settings.run, model=loaded.model))


def test_a_comparison_in_another_sparse_set_with_bounds(tmp_path: Path, settings: ComparisonSettings) -> None:
    """Every method has the set, a bound of every layer, and both in its manifest; `verify` agrees."""
    run = replace(settings.run, constraint="row-wise", bounds=True, problem="layer")
    compare(replace(settings, run=run, targets=settings.targets[:1]), tmp_path / "out")
    for method in settings.methods:
        place = tmp_path / f"out/models/{method}-50"
        content = json.loads((place / "admm_prune.json").read_text())
        chosen = {name: content["settings"][name] for name in ("constraint", "problem", "bounds")}
        assert chosen == {"constraint": "row-wise", "problem": "layer", "bounds": True}
        assert all(0 <= layer["bound"] <= layer["objective"] for layer in content["layers"])
        weights = load_file(place / "model.safetensors")
        for layer in content["layers"]:
            kept = (weights[layer["name"]] != 0).sum(1)
            assert set(kept.tolist()) == {layer["shape"][1] // 2}
    assert verify_folder(tmp_path / "out", quick=True).verdict is not Verdict.REJECTED


def test_the_ridge_of_a_comparison_is_for_the_methods_that_have_one(
    tmp_path: Path, settings: ComparisonSettings
) -> None:
    run, targets = replace(settings.run, ridge="0.25"), settings.targets[:1]
    compare(replace(settings, run=run, targets=targets), tmp_path / "out")
    ridges = {}
    for method in settings.methods:
        content = json.loads((tmp_path / f"out/models/{method}-50/admm_prune.json").read_text())
        ridges[method] = {layer["ridge"] for layer in content["layers"]}
        assert content["settings"]["ridge"] == 0.25
    assert ridges == {"magnitude": {None}, "sparsegpt": {0.25}}
    assert verify_folder(tmp_path / "out", quick=True).verdict is not Verdict.REJECTED
    with pytest.raises(UserError, match=r"^magnitude only scores weights, whatever the ridge: leave --ridge out$"):
        compare(replace(settings, run=run, targets=targets, methods=("magnitude", "wanda")), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_settings_of_structured_groups_in_a_comparison(tmp_path: Path, settings: ComparisonSettings) -> None:
    run = replace(settings.run, unit="bytes", multiple=8)
    methods = ("magnitude", "struprune-uniform")
    compare(replace(settings, run=run, methods=methods, targets=settings.targets[:1]), tmp_path / "out")
    details = json.loads((tmp_path / "out/models/struprune-uniform-50/admm_prune.json").read_text())["details"]
    assert details["unit"] == "bytes"
    page = read_page((tmp_path / "out/report.html").read_text()).text
    assert "Of struprune-uniform, zeros are the weights of the units that were removed" in " ".join(page.split())


def test_a_comparison_of_chosen_weights(tmp_path: Path, settings: ComparisonSettings) -> None:
    chosen: dict[str, Any] = {
        "targets": ["LlamaMLP"], "ignore": ["re:.*down_proj"], "overrides": {"re:.*layers.1.*up_proj": "2:4"}
    }  # fmt: skip
    run = replace(settings.run, **chosen)
    compare(replace(settings, run=run, targets=settings.targets[1:]), tmp_path / "out")
    for method in settings.methods:
        place = tmp_path / f"out/models/{method}-60"
        layers = {found["name"]: found for found in json.loads((place / "admm_prune.json").read_text())["layers"]}
        expected = {"gate_proj": (0.6, 0.6), "up_proj": (0.6, 0.5)}
        for name, layer in layers.items():
            asked = expected.get(name.split(".")[-2], (0.0, 0.0))["layers.1." in name]
            assert layer["sparsity"] == pytest.approx(asked, abs=0.002), name
