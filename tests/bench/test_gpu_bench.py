"""The GPU benchmark, end to end at tiny shapes, and how its rows end when they do not end well."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from admm_prune.bench import baselines, blocks, layers, rows, scaling, suite, training
from admm_prune.bench.baselines import Ceilings, Work
from admm_prune.bench.rows import Case, Figures, Measurement, Runner
from admm_prune.bench.suite import rendered
from admm_prune.cli.app import app
from admm_prune.errors import UserError
from admm_prune.ops import quadratic
from admm_prune.problems.constraints import NofM, Unstructured

CPU = torch.device("cpu")
CEILINGS = Ceilings(dict.fromkeys(("float64", "float32", "bfloat16", "bfloat16x3"), 1000000000.0), read=1e9, copied=1e9)
# What the machine with a GPU lacks: importing it fails, and so does asking for its version. typer may use pydantic.
WITHOUT = """
import builtins, importlib.metadata, importlib.util, sys
LACKING = {"pydantic", "pydantic_core", "datasets", "cvxpy", "pyscipopt"}
real, found, version = builtins.__import__, importlib.util.find_spec, importlib.metadata.version
def imported(name, globals=None, locals=None, fromlist=(), level=0):
    asking = (globals or {}).get("__name__", "").partition(".")[0]
    if level == 0 and name.partition(".")[0] in LACKING and asking not in LACKING | {"typer"}:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)
def asked(name):
    if name in LACKING | {"admm-prune"}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
builtins.__import__, importlib.metadata.version = imported, asked
importlib.util.find_spec = lambda name, package=None: None if name in LACKING else found(name, package)
"""
COMMAND = """
from admm_prune import cli
sys.argv = ["admm-prune", "bench", "gpu", "--small", "--device", "cpu", "--budget", "400", "--out", sys.argv[1]]
cli.main()
"""
# As `make gpu` and `scripts/card.sh` do there.
COLLECT = """
import pytest
words = ["--collect-only", "-q", "-p", "tests.gpu_run", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*words, "tests"]))
"""


@pytest.mark.slow
def test_the_whole_of_it_without_what_a_gpu_machine_lacks(tmp_path: Path) -> None:
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT + COMMAND, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "out" / "admm_prune.json").read_text())
    assert {row["section"] for row in content["rows"]} == set(suite.SECTIONS)
    assert [row for row in content["rows"] if row["status"] != "measured"] == []
    assert content["gap"]
    assert all(claim["met"] is None for claim in content["claims"])  # tiny shapes prove nothing
    for row in content["rows"]:
        assert row["seconds"] > 0
        assert row["floor_seconds"] > 0
        assert row["reached"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        if row["section"] == "layers":
            assert 0 < row["error"] < 1
    assert {"sparsegpt", "admm-fast", "admm"} <= set(content["model"]["layers"])
    table = (tmp_path / "out" / "gpu.txt").read_text()
    for row in content["rows"]:
        assert row["name"] in table
    assert "nothing about the speed of a GPU" in table


@pytest.mark.slow
def test_what_runs_on_a_gpu_is_collected_without_them() -> None:
    tests = Path(__file__).parents[1]
    files = [path for path in sorted(tests.rglob("test_*.py")) if path != Path(__file__)]
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-c", WITHOUT + COLLECT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = {path.name for path in marked}
    assert {"test_on_device.py", "test_triton_kernels.py", "test_precision.py"} <= names
    assert all(f"{name}::" in done.stdout for name in names)


def test_the_command(tmp_path: Path) -> None:
    words = ["bench", "gpu", "--small", "--device", "cpu", "--sections", "selection", "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    names = [row["name"] for row in json.loads(told.stdout.splitlines()[-1])["rows"]]
    assert {"threshold", "mask", "torch.topk", "torch.sort"} <= set(names)
    shown = CliRunner().invoke(app, [*words, "--overwrite"])
    assert "reads of memory" in shown.output


def test_full_size_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--small"):
        suite.bench_gpu(tmp_path / "out", device="cpu")
    with pytest.raises(UserError, match="no section 'speed'"):
        suite.bench_gpu(tmp_path / "out", device="cpu", small=True, sections=["speed"])
    assert not (tmp_path / "out").exists()


def case(run, **how) -> Case:
    return Case(section="s", name="n", case="c", run=run, **how)


def test_baselines_are_timed_like_the_solvers(monkeypatch) -> None:
    """The faster of two runs, since the first may load libraries and compile kernels; a long one is not repeated."""
    calls: list[str] = []
    for name in ("alps", "sparsegpt"):
        solve = getattr(baselines, name)
        monkeypatch.setattr(
            baselines, name, lambda *a, solve=solve, name=name, **how: (calls.append(name), solve(*a, **how))[1]
        )
    cases = {
        case.name: case for case in layers.cases([(8, 16)], CPU, targets=(layers.Target(0.5),), baseline_rows=True)
    }
    for name, count in (("SparseGPT, straightforward", 2), ("ALPS, straightforward float32", 2)):
        calls.clear()
        cases[name].run()
        assert len(calls) == count
    seconds = iter((2.5, 0.1))
    assert layers._fastest(lambda: Figures(seconds=next(seconds))).seconds == 2.5
    assert next(seconds) == 0.1


def test_rows_of_a_run_that_was_stopped_are_kept(tmp_path: Path) -> None:
    rows_so_far = tmp_path / "gpu.rows.jsonl"
    rows_so_far.write_text("{}")
    with pytest.raises(UserError, match=r"gpu\.rows\.jsonl has the rows of a run that was stopped"):
        suite.bench_gpu(tmp_path / "gpu", device="cpu", small=True)
    assert rows_so_far.read_text() == "{}"


def test_a_row_that_fails_is_a_row(monkeypatch) -> None:
    def singular() -> Figures:
        raise torch.linalg.LinAlgError("not positive definite\nmore")

    def exhausted() -> Figures:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    def endless() -> Figures:
        while True:
            time.sleep(0.01)

    runner = Runner(CPU, CEILINGS, budget=30.0)
    good = case(lambda: Figures(seconds=2.0, work=Work({"float32": 1e9}, 4e8)))
    found = runner.run([case(singular), case(exhausted), case(endless, limit=0.1), good])
    assert [row.status for row in found] == ["failed", "no memory", "too long", "measured"]
    assert found[0].note == "LinAlgError: not positive definite"
    assert found[3].floor_seconds == pytest.approx(1.0)
    assert found[3].reached == pytest.approx(0.5)
    assert found[3].bound == "operations"
    monkeypatch.setattr(rows, "free_memory", lambda device: 1e9)
    assert runner.run([case(endless, needs=2e9)])[0].status == "no memory"
    assert Runner(CPU, CEILINGS, budget=0.0).run([good])[0].status == "no time"


class CompilationError(Exception):
    """As Triton's, which is of no builtin kind."""


@pytest.mark.parametrize(
    "error",
    [
        CompilationError("at 3:7"),
        subprocess.CalledProcessError(1, ["ptxas"]),
        OSError("no space left on device"),
        IndexError("list index out of range"),
        ModuleNotFoundError("no triton"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_of_a_row_ends_the_others(error: Exception) -> None:
    def fails() -> Figures:
        raise error

    runner = Runner(CPU, CEILINGS, budget=30.0)
    found = runner.run([case(fails), case(lambda: Figures(seconds=1.0))])
    assert [row.status for row in found] == ["failed", "measured"]
    assert found[0].note.startswith(f"{type(error).__name__}: ")


def test_ctrl_c_ends_the_benchmark() -> None:
    def interrupted() -> Figures:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(CPU, CEILINGS, budget=30.0).run([case(interrupted)])


def test_a_card_that_answers_nothing_more_leaves_the_rows_so_far(monkeypatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner = Runner(CPU, CEILINGS, budget=30.0)
    runner.run([case(lambda: Figures(seconds=2.0))])
    for name in ("mem_get_info", "empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lost)
    runner.device = torch.device("cuda")
    runner.run([case(lambda: Figures(seconds=1.0))])
    assert [row.status for row in runner.rows] == ["measured", "failed"]
    assert "illegal memory access" in runner.rows[1].note
    for section in suite.SECTIONS:  # what is measured depends on the memory that is free
        runner.run(suite._cases(section, suite.SMALL, runner.device))
    assert {row.status for row in runner.rows[1:]} == {"failed"}
    assert {row.section for row in runner.rows[1:]} == {"s", *suite.SECTIONS}


def test_the_fit_finds_a_line() -> None:
    points = [(0.01, 0.03), (0.1, 0.21), (1.0, 2.01)]  # 10 ms and twice the floor
    measured = [
        Measurement(section="layers", name="admm", case="", status="measured", seconds=t, floor_seconds=f)
        for f, t in points
    ]
    line = scaling.fitted(measured)
    assert line is not None
    assert line.overhead == pytest.approx(0.01)
    assert line.reached == pytest.approx(0.5)
    assert line.worst < 1e-9
    assert scaling.fitted(measured[:1]) is None
    content = scaling.model_of(measured, [training.SHAPES["7B"]], CEILINGS, tokens=1024, methods=("admm",))
    (model,) = content["models"]
    assert model["seconds"] == pytest.approx(2 * model["floor_seconds"])
    assert 6.5e9 < model["parameters"] < 6.9e9
    assert model["working_from"] == "counted"


def test_memory_is_scaled_by_what_blocks_took() -> None:
    def row(name: str, case: str, **more: float) -> Measurement:
        named = {"section": "models", "name": name, "case": case, "status": "measured"}
        return Measurement(**named, seconds=2.0, floor_seconds=1.0, more=more)

    seven, tokens = training.SHAPES["7B"], 1024
    counted = {"7B": 6822035456.0, "70B": 41104179200.0}  # by hand, from the docstring of `working_bytes`
    half = counted["7B"] / 2
    sizes = [row(blocks.STRUCTURED, "", parameters=p, **{blocks.BEYOND: 3 * p**0.5}) for p in (1e6, 1e7, 1e8)]
    measured = [row("admm 70 %, layer by layer", "7B, 2 of 32 blocks", **{blocks.BEYOND: half}), *sizes]
    shapes = [seven, training.SHAPES["70B"]]
    content = scaling.model_of(measured, shapes, CEILINGS, tokens=tokens, methods=("admm",))
    for shape, model in zip(shapes, content["models"], strict=True):
        assert model["working_bytes"] == pytest.approx(counted[shape.name] / 2)
        assert model["working_from"] == "blocks"
    assert content["structured_peak"]["exponent"] == pytest.approx(0.5)
    content |= {"date": "", "command": "", "gap": "", "claims": [], "model": content}
    content["environment"] = {"device": "a card", "versions": {}, "kernels": ""}
    assert "parameters^0.50, 3 rows" in rendered(content, measured, CEILINGS)


def test_claims_are_judged_by_the_rows() -> None:
    def row(name: str, seconds: float, error: float) -> Measurement:
        return Measurement(section="layers", name=name, case="4x4 0.7", status="measured", seconds=seconds, error=error)

    alps = row("ALPS, straightforward float32", 3.0, 0.10), row("ALPS, straightforward float64", 12.0, 0.10)
    measured = [row("admm", 1.0, 0.10), *alps, row("sparsegpt", 1.0, 0.1)]
    found = {claim["what"]: claim for claim in suite.claims(measured)}
    assert found["admm over float32 ALPS, 4x4 0.7"]["value"] == 3.0
    assert found["admm over float32 ALPS, 4x4 0.7"]["met"] is False
    assert found["its error over that of ALPS, 4x4 0.7"]["met"]
    missing = found["sparsegpt over the straightforward one, 4x4 0.7"]
    assert missing["value"] is None
    assert missing["met"] is None


def test_fewer_scores_are_not_taken_for_all_of_them() -> None:
    """Where the mask of all scores has no memory, it is not measured."""

    def row(name: str, entries: str, reads: float | None) -> Measurement:
        status, seconds = ("no memory", None) if reads is None else ("measured", 1.0)
        named = {"section": "selection", "name": name, "case": entries, "status": status}
        return Measurement(**named, seconds=seconds, more={"reads of memory": reads})

    def judged(*found: Measurement) -> list[float | None]:
        return [claim["value"] for claim in suite.claims(found) if claim["what"].endswith("in reads of memory")]

    threshold, fewer = row("threshold", "6.5e9 scores", 1.5), row("mask", "5e8 scores", 2.0)
    assert judged(threshold, row("mask", "6.5e9 scores", None), fewer) == [1.5, None]
    assert judged(threshold, row("mask", "6.5e9 scores", 2.5), fewer) == [1.5, 2.5]
    assert judged(row("threshold", "6.5e9 scores", None), fewer) == [None, None]
    assert judged() == [None, None]


def test_what_is_starred_is_written_for_the_benchmark_or_part_of_torch() -> None:
    size, starred = suite.SMALL, set()
    for section in suite.SECTIONS:
        starred |= {one.name for one in suite._cases(section, size, CPU) if one.baseline}
    written = {name for name in starred if "straightforward" in name}
    assert written
    assert all("torch." in name or "clip_grad_norm_" in name for name in starred - written), starred


def test_steps_with_8_bit_moments_have_a_target() -> None:
    names = [how.name for how in training.CONFIGURATIONS]
    measured = [
        Measurement(section="training", name=name, case="1B", status="measured", seconds=1.0, floor_seconds=0.4)
        for name in names
    ]
    found = {claim["what"]: claim for claim in suite.claims(measured) if claim["what"].startswith("floor of")}
    assert set(found) == {f"floor of {name} over its time, 1B" for name in names if "8-bit moments" in name}
    assert len(found) == 2
    assert all(claim["value"] == 0.4 and claim["met"] is False for claim in found.values())


@pytest.mark.parametrize("constraint", [Unstructured(0.7), NofM(2, 4)], ids=["70%", "2:4"])
def test_the_baselines_do_what_they_say(constraint) -> None:
    """As good as our own implementations of the same algorithms, and feasible."""
    from admm_prune.point import Point
    from admm_prune.problems.layer import LayerReconstruction
    from admm_prune.solvers.admm import ADMM
    from admm_prune.solvers.obs import SparseGPT

    layer = layers.drawn(40, 64, CPU)
    task = LayerReconstruction(layer.weight.double(), layer.gram.double(), constraint, ridge=0.0, damping=0.01)
    pattern = (2, 4) if isinstance(constraint, NofM) else None
    found = {
        "alps": (baselines.alps(layer.weight, layer.gram, constraint), ADMM.alps()),
        "sparsegpt": (baselines.sparsegpt(layer.weight, layer.gram, sparsity=0.7, pattern=pattern), SparseGPT()),
    }
    for name, (baseline, solver) in found.items():
        assert constraint.contains(Point(weight=baseline.weight))
        error = quadratic.energy(baseline.weight.double(), task.gram, task.weight)
        ours = quadratic.energy(solver.solve(task).solution["weight"], task.gram, task.weight)
        assert abs(math.log(error / ours)) < (0.1 if name == "alps" else 0.02), f"{name}: {error} for {ours}"
