"""The collection as committed: files, hashes, records; and the commands that add to it."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from admm_prune.errors import UserError
from admm_prune.point import Point
from collection import bounds, build, checker, long_search, page, profiles, record, solve
from collection.capture import Layer, damped, row_problems
from collection.checker import Problem
from collection.export_benchopt import export
from collection.files import write_certificate, write_problem, write_solution
from collection.sets import constraint_of
from tests.collection import exact, producers
from tests.collection.producers import SETS

COMMITTED = sorted(name for name, entry in build.manifest().items() if entry["committed"])
LIMIT = 20 * 10**6


def test_the_collection_has_the_layers_it_promises() -> None:
    entries = build.manifest()
    layers = {name: entry for name, entry in entries.items() if entry["module"] != "rows"}
    assert len(layers) >= 40
    assert {entry["shape"][1] for entry in layers.values()} >= {64, 172, 256, 576, 640, 1536}
    assert sum(entry["shape"][0] for entry in entries.values() if entry["module"] == "rows") > 2000
    assert sum(name.endswith(".retargeted") for name in layers) >= 10
    for percent in build.SPARSITIES:
        named = {given for entry in layers.values() for given in entry["sets"] if given.endswith(f"-{percent}")}
        assert named == {f"{kind}-{percent}" for kind in ("row", "unstructured", "block4x4", "columns")}
    assert {"2of4", "4of8"} <= {given for entry in layers.values() for given in entry["sets"]}


def test_committed_files_are_small_and_as_in_the_manifest() -> None:
    files = [path for folder in ("problems", "solutions") for path in (build.FOLDER / folder).rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in files) < LIMIT
    assert sorted(path.stem for path in (build.FOLDER / "problems").iterdir()) == COMMITTED
    for layer in COMMITTED:
        tensors, metadata = checker.read(build.place_of(layer), "problem")
        entry = build.manifest()[layer]
        assert checker.tensor_hash(tensors) == entry["sha256"]
        assert json.loads(metadata["sets"]) == entry["sets"]
        assert {name.partition("/")[2] for name in build.problems_of(layer)} == set(entry["sets"])
        assert list(tensors["weight"].shape) == entry["shape"]


def test_every_fingerprint_is_that_of_the_set_and_data_of_the_manifest() -> None:
    for layer, entry in build.manifest().items():
        assert entry["fingerprints"] == build.fingerprints(layer, entry["sets"], entry["sha256"])


@pytest.mark.parametrize("layer", COMMITTED)
def test_the_checker_accepts_every_record_of_a_committed_problem(layer: str) -> None:
    rows = record.records()
    for name in build.manifest()[layer]["sets"]:
        row = rows.get(f"{layer}/{name}")
        if row is None:
            continue
        files = [record.place_of(row["id"], kind) for kind in ("solution", "certificate")]
        given = [path if row[what] else None for path, what in zip(files, ("value", "bound"), strict=True)]
        problem, reached, proved = checker.check(build.place_of(layer), *given, row["id"])
        assert row["energy"] == f"{checker.energy(problem):.10g}"
        for found, what, kind in ((reached, "value", "solution"), (proved, "bound", "certificate")):
            if found is not None:
                assert row[what] == checker.decimal_text(found.upper if what == "value" else found.value, what)
                tensors, _ = checker.read(record.place_of(row["id"], kind), kind)
                assert checker.tensor_hash(tensors) == row[f"{what}_sha256"]
        gap = worst = ""
        if reached is not None and proved is not None:
            gap = f"{checker.gap(float(row['value']), float(row['bound'])):.4g}"
            if problem.is_stack:
                assert proved.rows is not None
                worst = f"{max(map(checker.gap, reached.rows[:, 1], proved.rows)):.4g}"
        assert (row["gap"], row["worst_row_gap"]) == (gap, worst)


def test_the_page_is_up_to_date() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run: make catalogue"


@pytest.mark.parametrize(("kind", "part"), [("dual", 0.25), ("block", 0.5)])
def test_the_page_reads_a_certificate_by_the_kind_it_states(small: Path, kind: str, part: float) -> None:
    """Here the file has the tensors of both kinds, which the checker refuses."""
    hessian = np.diag(np.diagonal(build.load("tiny/row").hessian))
    tensors = {
        "columns": np.arange(4)[None],
        "blocks": 0.5 * hessian[None],
        "diagonal": 0.25 * np.diagonal(hessian)[None],
    }
    path = record.place_of("tiny/row", "certificate")
    path.parent.mkdir(parents=True)
    save_file(tensors, path, {"format": checker.FORMATS["certificate"], "kind": kind})
    assert page._splitting("tiny/row")[:2] == (kind, pytest.approx(part))


@pytest.mark.parametrize("name", sorted(SETS))
def test_the_solvers_are_given_the_set_of_the_file(name: str) -> None:
    draw = np.random.default_rng(0)
    problem = Problem(f"x/{name}", SETS[name], draw.standard_normal((2, 4)), np.eye(4), "")
    constraint = constraint_of(problem.set, (2, 4))
    mask = constraint.select(Point(weight=torch.from_numpy(np.abs(problem.weight))))["weight"].numpy()
    assert checker.is_member(mask * problem.weight, problem.set)
    table, keep = checker.cells(mask.astype(float), problem.set)
    assert ((table > 0).sum(axis=1) == keep).all(), "as much is kept as may be"


def test_row_problems_are_restrictions_of_their_layers() -> None:
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.standard_normal((30, 6)))
    layer = Layer(0, "q", draw.standard_normal((3, 6)).astype(np.float32), damped(x.T @ x).float().numpy(), 30)
    weights, hessians = row_problems([layer], 3, 20, seed=1)
    for w, h in zip(weights, hessians, strict=True):
        assert w @ h @ w == pytest.approx(1, rel=1e-5)
        row = next(i for i in range(3) if np.isin(w, layer.weight[i]).all())
        inputs = [int(np.flatnonzero(layer.weight[row] == entry)[0]) for entry in w]
        block = layer.hessian[np.ix_(inputs, inputs)]
        np.testing.assert_allclose(h * (w @ block @ w), block, rtol=1e-4)


def hashes(path: Path, layer: str) -> dict[str, Any]:
    """The entries of the manifest that name the content of a problem file with the set "row"."""
    digest = checker.tensor_hash(checker.read(path, "problem")[0])
    return {"sha256": digest, "fingerprints": build.fingerprints(layer, {"row": SETS["row"]}, digest)}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection of one matrix and one stack of rows, in its own folder."""
    entries: dict[str, Any] = {}
    for layer, stack in (("tiny", False), ("tiny.rows", True)):
        weight, hessian = producers.hostile(5, 2, 4, stack=stack)
        hessian = hessian + np.eye(4, dtype=np.float32) * 0.1 * np.abs(hessian).max()
        path = tmp_path / "problems" / f"{layer}.safetensors"
        write_problem(path, layer, weight, hessian, {"row": SETS["row"]}, {})
        entry = {"model": "tiny", "module": "rows" if stack else "q", "shape": [2, 4], "sets": {"row": SETS["row"]}}
        entries[layer] = {**entry, **hashes(path, layer), "committed": True, "subset": "small"}
    (tmp_path / "problems.json").write_text(json.dumps(entries))
    for module, name, value in (
        *((build, name, value) for name, value in (("FOLDER", tmp_path), ("MANIFEST", tmp_path / "problems.json"))),
        *((record, "TABLE", tmp_path / "records.csv"), (solve, "RUNS", tmp_path / "runs.csv")),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(record.records, "__defaults__", (tmp_path / "records.csv",))
    monkeypatch.setattr(record.write_records, "__defaults__", (tmp_path / "records.csv",))
    return tmp_path


def offered(folder: Path, problem: Problem, weight: Any, solver: str, **certificate: Any) -> list[str]:
    write_solution(folder / "s.safetensors", problem, weight, {"solver": solver})
    if certificate:
        write_certificate(folder / "c.safetensors", problem, "dual", certificate, {"solver": solver})
    return record.offer(problem.id, folder / "s.safetensors", folder / "c.safetensors" if certificate else None)


def test_records_only_improve(small: Path) -> None:
    problem = build.load("tiny/row")
    good = producers.solution(problem)
    mask = good != 0
    assert "value" in offered(small, problem, problem.weight * mask, "first")[0]
    data = producers.dual(problem, np.random.default_rng(1))
    lines = offered(small, problem, good, "second", **data)
    row = record.records()["tiny/row"]
    assert [line.rpartition(" ")[2] for line in lines] == ["second", "second"]
    assert float(row["bound"]) <= float(row["value"])
    assert float(row["gap"]) == pytest.approx(1 - float(row["bound"]) / float(row["value"]), abs=1e-3)
    before = (small / "records.csv").read_bytes()
    weaker = {**data, "diagonal": data["diagonal"] * 0.1, "shift": data["shift"] * 0}
    lines = offered(small, problem, good * 1.01, "third", **weaker)
    assert "not below" in lines[0]
    assert "not above" in lines[1]
    assert (small / "records.csv").read_bytes() == before
    with pytest.raises(checker.CheckError, match="more weights are kept"):
        offered(small, problem, problem.weight + 1, "cheat")


def test_the_rows_of_a_stack_are_put_together(small: Path) -> None:
    problem = build.load("tiny.rows/row")
    good = producers.solution(problem)
    data = producers.dual(problem, np.random.default_rng(1))
    data["shift"] = (good - problem.weight) * 0.1  # so little that it is better than none
    halves = []
    for i in range(2):
        weight, shift = np.zeros_like(good), data["shift"] * 0
        weight[i], shift[i] = good[i], data["shift"][i]
        halves.append((weight, {**data, "shift": shift}))
    for name, (weight, certificate) in zip("ab", halves, strict=True):
        offered(small, problem, weight, name, **certificate)
    row = record.records()[problem.id]
    assert float(row["value"]) == pytest.approx(checker.value(problem, good).upper, rel=1e-6)
    proved = [checker.dual_bound(problem, given).rows for given in (data, {**data, "shift": data["shift"] * 0})]
    assert float(row["bound"]) == pytest.approx(np.max(proved, axis=0).sum(), rel=1e-6)
    assert row["value_solver"] == row["bound_solver"] == "a + b"
    assert float(row["worst_row_gap"]) >= float(row["gap"])


def test_a_refused_or_worse_file_changes_nothing(small: Path) -> None:
    """What is stored is compared, which is rounded to float32, and bounds below 0 rise as well."""
    weight, hessian = np.array([[1, 2, 3, 4], [4, 3, 2, 1]]), 1e4 * np.ones((4, 4)) + 0.01 * np.eye(4)
    path = small / "problems/tiny.safetensors"
    write_problem(path, "tiny", weight.astype(np.float32), hessian.astype(np.float32), {"row": SETS["row"]}, {})
    entries = build.manifest()
    entries["tiny"] |= hashes(path, "tiny")
    (small / "problems.json").write_text(json.dumps(entries))
    problem = build.load("tiny/row")
    good = producers.solution(problem)
    draw = np.random.default_rng(0)
    values = []
    for _ in range(20):
        near = np.where(good != 0, good * (1 + 1e-9 * draw.standard_normal(good.shape)), 0)
        save = {"weight": near}  # float64
        notes = {"id": problem.id, "problem": problem.fingerprint, "format": checker.FORMATS["solution"]}
        save_file(save, small / "s.safetensors", notes)
        record.offer(problem.id, small / "s.safetensors")
        values.append(float(record.records()[problem.id]["value"]))
        kept = checker.load_weight(record.place_of(problem.id, "solution"), problem)
        assert 0 <= values[-1] / checker.value(problem, kept).upper - 1 < 1e-9
    assert values == sorted(values, reverse=True)
    data = producers.dual(problem, draw)
    lower = []
    for factor in (1e6, 2e6, 1e5):
        shift = {**data, "shift": np.full((2, 4), factor)}
        write_certificate(small / "c.safetensors", problem, "dual", shift, {})
        record.offer(problem.id, None, small / "c.safetensors")
        lower.append(float(record.records()[problem.id]["bound"]))
    assert lower[0] < 0
    assert lower[1] == lower[0] < lower[2]


def test_a_stack_whose_files_are_not_at_hand_takes_offers(small: Path) -> None:
    problem = build.load("tiny.rows/row")
    good = producers.solution(problem)
    offered(small, problem, problem.weight * (good != 0), "first", **producers.dual(problem, np.random.default_rng(1)))
    before = record.records()[problem.id]
    assert before["worst_row_gap"]
    for kind in ("solution", "certificate"):
        record.place_of(problem.id, kind).unlink()
    assert "not below" in offered(small, problem, good * 1.5, "worse")[0]
    assert record.records()[problem.id] == before
    offered(small, problem, good, "second")
    row = record.records()[problem.id]
    assert float(row["value"]) < float(before["value"])
    assert row["value_solver"] == "second"
    assert (row["bound"], row["worst_row_gap"]) == (before["bound"], "")


def test_a_stale_file_of_a_stack_does_not_replace_a_better_record(small: Path) -> None:
    """A file of an earlier record, with a row that the offer improves, and another that the table has better."""
    problem = build.load("tiny.rows/row")
    good, draw = producers.solution(problem), np.random.default_rng(1)
    data = producers.dual(problem, draw)
    data["shift"] = (good - problem.weight) * 0.01
    none = {**data, "shift": data["shift"] * 0}
    files = [record.place_of(problem.id, kind) for kind in ("solution", "certificate")]
    offered(small, problem, problem.weight * (good != 0) * 0.5, "first", **none)
    stale = [path.read_bytes() for path in files]
    offered(small, problem, good, "second", **data)
    before = record.records()[problem.id]
    for path, content in zip(files, stale, strict=True):
        path.write_bytes(content)
    half, shift = np.where([[True], [False]], good, 0), np.where([[True], [False]], data["shift"], 0)
    lines = offered(small, problem, half, "third", **{**data, "shift": shift})
    assert "not below" in lines[0]
    assert "not above" in lines[1]
    assert record.records()[problem.id] == before
    offered(small, problem, good * (1 + 1e-6), "fourth", **{**data, "shift": data["shift"] * 2})  # a better bound alone
    row = record.records()[problem.id]
    assert (row["bound_solver"], row["worst_row_gap"]) == ("fourth", ""), "the stale solution has no part in the gap"


@pytest.mark.parametrize(("layer", "what"), [(f"tiny{s}/row", w) for s in ("", ".rows") for w in ("value", "bound")])
def test_a_bound_above_a_recorded_value_is_refused(small: Path, layer: str, what: str) -> None:
    """Whichever of them is in the table, and false there."""
    problem = build.load(layer)
    write_solution(small / "s.safetensors", problem, producers.solution(problem), {})
    data = producers.dual(problem, np.random.default_rng(1))
    write_certificate(small / "c.safetensors", problem, "dual", data, {})
    offers = {"value": (small / "s.safetensors", None), "bound": (None, small / "c.safetensors")}
    for given in offers.values():
        record.offer(problem.id, *given)
    row = record.records()[problem.id]
    other = {"value": "bound", "bound": "value"}[what]
    false = {"value": float(row["bound"]) - 1e-3, "bound": float(row["value"]) + 1e-3}[other]
    for left_out in record.COLUMNS:
        if left_out.startswith(what):
            row[left_out] = ""
    record.write_records({problem.id: row | {other: repr(false)}}, small / "records.csv")
    before = (small / "records.csv").read_bytes()
    with pytest.raises(checker.CheckError, match="is above the value"):
        record.offer(problem.id, *offers[what])
    assert (small / "records.csv").read_bytes() == before


def test_notes_are_one_line_of_a_table(small: Path) -> None:
    problem = build.load("tiny/row")
    notes = {"solver": "a | 0.0 |\n\x1bb", "settings": "c" * 9999, "holder": "x"}
    write_solution(small / "s.safetensors", problem, producers.solution(problem), notes)
    record.offer(problem.id, small / "s.safetensors", holder="y")
    row = record.records()[problem.id]
    assert (row["value_solver"], row["value_holder"]) == ("a / 0.0 / b", "y")
    assert len(row["value_settings"]) < 9999


def test_numbers_are_rounded_to_the_safe_side() -> None:
    draw = np.random.default_rng(0)
    for number in [0.0, 5e-324, 1e22, *(draw.standard_normal(200) * 10.0 ** draw.integers(-30, 30, 200)).tolist()]:
        for digits in (3, 10, 15):
            upper, lower = (float(checker.decimal_text(number, kind, digits)) for kind in ("value", "bound"))
            assert lower <= number <= upper
            assert upper - lower <= abs(number) * 10.0 ** (1 - digits) * 1.01 + 5e-324


def test_a_problem_that_is_missing_or_changed_is_named(small: Path) -> None:
    with pytest.raises(UserError, match="no layer 'big'"):
        build.load("big/row")
    with pytest.raises(UserError, match="has no set 'column'"):
        build.load("tiny/column")
    path = small / "problems/tiny.safetensors"
    write_problem(path, "tiny", np.ones((2, 4), np.float32), np.eye(4, dtype=np.float32), {"row": SETS["row"]}, {})
    with pytest.raises(UserError, match="another SHA-256"):
        build.load("tiny/row")
    path.unlink()
    with pytest.raises(UserError, match="not built"):
        build.load("tiny/row")


@pytest.mark.parametrize(
    "sets", [{"row": {"kind": "row", "keep": 3}}, {"row": SETS["row"], "all": {"kind": "row", "keep": 4}}]
)
def test_a_file_with_other_sets_is_not_that_of_the_manifest(small: Path, sets: dict[str, Any]) -> None:
    """The data are those of the manifest, so that only the fingerprints tell."""
    path = small / "problems/tiny.safetensors"
    tensors, metadata = checker.read(path, "problem")
    save_file(tensors, path, {**metadata, "sets": json.dumps(sets)})
    given = checker.load_problems(path)["tiny/row"]
    write_solution(small / "s.safetensors", given, np.where(np.arange(4) < given.set["keep"], given.weight, 0), {})
    with pytest.raises(UserError, match="another SHA-256"):
        record.offer("tiny/row", small / "s.safetensors")
    assert not record.records()
    with pytest.raises(UserError, match="another SHA-256"):
        export(small / "out", "tiny")


def rebuilt(folder: Path, factor: float, *, committed: bool = False, layer: str = "tiny") -> Problem:
    """The problem of `layer` in a collection where it is not committed, with H times a factor."""
    entries = build.manifest()
    loaded = next(iter(checker.load_problems(folder / f"problems/{layer}.safetensors").values()))
    energy = float(f"{checker.energy(loaded):.10g}")
    entries[layer] |= {"committed": committed, "energy": energy}
    (folder / "problems.json").write_text(json.dumps(entries))
    path = folder / ("problems" if committed else "built") / f"{layer}.safetensors"
    hessian = (loaded.hessian * factor).astype(np.float32)
    write_problem(path, layer, loaded.weight.astype(np.float32), hessian, {"row": SETS["row"]}, {})
    return build.load(f"{layer}/row")


def test_records_of_a_problem_that_was_rounded_otherwise_must_be_better_by_more(small: Path) -> None:
    first = rebuilt(small, 1.0)
    assert first.fingerprint == build.manifest()["tiny"]["fingerprints"]["row"]
    good = producers.solution(first)
    offered(small, first, good * 1.001, "first", **producers.dual(first, np.random.default_rng(1)))
    row = record.records()["tiny/row"]
    assert row["value_problem"] == row["bound_problem"] == first.fingerprint
    other = rebuilt(small, 1 - 5e-7)
    assert other.fingerprint != first.fingerprint
    (line,) = offered(small, other, good * 1.001, "other")  # lower, by the rounding
    assert "not below" in line
    assert record.records()["tiny/row"] == row
    offered(small, other, good, "other")
    after = record.records()["tiny/row"]
    assert (after["value_solver"], after["value_problem"]) == ("other", other.fingerprint)
    assert (after["bound_problem"], after["energy"]) == (first.fingerprint, row["energy"])
    again = rebuilt(small, 1.0)
    assert "not below" in offered(small, again, good, "again")[0]
    record.write_records({"tiny/row": after | {"energy": f"{1.1 * float(after['energy']):.10g}"}})
    with pytest.raises(checker.CheckError, match="the record is that of other data"):
        offered(small, again, good, "again")


def test_a_bound_of_another_rounding_may_exceed_the_value_by_it_alone(small: Path) -> None:
    problem = rebuilt(small, 1.0)
    row = dict.fromkeys(record.COLUMNS, "") | {"value": "1", "value_problem": "a", "bound_problem": "b"}
    assert record._gaps(problem, row, row | {"bound": "1.000001"}, {})[0] == "0"
    for changed in ({"bound": "1.0001"}, {"bound": "1.000001", "bound_problem": "a"}):
        with pytest.raises(checker.CheckError, match="is above the value"):
            record._gaps(problem, row, row | changed, {})


def test_more_than_rounding_is_refused(small: Path) -> None:
    """As are committed files with any difference, and stacks, whose rows all have the same energy."""
    strict = "must be the same to the bit"
    for factor, how, why in (
        (1 + 2e-6, {}, "by more than rounding: build it again"),
        (1 - 5e-7, {"committed": True}, strict),
        (1 - 5e-7, {"layer": "tiny.rows"}, strict),
    ):
        with pytest.raises(UserError, match=f"another SHA-256 than the manifest, .*{why}"):
            rebuilt(small, factor, **how)  # type: ignore[arg-type]


def test_build_tells_rounding_from_other_data(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = rebuilt(small, 1.0)
    build.place_of("tiny").unlink()
    entry = {**build.manifest()["tiny"], "block": 0, "tokens": 9, "ridge": "0"}
    monkeypatch.setattr(build, "sources", lambda _: [build.Source("tiny", "", "", 9, (0, 0, 0), ())])
    monkeypatch.setattr(build, "subset_of", lambda *_: ("small", False))
    for factor in (1 - 5e-7, 1.1):
        data = (loaded.weight.astype(np.float32), (loaded.hessian * factor).astype(np.float32))
        monkeypatch.setattr(build, "layers_of", lambda _, data=data: iter([("tiny", entry, *data)]))
        if factor == 1.1:
            with pytest.raises(SystemExit, match="1 layers differ from the manifest: its records do not apply"):
                build.main(["--out", str(small / "built")])
            assert "tiny differs from the manifest in its data" in capsys.readouterr().out
        else:
            build.main(["--out", str(small / "built")])
            assert "1 layers differ from the manifest by rounding (tiny)" in capsys.readouterr().out
            assert build.load("tiny/row").fingerprint != loaded.fingerprint


def test_build_replaces_a_file_with_other_sets(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small / "problems/tiny.safetensors"
    tensors, metadata = checker.read(path, "problem")
    loaded = build.load("tiny/row")
    entry = {**build.manifest()["tiny"], "block": 0, "tokens": 9, "ridge": "0"}
    data = (loaded.weight.astype(np.float32), loaded.hessian.astype(np.float32))
    monkeypatch.setattr(build, "sources", lambda _: [build.Source("tiny", "", "", 9, (0, 0, 0), ())])
    monkeypatch.setattr(build, "layers_of", lambda _: iter([("tiny", entry, *data)]))
    monkeypatch.setattr(build, "subset_of", lambda *_: ("small", True))
    given = argparse.Namespace(layers="tiny*", subset=None, write_manifest=False, out=small / "built")
    assert build.build(given) == (0, [], [])
    save_file(tensors, path, {**metadata, "sets": json.dumps({"row": {"kind": "row", "keep": 3}})})
    assert build.build(given) == (1, [], [])
    assert build.load("tiny/row").set == SETS["row"]
    entry["sets"] = {"row": {"kind": "row", "keep": 3}}
    count, _, (line,) = build.build(given)
    assert (count, line[:44]) == (0, "tiny differs from the manifest in its sets (")


def test_solve_continues_and_offers(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solve.main(["--solvers", "magnitude,admm", "--minutes", "0"])
    assert "4 runs are left" in capsys.readouterr().out
    solve.main(["--solvers", "magnitude,admm"])
    assert len(capsys.readouterr().out.splitlines()) == 5
    solve.main(["--solvers", "magnitude,admm"])
    assert capsys.readouterr().out == "all runs are done\n"
    assert set(record.records()) == {"tiny/row", "tiny.rows/row"}


def test_bounds_are_offered_and_not_proved_twice(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for problem in ("tiny/row", "tiny.rows/row"):
        offered(small, build.load(problem), producers.solution(build.load(problem)), "first")
    arguments = ["--rounds", "2", "--iterations", "20"]
    bounds.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 3
    for problem, row in record.records().items():
        loaded = build.load(problem)
        best = exact.optimum(loaded.weight, loaded.hessian, loaded.set)
        assert 0.3 * float(best) < float(row["bound"]) <= float(best) * (1 + 1e-9)
    bounds.main(arguments)
    assert capsys.readouterr().out == "all proofs are done\n"
    before = record.records()["tiny/row"]
    bounds.main([*arguments, "--kind", "dual"])  # left out: what is weaker
    assert capsys.readouterr().out == "all proofs are done\n"
    bounds.main([*arguments, "--kind", "dual", "--again"])
    assert "tiny/row: the bound" in capsys.readouterr().out
    assert float(record.records()["tiny/row"]["bound"]) >= float(before["bound"])


def test_the_settings_of_a_record_are_the_command_that_finds_it_again(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solve.main(["--problems", "tiny/row", "--solvers", "admm"])
    bounds.main(["--problems", "tiny/row", "--rounds", "2", "--iterations", "20"])
    before = record.records()["tiny/row"]
    runs = (small / "runs.csv").read_bytes()
    (small / "records.csv").unlink()
    for command in (before["value_settings"], before["bound_settings"]):
        words = command.split()
        assert words[:2] == ["python", "-m"]
        {"collection.solve": solve, "collection.bounds": bounds}[words[2]].main(words[3:])
    after = record.records()["tiny/row"]
    same = {name for name in record.COLUMNS if not name.endswith("_seconds")}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert (small / "runs.csv").read_bytes() == runs


def test_two_commands_at_once_lose_no_record(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock, both would have read the table before either writes it."""
    files = {}
    for name in ("tiny/row", "tiny.rows/row"):
        problem = build.load(name)
        files[name] = small / f"{problem.id.replace('/', '.')}.solution"
        write_solution(files[name], problem, producers.solution(problem), {"solver": name})
    write, both_have_read = record.write_records, threading.Barrier(2)

    def write_after_both_have_read(rows: Mapping[str, record.Row]) -> None:
        with suppress(threading.BrokenBarrierError):  # with the lock the other one waits before it reads
            both_have_read.wait(timeout=0.3)
        write(rows, small / "records.csv")

    monkeypatch.setattr(record, "write_records", write_after_both_have_read)
    threads = [threading.Thread(target=record.offer, args=given) for given in files.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(record.records()) == set(files)
    assert not list(small.glob("*.tmp"))


def test_the_manifest_is_written_for_the_layers_that_are_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.manifest()

    def layers(source: build.Source) -> Iterator[tuple[str, dict[str, Any], Any, Any]]:
        for name in ("tiny", "tiny.new", "tiny.other"):
            entry = {"model": "tiny", "module": "q_proj", "block": 0, "tokens": 9, "ridge": "0"}
            shape = {"shape": [2, 4], "sets": {"row": SETS["row"]}}
            yield name, {**entry, **shape}, np.ones((2, 4), np.float32), np.eye(4, dtype=np.float32)

    monkeypatch.setattr(build, "sources", lambda _: [build.Source("tiny", "", "", 9, (0, 0, 0), ())])
    monkeypatch.setattr(build, "layers_of", layers)
    given = argparse.Namespace(layers="*.new", subset=None, write_manifest=True, out=small / "built")
    assert build.build(given) == (1, [], [])
    after = build.manifest()
    assert set(after) == {*before, "tiny.new"}
    assert {name: after[name] for name in before} == before
    given = argparse.Namespace(layers="*", subset="large", write_manifest=True, out=small / "built")
    build.build(given)
    assert build.manifest() == after, "attention is in the subset 'standard'"


def test_a_long_search_reaches_the_optimum_and_says_by_how_much(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long_search, "LOG", small / "long_search.csv")
    problem = build.load("tiny/row")
    offered(small, problem, problem.weight * (producers.solution(problem) != 0), "first")
    before = float(record.records()[problem.id]["value"])
    long_search.main(["--problems", "tiny*", "--seconds", "0.5"])
    row = record.records()[problem.id]
    best = float(exact.optimum(problem.weight, problem.hessian, problem.set))
    assert float(row["value"]) == pytest.approx(best, rel=1e-5)
    assert row["value_solver"] == "long_search"
    (line,) = capsys.readouterr().out.splitlines()  # stacks of rows are left out
    assert f"before={before}" in line
    (logged,) = (small / "long_search.csv").read_text().splitlines()[1:]
    assert float(logged.split(",")[6]) == pytest.approx(1 - best / before, rel=1e-3)


@pytest.mark.parametrize(("name", "keep"), [("2of4", 1), ("row", 2), ("unstructured", 4), ("group", 2), ("block", 1)])
def test_a_long_search_stays_in_the_set(name: str, keep: int) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((9, 4))
    problem = Problem(f"x/{name}", SETS[name], draw.standard_normal((2, 4)), x.T @ x + 0.1 * np.eye(4), "")
    assert problem.set["keep"] == keep
    found = long_search.search(problem, 0.3, 1)
    weight = found.weight.numpy()
    assert checker.is_member(weight, problem.set)
    assert found.value == pytest.approx(checker.value(problem, weight).upper, rel=1e-9)
    best = float(exact.optimum(problem.weight, problem.hessian, problem.set))
    assert found.value == pytest.approx(best, rel=1e-9)


def test_exchanges_keep_the_counts_of_groups() -> None:
    draw = np.random.default_rng(0)
    weight = torch.from_numpy(draw.standard_normal((50, 8))) * torch.tensor([1.0, 0, 0, 1] * 2)
    moved = long_search.exchanged(weight, (1, 1), 4, draw)
    assert bool(((moved != 0).view(50, 2, 4).sum(2) == 2).all())
    assert bool(((moved != 0) != (weight != 0)).any(1).float().mean() > 0.8)


def test_exchanges_move_whole_tiles_within_their_strip() -> None:
    draw = np.random.default_rng(0)
    strips = torch.from_numpy(draw.permuted(np.tile([1.0, 0, 0, 1, 0, 1], (25, 1)), axis=1))
    weight = torch.from_numpy(draw.standard_normal((50, 12))) * strips.repeat_interleave(2, 0).repeat_interleave(2, 1)
    moved = long_search.exchanged(weight, (2, 2), 6, draw)
    tiles = (moved != 0).view(25, 2, 6, 2)
    assert torch.equal(tiles.any(3).any(1), tiles.all(3).all(1))
    assert bool((tiles.any(3).any(1).sum(1) == 3).all())
    assert bool(((moved != 0) != (weight != 0)).any(1).float().mean() > 0.8)


def test_profiles_by_hand(tmp_path: Path) -> None:
    gap = {"a": {"x": 0.0, "y": 0.02}, "b": {"x": 0.3, "y": 0.0}, "c": {"y": 0.04}}
    assert profiles.profile(gap, ["x", "y"], (0.0, 0.02, 1.0)) == {"x": [1 / 3, 1 / 3, 2 / 3], "y": [1 / 3, 2 / 3, 1.0]}
    cost = {"a": {"x": 10.0, "y": 5.0}, "b": {"x": 1.0, "y": 8.0}, "c": {"y": 3.0}}
    ratios = profiles.performance_ratios(gap, cost, 0.05)
    assert ratios == {"a": {"x": 2.0, "y": 1.0}, "b": {"y": 1.0}, "c": {"y": 1.0}}
    assert profiles.profile(ratios, ["x", "y"], (1.0, 2.0)) == {"x": [0.0, 1 / 3], "y": [1.0, 1.0]}
    assert profiles.solved_by_all(gap) == ["a", "b"]
    assert profiles.solved_by_all({"a": {"x": 0.0, "y": float("inf")}, "b": {"x": 1.0, "y": 1.0}}) == ["b"]


def test_profiles_are_over_problems_whose_best_value_has_another_source(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("runs.csv", "records.csv", "long.csv")]
    files[0].write_text(
        "id,solver,settings,status,value,relative_error,cpu_seconds,cost,date,notes\n"
        + "".join(f"{name},admm,x,solved,2,1,1,1,today,\n" for name in ("own", "searched", "proved"))
    )
    rows = [
        {**dict.fromkeys(record.COLUMNS, ""), "id": name, "value": "1", "gap": "0.4"} for name in ("own", "searched")
    ]
    rows.append({**rows[0], "id": "proved", "gap": "0.009"})
    record.write_records({row["id"]: row for row in rows}, files[1])
    files[2].write_text(
        "id,seconds,seed,date,before,after,lowered_by,restarts,kicks\nsearched,10,0,today,2,1,0.5,1,1\n"
    )
    assert profiles.gaps(*files) == {"searched": {"admm": 1.0}, "proved": {"admm": 1.0}}
