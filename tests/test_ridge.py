"""The ridge chosen on validation tokens is the one that serves tokens never seen."""

from __future__ import annotations

import torch
from catalogue import correlated_inputs, random_weight

from admm_prune.problems.constraints import Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.ridge import GRID, choose_ridge
from admm_prune.solvers.admm import ADMM


def split_grams(tokens: int, width: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = correlated_inputs(tokens + 4000, width, 0, torch.float32)
    seen, validation, unseen = x[:tokens], x[int(0.85 * tokens) : tokens], x[tokens:]
    return seen.T @ seen, validation.T @ validation, unseen.T @ unseen


def test_scarce_text_asks_for_a_larger_ridge_than_plenty() -> None:
    weight, constraint = random_weight(32, 48, 0, torch.float32), Unstructured(0.5)
    chosen = {}
    for tokens in (60, 6000):
        gram, validation, _ = split_grams(tokens)
        chosen[tokens], errors = choose_ridge(weight, gram, validation, constraint)
        assert set(errors) == set(GRID)
        assert errors[chosen[tokens]] == min(errors.values())
    assert chosen[60] > chosen[6000]


def test_the_choice_serves_unseen_tokens() -> None:
    weight, constraint = random_weight(32, 48, 0, torch.float32), Unstructured(0.5)
    gram, validation, unseen = split_grams(60)
    chosen, _ = choose_ridge(weight, gram, validation, constraint)
    error = {}
    for ridge in (min(GRID), chosen):
        problem = LayerReconstruction(weight, gram, constraint, ridge=ridge)
        error[ridge] = problem.relative_error(ADMM().solve(problem).solution, unseen)
    assert error[chosen] < error[min(GRID)]
