"""The fast solvers give what the reference implementations of `solvers/textbook.py` give, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import SupportConstraint
from admm_prune.problems.constraints import Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers import textbook
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Wanda
from admm_prune.solvers.schedules import LogSpaced
from tests.catalogue import CONSTRAINTS, WIDTH, layer, retargeted
from tests.networks import network, split

seeds = st.integers(0, 10_000)


def selection_of(constraint: SupportConstraint) -> textbook.Select:
    return lambda score: constraint.select(Point(weight=score))["weight"]


@pytest.mark.parametrize("make", [layer, retargeted])
@pytest.mark.parametrize("constraint", ["half", "2:4", "rows"])
@settings(max_examples=20)
@given(seed=seeds, relaxation=st.sampled_from([1.0, 1.5]))
def test_admm(make, constraint, seed, relaxation) -> None:
    penalty = LogSpaced(0.05, 3.0, over=20, every=3)
    solver = ADMM(refit=False, penalty=penalty, relaxation=relaxation, max_iterations=20, tolerance=0.0)
    problem = make(CONSTRAINTS[constraint], seed=seed)
    rho = [penalty.rho(0, 0.0, 0.0)]
    for t in range(1, 20):
        rho.append(penalty.rho(t, rho[-1], 0.0) if t % penalty.every == 0 else rho[-1])
    expected = textbook.admm(
        problem.minimizer, problem.hessian, selection_of(problem.constraint), rho, relaxation=relaxation
    )
    last = solver.solution(problem, solver.solve(problem).state.inner)["weight"]
    assert torch.allclose(last, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [layer, retargeted])
@settings(max_examples=20)
@given(seed=seeds, block=st.sampled_from([4, 8, 128]), sparsity=st.sampled_from([0.3, 0.5, 0.8]))
def test_sparsegpt(make, seed, block, sparsity) -> None:
    problem = make(Unstructured(sparsity), seed=seed)

    def select(score: Tensor, start: int) -> Tensor:
        share = problem.constraint.column_slice(start, start + score.shape[1], (len(score), WIDTH))
        return share.select(Point(weight=score.sqrt()))["weight"]

    expected = textbook.sparsegpt(problem.minimizer, problem.hessian, select, block)
    v = SparseGPT(block=block).solve(problem).solution["weight"]
    assert torch.equal(v != 0, expected != 0)
    assert torch.allclose(v, expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=10)
@given(seed=seeds, rounds=st.integers(1, 4), sparsity=st.sampled_from([0.0, 0.5, 0.7]))
def test_sparsellm(seed, rounds, sparsity) -> None:
    net = network("relu", gated=False, seed=seed)
    problem = split(net, seed=seed, constraint=Unstructured(sparsity))
    condition = []

    def prune(weight: Tensor, hessian: Tensor) -> Tensor:
        condition.append(float(torch.linalg.cond(hessian)))
        return Wanda().solve(LayerReconstruction(weight, hessian, Unstructured(sparsity))).solution["weight"]

    up, down = textbook.sparsellm(
        problem.inputs, problem.targets, *(part[name] for name in ("up", "down") for part in (net.weights, net.biases)),
        prune=prune, rounds=rounds,
    )  # fmt: skip
    assume(max(condition) < 1e8)  # of units that are never active the textbook takes the least norm
    solver = Alternating(inner=Wanda(), max_iterations=rounds, tolerance=-float("inf"))
    last = solver.solve(problem).state.inner.x
    assert torch.allclose(last["up"], up, rtol=1e-6, atol=1e-8)
    assert torch.allclose(last["down"], down, rtol=1e-6, atol=1e-8)
