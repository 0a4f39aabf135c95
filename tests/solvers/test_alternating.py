"""Alternating minimization and descent on a support: what they return, when they stop, what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from admm_prune.errors import UserError
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.problems.constraints import Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.result import Result, Status
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.support_descent import SupportDescent
from admm_prune.testing import assert_solver_conforms
from admm_prune.testing.supports import OnlyStochastic
from tests.catalogue import CONSTRAINTS, layer
from tests.networks import damped, network, split, whole

FITTING = {name: CONSTRAINTS[name] for name in ("half", "most", "nothing", "everything", "rows", "2:4", "tiles")}
COORDINATED = {
    "a network": lambda c: whole(network("silu", gated=True, biases=False), constraint=c, noise=0.0, sample=50),
    "a network with biases": lambda c: whole(network("relu", gated=False), constraint=c, sample=50),
    "a split network": lambda c: split(network("relu", gated=False), constraint=c),
}


def test_alternating_conforms() -> None:
    solver = Alternating(inner=SparseGPT(), max_iterations=2)
    tried = assert_solver_conforms(solver, problems=COORDINATED, constraints=FITTING, fills=False)
    assert {f"{problem}, {name}" for problem in COORDINATED for name in FITTING} <= set(tried.solved)
    assert "Alternating needs a Coordinated problem" in tried.refused["a layer that shows only its value, half"]


def test_descent_on_a_support_conforms() -> None:
    networks = {name: make for name, make in COORDINATED.items() if "split" not in name}
    tried = assert_solver_conforms(
        SupportDescent(over=20, max_iterations=20), problems=networks, constraints=FITTING, fills=False
    )
    assert {f"{problem}, {name}" for problem in networks for name in FITTING} <= set(tried.solved)
    assert "SupportDescent needs a Stochastic problem" in tried.refused["a layer that shows only its value, half"]


@pytest.mark.parametrize(("name", "gated"), [("relu", False), ("silu", True)])
def test_each_step_lowers_the_error_on_other_tokens(name: str, gated: bool) -> None:
    """Local, as published (where its order holds: ReLU), with the closing step, all weights together at the end."""
    validation_loss = []
    for seed in range(3):
        net = network(name, gated=gated, seed=seed)
        setting = {"constraint": Unstructured(0.6), "noise": 0.02, "count": 1000, "damped": damped(net, 0.01)}
        problem = whole(net, **setting)
        explicit = split(net, validation=problem.validation, **setting)
        runs = [
            Alternating(inner=SparseGPT(), max_iterations=1).solve(explicit),
            Alternating(inner=SparseGPT(), max_iterations=4, tolerance=-1.0).solve(explicit),
            Alternating(inner=SparseGPT(), max_iterations=1).solve(problem),
            Alternating(inner=SparseGPT(), max_iterations=2, together=SupportDescent()).solve(problem),
        ]
        validation_loss.append([problem.validation_loss(weights_of(problem, run.solution)) for run in runs])
    local, published, closed, finished = torch.tensor(validation_loss).mean(0).tolist()
    assert local > closed > finished
    assert gated or local > published


def weights_of(problem: NetworkOutput, x: Point) -> Point:
    return Point({**problem.initial(), **{name: x[name] for name in x if name in problem.initial()}})


def test_the_best_round_by_the_judge_is_returned() -> None:
    problem = whole(network("silu", gated=True), constraint=Unstructured(0.7))
    result = Alternating(inner=SparseGPT(), max_iterations=6, tolerance=-1.0).solve(problem)
    told = [step.end_to_end for step in result.history]
    assert problem.validation_loss(result.solution) == min(told)
    assert result.iterations == 6
    assert result.status is Status.MAX_ITERATIONS


def test_a_round_that_improves_nothing_ends_the_run_and_is_told() -> None:
    result = Alternating(inner=Magnitude(), max_iterations=9).solve(Fading())
    assert [step.end_to_end for step in result.history] == [1.0, 0.5, 0.75]
    assert result.status is Status.SOLVED
    assert result.solution["weight"][0, 0] == 2.0
    assert result.notes == ("stalled: round 2 of 3 was the best",)


@pytest.mark.parametrize("rounds", [0, 2])
def test_without_a_round_that_can_be_validated_the_projected_start_is_returned(rounds: int) -> None:
    problem = whole(network("silu", gated=True), constraint=Unstructured(0.7))
    problem.validation_loss = lambda x: math.nan
    result = Alternating(inner=SparseGPT(), max_iterations=rounds, tolerance=-1.0).solve(problem)
    assert problem.constraint.contains(result.solution)
    assert result.objective == problem.value(problem.constraint.project(problem.initial()))
    assert (result.notes[:1] == ("no validation loss of 2 rounds is a number",)) == bool(rounds)


def test_a_frozen_support_stays() -> None:
    problem = whole(network("relu", gated=False), constraint=Unstructured(0.7))
    first = Alternating(inner=ADMM(), max_iterations=1).solve(problem)
    frozen = Alternating(inner=ADMM(), max_iterations=3, freeze_after=1, tolerance=-1.0).solve(problem)
    assert [step.support_changes for step in frozen.history][1:] == [0, 0]
    assert all(torch.equal(first.solution[name] != 0, frozen.solution[name] != 0) for name in ("up", "down"))
    assert problem.validation_loss(frozen.solution) <= problem.validation_loss(first.solution)


def test_a_step_together_that_the_judge_does_not_like_is_dropped() -> None:
    problem = whole(network("relu", gated=False), constraint=Unstructured(0.7))
    plain = Alternating(inner=ADMM(), max_iterations=1).solve(problem)
    wild = Alternating(inner=ADMM(), max_iterations=1, together=Ruin()).solve(problem)
    assert torch.equal(plain.solution["up"], wild.solution["up"])
    assert torch.equal(plain.solution["down"] != 0, wild.solution["down"] != 0)
    assert problem.validation_loss(wild.solution) <= problem.validation_loss(plain.solution)
    assert any(note.startswith("round 1: the joint step was no better") for note in wild.notes)


def test_descent_keeps_the_support_and_lowers_the_value() -> None:
    problem = whole(network("gelu", gated=True), constraint=Unstructured(0.6))
    start = problem.constraint.project(problem.initial())
    result = SupportDescent().solve(problem, start=start)
    assert result.objective < 0.8 * problem.value(start)
    assert all(not (result.solution[name][x == 0]).any() for name, x in start.items() if name != "bias")


@pytest.mark.parametrize("power", [-80, 80])
def test_descent_does_not_depend_on_the_scale_of_the_loss(power: int) -> None:
    """By powers of two, which round nothing."""
    plain = layer(Unstructured(0.5))
    scaled = LayerReconstruction(
        plain.weight, torch.ldexp(plain.gram, torch.tensor(power)), plain.constraint, ridge=plain.ridge
    )
    solver = SupportDescent.of(20)
    weights = [solver.solve(OnlyStochastic(problem)).solution["weight"] for problem in (plain, scaled)]
    assert torch.equal(*weights)


def test_a_loss_of_targets_that_are_zero_is_not_zero() -> None:
    for problem in (whole(network("relu", gated=False)), split(network("relu", gated=False))):
        inputs, targets = problem.validation
        problem.validation = inputs, torch.zeros_like(targets)
        outputs = problem.network.hidden(problem.initial(), inputs) @ problem.initial()["down"].T
        bias = problem.network.biases.get("down")
        expected = float((outputs if bias is None else outputs + bias).square().sum())
        assert problem.validation_loss(problem.initial()) == pytest.approx(expected)


def test_both_refuse_what_they_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"Alternating needs a Coordinated problem .* LayerReconstruction lacks block"):
        Alternating(inner=ADMM()).solve(layer(Unstructured(0.5)))
    with pytest.raises(
        TypeError, match=r"SupportDescent needs a Stochastic problem .* LayerReconstruction lacks sample"
    ):
        SupportDescent().solve(layer(Unstructured(0.5)))


class Ruin:
    """Returns what is worse than its start, as no solver should."""

    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        assert start is not None
        ruined = Point({**start, "up": -start["up"]})
        return Result(ruined, Status.CLOSED_FORM, problem.value(ruined))


@dataclass
class Fading:
    """One block, which counts its rounds; the judge likes the second one best."""

    order: tuple[str, ...] = ("weight",)
    curvature: float = 1.0
    constraint = Unstructured(0.0)
    rounds: int = 0

    def initial(self) -> Point:
        return Point(weight=torch.zeros(1, 1))

    def value(self, x: Point) -> float:
        return -float(x["weight"])

    def block(self, name: str, x: Point) -> Problem:
        return layer(Unstructured(0.0))

    def part(self, x: Point, name: str) -> Point:
        return x

    def joined(self, x: Point, name: str, block: Problem, solution: Point) -> Point:
        return Point(weight=x["weight"] + 1)

    def validation_loss(self, x: Point) -> float:
        return {1.0: 1.0, 2.0: 0.5, 3.0: 0.75}[float(x["weight"])]


@pytest.mark.parametrize("how", [{"freeze_after": -1}, {"tolerance": math.nan}, {"max_iterations": 1.5}], ids=str)
def test_settings_out_of_range_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(how))} of Alternating must be"):
        Alternating(inner=Wanda(), **how)
