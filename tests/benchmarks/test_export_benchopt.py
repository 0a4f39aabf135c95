"""The benchopt export, driven as benchopt drives it: data to objective to solver and back to the objective.

Its base classes are stood in for: all that this benchmark takes of them is that parameters become attributes.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from admm_prune.data.layer_file import LayerFile
from admm_prune.errors import UserError
from admm_prune.testing.instances import correlated_inputs, random_weight
from benchmarks.export_benchopt import export


class Base:
    def __init__(self, **parameters: Any) -> None:
        vars(self).update(parameters)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    benchopt = types.ModuleType("benchopt")
    benchopt.BaseObjective = benchopt.BaseDataset = benchopt.BaseSolver = Base
    monkeypatch.setitem(sys.modules, "benchopt", benchopt)
    layers = tmp_path / "layers"
    layers.mkdir()
    for seed in (0, 1):
        x, other = (correlated_inputs(64, 16, s, torch.float32) for s in (seed, seed + 5))
        weight = random_weight(12, 16, seed, torch.float32)
        LayerFile(weight, x.T @ x, gram_holdout=other.T @ other).save(layers / f"{seed}.safetensors")
    export(layers, tmp_path / "out")
    return tmp_path / "out"


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def validation_loss(exported: Path, solver: Any, file: str, target: str, iterations: int = 30) -> dict[str, float]:
    """One run as benchopt does it."""
    objective = load(exported / "objective.py").Objective(target=target)
    objective.set_data(**load(exported / "datasets/layer_files.py").Dataset(file=file).get_data())
    solver.set_objective(**objective.get_objective())
    solver.run(iterations)
    return objective.evaluate_result(**solver.get_result())


@pytest.mark.parametrize("target", ["0.5", "2:4"])
def test_every_solver_runs_on_every_layer_and_is_ranked(exported: Path, target: str) -> None:
    dataset = load(exported / "datasets/layer_files.py").Dataset
    assert dataset.parameters == {"file": ["0.safetensors", "1.safetensors"]}
    methods = load(exported / "solvers/admm_prune_methods.py").Solver
    ours = load(exported / "solvers/projected_gradient.py").Solver
    for file in dataset.parameters["file"]:
        errors = {}
        for name in methods.parameters["method"]:
            figures = validation_loss(exported, methods(method=name), file, target)
            assert figures["excess"] == 0
            assert figures["sparsity"] == pytest.approx(0.5, abs=0.01)
            errors[name] = figures["value"]
        errors["projected gradient"] = validation_loss(exported, ours(), file, target)["value"]
        assert errors["admm"] < errors["sparsegpt"] < errors["magnitude"]
        assert errors["admm"] < errors["projected gradient"] < errors["magnitude"]


def test_the_objective_agrees_with_ours_and_refuses_what_is_beyond_the_budget(exported: Path) -> None:
    from admm_prune import Point, Unstructured
    from admm_prune.data.layer_file import load_layer_file
    from admm_prune.problems.layer import LayerReconstruction

    layer = load_layer_file(exported / "layers/0.safetensors")
    point = Point(weight=Unstructured(0.5).project(Point(weight=layer.weight))["weight"])
    problem = LayerReconstruction(layer.weight, layer.gram, Unstructured(0.5))
    objective = load(exported / "objective.py").Objective(target="0.5")
    objective.set_data(**load(exported / "datasets/layer_files.py").Dataset(file="0.safetensors").get_data())
    figures = objective.evaluate_result(point["weight"].numpy())
    assert figures["value"] == pytest.approx(problem.relative_error(point), rel=1e-9)
    assert figures["holdout"] == pytest.approx(problem.relative_error(point, layer.gram_holdout), rel=1e-9)
    assert objective.evaluate_result(layer.weight.numpy())["value"] == np.inf
    assert objective.evaluate_result(**objective.get_one_result())["value"] == pytest.approx(1.0)


def test_what_is_no_layer_problem_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(UserError, match="is not a safetensors file"):
        export(tmp_path / "x.safetensors", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="contains no layer problem files"):
        export(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
