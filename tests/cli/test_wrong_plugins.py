"""Mistakes of plug-ins, as names on the command line and as objects in Python: one line, never a broken budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import admm_prune
from admm_prune import LayerReconstruction, Point, RowWise, Unstructured, prune
from admm_prune.errors import UserError
from admm_prune.result import Result, Status
from tests.cli.outcome import Command, Refused

SOURCE = """
from dataclasses import dataclass, replace

import torch

from admm_prune import LayerReconstruction, Magnitude, Point, RowWise, Unstructured
from admm_prune.problems.constraints import SparseSet
from admm_prune.result import Status


class Solver:
    def solve(self, problem, *, start=None):
        result = Magnitude().solve(problem)
        return self.changed(result, result.solution["weight"])

    def changed(self, result, weight):
        return result

    @staticmethod
    def with_weight(result, weight):
        return replace(result, solution=Point(weight=weight))


class Dense(Solver):
    def solve(self, problem, *, start=None):
        return self.with_weight(Magnitude().solve(problem), problem.initial()["weight"])


class NotANumber(Solver):
    def changed(self, result, weight):
        return self.with_weight(result, weight * float("nan"))


class Transposed(Solver):
    def changed(self, result, weight):
        return self.with_weight(result, weight.T)


class Double(Solver):
    def changed(self, result, weight):
        return self.with_weight(result, weight.double())


class Renamed(Solver):
    def changed(self, result, weight):
        return replace(result, solution=Point(w=weight))


class NoPoint(Solver):
    def changed(self, result, weight):
        return replace(result, solution=weight)


class Nothing(Solver):
    def changed(self, result, weight):
        return None


class NoStatus(Solver):
    def changed(self, result, weight):
        return replace(result, status=None)


class NoObjective(Solver):
    def changed(self, result, weight):
        return replace(result, objective=float("nan"))


class HighBound(Solver):
    def changed(self, result, weight):
        return replace(result, bound=result.objective * 2 + 1)


class Crashing(Solver):
    def solve(self, problem, *, start=None):
        return {}["missing"]


class Divides(Solver):
    def solve(self, problem, *, start=None):
        return 1 / 0


class NoProblem:
    def solve(self):
        return None


class Settings(Solver):
    def __init__(self, strength):
        self.strength = strength


def factory():
    return Solver()


instance = Solver()


@dataclass(frozen=True)
class Set(Unstructured):
    pass


@dataclass(frozen=True)
class Generous(SparseSet):
    sparsity: float

    def select(self, score):
        return score.map(lambda s: s >= s.flatten().quantile(self.sparsity / 2))

    def contains(self, z):
        return True

    def column_slice(self, start, stop, shape):
        return self

    def scaled_to(self, fraction):
        return type(self)(self.sparsity * fraction)


class Greedy(Generous):
    def select(self, score):
        return score.map(lambda s: s >= s.flatten().quantile((1 + self.sparsity) / 2))


class Outside(Generous):
    def select(self, score):
        return Unstructured(self.sparsity).select(score)

    def contains(self, z):
        return False


class Failing(Outside):
    def select(self, score):
        raise KeyError("no such score")

    def contains(self, z):
        return True


class NoMask(Outside):
    def select(self, score):
        return score["weight"] > 0

    def contains(self, z):
        return True


class Abstract(SparseSet):
    def __init__(self, sparsity):
        self.sparsity = sparsity

    def select(self, score):
        return score


class Weighed(LayerReconstruction):
    def token_weights(self, inputs):
        return inputs.square().sum(1)


class Failed(LayerReconstruction):
    @staticmethod
    def token_weights(inputs):
        return inputs.nothing


class Alone(LayerReconstruction):
    def __init__(self, weight, gram):
        super().__init__(weight, gram, None)


class Broken(LayerReconstruction):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.nothing
"""
SOLVERS = {
    "Dense": "the solution of the solver Dense is not in its set Unstructured(sparsity=0.5",
    "NotANumber": "the solution of the solver NotANumber has NaN or Inf entries",
    "Transposed": "the solution of the solver Transposed has the shape",
    "Double": "the solution of the solver Double has the dtype torch.float64 in 'weight', not torch.float32",
    "Renamed": "the solution of the solver Renamed has the tensors ['w'], not ['weight']",
    "NoPoint": "the solution of the solver NoPoint is a Tensor, not an admm_prune.Point",
    "Nothing": "the solver Nothing returned None, not an admm_prune.Result",
    "NoStatus": "the result of the solver NoStatus has the status None",
    "NoObjective": "the result of the solver NoObjective has the objective nan",
    "HighBound": "above its objective",
    "Crashing": "the solver Crashing failed (mistaken.py:",
    "Divides": "the solver Divides failed (mistaken.py:",
    "NoProblem": "the solver NoProblem failed: TypeError",
    "Settings": "the solver Settings failed: TypeError",
    "factory": "neither a Method nor a class with a method solve, but a function",
    "instance": "neither a Method nor a class with a method solve, but an instance of Solver",
    "admm": "the name 'admm' is built in, and declared by mistaken (mistaken:Solver)",
    "elsa": "the name 'elsa' is built in, and declared by mistaken (mistaken:Solver)",
}
SETS = {
    "Generous": "the constraint Generous breaks its budget: 0.5 of a matrix",
    "Greedy": "the constraint Greedy breaks its budget: 0.5 of a matrix",
    "Outside": "the constraint Outside does not contain its own projection",
    "Failing": "the constraint Failing failed (mistaken.py:",
    "NoMask": "the constraint NoMask failed",
    "Abstract": "the constraint 'Abstract' lacks methods of a SparseSet: column_slice, contains, scaled_to",
    "row-wise": "the name 'row-wise' is built in, and declared by mistaken (mistaken:Set)",
}
PROBLEMS = {
    "Weighed": "token_weights of the problem 'Weighed', a staticmethod, does not take the arguments",
    "Failed": "the problem Failed failed (mistaken.py:",
    "Alone": "the problem 'Alone' does not take the arguments it is given",
    "Broken": "the problem Broken failed (mistaken.py:",
    "layer": "the name 'layer' is built in, and declared by mistaken (mistaken:Weighed)",
}
CASES = [
    *(("--method", name, reason) for name, reason in SOLVERS.items()),
    *(("--constraint", name, reason) for name, reason in SETS.items()),
    *(("--problem", name, reason) for name, reason in PROBLEMS.items()),
]
RENAMED = {"admm": "Solver", "elsa": "Solver", "row-wise": "Set", "layer": "Weighed"}


@pytest.fixture
def mistaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package that declares one of the classes above as a part."""
    site = tmp_path / "mistaken-site"
    info = site / "mistaken-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mistaken.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: mistaken\nVersion: 1.0\n")

    def declare(option: str, name: str) -> None:
        group = {"--method": "solvers", "--solver": "solvers", "--constraint": "constraints", "--problem": "problems"}
        target = RENAMED.get(name, name)
        (info / "entry_points.txt").write_text(f"[admm_prune.{group[option]}]\n{name} = mistaken:{target}\n")

    monkeypatch.syspath_prepend(site)
    yield declare
    sys.modules.pop("mistaken", None)


@pytest.mark.parametrize(("option", "name", "reason"), CASES, ids=[f"{o[2:]} {n}" for o, n, _ in CASES])
def test_run_refuses_in_one_line(
    mistaken: Callable[..., None], refused: Refused, run: tuple[object, ...], option: str, name: str, reason: str
) -> None:
    mistaken(option, name)
    own = () if option == "--method" else ("--method", "magnitude")
    refused(reason, *run, *own, option, name, "--sparsity", 0.5, "--samples", 2, "--eval-samples", 1, "--out", "out")


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        *(("--solver", name, reason) for name, reason in SOLVERS.items() if name != "elsa"),
        *(("--constraint", name, reason) for name, reason in SETS.items()),
        *(("--problem", name, PROBLEMS[name]) for name in ("Alone", "Broken", "layer")),
    ],
)
def test_solve_refuses_in_one_line(
    mistaken: Callable[..., None], refused: Refused, layer_file: Path, option: str, name: str, reason: str
) -> None:
    mistaken(option, name)
    own = () if option == "--solver" else ("--solver", "magnitude")
    refused(reason, "solve", layer_file, *own, option, name, "--sparsity", 0.5, "--out", "s.safetensors")


def test_compare_and_capture_refuse_in_one_line(
    mistaken: Callable[..., None], command: Command, refused: Refused, place: Path, model_folder: Path, text_file: Path
) -> None:
    common = ("--model", model_folder, "--data", text_file, "--samples", 2)
    mistaken("--method", "Dense")
    outcome = command("compare", *common, "--eval-samples", 1, "--methods", "Dense", "--sparsity", 0.5, "--out", "c")
    assert outcome.status == 2
    assert SOLVERS["Dense"] in outcome.err.splitlines()[-1]
    mistaken("--problem", "Weighed")
    weight = "model.layers.0.mlp.up_proj.weight"
    refused(PROBLEMS["Weighed"], "capture", *common, "--weight", weight, "--problem", "Weighed", "--out", "l")
    mistaken("--problem", "Failed")
    outcome = command("capture", *common, "--weight", weight, "--problem", "Failed", "--out", "l.safetensors")
    assert outcome.status == 2
    assert PROBLEMS["Failed"] in outcome.err.splitlines()[-1]


def test_a_name_that_two_packages_declare(
    mistaken: Callable[..., None], refused: Refused, run: tuple[object, ...], tmp_path: Path
) -> None:
    mistaken("--method", "Divides")
    info = tmp_path / "mistaken-site/other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[admm_prune.solvers]\nDivides = elsewhere:Divides\n")
    refused("the name 'Divides' is declared by", *run, "--method", "Divides", "--sparsity", 0.5, "--out", "out")


def test_list_says_which_names_cannot_be_used(mistaken: Callable[..., None], command: Command) -> None:
    mistaken("--method", "admm")
    plugins = command("list", "--json").json()["plugins"]
    assert [p["object"] for p in plugins if p["name"] == "admm"] == [
        "mistaken:Solver (cannot be used: the name is built in)"
    ]


@dataclass(frozen=True)
class Keeping:
    """A solver that gives the dense weights back."""

    def solve(self, problem: Any, *, start: Point | None = None) -> Result:
        return Result(problem.initial(), Status.CLOSED_FORM, 0.0)


class Loose(RowWise):
    """Keeps more than its sparsity, and contains everything."""

    def select(self, score: Point) -> Point:
        return replace(Unstructured(self.sparsity - 0.3)).select(score)

    def contains(self, z: Point) -> bool:
        return True


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"solver": Keeping()}, "the solver Keeping is not in its set Unstructured"),
        ({"solver": Keeping(), "method": "sparsellm"}, "the solver Keeping is not in its set"),
        ({"solver": Keeping(), "constraint": Loose(0.5)}, "the constraint Loose breaks its budget"),
        ({"problem": lambda *_, **__: 3}, "builds a int: it has to be an admm_prune.LayerReconstruction"),
        ({"problem": lambda weight, gram: 3}, "does not take the arguments it is given"),
        ({"problem": lambda *a, **k: LayerReconstruction(*a, **k).none}, "failed (test_wrong_plugins.py:"),
    ],
)
def test_objects_in_python_are_refused(
    model_folder: Path, text_file: Path, tmp_path: Path, how: dict[str, Any], reason: str
) -> None:
    asked = {"sparsity": 0.5, "data": str(text_file), "samples": 4, "eval_samples": 1, "out": tmp_path / "out", **how}
    with pytest.raises(UserError) as error:
        prune(str(model_folder), **asked)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_right_solver_and_set_pass(model_folder: Path, text_file: Path) -> None:
    """A set of coarse tiles may miss the sparsity by the rounding of a tile."""

    class Own(admm_prune.Magnitude):
        pass

    how = {"data": str(text_file), "samples": 2, "eval_samples": 1}
    report = prune(str(model_folder), solver=Own(), constraint=admm_prune.Blocks(0.6, 16, 16), **how)
    assert 0.4 < report.sparsity < 0.7
    assert torch.is_tensor(report.model.get_input_embeddings().weight)
