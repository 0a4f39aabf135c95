"""Layer files solved along a path and with a chosen ridge: each answer is that of its own solve, and verifies."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from admm_prune.data.layer_file import LayerFile, load_layer_file, load_solution
from admm_prune.errors import UserError
from admm_prune.methods.local import LOCAL_METHODS, given, method_named
from admm_prune.methods.target import Target, parse_path, target_named
from admm_prune.problems.constraints import Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.runs.layer import SolvedLayer, solve_path
from admm_prune.testing.instances import correlated_inputs, random_weight
from admm_prune.verify.layer import verify_layer

PATH = [Target(0.9), Target(0.5), Target(0.7)]


def layer_file(path: Path, *, cross: bool = False, validation: bool = True, rows: int = 24) -> Path:
    """A layer of 40 inputs, 240 tokens, 40 of which validate, and as many held out."""
    x, other = correlated_inputs(240, 40, 1), correlated_inputs(240, 40, 2)
    weight = random_weight(rows, 40, 3)
    dense = x + 0.1 * other
    LayerFile(
        weight=weight.float(),
        gram=(x.T @ x).float(),
        gram_validation=(x[:40].T @ x[:40]).float() if validation else None,
        gram_holdout=(other.T @ other).float(),
        cross_gram=(dense.T @ x).float() if cross else None,
        metadata={"target_energy": repr(float((dense @ weight.T).square().sum()))} if cross else {},
    ).save(path)
    return path


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    return layer_file(tmp_path / "layer.safetensors")


def figures(solved: SolvedLayer) -> list[float]:
    assert solved.relative_error_holdout is not None
    return [solved.relative_error, solved.relative_error_holdout, solved.objective]


@pytest.mark.parametrize("method", LOCAL_METHODS)
def test_a_path_gives_what_separate_solves_give(layer: Path, method: str) -> None:
    path = solve_path(layer, method_named(method), PATH, device="cpu")
    assert [solved.target for solved in path] == ["0.9", "0.5", "0.7"]
    for solved, target in zip(path, PATH, strict=True):
        (alone,) = solve_path(layer, method_named(method), [target], device="cpu")
        assert solved.sparsity == alone.sparsity
        assert figures(solved) == pytest.approx(figures(alone), rel=1e-4)
        assert (solved.status, solved.bound_kind) == (alone.status, alone.bound_kind)
        assert solved.bound == pytest.approx(alone.bound)


def test_only_what_does_not_look_at_the_whole_stack_is_stacked() -> None:
    assert [name for name, method in LOCAL_METHODS.items() if method.stacks_targets] == [
        "sparsegpt", "admm", "admm-fast", "admm-gradual",
    ]  # fmt: skip


@pytest.mark.parametrize(("cross", "pattern"), list(product([False, True], [False, True])))
def test_every_file_of_a_path_verifies(tmp_path: Path, cross: bool, pattern: bool) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", cross=cross)
    targets = [Target(None, (2, 4)), Target(None, (1, 4))] if pattern else PATH
    solved = solve_path(layer, method_named("admm"), targets, out=tmp_path / "v.safetensors", device="cpu")
    names = ["v-2of4.safetensors", "v-1of4.safetensors"] if pattern else [f"v-{s}.safetensors" for s in (0.9, 0.5, 0.7)]
    assert sorted(path.name for path in tmp_path.glob("v*")) == sorted(names)
    for name, one in zip(names, solved, strict=True):
        assert verify_layer(tmp_path / name).failures == []
        weight = load_file(tmp_path / name)["weight"]
        assert (weight == 0).double().mean().item() == pytest.approx(one.sparsity)


def test_auto_chooses_for_each_target_and_says_by_what(tmp_path: Path, layer: Path) -> None:
    out = tmp_path / "v.safetensors"
    path = solve_path(layer, method_named("admm"), PATH, ridge="auto", out=out, device="cpu")
    for solved in path:
        best = solved.ridge_trials[0]
        assert (solved.ridge, solved.damping) == (best.ridge, best.damping)
        assert best.error == min(trial.error for trial in solved.ridge_trials)
        assert solved.as_json()["ridge_trials"][0] == {
            "ridge": best.ridge,
            "damping": best.damping,
            "error": best.error,
        }
        (alone,) = solve_path(layer, method_named("admm"), [target_named(solved.target)], ridge="auto", device="cpu")
        assert figures(solved) == pytest.approx(figures(alone), rel=1e-4)
        assert verify_layer(tmp_path / f"v-{solved.target}.safetensors").failures == []
    (untried,) = solve_path(layer, method_named("admm"), PATH[:1], device="cpu")
    assert "ridge_trials" not in untried.as_json()


def test_auto_without_what_it_chooses_on_is_refused(tmp_path: Path) -> None:
    bare = layer_file(tmp_path / "bare.safetensors", validation=False)
    with pytest.raises(UserError, match="it has no gram_validation, which --ridge auto cannot choose on"):
        solve_path(bare, method_named("admm"), PATH[:1], ridge="auto")
    crossed = layer_file(tmp_path / "crossed.safetensors", cross=True)
    with pytest.raises(UserError, match="it has a target from other inputs, which --ridge auto cannot choose on"):
        solve_path(crossed, method_named("admm"), PATH[:1], ridge="auto")


def test_no_file_of_a_path_is_written_over_what_is_not_ours(tmp_path: Path, layer: Path) -> None:
    (tmp_path / "v-0.7.safetensors").write_text("not to be lost")
    with pytest.raises(UserError, match=r"v-0\.7\.safetensors exists and was not written by admm-prune"):
        solve_path(layer, method_named("magnitude"), PATH, out=tmp_path / "v.safetensors", device="cpu")
    assert [path.name for path in tmp_path.glob("v*")] == ["v-0.7.safetensors"]


def test_a_path_is_read_once_each_and_from_one_list() -> None:
    assert parse_path("0.5, 0.7,0.50", None) == [Target(0.5), Target(0.7)]
    assert parse_path(None, "2:4,1:4") == [Target(None, (2, 4)), Target(None, (1, 4))]
    for wrong in ((None, None), ("0.5", "2:4")):
        with pytest.raises(UserError, match="give either a sparsity"):
            parse_path(*wrong)


def test_the_seconds_of_a_path_are_shared_evenly(layer: Path) -> None:
    path = solve_path(layer, method_named("admm"), PATH, device="cpu")
    assert len({solved.seconds for solved in path}) == 1
    assert len({solved.iterations for solved in path}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_solution_from_elsewhere_is_measured_and_verified(layer: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """With the error that the definition gives, and refused outside of the set."""
    problem = load_layer_file(layer)
    weight = method_named("wanda").make().solve(layer_problem(problem)).solution["weight"].to(dtype)
    save_file({"weight": weight, "other": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    out = tmp_path / "checked.safetensors"
    loaded = load_solution(tmp_path / "theirs.safetensors")
    (solved,) = solve_path(layer, given(loaded), [Target(0.5)], bound="dual", out=out, device="cpu")
    away, gram = (weight.float() - problem.weight).double(), problem.gram.double()
    errors = [torch.einsum("ij,jk,ik->", x, gram, x) for x in (away, problem.weight.double())]
    assert solved.relative_error == pytest.approx(float(errors[0] / errors[1]), rel=1e-5)
    assert solved.objective == pytest.approx(float(errors[0]), rel=1e-4)
    assert solved.bound is not None
    assert solved.bound <= solved.objective
    assert torch.equal(load_file(out)["weight"], weight.float())
    assert verify_layer(out, layer).failures == []
    with pytest.raises(UserError, match="keeps more weights than the target allows: 480 of 960"):
        solve_path(layer, given(loaded), [Target(0.6)], device="cpu")
    for wrong, told in (
        (loaded[:3], "shapes 3 x 40 and 24 x 40"),
        (loaded * torch.inf, "NaN or Inf"),
    ):
        with pytest.raises(UserError, match=told):
            solve_path(layer, given(wrong), [Target(0.5)], device="cpu")


def test_a_file_that_holds_no_solution_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(UserError, match="no such solution"):
        load_solution(path)
    path.write_text("text")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_solution(path)
    for tensors, told in (({"v": torch.ones(2, 2)}, "no tensor 'weight'"), ({"weight": torch.ones(2)}, "no matrix")):
        save_file(tensors, path)
        with pytest.raises(UserError, match=told):
            load_solution(path)


def layer_problem(layer: LayerFile) -> LayerReconstruction:
    return LayerReconstruction(layer.weight, layer.gram, Unstructured(0.5), ridge=0.0)
