"""The benchopt export of the collection, driven as benchopt drives it, with stand-ins for its base classes."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collection.export_benchopt import export


class Base:
    def __init__(self, **parameters: Any) -> None:
        vars(self).update(parameters)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_are_compared_by_the_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchopt: Any = types.ModuleType("benchopt")
    benchopt.BaseObjective = benchopt.BaseDataset = benchopt.BaseSolver = Base
    monkeypatch.setitem(sys.modules, "benchopt", benchopt)
    out = tmp_path / "out"
    assert len(export(out, "stories260k.2.[kv]_proj")) == 2
    monkeypatch.syspath_prepend(str(out))
    dataset = load(out / "datasets/collection.py").Dataset
    assert {name.partition("/")[2] for name in dataset.parameters["problem"]} >= {"row-50", "block4x4-70", "2of4"}
    objective, solver = load(out / "objective.py").Objective(), load(out / "solvers/admm_prune_methods.py").Solver
    for name in ("row-50", "unstructured-70", "2of4", "block4x4-50", "columns-50"):
        objective.set_data(**dataset(problem=f"stories260k.2.v_proj/{name}").get_data())
        figures = {}
        for method in ("magnitude", "admm"):
            run = solver(method=method)
            run.set_objective(**objective.get_objective())
            run.run(1)
            figures[method] = objective.evaluate_result(**run.get_result())
        assert -1e-6 <= figures["admm"]["excess"] < figures["magnitude"]["excess"]
        assert 0 < figures["admm"]["value"] < figures["magnitude"]["value"] < 1
    for wrong in (objective.problem.weight, np.zeros((1, 2)), np.full_like(objective.problem.weight, np.nan)):
        assert objective.evaluate_result(wrong)["value"] == np.inf
    assert objective.evaluate_result(**objective.get_one_result())["value"] == pytest.approx(1.0)


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no layer that is built matches 'x'"):
        export(tmp_path / "out", "x")
