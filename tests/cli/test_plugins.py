"""Parts of other packages: the four examples conform, and each is used from the command line by its name."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from admm_prune import ADMM, GramAccumulator, Point, RowWise, Unstructured
from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.statistics import TokenWeighting
from admm_prune.testing import assert_constraint_conforms, assert_problem_conforms, assert_solver_conforms
from admm_prune.testing.instances import correlated_inputs, layer, random_weight
from tests.cli.outcome import Command
from tests.plugged_in import PACKAGES, plugged_in

__all__ = ["plugged_in"]  # a fixture

UP = "model.layers.0.mlp.up_proj.weight"


def part(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def statements(package: Path) -> int:
    """Lines of substance: of the bodies of classes and functions, docstrings, decorators and signatures apart."""
    count = 0
    for source in package.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                count += sum(statement.end_lineno - statement.lineno + 1 for statement in body)
    return count


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_an_example_is_about_fifteen_lines(package: Path) -> None:
    assert 0 < statements(package) <= 20


def test_the_objective_conforms_and_weighs_every_token_by_its_energy(plugged_in: Path) -> None:
    kind = part("relative_reconstruction", "RelativeReconstruction")

    def make(seed: int) -> Any:
        x = correlated_inputs(64, 16, seed)
        gram = GramAccumulator(16)
        gram.add(x, kind.token_weights(x))
        return kind(random_weight(6, 16, seed), gram.gram, Unstructured(0.5), ridge=0.01)

    assert_problem_conforms(make, examples=4)
    x, problem = correlated_inputs(64, 16, 3), make(3)
    away = Point(weight=problem.constraint.project(problem.initial())["weight"])
    residuals = x @ (away["weight"] - problem.weight).T
    loss = float((residuals.square().sum(1) / x.square().sum(1)).sum())
    energy = float(((x @ problem.weight.T).square().sum(1) / x.square().sum(1)).sum())
    assert problem.relative_error(away) == pytest.approx(loss / energy, rel=1e-9)


def test_the_solver_conforms(plugged_in: Path) -> None:
    solver = part("projected_gradient", "ProjectedGradient")()
    tried = assert_solver_conforms(solver, examples=5)
    assert "layer, half" in tried.solved
    assert "layer, columns" in tried.solved
    assert "ProjectedGradient needs a Quadratic problem" in tried.refused["a layer that shows only its prox, half"]
    problem = layer(Unstructured(0.5))
    assert solver.solve(problem).objective < problem.value(problem.constraint.project(problem.initial()))


@pytest.mark.parametrize(("sparsity", "shape"), [(0.5, (2, 4)), (0.6, (3, 4)), (0.4, (6, 16)), (0.9, (6, 16))])
def test_the_set_conforms(plugged_in: Path, sparsity: float, shape: tuple[int, int]) -> None:
    assert_constraint_conforms(part("row_mixture", "RowMixture")(sparsity), shape)


def test_rows_keep_what_they_need(plugged_in: Path) -> None:
    """A row of even weights beside one with few large ones: the mixture is better than 2:4 in both."""
    mixture = part("row_mixture", "RowMixture")(0.5)
    v = Point(weight=torch.tensor([[9.0, 8, 7, 6, 9, 8, 7, 6], [9.0, 1, 1, 1, 9, 1, 1, 1]]))
    assert mixture.project(v)["weight"].count_nonzero(1).tolist() == [6, 2]
    solution = ADMM().solve(layer(mixture)).solution
    assert mixture.contains(solution)


def test_three_of_them_are_used_by_name_from_the_command_line(
    plugged_in: Path, command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    common = ("--model", model_folder, "--data", text_file, "--samples", 16)
    parts = ("--problem", "relative", "--constraint", "row-mixture")
    outcome = command(
        "run", *common, "--method", "projected-gradient", *parts, "--sparsity", 0.6, "--out", "p", "--json"
    )
    content = outcome.json()
    manifest = json.loads((place / "p/admm_prune.json").read_text())
    chosen = {key: manifest["settings"][key] for key in ("method", "problem", "constraint")}
    assert chosen == {"method": "projected-gradient", "problem": "relative", "constraint": "row-mixture"}
    mixture = part("row_mixture", "RowMixture")(0.6)
    weights = {name: x for name, x in load_file(place / "p/model.safetensors").items() if "_proj." in name}
    assert len(weights) == 14
    for weight in weights.values():
        assert mixture.contains(Point(weight=weight))
        rows = weight.unflatten(1, (-1, 4)).count_nonzero(2).amax(1)
        assert rows.unique().numel() > 1  # no plain N:M
    assert content["sparsity"] == pytest.approx(0.6, abs=0.01)
    verified = command("verify", "p", "--json").json()
    assert verified["verified"]
    assert verified["unchecked"] == []  # the set and the objective are installed: their own code was asked
    assert "target" in verified["checked"]


def test_a_layer_is_captured_and_solved_for_the_objective(
    plugged_in: Path, command: Command, place: Path, model_folder: Path, text_file: Path
) -> None:
    common = ("--model", model_folder, "--data", text_file, "--samples", 16, "--weight", UP)
    assert command("capture", *common, "--problem", "relative", "--out", "r.safetensors").status == 0
    assert command("capture", *common, "--out", "plain.safetensors").status == 0
    loaded = load(str(model_folder), device="cpu")
    texts = Texts(TextSettings(data=str(text_file), samples=16), loaded)
    x = _inputs(loaded.model, texts.calibration())
    expected = (x / x.square().sum(1, keepdim=True)).T @ x
    torch.testing.assert_close(load_file("r.safetensors")["gram"].double(), expected, rtol=1e-5, atol=1e-7)

    solved = command("solve", "r.safetensors", "--sparsity", 0.5, "--out", "s.safetensors", "--json").json()
    assert 0 < solved["relative_error"] < 1
    with safe_open("s.safetensors", framework="pt") as file:
        assert file.metadata()["problem"] == "relative"
    verified = command("verify", "s.safetensors", "--json").json()
    assert verified["verified"]
    assert "objective" in verified["checked"]
    refused = command("solve", "plain.safetensors", "--problem", "relative", "--sparsity", 0.5)
    assert refused.status == 2
    assert "capture the layer with --problem relative" in refused.err
    mixed = command(
        "solve", "plain.safetensors", "--constraint", "row-mixture", "--sparsity", 0.5, "--out", "m.safetensors"
    )
    assert mixed.status == 0, mixed.err
    asked = command("verify", "m.safetensors", "--json").json()  # the set is installed: its own code is asked
    assert (asked["verified"], asked["unchecked"]) == (True, [])
    assert "sparse set" in asked["checked"]


def _inputs(model: Any, sequences: Sequences) -> torch.Tensor:
    """What enters the up projection of the first block, every real token, in float64: by a hook of our own."""
    seen: list[torch.Tensor] = []
    masks = [batch.mask for batch in sequences.batches]
    hook = decoder_blocks(model)[0].module.mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in sequences.batches:
            model(input_ids=batch.input_ids)
    hook.remove()
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)]).double()


def test_list_shows_the_plug_ins(plugged_in: Path, command: Command) -> None:
    plugins = {(p["kind"], p["name"]): p for p in command("list", "--json").json()["plugins"]}
    assert plugins["solvers", "projected-gradient"]["package"] == "admm-prune-projected-gradient 0.1.0"
    assert plugins["problems", "relative"]["object"] == "relative_reconstruction:RelativeReconstruction"
    assert ("constraints", "row-mixture") in plugins
    assert "projected-gradient" in command("list").out


def test_the_weights_of_tokens_enter_the_grams_alone(model_folder: Path, text_file: Path) -> None:
    loaded = load(str(model_folder), device="cpu")
    texts = Texts(TextSettings(data=str(text_file), samples=16), loaded).calibration()
    blocks = decoder_blocks(loaded.model)
    plain = BlockStream(loaded.model, blocks, texts, "cpu").collect(0)
    double = TokenWeighting(lambda x, _: torch.full((len(x),), 2.0))
    doubled = BlockStream(loaded.model, blocks, texts, "cpu", weighting=double).collect(0)
    for one, two in zip(plain, doubled, strict=True):
        torch.testing.assert_close(two.statistics.gram, 2 * one.statistics.gram)
        assert two.statistics.tokens == one.statistics.tokens
        assert torch.equal(two.statistics.mean, one.statistics.mean)


@pytest.mark.parametrize(
    "wrong", [lambda x: x.sum(), lambda x: -torch.ones(len(x)), lambda x: torch.full((len(x),), torch.nan)]
)
def test_weights_that_are_none_are_refused_by_the_name_of_the_matrix(
    model_folder: Path, text_file: Path, wrong
) -> None:
    loaded = load(str(model_folder), device="cpu")
    texts = Texts(TextSettings(data=str(text_file), samples=4), loaded).calibration()
    weighting = TokenWeighting(lambda x, _: wrong(x))
    stream = BlockStream(loaded.model, decoder_blocks(loaded.model), texts, "cpu", weighting=weighting)
    with pytest.raises(UserError, match=r"q_proj\.weight: token weights must be"):
        stream.collect(0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--problem", "nonsense"), "unknown problem 'nonsense': choose one of layer, "),
        (("--constraint", "nonsense"), "unknown constraint 'nonsense': choose one of unstructured, row-wise, groups"),
        (("--problem", "broken"), "the plug-in 'broken' of broken (nowhere:Nothing) cannot be loaded"),
        (("--constraint", "list"), "the constraint 'list' gives a list"),
        (("--problem", "list"), "the plug-in 'list' is the class list"),
        (("--method", "list"), "the plug-in 'list' is neither a Method nor a class with a method solve"),
        (
            ("--method", "sparsellm", "--problem", "relative"),
            "sparsellm takes no problem: it is for layer-wise methods",
        ),
    ],
)
def test_wrong_names_and_broken_packages(
    plugged_in: Path, command: Command, place: Path, options: tuple[str, ...], said: str
) -> None:
    info = plugged_in / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[admm_prune.problems]\nbroken = nowhere:Nothing\nlist = builtins:list\n"
        "[admm_prune.constraints]\nlist = tests.cli.test_plugins:no_set\n[admm_prune.solvers]\nlist = builtins:list\n"
    )
    outcome = command("run", *options, "--sparsity", 0.5, "--out", "p")
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(place.iterdir())


def no_set(sparsity: float) -> list[float]:
    return [sparsity]


def test_a_pattern_beside_a_set_is_refused(command: Command, place: Path) -> None:
    outcome = command("run", "--constraint", "row-wise", "--pattern", "2:4", "--out", "p")
    assert outcome.status == 2
    assert "give the constraint a sparsity instead" in outcome.err


def test_our_own_sets_by_name(command: Command, place: Path, model_folder: Path, text_file: Path) -> None:
    common = ("--model", model_folder, "--data", text_file, "--samples", 16, "--sparsity", 0.5)
    assert command("run", *common, "--method", "magnitude", "--constraint", "row-wise", "--out", "p").status == 0
    for name, weight in load_file("p/model.safetensors").items():
        if "_proj." in name:
            assert RowWise(0.5).contains(Point(weight=weight)), name


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_an_example_installs(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / package.name
    copy.mkdir()
    for file in package.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    command = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target", "site", str(copy)]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    kinds = "('solvers', 'problems', 'constraints')"
    loaded = f"[p.load().__name__ for k in {kinds} for p in e(group=f'admm_prune.{{k}}')]"
    script = f"from importlib.metadata import entry_points as e; print({loaded})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    module = next(copy.glob("*.py")).stem
    assert module.replace("_", "") in done.stdout.lower()
