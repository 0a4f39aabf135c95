"""Groups of columns: elimination, masks and their references, the centred problem."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm_prune.methods.struprune import selectors
from admm_prune.methods.struprune.selectors import SeededADMM
from admm_prune.ops import group_compensation
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups, Unstructured
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.group_obs import GroupMask, GroupOBS
from admm_prune.solvers.reference import BruteForceGroups
from admm_prune.solvers.refit import Refit
from admm_prune.statistics import GramAccumulator, LayerStatistics, centred
from admm_prune.testing import assert_problem_conforms
from tests.catalogue import correlated_inputs, layer, random_weight

seeds = st.integers(0, 10_000)
widths = st.sampled_from([1, 2, 4])


def survivors(problem, kept: torch.Tensor) -> torch.Tensor:
    """W A_:S A_SS^-1 by a dense solve: least squares on the columns that stay."""
    a, w = problem.hessian, problem.minimizer
    v = torch.zeros_like(w)
    v[:, kept] = torch.linalg.solve(a[kept][:, kept], (w @ a[:, kept]).T).T
    return v


def energy(problem, v: torch.Tensor) -> float:
    e = v - problem.minimizer
    return float(torch.einsum("ij,jk,ik->", e, problem.hessian, e))


@given(seed=seeds, width=widths, batch=st.sampled_from([0, 1, 3]))
def test_the_loss_of_elimination_is_that_of_least_squares_on_the_survivors(seed, width, batch) -> None:
    problem = layer(Groups(0.5, width), seed=seed)
    count = 16 // width
    found = group_compensation.eliminate(problem.hessian, problem.minimizer, width, count - 1, batch or count)
    assert sorted(set(found.order.tolist())) == sorted(found.order.tolist())
    for removed in range(1, count):
        kept = torch.ones(16, dtype=torch.bool)
        kept[group_compensation.columns_of(found.order[:removed], width)] = False
        assert energy(problem, survivors(problem, kept)) == pytest.approx(float(found.losses[removed - 1]), rel=1e-8)


@given(seed=seeds, width=widths)
def test_group_obs_solves_least_squares_on_what_it_keeps(seed, width) -> None:
    problem = layer(Groups(0.5, width), seed=seed)
    for solver in (GroupOBS(), GroupOBS(batch=0), GroupOBS(batch=None)):
        result = solver.solve(problem)
        v = result.solution["weight"]
        kept = v.any(0)
        assert int((~kept).sum()) == 8
        assert torch.count_nonzero(v[:, ~kept]) == 0
        assert torch.allclose(v, survivors(problem, kept), rtol=1e-8, atol=1e-10)
        assert result.objective == pytest.approx(energy(problem, v), rel=1e-8)


def test_greedy_elimination_removes_the_least_rise_each_time() -> None:
    problem = layer(Groups(0.5, 2), seed=3)
    order = group_compensation.eliminate(problem.hessian, problem.minimizer, 2, 7, 1).order.tolist()
    gone: list[int] = []
    for group in order:
        rises = {}
        for candidate in set(range(8)) - set(gone):
            kept = torch.ones(16, dtype=torch.bool)
            kept[group_compensation.columns_of(torch.tensor([*gone, candidate]), 2)] = False
            rises[candidate] = energy(problem, survivors(problem, kept))
        assert group == min(rises, key=lambda g: rises[g])
        gone.append(group)


def test_elimination_needs_more_digits_than_float32_has_and_says_so() -> None:
    gram, weight = torch.eye(12, dtype=torch.float64) + 8e6, random_weight(3, 12, 0)  # integers: exact in float32
    single = group_compensation.eliminate(gram.float(), weight.float(), 1, 11, 1)
    assert single.escalated
    assert not group_compensation.eliminate(gram, weight, 1, 11, 1).escalated
    with pytest.raises(RuntimeError):
        group_compensation.eliminate(
            torch.ones(2, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64), 1, 1, 1
        )


@pytest.mark.bitwise
def test_elimination_repeats_by_the_bit_and_knows_ties() -> None:
    problem = layer(Groups(0.5), seed=1, dtype=torch.float32)
    first, second = (group_compensation.eliminate(problem.hessian, problem.minimizer, 1, 10, 2) for _ in range(2))
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.losses, second.losses)
    assert group_compensation.eliminate(torch.eye(4), torch.ones(2, 4), 1, 3, 1).order.tolist() == [3, 2, 1]
    assert len(group_compensation.eliminate(torch.eye(4), torch.ones(2, 4), 1, 0, 1).order) == 0


def test_structured_obs_against_every_set_of_groups() -> None:
    greedy, once, admm = [], [], []
    for seed in range(20):
        problem = layer(Groups(0.0, keep=8), width=12, seed=seed)
        optimum = BruteForceGroups().solve(problem).objective
        start = GroupOBS().solve(problem)
        greedy.append(start.objective / optimum)
        once.append(GroupOBS(batch=0).solve(problem).objective / optimum)
        admm.append(Refit(ADMM()).solve(problem, start=start.solution).objective / optimum)
        assert min(greedy[-1], once[-1], admm[-1]) >= 1 - 1e-9
        assert admm[-1] <= greedy[-1], "ADMM is never worse than where it starts"
    assert sum(once) >= sum(greedy)
    assert median(greedy) <= 1.02
    assert max(greedy) <= 1.3


def test_admm_finishes_at_the_least_squares_of_its_columns() -> None:
    problem = layer(Groups(0.5, 2), seed=4)
    v = ADMM().solve(problem).solution["weight"]
    assert torch.allclose(v, survivors(problem, v.any(0)), rtol=1e-8, atol=1e-10)


def test_brute_force_over_groups_is_the_least_of_all() -> None:
    problem = layer(Groups(0.5, 4), seed=5)
    losses = []
    for stay in combinations(range(4), 2):
        kept = torch.zeros(16, dtype=torch.bool)
        kept[group_compensation.columns_of(torch.tensor(stay), 4)] = True
        losses.append(energy(problem, survivors(problem, kept)))
    result = BruteForceGroups().solve(problem)
    assert result.objective == pytest.approx(min(losses), rel=1e-9)
    assert result.bound is not None
    assert result.objective * (1 - 1e-9) <= result.bound <= result.objective
    with pytest.raises(ValueError, match=r"BruteForceGroups tries at most 5 sets; Groups has 1.29e4: raise max"):
        BruteForceGroups(max_supports=5).solve(layer(Groups(0.5)))


@pytest.mark.parametrize("solver", [GroupOBS(), GroupMask(), BruteForceGroups()])
def test_other_sets_are_refused_by_name(solver) -> None:
    name = type(solver).__name__
    with pytest.raises(TypeError, match=rf"{name} needs a GroupConstraint.*Unstructured.* lacks budget, width"):
        solver.solve(layer(Unstructured(0.5)))


# The mask alone


@given(seed=seeds, width=widths)
def test_the_loss_of_a_mask_is_a_quadratic_form_of_the_mask(seed, width) -> None:
    problem = grouped(seed, width)
    removed = torch.rand(16 // width, generator=torch.Generator().manual_seed(seed)) < 0.5
    masked = problem.minimizer.masked_fill(removed.repeat_interleave(width), 0)
    q = group_compensation.interactions(problem.hessian, problem.minimizer, width)
    gone = removed.double()
    assert float(gone @ q @ gone) == pytest.approx(energy(problem, masked), rel=1e-10, abs=1e-12)
    eigenvalues = torch.linalg.eigvalsh(q)
    assert float(eigenvalues[0]) >= -1e-10 * float(eigenvalues[-1])


def test_the_mask_keeps_the_largest_scores_and_changes_no_weight() -> None:
    problem = grouped(0, 1)
    v = GroupMask().solve(problem).solution["weight"]
    score = problem.minimizer.square().sum(0) * problem.hessian.diagonal()
    kept = v.any(0)
    assert float(score[kept].min()) > float(score[~kept].max())
    assert torch.equal(v[:, kept], problem.weight[:, kept])


def test_a_mask_that_sees_interactions_loses_less_on_average() -> None:
    plain, seeing = (
        sum(solver.solve(grouped(seed, 1)).objective for seed in range(20))
        for solver in (GroupMask(), GroupMask(interactions=True))
    )
    assert seeing < plain


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    ("selector", "compensate"),
    [("obs", True), ("obs-one-shot", True), ("obs", False), ("mask", False), ("mask-interactions", False)],
)
def test_the_reported_losses_are_those_of_what_the_selector_removes(selector, compensate, width) -> None:
    count = 16 // width
    curve, reported = selectors.losses(grouped(0, width), width, selector, compensate)
    for removed in range(1, count):
        problem = grouped(0, width, keep=count - removed)
        result, _ = selectors.solve(problem, selector, compensate)
        assert float(reported[removed]) == pytest.approx(energy(problem, result.solution["weight"]), rel=1e-8)
    assert torch.equal(curve, curve.cummax(0).values)
    if not compensate:
        q = group_compensation.interactions(problem.hessian, problem.minimizer, width).diagonal().sort().values
        assert torch.allclose(curve, torch.cat([q.new_zeros(1), q.cumsum(0)]))


# The problem


def grouped(seed: int, width: int, *, mean: bool = False, keep: int | None = None) -> GroupReconstruction:
    x, weight = correlated_inputs(64, 16, seed) + 0.3, random_weight(6, 16, seed)
    chosen = Groups(0.5, width) if keep is None else Groups(0.0, width, keep)
    return GroupReconstruction(weight, x.T @ x, chosen, mean=x.mean(0) if mean else None, tokens=64, ridge=0.01)


@pytest.mark.parametrize("mean", [False, True])
def test_the_problem_keeps_the_promises_of_its_protocols(mean) -> None:
    assert_problem_conforms(lambda seed: grouped(seed, 2, mean=mean))


@given(seed=seeds)
def test_a_bias_takes_the_constant_part_of_the_error(seed) -> None:
    x, weight = correlated_inputs(64, 16, seed) + 0.3, random_weight(6, 16, seed)
    problem = GroupReconstruction(weight, x.T @ x, Groups(0.5), mean=x.mean(0), tokens=64, ridge=0.0)
    solution = GroupOBS().solve(problem).solution
    v, shift = solution["weight"], problem.bias_shift(solution)
    true_error = (x @ v.T + shift - x @ weight.T).square().sum()
    assert float(true_error) == pytest.approx(problem.value(solution), rel=1e-10)
    with_constant = torch.cat([x, torch.ones(64, 1, dtype=x.dtype)], 1)  # the bias as one more column that stays
    kept = torch.cat([v.any(0), torch.tensor([True])])
    best = torch.linalg.lstsq(with_constant[:, kept], x @ weight.T).solution
    least = (with_constant[:, kept] @ best - x @ weight.T).square().sum()
    assert float(true_error) == pytest.approx(float(least), rel=1e-8)


def test_a_constant_channel_goes_first_and_the_bias_keeps_what_it_gave() -> None:
    x, weight = correlated_inputs(64, 16, 0), random_weight(6, 16, 0)
    x[:, 5] = 40.0
    problem = GroupReconstruction(weight, (x.T @ x).float(), Groups(0.0, keep=15), mean=x.mean(0), tokens=64)
    solution = GroupOBS().solve(problem).solution
    assert solution["weight"].any(0).logical_not().nonzero().tolist() == [[5]]
    shift = problem.bias_shift(solution).double()
    assert torch.allclose(x @ solution["weight"].double().T + shift, x @ weight.T, atol=1e-3)


def far_from_zero() -> torch.Tensor:
    """Inputs whose squared mean is 40,000 times their variance."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=g, dtype=torch.float64) / 8
    return torch.randn(5000, 64, generator=g, dtype=torch.float64) @ mixing + 200


def least_eigenvalue(gram: torch.Tensor) -> float:
    scale = gram.double().diagonal().sqrt()
    return float(torch.linalg.eigvalsh(gram.double() / scale / scale[:, None])[0])


def test_a_centred_gram_is_centred_before_it_is_rounded() -> None:
    x = far_from_zero()
    away = x - x.mean(0)
    truth = away.T @ away
    parts = GramAccumulator(64), GramAccumulator(64)
    for accumulator, some in zip(parts, x.split([4000, 1000]), strict=True):
        accumulator.add(some)
    found = LayerStatistics.collected(*parts, centre=True)
    assert found.centred is not None
    assert found.gram.dtype == found.centred.dtype == torch.float32
    assert torch.equal(found.centred, found.centred.T)
    assert float((found.centred - truth).abs().max()) < 1e-7 * float(truth.diagonal().max())
    assert least_eigenvalue(found.centred) == pytest.approx(least_eigenvalue(truth), rel=1e-2)


def test_a_gram_that_was_rounded_before_gives_a_semidefinite_centred_one() -> None:
    x = far_from_zero()
    away = x - x.mean(0)
    truth, rounded = away.T @ away, (x.T @ x).float()
    assert least_eigenvalue(rounded.double() - len(x) * x.mean(0).outer(x.mean(0))) < -1e-4  # what rounding leaves
    found = centred(rounded, x.mean(0), len(x))
    assert least_eigenvalue(found) > -1e-6
    assert float((found - truth).norm()) < 0.01 * float(truth.norm())


def test_centring_leaves_the_gram_as_it_was() -> None:
    x = correlated_inputs(64, 16, 0) + 0.3
    gram = x.T @ x
    before = gram.clone()
    GroupReconstruction(random_weight(6, 16, 0), gram, Groups(0.5), mean=x.mean(0), tokens=64)
    assert torch.equal(gram, before)


def test_no_bias_no_shift_and_a_mean_needs_its_tokens() -> None:
    problem = grouped(0, 1)
    assert torch.equal(problem.bias_shift(Point(weight=torch.zeros(6, 16))), torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="a mean input needs the number of tokens"):
        GroupReconstruction(torch.ones(2, 2), torch.eye(2), Groups(0.5), mean=torch.ones(2))


@given(seed=seeds)
def test_refit_on_columns_is_the_refit_row_by_row(seed) -> None:
    problem = grouped(seed, 1)
    kept = torch.rand(16, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask = kept.expand(6, 16).clone()
    together = problem.refit(Point(weight=mask))["weight"]
    assert torch.allclose(together, survivors(problem, kept), rtol=1e-8, atol=1e-10)
    mask[0, int(kept.int().argmax())] = False
    alone = problem.refit(Point(weight=mask))["weight"]
    assert torch.allclose(alone[1:], together[1:], rtol=1e-8, atol=1e-10)


def test_groups_refuse_shapes_that_they_do_not_divide() -> None:
    with pytest.raises(ValueError, match="groups of 3 columns do not divide a matrix of 16 columns"):
        Groups(0.5, 3).project(Point(weight=torch.ones(2, 16)))
    with pytest.raises(ValueError, match="groups of 0 columns are empty"):
        Groups(0.5, 0)
    with pytest.raises(ValueError, match="a set with an explicit count has no fraction to scale: give a sparsity"):
        Groups(0.5, keep=2).scaled_to(0.5)
    with pytest.raises(ValueError, match="keep is a whole number of at least 0, not -1"):
        Groups(0.5, keep=-1)


def test_admm_from_structured_obs_keeps_the_notes_of_both(monkeypatch) -> None:
    problem = layer(Groups(0.5, 2))
    elimination = group_compensation.eliminate(problem.hessian, problem.minimizer, 2, 4, 1)
    monkeypatch.setattr(group_compensation, "eliminate", lambda *_: replace(elimination, escalated=True))
    assert "groups were eliminated in float64" in SeededADMM().solve(problem).notes
