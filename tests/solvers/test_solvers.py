"""What each solver promises beyond the product: exactness to its definition, invariances, continuing, refusing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm_prune.errors import NonFiniteError, UserError
from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups, NofM, RowWise, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Status
from admm_prune.solvers import x_updates
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import closed_form
from admm_prune.solvers.group_obs import GroupMask, GroupOBS
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.reference import BranchAndBound, BruteForceGroups
from admm_prune.solvers.refit import Refit
from admm_prune.solvers.schedules import Constant, CubicSparsity, LogSpaced, SupportDriven
from admm_prune.solvers.support_descent import SupportDescent
from admm_prune.solvers.together import solve_batch
from tests.catalogue import CONSTRAINTS, ROWS, WIDTH, layer, retargeted
from tests.third_party import Bare

seeds = st.integers(0, 10_000)


def sequential_obs(problem: LayerReconstruction, mask: torch.Tensor) -> torch.Tensor:
    """Settles column after column: each time the columns to the right solve their least squares exactly."""
    a, w = problem.hessian, problem.minimizer.clone()
    for j in range(w.shape[1]):
        settled = torch.where(mask[:, j], w[:, j], 0)
        step = settled - w[:, j]
        w[:, j] = settled
        if j + 1 < w.shape[1]:
            rest = slice(j + 1, None)
            w[:, rest] -= torch.linalg.solve(a[rest, rest], a[rest, j, None] * step).T
    return w


@pytest.mark.parametrize("make", [layer, retargeted])
@given(seed=seeds, block=st.sampled_from([4, 7, 128]))
def test_sparsegpt_is_exact_sequential_obs(make, seed, block) -> None:
    problem = make(Unstructured(0.6), seed=seed)
    v = SparseGPT(block=block).solve(problem).solution["weight"]
    assert torch.allclose(v, sequential_obs(problem, v != 0), rtol=1e-8, atol=1e-10)


def test_sparsegpt_chooses_as_published() -> None:
    problem = layer(Unstructured(0.5))
    v = SparseGPT(block=8).solve(problem).solution["weight"]
    diagonal = torch.linalg.cholesky(torch.linalg.inv(problem.hessian), upper=True).diagonal()
    first = (problem.weight / diagonal)[:, :8].square()
    level = first.flatten().sort().values[ROWS * 8 // 2 - 1]
    assert torch.equal(v[:, :8] != 0, first > level)


def test_sparsegpt_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    hessian = layer(Unstructured(0.5)).hessian
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    assert torch.allclose(quadratic.inverse_factor(hessian), expected, rtol=1e-9)


def nearly_dependent(distance: float) -> LayerReconstruction:
    """Seven inputs that differ from the first by so much of it: float32 factors the Hessian, but not accurately."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    x[:, 1:8] = x[:, :1] + distance * x[:, 1:8]
    return LayerReconstruction(torch.randn(8, 16, generator=generator), (x.T @ x).float(), Unstructured(0.5), ridge=0.0)


@pytest.mark.parametrize("distance", [1e-3, 5e-3])
def test_sparsegpt_factors_in_float64_what_is_not_accurate_in_float32(distance) -> None:
    problem = nearly_dependent(distance)
    result = SparseGPT().solve(problem)
    (note,) = result.notes
    assert note.startswith("the Hessian was factored in float64: in float32 its residual was")
    exact = LayerReconstruction(problem.weight.double(), problem.hessian.double(), Unstructured(0.5), ridge=0.0)
    assert result.objective == pytest.approx(SparseGPT().solve(exact).objective, rel=1e-6)
    assert SparseGPT().solve(nearly_dependent(0.1)).notes == ()
    assert SparseGPT().solve(exact).notes == ()


@given(seed=seeds, error=st.floats(-0.5, 0.5))
def test_the_residual_of_a_factor(seed, error) -> None:
    """Of (1 + e) U it is |2 e + e^2|, whatever the Hessian."""
    hessian = layer(Unstructured(0.5), seed=seed).hessian
    factor = quadratic.inverse_factor(hessian) * (1 + error)
    assert quadratic.factor_residual(factor, hessian) == pytest.approx(abs(2 * error + error**2), rel=1e-6, abs=1e-9)


@given(seed=seeds)
def test_the_residual_of_a_float32_factor_is_bounded(seed) -> None:
    """By a multiple of in eps cond(A), which backward stability of Cholesky and of the triangular inverse promises."""
    hessian = layer(Unstructured(0.5), seed=seed).hessian.float()
    residual = quadratic.factor_residual(quadratic.inverse_factor(hessian), hessian)
    bound = len(hessian) * torch.finfo(torch.float32).eps * float(torch.linalg.cond(hessian.double()))
    assert residual <= 4 * bound


@given(seed=seeds)
def test_wanda_is_a_projection_in_the_metric_of_the_inputs(seed) -> None:
    problem = layer(RowWise(0.5), seed=seed)
    score = problem.weight.abs() * problem.gram.diagonal().sqrt()
    kept = Wanda().solve(problem).solution["weight"] != 0
    assert bool((score.where(kept, torch.inf).amin(1) >= score.where(~kept, 0).amax(1)).all())


@pytest.mark.parametrize("make", [layer, retargeted])
@given(seed=seeds)
def test_admm_with_its_support_frozen_equals_least_squares(make, seed) -> None:
    problem = make(CONSTRAINTS["half"], seed=seed)
    solver = ADMM(freeze_after=0, penalty=Constant(0.3), max_iterations=2000, refit=False, tolerance=1e-12)
    result = solver.solve(problem)
    refitted = problem.refit(result.solution.map(lambda v: v != 0))
    assert result.status is Status.SOLVED
    assert result.objective == pytest.approx(problem.value(refitted), rel=1e-9)
    assert torch.allclose(result.solution["weight"], refitted["weight"], rtol=1e-5, atol=1e-7)


@given(seed=seeds)
def test_conjugate_gradients_equal_cholesky(seed) -> None:
    problem = layer(CONSTRAINTS["half"], seed=seed)
    mask = problem.constraint.select(Point(weight=problem.weight.abs()))["weight"]
    iterated = problem.weight * mask
    _, residual = quadratic.conjugate_gradient_on_support_(
        iterated, problem.hessian, problem.minimizer, mask, tolerance=1e-13, max_iterations=200
    )
    assert residual <= 1e-12
    direct = problem.refit(Point(weight=mask))["weight"]
    assert torch.allclose(direct, iterated, rtol=1e-8, atol=1e-10)


def test_products_in_bfloat16_cost_no_error(monkeypatch) -> None:
    """The early penalties only choose a support, which the later ones and the refit settle."""
    monkeypatch.setattr(x_updates, "multiplies_bfloat16", lambda device: True)
    exact, rounded = [], []
    for seed in range(4):
        problem = layer(CONSTRAINTS["half"], seed=seed, dtype=torch.float32)
        exact.append(ADMM(fast_until=0).solve(problem).objective)
        rounded.append(ADMM().solve(problem).objective)
    assert rounded != exact  # another way, so bfloat16 was used
    assert sum(rounded) <= 1.01 * sum(exact)


def test_float64_problems_never_see_bfloat16() -> None:
    problem = layer(CONSTRAINTS["half"])
    default, exact = ADMM().solve(problem), ADMM(fast_until=0).solve(problem)
    assert torch.equal(default.solution["weight"], exact.solution["weight"])


@pytest.mark.bitwise
def test_ten_and_ten_iterations_are_twenty() -> None:
    problem = layer(CONSTRAINTS["half"], dtype=torch.float32)
    whole = ADMM(max_iterations=20).solve(problem)
    half = ADMM(max_iterations=10).solve(problem)
    assert half.iterations == 10
    continued = ADMM(max_iterations=20).solve(problem, state=half.state)
    assert torch.equal(continued.solution["weight"], whole.solution["weight"])
    assert [p.support_changes for p in continued.history] == [p.support_changes for p in whole.history]


def test_a_watcher_sees_every_iteration_and_can_stop() -> None:
    seen = []
    result = ADMM().solve(layer(CONSTRAINTS["half"]), watch=lambda p: seen.append(p.iteration) or p.iteration == 7)
    assert seen == list(range(1, 8))
    assert result.status is Status.STOPPED
    assert result.iterations == 7


def test_a_watcher_sees_the_iteration_that_converges_too() -> None:
    seen = []
    result = ADMM(tolerance=1e9).solve(layer(CONSTRAINTS["half"]), watch=lambda p: seen.append(p.iteration))
    assert result.status is Status.SOLVED
    assert seen == list(range(1, result.iterations + 1))


def test_continued_from_a_start_the_result_is_never_worse_than_that_start() -> None:
    problem = layer(CONSTRAINTS["half"])
    good = LocalSearch(ADMM.best()).solve(problem)
    part = ADMM(max_iterations=3).solve(problem, start=good.solution)
    joined = ADMM(max_iterations=6).solve(problem, state=part.state)
    whole = ADMM(max_iterations=6).solve(problem, start=good.solution)
    assert joined.objective == whole.objective <= good.objective
    assert joined.start_objective == whole.start_objective
    with pytest.raises(ValueError, match="give a start or a state, not both"):
        ADMM().solve(problem, start=good.solution, state=part.state)


def test_a_time_limit_still_gives_a_feasible_point() -> None:
    problem = layer(CONSTRAINTS["half"])
    result = ADMM(time_limit=0.0).solve(problem)
    assert result.status is Status.TIME_LIMIT
    assert problem.constraint.contains(result.solution)


@given(seed=seeds)
def test_history_tells_the_truth(seed) -> None:
    problem = layer(CONSTRAINTS["half"], seed=seed)
    solver = ADMM(objective_every=1)
    result = solver.solve(problem)
    assert min(p.objective for p in result.history) >= result.objective
    d = solver.solution(problem, result.state.inner)
    assert result.history[-1].objective == problem.value(d)
    assert result.best_iteration <= result.iterations
    assert result.start_objective == problem.value(solver.projected_start(problem, None))


class OnlyProximable:
    """A quadratic that shows nothing but its prox: ADMM must come out where it does on the open problem."""

    def __init__(self, problem: LayerReconstruction) -> None:
        self.constraint, self.curvature = problem.constraint, problem.curvature
        self.initial, self.value, self.prox = problem.initial, problem.value, problem.prox


def test_admm_needs_only_a_prox() -> None:
    identity_metric = LayerReconstruction(
        torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.eye(WIDTH, dtype=torch.float64) + 0.3,
        Unstructured(0.5),
        ridge=0.0,
    )  # unit diagonal up to a factor: both coordinates agree
    solver = ADMM(refit=False, max_iterations=15, tolerance=0.0)
    through_prox = solver.solve(OnlyProximable(identity_metric))
    open_problem = solver.solve(identity_metric)
    assert torch.allclose(through_prox.solution["weight"], open_problem.solution["weight"], rtol=1e-8)


@given(seed=seeds)
def test_scaling_a_channel_and_permuting_change_nothing(seed) -> None:
    problem = layer(RowWise(0.5), seed=seed)
    g = torch.Generator().manual_seed(seed)
    factors = torch.exp(2 * torch.randn(WIDTH, generator=g, dtype=torch.float64))
    columns, rows = torch.randperm(WIDTH, generator=g), torch.randperm(ROWS, generator=g)
    moved = LayerReconstruction(
        (problem.weight / factors)[rows][:, columns],
        (problem.gram * factors * factors[:, None])[columns][:, columns],
        RowWise(0.5),
        ridge=0.01,
    )
    for solver in (ADMM(), Wanda(), Refit(Wanda())):
        here, there = solver.solve(problem), solver.solve(moved)
        assert there.objective == pytest.approx(here.objective, rel=1e-8)
        back = (there.solution["weight"])[rows.argsort()][:, columns.argsort()] * factors
        assert torch.allclose(back, here.solution["weight"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [ADMM(), Wanda(), SparseGPT(mask_scope="layer"), Refit(Wanda())], ids=str)
def test_with_unrelated_inputs_the_wanda_mask_is_optimal(solver) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    h = torch.diag(torch.rand(WIDTH, generator=g, dtype=torch.float64) + 0.1)
    problem = LayerReconstruction(w, h, Unstructured(0.5), ridge=0.0)
    score = w.abs() * h.diagonal().sqrt()
    best = torch.where(score >= score.flatten().sort(descending=True).values[ROWS * WIDTH // 2 - 1], w, 0)
    assert torch.allclose(solver.solve(problem).solution["weight"], best)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 8), (8, 1), (3, 5)])
@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT(), ADMM(), Refit(Magnitude())], ids=str)
def test_odd_shapes(solver, rows, width) -> None:
    problem = layer(Unstructured(0.5), rows=rows, width=width)
    assert problem.constraint.contains(solver.solve(problem).solution)


def test_the_order_of_the_field_holds() -> None:
    problem = layer(Unstructured(0.7), rows=64, width=64, tokens=512, dtype=torch.float32)
    errors = [s.solve(problem).objective for s in (ADMM(), ADMM.gradual(), SparseGPT(), Wanda(), Magnitude())]
    assert errors == sorted(errors)


def test_refusals_name_both_sides() -> None:
    for solver in (Wanda(), SparseGPT(), ADMM(), Refit(Magnitude())):
        with pytest.raises(TypeError, match=f"{type(solver).__name__} needs.*Bare"):
            solver.solve(Bare())
    with pytest.raises(TypeError, match="Bare lacks hessian, linear, minimizer"):
        Wanda().solve(Bare())

    class Ball:
        def project(self, v: Point, metric: Point | None = None) -> Point:
            return v * (1 / max(1.0, v.norm()))

        def contains(self, z: Point) -> bool:
            return z.norm() <= 1

    for solver in (SparseGPT(), ADMM(), Refit(Magnitude())):
        with pytest.raises(TypeError, match=f"{type(solver).__name__} needs a SupportConstraint.*Ball"):
            solver.solve(layer(Ball()))
    assert Magnitude().solve(layer(Ball())).solution.norm() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="inner solver or a start"):
        Refit().solve(layer(Unstructured(0.5)))


def test_a_member_that_is_none_is_missing_and_one_that_is_passed_on_is_there() -> None:
    class Dropped(LayerReconstruction):
        hessian = None
        refit = None

    class Passing:
        def __init__(self, inside: LayerReconstruction) -> None:
            self.inside = inside

        def __getattr__(self, name: str) -> object:
            return getattr(self.inside, name)

    problem = layer(CONSTRAINTS["half"])
    dropped = Dropped.__new__(Dropped)
    vars(dropped).update(vars(problem))
    with pytest.raises(TypeError, match=r"Wanda needs a Quadratic problem .* Dropped lacks hessian$"):
        Wanda().solve(dropped)
    with pytest.raises(TypeError, match="Dropped has neither a hessian nor a refit"):
        Refit(Magnitude()).solve(dropped)
    assert ADMM().solve(Passing(problem)).objective == ADMM().solve(problem).objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ADMM(max_iterations=-1), "max_iterations of ADMM must be at least 0, not -1"),
        (lambda: ADMM(time_limit=float("nan")), "time_limit of ADMM must be a number, not nan"),
        (lambda: ADMM(relaxation=2.0), "relaxation of ADMM must lie between 0 and 2, not 2.0"),
        (lambda: Constant(0.0), "value of Constant must be positive and finite, not 0.0"),
        (lambda: LogSpaced(0.0), "start of LogSpaced must be positive"),
        (lambda: LogSpaced(every=0), "every of LogSpaced must be at least 1, not 0"),
        (lambda: SupportDriven(limit=float("inf")), "limit of SupportDriven must be positive and finite"),
        (lambda: CubicSparsity(0), "over of CubicSparsity must be at least 1, not 0"),
        (lambda: SparseGPT(block=0), "block of SparseGPT must be at least 1, not 0"),
        (lambda: SparseGPT(mask_scope="layers"), r"unknown mask_scope 'layers' \(did you mean 'layer'\?\)"),
        (lambda: GroupOBS(batch=-1), "batch of GroupOBS must be at least 0, not -1"),
        (lambda: LocalSearch(candidates=0), "candidates of LocalSearch must be at least 1, not 0"),
        (lambda: SupportDescent(warm_up=0), "warm_up of SupportDescent must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_a_solve(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


ANY_START = [Magnitude(), Wanda(), SparseGPT(), ADMM(), LocalSearch(), Refit(Wanda()), BranchAndBound()]


@pytest.mark.parametrize("solver", ANY_START, ids=lambda solver: type(solver).__name__)
def test_a_start_of_another_form_is_refused_in_a_line(solver) -> None:
    problem = layer(RowWise(0.5))
    for start, message in (
        (Point(w=problem.weight), r"is a Point with \{'weight': \(6, 16\)\}, not one with \{'w': \(6, 16\)\}"),
        (Point(weight=problem.weight[:2]), r"not one with \{'weight': \(2, 16\)\}"),
        (problem.weight, "a start for LayerReconstruction is a Point .* not a Tensor"),
        (Point(weight=problem.weight * torch.nan), "the start contains NaN or Inf"),
    ):
        with pytest.raises(UserError, match=message):
            solver.solve(problem, start=start)
    narrow = solver.solve(problem, start=Point(weight=problem.weight.half()))
    assert narrow.solution["weight"].dtype is torch.float64


def test_schedules() -> None:
    log = LogSpaced(0.1, 10.0, over=5)
    assert [log.rho(t, 0.0, 0.0) for t in (0, 2, 4, 9)] == pytest.approx([0.1, 1.0, 10.0, 10.0])
    driven = SupportDriven()
    assert driven.rho(0, 0.0, 1.0) == 0.1
    assert [driven.rho(3, 1.0, c) for c in (0.5, 0.05, 0.001, 0.0)] == [1.3, 1.2, 1.1, 1.0]
    assert replace(ADMM.gradual(), refit=True).ramp.fraction(14) == 1.0


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT(), ADMM(), ADMM.gradual(), ADMM.alps()], ids=str)
@pytest.mark.parametrize("trouble", ["rank one", "dead", "huge channel", "half precision", "zero weight"])
def test_ill_posed_layers_stay_finite(solver, trouble) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, WIDTH, generator=g), torch.randn(ROWS, WIDTH, generator=g)
    if trouble == "rank one":
        x = x[:1]
    elif trouble == "dead":
        x[:, ::3] = 0
    elif trouble == "huge channel":
        x[:, 5] *= 1e4
    elif trouble == "half precision":
        w = (w * 2e4).half()
    else:
        w.zero_()
    problem = LayerReconstruction(w, x.T @ x, NofM(2, 4), ridge=0.0)
    result = solver.solve(problem)
    assert result.solution.is_finite()
    assert problem.constraint.contains(result.solution)
    # A float32 Gram of rank one has eigenvalues a little below zero.
    assert -1e-6 <= problem.relative_error(result.solution) <= 1.0
    assert trouble not in ("rank one", "dead") or result.notes


def test_a_direct_computation_that_overflows_gives_the_projected_start_and_says_so() -> None:
    problem = layer(CONSTRAINTS["half"])
    infinite = Point(weight=torch.full_like(problem.weight, torch.inf))
    result = closed_form(problem, infinite, 0.0, problem.initial())
    assert result.status is Status.NONFINITE
    assert torch.equal(result.solution["weight"], problem.constraint.project(problem.initial())["weight"])
    with pytest.raises(ArithmeticError, match="raise the ridge or the precision"):
        closed_form(problem, infinite, 0.0, None)


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT(), ADMM(), LocalSearch()], ids=str)
def test_where_no_value_is_finite_there_is_no_result(solver) -> None:
    """The Gram and the weights are finite, the values are not; a batch says so of the problem that it is about."""
    good, x = layer(Unstructured(0.5)), torch.eye(WIDTH, dtype=torch.float64)
    bad = LayerReconstruction(good.weight * 1e120, x * 1e100, good.constraint)
    assert bad.value(bad.constraint.project(bad.initial())) == torch.inf
    for solve in (lambda: solver.solve(bad), lambda: solve_batch(solver, [good, bad])):
        with pytest.raises(NonFiniteError, match="finite"):
            solve()


def test_a_note_of_the_problem_is_given_once_also_behind_an_inner_solver() -> None:
    x, w = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)), torch.ones(ROWS, WIDTH)
    x[:, 0] = 0
    problem = LayerReconstruction(w, x.T @ x, NofM(2, 4))
    assert Refit(SparseGPT()).solve(problem).notes.count(problem.notes[0]) == 1


def test_a_start_outside_the_set_is_projected_before_it_is_refitted() -> None:
    problem = layer(CONSTRAINTS["half"])
    result = Refit().solve(problem, start=problem.initial())
    assert problem.constraint.contains(result.solution)
    assert result.objective == Refit(Magnitude()).solve(problem).objective


@pytest.mark.parametrize(
    "solver", [GroupMask(), GroupOBS(), LocalSearch(), BruteForceGroups(), Magnitude(), Wanda(), ADMM()], ids=str
)
def test_a_result_with_nothing_to_prune_has_memory_of_its_own(solver) -> None:
    problem = layer(Groups(0.0))
    before = problem.weight.clone()
    solver.solve(problem).solution.mul_(0.0)
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize("outer", [Refit, LocalSearch])
def test_an_overflow_of_an_inner_solver_is_noted(outer) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 8, generator=g) * 1e8, torch.randn(3, 8, generator=g) * 1e15
    problem = LayerReconstruction(w, x.T @ x, Unstructured(0.5))
    assert ADMM().solve(problem).status is Status.NONFINITE
    assert any(note.startswith("the inner solver ended as NONFINITE") for note in outer(ADMM()).solve(problem).notes)
