"""The benchmarks measure what they say: instances, ratios, resumed runs, gaps."""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from admm_prune.data.layer_file import LayerFile, load_layer_file
from admm_prune.methods.target import Target, parse_targets, target_named
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.reference import BruteForce
from admm_prune.solvers.reference.rows import separate
from benchmarks import (
    batches,
    float64,
    gaps,
    instances,
    leaderboard,
    machine,
    measuring,
    published,
    rounding,
    streaming,
    tables,
)
from benchmarks.configurations import CONFIGURATIONS, YARDSTICK, problem_for, settings_key
from benchmarks.journal import Journal, write_csv
from benchmarks.leaderboard import Leaderboard
from benchmarks.memory import peak_in_a_process

SOLVERS = [YARDSTICK, "sparsegpt"]
HALF = Target(sparsity=0.5)


def small_layer() -> LayerFile:
    return instances.instance(24, 32, tokens=256)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = tmp_path / "layers"
    layers.mkdir()
    small_layer().save(layers / "small.safetensors")
    return layers


# Instances


def test_an_instance_has_the_values_it_had_when_the_recipe_was_checked() -> None:
    """The same code, bit for bit, gave the files of the published instances."""
    layer = instances.instance(24, 32)
    energy = float((layer.weight.double() @ layer.gram.double() * layer.weight.double()).sum())
    assert float(layer.gram.diagonal().sum()) == pytest.approx(1.9868458e7, rel=1e-5)
    assert energy == pytest.approx(1.0849599e6, rel=1e-5)
    assert float(layer.weight[0, 0]) == pytest.approx(0.046175115, rel=1e-4)
    assert float(layer.weight.square().sum()) == pytest.approx(24, rel=1e-5)


@pytest.mark.bitwise
def test_an_instance_depends_on_its_seed_alone() -> None:
    a, b, other = (instances.instance(8, 16, seed, tokens=128) for seed in (0, 0, 1))
    for name in ("weight", "gram", "gram_validation", "gram_holdout"):
        assert torch.equal(getattr(a, name), getattr(b, name))
        assert not torch.equal(getattr(a, name), getattr(other, name))


def test_its_grams_are_symmetric_and_the_validation_part_belongs_to_the_calibration_tokens() -> None:
    layer = small_layer()
    for gram in (layer.gram, layer.gram_validation, layer.gram_holdout):
        assert gram is not None
        assert gram.dtype == torch.float32
        assert torch.equal(gram, gram.T)
    assert layer.gram_validation is not None
    rest = layer.gram.double() - layer.gram_validation.double()
    assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-5 * float(torch.linalg.eigvalsh(rest)[-1])


def test_the_command_writes_layer_files_and_leaves_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "out"), "8x16", "--seed", "3"]
    instances.main(arguments)
    path = tmp_path / "out/8x16-seed3.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    written = path.read_bytes()
    layer = load_layer_file(path)
    assert layer.metadata["seed"] == "3"
    assert torch.equal(layer.weight, instances.instance(8, 16, 3).weight)
    path.touch()
    stamp = path.stat().st_mtime_ns
    instances.main(arguments)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (written, stamp)


# Published figures


def test_published_figures_are_read_by_pattern() -> None:
    assert published.published("512x512", "70%")["alps"] == (2.424072e-02, 2.653119e-02)
    assert published.published("2048x2048", "2:4").keys() == {"alps", "sparsegpt"}
    assert published.published("512x512", "33%") == {}
    assert published.published(None, "70%") == {}


def test_only_the_published_instance_is_taken_for_it() -> None:
    trace, energy, corner = published.CHECK_VALUES["512x512"]
    weight = torch.zeros(512, 512)
    weight[0, 0] = corner
    gram = torch.zeros(512, 512)
    gram[0, 0] = energy / corner**2
    gram[1, 1] = trace - energy / corner**2  # a stand-in with the same check values; it need not be a Gram
    layer = LayerFile(weight=weight, gram=gram)
    assert published.instance_name(layer) == "512x512"
    assert published.instance_name(replace(layer, gram=gram * 1.001)) is None
    assert published.instance_name(small_layer()) is None


# The leaderboard


@pytest.mark.slow
def test_the_leaderboard_from_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [str(folder), str(out), "--solvers", ",".join(SOLVERS), "--sparsity", "0.5", "--pattern", "2:4"]
    leaderboard.main([*arguments, "--curves", "--date", "2026-01-31", "--repeats", "2"])
    table = capsys.readouterr().out
    assert table == (out / "leaderboard.txt").read_text()
    assert "small (24 x 32)" in table
    rows = read(out / "leaderboard.csv")
    assert [(row["pattern"], row["solver"]) for row in rows] == [(p, s) for p in ("50%", "2:4") for s in SOLVERS]
    for row in rows:
        yardstick = next(r for r in rows if (r["pattern"], r["solver"]) == (row["pattern"], YARDSTICK))
        for suffix in ("", "_holdout"):
            error = f"relative_error{suffix}"
            assert float(row[f"ratio{suffix}"]) == pytest.approx(float(row[error]) / float(yardstick[error]), rel=1e-5)
        assert float(row["cost_cpu"]) > 0
        assert float(row["cost"]) > 0
        assert row["feasible"] == "True"
        assert float(row["sparsity"]) >= 0.5
        assert row["repeats"] == "2"
        assert row["published_alps"] == ""
    document = json.loads((out / "leaderboard.json").read_text())
    assert document["machine"]["date"] == "2026-01-31"
    assert document["machine"]["torch"] == torch.__version__
    assert document["settings"].keys() == set(SOLVERS)
    curves = read(out / "curves.csv")
    assert {point["solver"] for point in curves} == {YARDSTICK}
    for plot in ("cost.png", "cost-holdout.png", "curves.png"):
        assert (out / plot).stat().st_size > 10_000


def test_a_row_tells_the_truth_about_its_solve() -> None:
    layer, method = small_layer(), CONFIGURATIONS["sparsegpt"]
    row = measuring.measure(layer, method, HALF, measuring.Product(layer), repeats=1)
    away = (method.make().solve(problem_for(layer, method, HALF)).solution["weight"] - layer.weight).double()
    dense = layer.weight.double()
    assert layer.gram_holdout is not None
    for found, gram in ((row.relative_error, layer.gram), (row.relative_error_holdout, layer.gram_holdout)):
        h = gram.double()
        assert found == pytest.approx(float((away @ h * away).sum() / (dense @ h * dense).sum()), rel=1e-9)
    assert row.sparsity == 0.5
    assert row.cost == pytest.approx(row.seconds / row.product_seconds)
    assert row.cost_cpu == pytest.approx(row.cpu_seconds / row.product_cpu_seconds)


def test_a_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = parse_targets("0.5", "2:4")
    layers = list(folder.iterdir())
    solved: list[str] = []
    original = leaderboard.measure

    def stops(layer: LayerFile, method: Any, target: Target, *others: Any, **options: Any) -> Any:
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append(f"{method.name} {target.label}")
        return original(layer, method, target, *others, **options)

    monkeypatch.setattr(leaderboard, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        Leaderboard(layers, tmp_path / "out", targets, SOLVERS, repeats=1).time()
    before = (tmp_path / "out/solves.csv").read_text()
    with (tmp_path / "out/solves.csv").open("a") as file:
        file.write("small,cut sho")
    solved.clear()
    board = Leaderboard(layers, tmp_path / "out", targets, SOLVERS, repeats=1)
    board.time()
    assert solved == ["sparsegpt 2:4"]
    assert (tmp_path / "out/solves.csv").read_text().startswith(before)
    assert len(board.rows()) == 4
    solved.clear()
    board.time()
    assert not solved


def test_another_file_or_other_settings_are_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        board = Leaderboard(list(folder.iterdir()), tmp_path / "out", [HALF], [YARDSTICK], repeats=1)
        board.time()
        assert len(board.rows()) == 1
        return len(board.solves.records)

    assert [run(), run()] == [1, 1]
    changed = replace(CONFIGURATIONS[YARDSTICK], make=lambda: replace(ADMM.alps(), max_iterations=7))
    assert settings_key(changed) != settings_key(CONFIGURATIONS[YARDSTICK])
    monkeypatch.setitem(CONFIGURATIONS, YARDSTICK, changed)  # type: ignore[arg-type]
    assert run() == 2
    instances.instance(24, 32, 1, tokens=256).save(folder / "small.safetensors")
    assert run() == 3


def test_a_solver_that_refuses_is_a_row_that_says_why_and_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    instances.instance(8, 18, tokens=64).save(path)
    for runs in (1, 2):
        board = Leaderboard([path], tmp_path / "out", [Target(pattern=(2, 4))], SOLVERS, repeats=1)
        board.time()
        assert len(board.solves.records) == 2 * runs
    rows = board.rows()
    assert [row["status"] for row in rows] == ["FAILED", "FAILED"]
    assert "4 divides" in rows[0]["notes"]
    assert "-      -      -!" in tables.text_table(rows, "")


def test_a_layer_without_a_holdout_gram_and_without_the_yardstick_has_no_ratios(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    replace(small_layer(), gram_holdout=None).save(path)
    board = Leaderboard([path], tmp_path / "out", [HALF], ["wanda"], repeats=1)
    board.time()
    (row,) = board.rows()
    assert (row["relative_error_holdout"], row["ratio"], row["ratio_holdout"]) == (None, None, None)
    board.report({"date": "", "cpu": "", "cores": 1, "cpu_capability": "", "threads": 1, "torch": ""})


def test_a_curve_ends_at_the_error_of_the_solve_and_its_clock_only_rises() -> None:
    layer, method = small_layer(), CONFIGURATIONS["admm"]
    product = measuring.Product(layer)
    points = measuring.curve(layer, method, HALF, product)
    assert len(points) > method.make().max_iterations / 3  # type: ignore[attr-defined]
    times = [point["seconds"] or 0.0 for point in points]
    assert times == sorted(times)
    least = min(point["relative_error"] or 1.0 for point in points)
    row = measuring.measure(layer, method, HALF, product, repeats=1)
    assert least <= row.relative_error * (1 + 1e-6)
    with pytest.raises(TypeError, match="not iterative"):
        measuring.curve(layer, CONFIGURATIONS["wanda"], HALF, product)


@pytest.mark.slow
def test_the_extra_memory_is_measured_in_a_process_of_its_own(folder: Path) -> None:
    assert 0 <= peak_in_a_process(folder / "small.safetensors", "magnitude", HALF) < 50
    with pytest.raises(RuntimeError, match="no such layer file"):
        peak_in_a_process(folder / "none.safetensors", "magnitude", HALF)


@pytest.mark.parametrize("target", parse_targets("0.7,0.123456789", "2:4,1:8"), ids=lambda target: target.label)
def test_a_target_survives_the_way_to_another_process(target: Target) -> None:
    assert target_named(str(target)) == target


def test_wrong_words_are_refused(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(tmp_path / "none"), "out"], "no layer file"),
        ([str(folder), "out", "--solvers", "best"], "no solver 'best'"),
    ):
        with pytest.raises(SystemExit):
            leaderboard.main(arguments)
        assert words in capsys.readouterr().err


def test_a_journal_of_other_columns_is_not_added_to(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"x": 1.0}])
    with pytest.raises(ValueError, match="other columns"):
        Journal(tmp_path / "a.csv", ["y"])


def test_fewer_bits_are_measured_against_float64() -> None:
    row = float64.measured(24, 0.01, rows=6)
    assert 0 < row["factor float64"] <= row["factor float32"] < 1e-4
    assert row["objective float32"] < 1e-5
    assert row["objective bfloat16x3"] < 1e-3
    lines = float64.table([row]).splitlines()
    assert lines[0].split()[:2] == ["width", "ridge"]
    assert lines[1].split()[:2] == ["24", "0.01"]


def test_the_geometric_mean() -> None:
    assert tables.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert tables.geometric_mean([]) is None
    assert tables.geometric_mean([0.0, 1.0]) is None


# Gaps


@pytest.mark.slow
def test_gaps_are_relative_to_the_true_optimum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gaps.main([str(tmp_path), "--rows", "3", "--width", "8"])
    assert capsys.readouterr().out == (tmp_path / "gaps.txt").read_text()
    rows = read(tmp_path / "gaps.csv")
    assert {(row["family"], row["row"]) for row in rows} == {(f, str(i)) for f in gaps.FAMILIES for i in range(3)}
    for row in rows:
        problem = gaps.drawn(row["family"], 8, int(row["row"]))
        optimum = BruteForce().solve(problem).objective
        assert row["proved"] == "True"
        assert float(row["optimum"]) == pytest.approx(optimum, rel=1e-5)
        assert float(row["gap"]) == pytest.approx(float(row["objective"]) / float(row["optimum"]) - 1, abs=1e-5)
        assert float(row["gap"]) >= -1e-6
    assert (tmp_path / "gaps.png").stat().st_size > 10_000


@pytest.mark.parametrize("family", gaps.FAMILIES)
def test_a_drawn_row_is_of_its_family(family: str) -> None:
    problem = gaps.drawn(family, 16, 0)
    assert torch.equal(problem.gram, gaps.drawn(family, 16, 0).gram)
    assert not torch.equal(problem.gram, gaps.drawn(family, 16, 1).gram)
    assert problem.gram.dtype == torch.float64
    assert problem.constraint.select(problem.initial())["weight"].sum() == 8  # type: ignore[attr-defined]
    condition = float(torch.linalg.cond(problem.hessian))
    assert (condition == pytest.approx(1e6, rel=1e-3)) if family == "spectral" else condition < 1e4


def test_swaps_end_where_no_swap_helps() -> None:
    row = separate("test", gaps.drawn("wishart", 10, 0)).rows[0]
    kept = np.arange(10) < 5
    loss = gaps.swapped(row, kept)
    assert loss < row.loss(kept)
    assert kept.tolist() == [True] * 5 + [False] * 5, "the start is left as it was"


def test_models_to_stream_have_as_many_parameters_as_is_said(tmp_path: Path) -> None:
    parameters = streaming.write_model("tiny", "bfloat16", 2, tmp_path)
    stored = [tensor for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.numel() for tensor in stored) == parameters
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    row = {"method": "wanda", "peak_gb": 1.234, "minutes": 5.6, "reading_percent": 0.42}
    content = {
        "machine": machine.machine("2026-11-24"), "command": "c", "shape": "tiny", "blocks": "2 of 4", "tokens": 8,
        "parameters": parameters, "weights_gb": 0.1, "rows": [row],
    }  # fmt: skip
    assert "tiny shape, 2 of 4 blocks" in streaming.table(content)
    assert streaming.table(content).splitlines()[-1].split() == ["wanda", "1.23", "5.6", "0.42", "%"]


# Batches


@pytest.mark.slow
def test_batches_are_timed_beside_the_same_problems_alone(tmp_path: Path) -> None:
    out = tmp_path / "batches"
    batches.main([str(out), "--count", "3", "--repeats", "2", "--shapes", "16x32,300x128"])
    rows = json.loads((tmp_path / "batches.json").read_text())["rows"]
    assert [(row["shape"], row["target"], row["chosen"]) for row in rows] == [
        ("16x32", "70%", True),
        ("16x32", "2:4", True),
        ("300x128", "70%", False),
        ("300x128", "2:4", False),
    ]
    assert all(row["same_bits"] and row["ratio"] > 0 for row in rows)
    assert "16x32" in (tmp_path / "batches.txt").read_text()


def test_a_dtype_is_rounded_within_what_is_allowed(model_folder: Path, text_file: Path) -> None:
    given = argparse.Namespace(model=str(model_folder), data=str(text_file), length=32, sequences=8)
    narrow, wide = (rounding.evaluated(given, dtype) for dtype in ("bfloat16", "float32"))
    difference = abs(narrow["perplexity"] / wide["perplexity"] - 1)
    assert 0 < difference < narrow["allowed"] < 0.05
    assert wide["allowed"] < 1e-4
    row = {"dtype": "bfloat16", "difference": difference, "here": narrow, "older": narrow}
    assert f"{difference:.2g}" in rounding.table([row])
