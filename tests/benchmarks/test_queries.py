"""The experiment with queries and keys: its quadratic problem against a direct solve."""

from __future__ import annotations

import pytest
import torch

from benchmarks import queries
from benchmarks.queries import Logits, Rotations

WIDTH, SIZE, HEADS, GROUPS, LENGTH = 4, 2, 2, 1, 6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", queries.NAMES)
@pytest.mark.parametrize("metric", ["softmax", "floor", "output"])
def test_the_fit_of_a_projection_is_the_minimum_of_the_objective(
    metric: str, name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "_ITERATIONS", 400)
    monkeypatch.setattr(queries, "_TOLERANCE", 1e-14)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    dense = {"query": draw(HEADS * SIZE, WIDTH), "output": draw(WIDTH, HEADS * SIZE)}
    dense |= {"key": draw(GROUPS * SIZE, WIDTH), "value": draw(GROUPS * SIZE, WIDTH)}
    angles = draw(LENGTH, SIZE // 2).repeat(1, 2)
    problem = Logits(draw(3, LENGTH, WIDTH), Rotations(angles.cos(), angles.sin()), dense, SIZE, metric)
    weights = {one: dense[one] + 0.3 * draw(*dense[one].shape) for one in queries.NAMES}

    def objective(entries: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for number, x in enumerate(problem.inputs):
            delta = problem.logits({**weights, name: entries.view_as(dense[name])}, x) - problem.base[number]
            total = total + (delta * problem.metric_times(number, delta)).sum()
        return total

    zero = torch.zeros(dense[name].numel(), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(objective, zero)
    right = -torch.autograd.functional.jacobian(objective, zero)
    mask = torch.rand(dense[name].shape, generator=g) < 0.6 if masked else torch.ones_like(dense[name]).bool()
    chosen = mask.flatten()
    direct = zero.clone()
    direct[chosen] = torch.linalg.solve(hessian[chosen][:, chosen], right[chosen])
    fitted, rows, gram = problem.fitted(name, weights, mask, (0.0, 0.0))
    assert objective(fitted.flatten()) == pytest.approx(float(objective(direct)), rel=1e-8)
    assert torch.allclose(fitted.flatten(), direct, rtol=1e-6, atol=1e-8)
    assert rows.min() > 0
    assert torch.linalg.eigvalsh(gram).min() > 0
