"""A model's own loss as a problem, and ADMM on samples of it, or of anything else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from admm_prune import NofM, RowWise, Unstructured
from admm_prune.errors import UserError
from admm_prune.point import Point
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.problems.surrogate_free import SurrogateFree, epoch_order
from admm_prune.result import Status
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.elsa.duals import DualUpdate, WeightUpdate
from admm_prune.solvers.reference import BruteForce
from admm_prune.solvers.stochastic_admm import StochasticADMM
from admm_prune.testing import assert_problem_conforms, assert_solver_conforms
from admm_prune.testing.supports import OnlyStochastic
from tests.catalogue import CONSTRAINTS, layer

Batch = tuple[Tensor, Tensor]


def mean_square(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def batches(count: int, seed: int, size: int = 16) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    teacher = network(99)
    with torch.no_grad():
        return [(x, teacher(x)) for x in (torch.randn(size, 8, generator=g, dtype=torch.float64) for _ in range(count))]


def small(seed: int, constraint: object = None, **how: object) -> SurrogateFree:
    model = network(seed)
    return SurrogateFree(
        model, mean_square, batches(5, seed), batches(3, seed + 1000), constraint or Unstructured(0.5), **how
    )


def test_it_conforms() -> None:
    def on_its_training_data(seed: int) -> SurrogateFree:
        data = batches(5, seed)
        return SurrogateFree(network(seed), mean_square, data, data, Unstructured(0.5))

    assert_problem_conforms(on_its_training_data, examples=4)


@pytest.mark.parametrize("each", [True, False])
def test_the_constraint_holds_for_every_weight_or_for_all_together(each: bool) -> None:
    problem = small(0, Unstructured(0.5), each=each)
    point = problem.constraint.project(problem.initial())
    counts = [int(x.count_nonzero()) for x in point.values()]
    assert sum(counts) == (48 + 24) // 2
    assert (counts == [24, 12]) == each


def test_value_is_the_loss_on_validation_batches_and_draws_pass_through_the_training_batches() -> None:
    problem, model = small(3), network(3)
    model.requires_grad_(False)
    loss = sum(float(mean_square(model, batch)) for batch in batches(3, 1003)) / 3
    assert problem.value(problem.initial()) == pytest.approx(loss, rel=1e-12)
    losses = {float(mean_square(model, batch)) for batch in batches(5, 3)}
    for epoch in range(2):
        drawn = [problem.sample_gradient(problem.initial(), 5 * epoch + i)[0] for i in range(5)]
        assert set(drawn) == losses
    assert sorted(epoch_order(5, 3, 0)) == list(range(5))
    assert epoch_order(50, 3, 0) != epoch_order(50, 3, 1)


def test_the_curvature_is_half_the_mean_diagonal_of_the_hessian() -> None:
    """Of a linear model under a mean square the Hessian is known: 2 X^T X / (n out) for every output."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).double()
    inputs = torch.randn(32, 8, dtype=torch.float64)
    problem = SurrogateFree(model, mean_square, [(inputs, torch.zeros(32, 4).double())], [(inputs, inputs[:, :4])],
                            Unstructured(0.5))  # fmt: skip
    exact = float(inputs.square().sum(0).mean()) / (32 * 4)
    assert problem.curvature == pytest.approx(exact, rel=0.5)  # four random probes of a trace
    many = [SurrogateFree(model, mean_square, [(inputs, inputs[:, :4])], [(inputs, inputs[:, :4])], Unstructured(0.5),
                          seed=seed).curvature for seed in range(24)]  # fmt: skip
    assert sum(many) / len(many) == pytest.approx(exact, rel=0.15)


def test_a_loss_without_curvature_says_that_the_unit_of_the_penalty_is_made_up() -> None:
    problem = SurrogateFree(
        nn.Linear(8, 4).double(),
        lambda model, batch: model(batch[0]).sum() * 0,
        batches(1, 0),
        batches(1, 1),
        RowWise(0.5),
    )
    assert problem.curvature == 1.0
    assert problem.notes == ("the curvature of the loss is estimated as 0: 1 is used as the unit of the penalty",)
    assert StochasticADMM(total_steps=8, max_iterations=8).solve(problem).notes[: len(problem.notes)] == problem.notes


def test_the_model_keeps_who_takes_a_gradient_and_takes_a_solution() -> None:
    model = network(0)
    model[0].weight.requires_grad_(False)
    problem = SurrogateFree(model, mean_square, batches(2, 0), batches(1, 1), RowWise(0.5))
    problem.sample_gradient(problem.initial(), 0)
    assert not model[0].weight.requires_grad
    assert model[2].weight.grad is None
    half = problem.constraint.project(problem.initial())
    problem.write(half)
    assert torch.equal(model[0].weight, half["0.weight"])
    assert problem.read().keys() == half.keys()


def test_a_weight_that_is_stored_transposed_is_shown_as_out_by_in() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8), nn.Tanh(), nn.Linear(6, 4)).double()
    problem = SurrogateFree(model, mean_square, batches(2, 0), batches(1, 1), NofM(2, 4), targets=("0.*",))
    x = problem.initial()
    assert x["0.weight"].shape == (6, 8)
    _, gradient = problem.sample_gradient(x, 0)
    assert gradient["0.weight"].shape == (6, 8)
    moved = problem.constraint.project(x)
    problem.write(moved)
    assert torch.equal(model[0].weight.T, moved["0.weight"])


@pytest.mark.parametrize(
    ("how", "words"),
    [({"targets": ("nowhere*",)}, "nowhere"), ({"training": []}, "at least one"), ({"validation": []}, "at least one")],
    ids=str,
)
def test_it_says_what_it_lacks(how: dict[str, object], words: str) -> None:
    lists = {"training": batches(1, 0), "validation": batches(1, 1), **how}
    with pytest.raises(UserError, match=words):
        SurrogateFree(network(0), mean_square, lists.pop("training"), lists.pop("validation"), RowWise(0.5), **lists)


def test_the_solver_conforms() -> None:
    tried = assert_solver_conforms(StochasticADMM(max_iterations=60, total_steps=60), examples=4)
    assert {name.split(",")[0] for name in tried.solved} == {"a layer that shows only sampled gradients"}


def test_a_problem_without_samples_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"StochasticADMM needs a Stochastic problem .* LayerReconstruction lacks"):
        StochasticADMM().solve(layer(CONSTRAINTS["half"]))


def test_the_best_point_by_held_out_loss_is_returned_and_its_loss_is_true() -> None:
    problem = small(1, Unstructured(0.6))
    result = StochasticADMM(max_iterations=200, total_steps=200, objective_every=10).solve(problem)
    seen = [p.objective for p in result.history if p.objective is not None]
    assert len(seen) == 20
    assert result.objective <= min(seen)
    assert result.objective == problem.value(result.solution)
    assert result.objective < problem.value(problem.constraint.project(problem.initial()))
    assert problem.constraint.contains(result.solution)
    assert any(p.support_changes for p in result.history)


class Separable:
    """f(x) = sum h (x - b)^2: the optimum keeps the largest h b^2, at b. What is drawn adds noise to b."""

    def __init__(self, seed: int, sparsity: float, noise: float = 0.0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.h = torch.rand((12, 16), generator=g, dtype=torch.float64) * 3 + 0.1
        self.b = torch.randn((12, 16), generator=g, dtype=torch.float64)
        self.constraint, self.noise = Unstructured(sparsity), noise
        self.curvature = float(self.h.mean())

    def initial(self) -> Point:
        return Point(weight=self.b.clone())

    def value(self, x: Point) -> float:
        return float((self.h * (x["weight"] - self.b).square()).sum())

    def sample_gradient(self, x: Point, draw: int) -> tuple[float, Point]:
        g = torch.Generator().manual_seed(draw)
        away = x["weight"] - self.b - self.noise * torch.randn(self.b.shape, generator=g, dtype=torch.float64)
        return float((self.h * away.square()).sum()), Point(weight=2 * self.h * away)

    def optimum(self) -> float:
        cost = (self.h * self.b.square()).flatten().sort().values
        return float(cost[: cost.numel() - round((1 - self.constraint.sparsity) * cost.numel())].sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_on_a_separable_problem_the_residuals_fall_and_the_optimum_is_near(seed: int, noise: float) -> None:
    problem = Separable(seed, 0.7, noise)
    result = StochasticADMM().solve(problem)
    updates = [p for p in result.history if p.primal_residual is not None]
    assert updates[-1].primal_residual < 0.2 * max(p.primal_residual for p in updates)
    assert updates[-1].dual_residual < 0.2 * max(p.dual_residual for p in updates)
    assert problem.optimum() <= result.objective <= 1.15 * problem.optimum()


def test_the_residual_is_relative_to_the_solution_as_of_every_solver() -> None:
    """Where everything is pruned, to the smallest denominator."""
    update = dict.fromkeys(("u", "dual", "pull", "quantization", "anchor"), 0.0)
    counts = {"entered": 0, "support_size": 1, "entries": 4, "threshold": 0.0, "threshold_before": None}
    one = WeightUpdate(x=2.0, z=1.0, primal=0.5, rho=1.0, rho_next=1.0, tau=1.0, **update, **counts)
    whole = DualUpdate(step=1, gradient_norm=0.0, skipped=0, weights={"a": one, "b": one})
    assert whole.residual_of_solution == pytest.approx(0.5)
    assert whole.primal_residual == pytest.approx(0.25)
    none = DualUpdate(step=1, gradient_norm=0.0, skipped=0, weights={"a": replace(one, z=0.0)})
    assert 1 < none.residual_of_solution < math.inf


def test_it_stops_where_both_residuals_are_small() -> None:
    result = StochasticADMM(tolerance=0.2).solve(Separable(0, 0.7))
    assert result.status is Status.SOLVED
    assert result.iterations < 1000


@pytest.mark.parametrize("seed", range(3))
def test_on_small_quadratics_it_is_compared_with_the_exact_optimum(seed: int) -> None:
    """2 x 8 weights: every support tried. The one-shot projection is far off, ADMM on samples is not."""
    problem = layer(RowWise(0.5), rows=2, width=8, seed=seed)
    exact = BruteForce().solve(problem).objective
    shown = OnlyStochastic(problem)
    start = problem.value(problem.constraint.project(problem.initial()))
    reached = StochasticADMM().solve(shown).objective
    assert exact * (1 - 1e-9) <= reached
    assert reached <= 1.5 * exact or reached <= exact + 0.2 * (start - exact)


@pytest.mark.slow
def test_its_median_gap_to_the_local_solver_is_small() -> None:
    ratios = []
    for seed in range(2):
        for name in ("half", "most", "2:4"):
            problem: LayerReconstruction = layer(CONSTRAINTS[name], seed=seed)
            ratios.append(
                StochasticADMM().solve(OnlyStochastic(problem)).objective / ADMM.best().solve(problem).objective
            )
    assert math.isfinite(max(ratios))
    assert sorted(ratios)[len(ratios) // 2] <= 1.3
