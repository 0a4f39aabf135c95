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
from admm_prune.methods.registry import composed
from admm_prune.methods.target import Target
from admm_prune.models.loading import load
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


def weighing(function, **declared):
    return type("Objective", (LayerReconstruction,), {"token_weights": staticmethod(function), **declared})


def ones(inputs, context):
    return torch.ones(len(inputs))


def fails(*_):
    return {}["missing"]


def refuses(*_):
    raise ValueError("not for me")


def loss(logits, following):
    return torch.nn.functional.cross_entropy(logits, following, reduction="none")


Three = weighing(lambda inputs, context, more: inputs)
None_ = weighing(lambda: 1)
Number = type("Objective", (LayerReconstruction,), {"token_weights": 3})
Scalar = weighing(lambda inputs: 1.0)
Nothing_ = weighing(lambda inputs: None)
Array = weighing(lambda inputs: inputs[:, 0].numpy())
Column = weighing(lambda inputs: inputs[:, :1])
Short = weighing(lambda inputs, context: context.positions[1:])
Total = weighing(lambda inputs: inputs.sum())
Complex = weighing(lambda inputs: torch.ones(len(inputs), dtype=torch.complex64))
Sparse = weighing(lambda inputs: torch.ones(len(inputs)).to_sparse())
Elsewhere = weighing(lambda inputs: torch.ones(len(inputs), device="meta"))
Outputs = weighing(lambda inputs, context: context.outputs.sum(1))
Scores = weighing(lambda inputs, context: context.scores)
Unknown = weighing(lambda inputs, context: context.logits)
Unread = weighing(lambda inputs: inputs[:, 0] ** 2, needs_outputs=True)
Unscored = weighing(lambda inputs: inputs[:, 0] ** 2, token_scores=staticmethod(loss))
Unweighted = type("Objective", (LayerReconstruction,), {"needs_outputs": True})
Word = weighing(ones, needs_outputs="yes")
ScoreOfOne = weighing(ones, token_scores=staticmethod(lambda logits: logits))
ScoreOfSelf = weighing(ones, token_scores=loss)
ScoreNumber = weighing(ones, token_scores=1)
ScoreFails = weighing(ones, token_scores=staticmethod(fails))
ScoreShape = weighing(ones, token_scores=staticmethod(lambda logits, following: logits))
ScoreNone = weighing(ones, token_scores=staticmethod(lambda logits, following: None))
ScoreNan = weighing(ones, token_scores=staticmethod(lambda logits, following: logits[:, 0] / 0))
ScoreHuge = weighing(ones, token_scores=staticmethod(lambda logits, following: logits[:, 0].double() * 0 + 1e300))
# What shows on the text alone.
NotFinite = weighing(lambda inputs: torch.full((len(inputs),), torch.nan))
Infinite = weighing(lambda inputs, context: torch.full((len(inputs),), torch.inf))
Negative = weighing(lambda inputs: inputs[:, 0])
Zero = weighing(lambda inputs: torch.zeros(len(inputs)))
Huge = weighing(lambda inputs: torch.full((len(inputs),), 1e300, dtype=torch.float64))
Refusing = weighing(refuses)
ScoreRefuses = weighing(ones, token_scores=staticmethod(refuses))
InPlace = weighing(lambda inputs, context: inputs.square_().sum(1))
Dependent = weighing(lambda inputs: torch.softmax(inputs[:, 0], 0))


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
    "Weighed": "token_weights of the problem 'Weighed' must be a staticmethod or a classmethod",
    "Column": "token_weights of the problem 'Column' must be of shape (64,), one per token, not (64, 1)",
    "Outputs": "AttributeError: there are no outputs: declare needs_outputs = True in the objective",
    "ScoreNan": "token_scores of the problem 'ScoreNan' must be finite in float32",
    "Failed": "the problem Failed failed (mistaken.py:",
    "Alone": "the problem 'Alone' does not take the arguments it is given",
    "Broken": "the problem Broken failed (mistaken.py:",
    "layer": "the name 'layer' is built in, and declared by mistaken (mistaken:Weighed)",
}
HOOKS = {
    "Three": "token_weights of the problem 'Three' does not take the arguments it is given",
    "None_": "token_weights of the problem 'None_' does not take the arguments it is given",
    "Number": "token_weights of the problem 'Number' must be a staticmethod, not a int",
    "Scalar": "token_weights of the problem 'Scalar' must be a tensor (64,), one per token, not a float",
    "Nothing_": "token_weights of the problem 'Nothing_' must be a tensor (64,), one per token, not a NoneType",
    "Array": "token_weights of the problem 'Array' must be a tensor (64,), one per token, not a ndarray",
    "Short": "token_weights of the problem 'Short' must be of shape (64,), one per token, not (63,)",
    "Total": "token_weights of the problem 'Total' must be of shape (64,), one per token, not ()",
    "Complex": "token_weights of the problem 'Complex' must be real numbers in a dense tensor, not torch.complex64",
    "Sparse": "token_weights of the problem 'Sparse' must be real numbers in a dense tensor, not torch.float32",
    "Elsewhere": "token_weights of the problem 'Elsewhere' must be on cpu, where the inputs are, not on meta",
    "InPlace": "token_weights of the problem 'InPlace' must not change its inputs in place",
    "Scores": "AttributeError: there are no scores: define token_scores in the objective",
    "Unknown": "AttributeError: 'TokenContext' object has no attribute 'logits'",
    "Unread": "the problem 'Unread' has needs_outputs, which only token_weights(inputs, context) can read",
    "Unscored": "the problem 'Unscored' has token_scores, which only token_weights(inputs, context) can read",
    "Unweighted": "the problem 'Unweighted' has needs_outputs, which only token_weights(inputs, context) can read",
    "Word": "needs_outputs of the problem 'Word' must be True or False, not 'yes'",
    "ScoreOfOne": "token_scores of the problem 'ScoreOfOne' does not take the arguments it is given",
    "ScoreOfSelf": "token_scores of the problem 'ScoreOfSelf' must be a staticmethod or a classmethod",
    "ScoreNumber": "token_scores of the problem 'ScoreNumber' must be a staticmethod, not a int",
    "ScoreFails": "failed (mistaken.py:",
    "ScoreShape": "token_scores of the problem 'ScoreShape' must be of shape (64,), one per token, not (64, 8)",
    "ScoreNone": "token_scores of the problem 'ScoreNone' must be a tensor (64,), one per token, not a NoneType",
    "ScoreHuge": "token_scores of the problem 'ScoreHuge' must be finite in float32",
}
ON_THE_TEXT = {
    "NotFinite": "q_proj.weight: token weights must be finite and not negative",
    "Infinite": "q_proj.weight: token weights must be finite and not negative",
    "Negative": "q_proj.weight: token weights must be finite and not negative",
    "Zero": "q_proj.weight: its weighted Gram is zero: the token weights are zero, or too small",
    "Huge": "q_proj.weight: its weighted Gram is not finite: the token weights or the inputs are too large",
    "Refusing": "q_proj.weight: not for me",
    "ScoreRefuses": "token scores: not for me",
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
    for name, reason in {"Failed": PROBLEMS["Failed"], "Zero": "its weighted Gram is zero"}.items():
        mistaken("--problem", name)
        outcome = command("capture", *common, "--weight", weight, "--problem", name, "--out", "l.safetensors")
        assert outcome.status == 2
        assert reason in outcome.err.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Any:
    return load(str(model_folder), device="cpu").model


@pytest.mark.parametrize("name", HOOKS)
def test_wrong_weights_of_tokens_are_refused_before_any_work(
    mistaken: Callable[..., None], tiny: Any, name: str
) -> None:
    mistaken("--problem", name)
    with pytest.raises(UserError) as error:
        composed("magnitude", problem=name).check(tiny, Target(0.5))
    assert HOOKS[name] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ON_THE_TEXT)
def test_weights_that_are_wrong_on_the_text_end_a_run_in_one_line(
    mistaken: Callable[..., None], command: Command, run: tuple[object, ...], place: Path, name: str
) -> None:
    mistaken("--problem", name)
    how = ("--method", "magnitude", "--sparsity", 0.5, "--samples", 2, "--eval-samples", 1)
    outcome = command(*run, *how, "--problem", name, "--out", "out")
    assert outcome.status == 2
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith("admm-prune: ")
    assert ON_THE_TEXT[name] in last
    assert "Traceback" not in outcome.err
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("name", "violation"),
    [
        ("Dependent", "the weight of a token depends on which other tokens are in the call"),
        ("Column", PROBLEMS["Column"]),
        ("NotFinite", "token weights must be finite and not negative"),
        ("ScoreNan", PROBLEMS["ScoreNan"]),
    ],
)
def test_check_plugin_names_the_violation(
    mistaken: Callable[..., None], command: Command, place: Path, name: str, violation: str
) -> None:
    mistaken("--problem", name)
    outcome = command("check-plugin", name, "--examples", 1)
    assert outcome.status == 1
    assert violation in outcome.out
    assert outcome.out.count("\n") == 1
    assert outcome.err == ""


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
