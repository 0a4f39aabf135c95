"""The checker against rational arithmetic and brute force, on hostile small problems; and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from collection import checker
from collection.checker import CheckError, Problem
from collection.files import write_certificate, write_problem, write_solution
from tests.collection import exact, producers
from tests.collection.producers import SETS

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(SETS)
CASES = [*((name, kind) for name in NAMES for kind in ("dual", "block")), ("row", "tree"), ("rows", "tree")]
SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(seed: int, name: str, stack: bool = False) -> Problem:
    """A hostile problem without a file."""
    weight, hessian = producers.hostile(seed, 2, 4, stack=stack)
    return Problem(f"tiny/{name}", SETS[name], weight.astype(float), hessian.astype(float), "")


def proves(problem: Problem, seed: int, kind: str) -> float | None:
    """The bound of a certificate drawn by the seed; None where it proves nothing."""
    draw = np.random.default_rng(seed)
    tensors: dict[str, Any] = getattr(producers, kind)(problem, draw)
    try:
        bound: float = getattr(checker, f"{kind}_bound")(problem, tensors).value
    except CheckError:
        return None  # a singular Hessian
    return bound


@pytest.mark.parametrize("stack", [False, True])
@SHARED
@given(seed=st.integers(0, 10**6))
def test_the_interval_contains_the_exact_value(stack: bool, seed: int) -> None:
    problem = made(seed, "row", stack)
    v = np.random.default_rng(seed).standard_normal((2, 4)) * 10.0 ** (seed % 5)
    reached = checker.value(problem, v)
    truth = exact.value(problem.weight, problem.hessian, v)
    assert Fraction(reached.lower) <= truth <= Fraction(reached.upper)
    assert reached.upper - reached.lower <= 1e-12 * float(truth) + 1e-290
    assert reached.lower <= reached.rows[:, 0].sum() * (1 + 1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_membership_is_by_exact_counts(name: str) -> None:
    for code in range(256):
        mask = np.array([code >> i & 1 for i in range(8)]).reshape(2, 4)
        assert checker.is_member(mask * 1e-300, SETS[name]) == exact.admissible(mask, SETS[name])


def assert_bound_holds(seed: int, name: str, kind: str) -> float:
    """bound / optimum of a certificate that proves something; 0 of one that does not."""
    stack = name.startswith("row") and seed % 3 == 0 and kind != "block"
    problem = made(seed, name, stack)
    bound = proves(problem, seed, kind)
    if bound is None or bound == -np.inf:
        return 0.0
    best = exact.optimum(problem.weight, problem.hessian, problem.set)
    assert Fraction(bound) <= best, (seed, name, kind)
    return bound / float(best) if best > 0 else 1.0


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_bound_is_above_brute_force(name: str, kind: str) -> None:
    ratios = [assert_bound_holds(seed, name, kind) for seed in range(12)]
    assert max(ratios) > 0.05, "no certificate proves anything"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_bound_is_above_brute_force_in_10_000_cases(name: str, kind: str) -> None:
    for seed in range(12, 1262):
        assert_bound_holds(seed, name, kind)


@pytest.mark.parametrize("kind", ["dual", "tree"])
@SHARED
@given(seed=st.integers(0, 10**6))
def test_the_bound_is_what_the_certificate_gives_exactly(kind: str, seed: int) -> None:
    problem = made(seed, "row", stack=seed % 2 == 0)
    draw = np.random.default_rng(seed)
    tensors: dict[str, Any] = producers.dual(problem, draw) if kind == "dual" else producers.tree(problem, draw)
    tensors["diagonal"] = tensors["diagonal"] * 0.5 + 1e-3 * np.diagonal(problem.hessian_of(0)).min()
    bound = checker.dual_bound if kind == "dual" else checker.tree_bound
    total, proved = exact_bound(problem, kind, tensors), None
    try:
        proved = bound(problem, tensors)
    except CheckError:
        assert total is None or not well_inside(problem, tensors)
        return
    if proved.value == -np.inf:
        assert total is None
        return
    assert Fraction(proved.value) <= exact.optimum(problem.weight, problem.hessian, problem.set)
    if total is not None and well_inside(problem, tensors):  # the multipliers are taken as they are
        size = float(exact.value(problem.weight, problem.hessian, 0 * problem.weight))
        assert float(total) - 1e-9 * size <= proved.value
        assert Fraction(proved.value) <= total


@pytest.mark.parametrize("name", NAMES)
@settings(SHARED, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_the_bound_of_blocks_is_what_they_give_exactly(name: str, seed: int) -> None:
    """At the best price of the budgets, which loses what one block can; N:M has none."""
    problem = made(seed, name)
    tensors = producers.block(problem, np.random.default_rng(seed))
    tensors["blocks"] = tensors["blocks"] * 0.5
    arguments = problem.weight, problem.hessian, problem.set
    total = exact.block_bound(*arguments, tensors["columns"], tensors["blocks"], tensors["shift"])
    try:
        proved = checker.block_bound(problem, tensors).value
    except CheckError:
        proved = -np.inf
    if total is None:
        return
    well_inside = np.linalg.eigvalsh(problem.hessian)[0] > 1e-6 * np.diagonal(problem.hessian).max()
    assert proved == -np.inf or Fraction(proved) <= total <= exact.optimum(*arguments)
    if well_inside:
        size = float(exact.value(problem.weight, problem.hessian, 0 * problem.weight))
        priced = (
            total
            if name == "2of4"
            else exact.priced_block_bound(*arguments, tensors["columns"], tensors["blocks"], tensors["shift"])
        )
        assert priced is not None
        assert priced - Fraction(1e-7 * size) <= Fraction(proved) <= priced <= total


def blocks_of(seed: int) -> tuple[Problem, dict[str, Any]]:
    """A 2of4 problem and blocks of two columns each that prove a bound."""
    problem = made(seed, "2of4")
    hessian = np.eye(4) + 0.2
    problem = Problem(problem.id, problem.set, problem.weight, hessian, "")
    columns = np.array([[2, 3], [0, 1]], dtype=np.int32)
    blocks = np.stack([hessian[np.ix_(group, group)] for group in columns]) * 0.7
    return problem, {"columns": columns, "blocks": blocks, "shift": np.zeros((2, 4))}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("columns", lambda x: x[:, ::-1].copy(), "whole groups of 2 consecutive"),
        ("columns", lambda x: np.array([[1, 2], [3, 0]]), "whole groups of 2 consecutive"),
        ("columns", lambda x: np.array([[0, 1], [0, 1]]), "every column once"),
        ("columns", lambda x: x.reshape(4, 1), "do not fit"),
        ("columns", lambda x: x.astype(float), "dtype"),
        ("blocks", lambda x: x * 1.5, "not proved to be positive semidefinite"),
        ("blocks", lambda x: x - np.eye(2), "not proved to be positive semidefinite"),
        ("blocks", lambda x: x + np.array([[0, 1e-9], [0, 0]]), "not symmetric"),
        ("blocks", lambda x: np.full_like(x, np.nan), "NaN"),
        ("shift", lambda x: x[:1], "do not fit"),
        ("shift", lambda x: x + np.inf, "NaN, infinity"),
    ],
)
def test_blocks_that_prove_nothing_are_refused(name: str, change: Any, told: str) -> None:
    problem, tensors = blocks_of(0)
    assert checker.block_bound(problem, tensors).value > 0
    with pytest.raises(CheckError, match=told):
        checker.block_bound(problem, {**tensors, name: change(tensors[name])})


def test_blocks_too_many_supports_and_stacks_are_refused() -> None:
    weight = np.ones((1, 16))
    problem = Problem("x/unstructured", {"kind": "unstructured", "keep": 8}, weight, np.eye(16), "")
    data = {"columns": np.arange(16)[None], "blocks": np.eye(16)[None] * 0.5, "shift": weight * 0}
    with pytest.raises(CheckError, match="more than 4096 supports"):
        checker.block_bound(problem, data)
    wide = Problem("x/16of32", {"kind": "N:M", "keep": 16, "of": 32}, np.ones((1, 32)), np.eye(32), "")
    with pytest.raises(CheckError, match="more than 4096 supports"):  # which are not listed first
        checker.supports_of_block(np.arange(32)[None], wide.set, Path("c"))
    with pytest.raises(CheckError, match="not for a stack"):
        checker.block_bound(made(0, "row", stack=True), data)


def exact_bound(problem: Problem, kind: str, tensors: dict[str, Any]) -> Fraction | None:
    """What the data prove, for a row-wise set, in rational arithmetic; None for nothing."""
    out, width = problem.weight.shape
    keep = np.broadcast_to(np.asarray(problem.set["keep"]), (out,))
    total = Fraction(0)
    for i in range(out):
        if kind == "dual":
            signs, index, shifts = np.zeros((1, width), int), tensors["diagonal_of_row"][i : i + 1], tensors["shift"][i]
        else:
            own = tensors["row_of_leaf"] == i
            signs, index, shifts = tensors["leaves"][own], tensors["diagonal_of_leaf"][own], tensors["shift"][own]
        leaves = [
            (sign.tolist(), exact.rational(tensors["diagonal"][g]), exact.rational(s))
            for sign, g, s in zip(signs, index, np.atleast_2d(shifts), strict=True)
        ]
        h, w = exact.rational(problem.hessian_of(i)), exact.rational(problem.weight[i])
        row = exact.tree_row(h, w, leaves, int(keep[i]))
        if row is None:
            return None
        total += row
    return total


def well_inside(problem: Problem, tensors: dict[str, Any]) -> bool:
    """Whether H - D has a margin that float64 can see, so that the checker has to accept it as it is."""
    for i in range(len(problem.weight)):
        h = problem.hessian_of(i)
        scale = np.sqrt(np.diagonal(h))
        for d in tensors["diagonal"]:
            if scale.min() == 0 or d.min() <= 0:
                return False
            less = (h - np.diag(d)) / scale / scale[:, None]
            if np.linalg.eigvalsh(less)[0] < 1e-9:
                return False
    return True


@pytest.mark.parametrize("width", [4, 64, 200])
def test_matrices_with_a_singular_remainder_are_judged_with_all_their_rounding(width: int) -> None:
    """H - D in integers, with H 1 = D 1: singular, and indefinite for any larger D; n is in the margin."""
    draw = np.random.default_rng(width)
    edges = np.triu(draw.integers(0, 1000, (width, width)), 1).astype(float)
    laplacian = np.diag((edges + edges.T).sum(axis=1)) - edges - edges.T  # semidefinite, with 1 in its kernel
    diagonal = draw.integers(1, 1000, width).astype(float)
    hessian = laplacian + np.diag(diagonal)
    assert not checker.is_semidefinite(hessian, diagonal), "singular: no margin for the rounding"
    scale = np.diagonal(hessian)
    phi = checker.gamma(2 * width + 20) / (1 - checker.gamma(2 * width + 20))
    room = scale - diagonal
    for part, proved in ((-1.0, False), (0.5, False), (8.0, True)):  # of n phi, which has to be covered
        lowered = diagonal - part * width * phi * room
        assert checker.is_semidefinite(hessian, lowered) == proved, part
    assert (checker.proved_diagonal(hessian, diagonal) < diagonal).all()
    with pytest.raises(CheckError, match="not proved"):
        checker.proved_diagonal(hessian, diagonal + 1e-5 * scale)


@SHARED
@given(seed=st.integers(0, 10**6), excess=st.sampled_from([1e-3, 1e-6, 1e-9]))
def test_a_diagonal_beyond_the_hessian_is_lowered_or_refused(seed: int, excess: float) -> None:
    problem = made(seed, "row")
    h = problem.hessian
    scale = np.maximum(np.sqrt(np.diagonal(h)), 1e-30)
    least = max(0.0, float(np.linalg.eigvalsh(h / scale / scale[:, None])[0]))
    try:
        proved = checker.proved_diagonal(h, (least + excess) * scale**2)
    except CheckError:
        return
    less = exact.rational(h)
    for j, d in enumerate(proved):
        less[j][j] -= Fraction(float(d))
    assert exact.is_semidefinite(less)


def test_leaves_have_to_cover_all_supports() -> None:
    """Against listing them, for random subsets of the leaves of random trees."""
    draw = np.random.default_rng(0)
    seen = set()
    for seed in range(200):
        problem = made(seed, "row")
        leaves = producers.tree(problem, np.random.default_rng(seed), depth=int(draw.integers(1, 5)))["leaves"]
        chosen = leaves[draw.random(len(leaves)) < draw.choice((0.7, 1.0))].astype(np.int64)
        half = chosen[: len(chosen) // 2] if seed % 2 else chosen  # of two rows, one tree each
        covered = all(
            any(((mask == 1) >= (leaf > 0)).all() and ((mask == 0) >= (leaf < 0)).all() for leaf in half)
            for code in range(16)
            if (mask := np.array([code >> i & 1 for i in range(4)])).sum() == 2
        )
        found = checker.covers_all_supports(half, 2)
        assert not found or covered
        seen.add((found, covered))
    assert {(True, True), (False, False)} <= seen


def test_it_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    """A problem, a solution and a certificate through the command, in a process where torch and our package raise."""
    problem = producers.problem(tmp_path, 3, "row")
    write_solution(tmp_path / "s.safetensors", problem, producers.solution(problem), {})
    write_certificate(
        tmp_path / "c.safetensors", problem, "tree", producers.tree(problem, np.random.default_rng(3)), {}
    )
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'scipy', 'admm_prune', 'hypothesis'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    files = [str(tmp_path / f"{name}.safetensors") for name in ("problem", "s", "c")]
    command = [sys.executable, "-c", code, str(ROOT / "collection/checker.py"), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["problem", "SHA-256", "value", "bound", "gap"]
    assert problem.fingerprint in done.stdout


def test_numbers_that_overflow_prove_nothing() -> None:
    large = np.full((1, 4), 1e60)
    problem = Problem("x/row", {"kind": "row", "keep": 4}, large, 1e60 * np.eye(4), "")
    data = {"diagonal": np.full((1, 4), 1e-68), "diagonal_of_row": np.zeros(1, int), "shift": large}
    with pytest.raises(CheckError, match="proves no bound"):
        checker.bound_of(problem, "dual", data)


def test_the_content_of_a_file_is_named_by_all_of_it(tmp_path: Path) -> None:
    """A file has no tensors beside those of its format, by which two contents could have one SHA-256."""
    problem = producers.problem(tmp_path, 3, "row")
    path = tmp_path / "problem.safetensors"
    tensors, metadata = checker.read(path, "problem")
    for name in ("weight <f4 (2, 4)", "hessian"):
        save_file({**tensors, name: problem.hessian}, path, metadata)
        with pytest.raises(CheckError, match="must be weight, hessian or weight, hessian_upper"):
            checker.load_problems(path)
    weight = producers.solution(problem)
    for names in (("weight", "mask"), ("weight", "values"), ("weight", "mask", "values")):
        with pytest.raises(CheckError, match="must be weight or mask, values"):
            checker.weight_of(dict.fromkeys(names, weight), problem)


@pytest.mark.parametrize(
    ("kind", "decoy"),
    [
        *(("dual", name) for name in ("columns", "blocks", "leaves", "diagonal_of_leaf")),
        *(("tree", name) for name in ("diagonal_of_row", "blocks")),
        *(("block", name) for name in ("diagonal", "leaves")),
    ],
)
def test_a_certificate_has_the_tensors_of_its_kind_alone(kind: str, decoy: str) -> None:
    problem, draw = made(3, "row"), np.random.default_rng(3)
    tensors: dict[str, Any] = getattr(producers, kind)(problem, draw)
    checker.bound_of(problem, kind, tensors)
    with pytest.raises(CheckError, match=f"of the kind '{kind}' they must be"):
        checker.bound_of(problem, kind, {**tensors, decoy: np.zeros((1, 2))})


@pytest.mark.parametrize("text", ["x\nvalue    in [0, 0], proved", "x\x1b[2K", "x\u2028y", "x\u202ey"])
def test_ids_of_files_are_printed_in_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In problems they are refused, as they would be on the lines of a result; in other files they are quoted."""
    problem = producers.problem(tmp_path, 3, "row")
    files = [tmp_path / f"{name}.safetensors" for name in ("problem", "s", "c")]
    write_solution(files[1], problem, producers.solution(problem), {})
    write_certificate(files[2], problem, "dual", producers.dual(problem, np.random.default_rng(3)), {})
    for path, kind in zip(files, checker.FORMATS, strict=True):
        tensors, metadata = checker.read(path, kind)
        named = [{"id": text}] + [{"sets": json.dumps(x)} for x in ({text: SETS["row"]}, {"row": text})]
        for change in named if kind == "problem" else [{"id": text}, {"kind": text}][: 1 + (kind == "certificate")]:
            save_file(tensors, path, {**metadata, **change})
            assert checker.main([str(files[0]), "-" if kind == "certificate" else str(files[1]), str(files[2])]) == 1
            said = capsys.readouterr()
            assert said.out == ""
            assert said.err[:-1].isprintable()
            save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("upper", "lower", "gap"), [(2, 1, 0.5), (1, 2, 0), (1, -3, 1), (0, 0, 0), (0, -1, 1), (-30, -40, 1)]
)
def test_gaps(upper: float, lower: float, gap: float) -> None:
    assert checker.gap(upper, lower) == gap


def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = producers.problem(tmp_path, 3, "row")
    path = tmp_path / "s.safetensors"
    write_solution(path, problem, producers.solution(problem), {})
    path.write_bytes(path.read_bytes()[:-3])
    assert checker.main([str(tmp_path / "problem.safetensors"), str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("refused: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "row", "keep": 5}, "must keep 0 to 4"),
        ({"kind": "row", "keep": 2.0}, "must keep"),
        ({"kind": "row", "keep": [1]}, "does not fit"),
        ({"kind": "row"}, "a set has one of the kinds"),
        ({"kind": "rows", "keep": 2}, "a set has one of the kinds"),
        ({"kind": ["row"], "keep": 2}, "a set has one of the kinds"),
        ({"kind": "N:M", "keep": 2, "of": 3}, "does not fit"),
        ({"kind": "N:M", "keep": 2, "of": 0}, "positive integers"),
        ({"kind": "block", "height": 4, "width": 2, "keep": 1}, "does not fit"),
        ({"kind": "group", "width": 2, "keep": 3}, "must keep 0 to 2"),
    ],
)
def test_sets_that_do_not_exist_are_refused(given: Any, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        checker.check_set(given, 2, 4)


def test_a_hessian_that_is_none_is_refused(tmp_path: Path) -> None:
    weight, hessian = producers.hostile(1, 2, 4, stack=True)
    path = tmp_path / "problem.safetensors"
    for change, message in (
        (np.where(np.eye(4) > 0, -1, hessian), "negative diagonal"),
        (hessian + np.triu(np.ones((4, 4)), 1), "not symmetric"),
        (hessian[:, :3, :3], "does not fit"),
        (hessian * np.nan, "NaN"),
    ):
        write_problem(path, "tiny", weight, change.astype(np.float32), {"row": SETS["row"]}, {})
        with pytest.raises(CheckError, match=message):
            checker.load_problems(path)
    write_problem(path, "tiny", weight, hessian, {"group": SETS["group"]}, {})
    with pytest.raises(CheckError, match="only have sets of the kind 'row'"):
        checker.load_problems(path)
