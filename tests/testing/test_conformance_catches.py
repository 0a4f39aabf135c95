"""The conformance kit catches what is broken: each class breaks one promise and fails with the words of that one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, settings

from admm_prune.point import Point
from admm_prune.problem import Quadratic, Strips
from admm_prune.problems.constraints import Blocks, NofM, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Progress, Result, Status
from admm_prune.solvers.one_shot import Magnitude
from admm_prune.testing import assert_constraint_conforms, assert_problem_conforms, assert_solver_conforms
from admm_prune.testing.supports import OnlyStochastic
from tests.catalogue import layer, random_weight
from tests.third_party import Box, HardThresholding


@pytest.fixture(autouse=True, scope="module")
def without_shrinking() -> Iterator[None]:
    """That a class fails is all that is asked here; a simpler input that it fails on takes a second to find."""
    settings.register_profile("unshrunk", settings.get_profile("shared"), phases=[Phase.generate])
    settings.load_profile("unshrunk")
    yield
    settings.load_profile("shared")


@dataclass(frozen=True)
class Altered:
    """Magnitude, with its honest result changed."""

    def solve(self, problem, *, start=None) -> Result:
        return self.change(Magnitude().solve(problem, start=start), problem, start)

    def change(self, result: Result, problem, start) -> Result:
        return result


def evaluated(result: Result, problem, solution: Point) -> Result:
    return replace(result, solution=solution, objective=problem.value(solution))


class LiesAboutItsObjective(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, objective=result.objective * (1 - 1e-9))


class ReturnsTheDenseWeights(Altered):
    def change(self, result, problem, start) -> Result:
        return evaluated(result, problem, problem.initial().clone())


class RightCountWrongPlaces(Altered):
    """Keeps a count for a whole matrix where it should be in every row, group or tile."""

    def change(self, result, problem, start) -> Result:
        any_place = Unstructured(0.0, keep=result.solution.count_nonzero())
        return evaluated(result, problem, any_place.project(problem.initial()))


class PrunesMore(Altered):
    def change(self, result, problem, start) -> Result:
        if problem.constraint.contains(problem.initial()) or start is not None:
            return result
        fewer = Unstructured(0.0, keep=max(0, result.solution.count_nonzero() - 1))
        return evaluated(result, problem, fewer.project(result.solution))


class ModifiesTheStart(Altered):
    def change(self, result, problem, start) -> Result:
        if start is not None:
            start.mul_(0.5)
        return result


class ModifiesTheProblem(Altered):
    def change(self, result, problem, start) -> Result:
        if isinstance(problem, LayerReconstruction):
            problem.weight.mul_(1 + 1e-12)
        return evaluated(result, problem, result.solution)


class IsRandom(Altered):
    def change(self, result, problem, start) -> Result:
        if problem.constraint.contains(problem.initial()) or start is not None:
            return result
        score = problem.initial().map(torch.rand_like)
        mask = problem.constraint.select(score)
        return evaluated(result, problem, problem.initial().map(lambda w, kept: w * kept, mask))


class BoundsByItsOwnObjective(Altered):
    """A bound that no single result gives away: only the optimum does."""

    def change(self, result, problem, start) -> Result:
        return replace(result, bound=result.objective)


class BoundsByItsOwnObjectiveWhereNoOptimumIsKnown(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, bound=result.objective) if problem.initial().numel() > 12 else result


class ReturnsTheTensorOfTheProblem(Altered):
    def change(self, result, problem, start) -> Result:
        dense = problem.initial()
        return evaluated(result, problem, dense) if problem.constraint.contains(dense) else result


class BoundsAboveItsObjective(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, bound=result.objective * (1 + 1e-6))


class IgnoresTheStart(Altered):
    def solve(self, problem, *, start=None) -> Result:
        return Magnitude().solve(problem)


class RoundsTheDenseWeights(Altered):
    def change(self, result, problem, start) -> Result:
        return evaluated(result, problem, result.solution * (1 + 1e-15)) if start is None else result


class OverflowsInHalfPrecision(Altered):
    def change(self, result, problem, start) -> Result:
        through_half = result.solution.map(lambda w: w + 0 * w.half().square().to(w.dtype))
        return evaluated(result, problem, through_half)


class ModifiesALargeProblem(Altered):
    """As where a tile is converted to float64, which is no copy of float64, and then scaled in place."""

    def change(self, result, problem, start) -> Result:
        if isinstance(problem, LayerReconstruction):
            for tile in problem.gram.double().split(256)[1:]:
                tile *= 2
        return result


class ChangesTheDtype(Altered):
    def change(self, result, problem, start) -> Result:
        return evaluated(result, problem, result.solution.map(torch.Tensor.float))


class SaysItStalled(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, status=Status.STALLED)


class SaysItWasStopped(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, status=Status.STOPPED)


class MissedItsBest(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, iterations=1, history=(Progress(1, objective=result.objective - 1e-3),))


class IsWorseThanItsStart(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, start_objective=result.objective - 1e-3)


class CountsFromTwo(Altered):
    def change(self, result, problem, start) -> Result:
        return replace(result, iterations=2, history=(Progress(2), Progress(1)))


class RefusesEverything(Altered):
    def solve(self, problem, *, start=None) -> Result:
        raise TypeError(f"RefusesEverything can not do {type(problem).__name__}")


class RefusesWithoutAName(Altered):
    def solve(self, problem, *, start=None) -> Result:
        raise TypeError("unsupported operand")


class Crashes(Altered):
    def solve(self, problem, *, start=None) -> Result:
        raise KeyError("hessian")


@dataclass(frozen=True)
class RemembersInItself(Altered):
    calls: list[int] = field(default_factory=list)

    def change(self, result, problem, start) -> Result:
        self.calls.append(1)
        return result


@dataclass(frozen=True, kw_only=True)
class KeepsStateOutside(HardThresholding):
    """Steps that shrink with the number of steps of this call: forgotten when it continues."""

    taken: list[int] = field(default_factory=list, repr=False, compare=False)

    def check(self, problem) -> None:
        super().check(problem)
        self.taken.clear()

    def step(self, problem, state, iteration) -> None:
        self.taken.append(iteration)
        replace(self, step_size=self.step_size / len(self.taken)).descend(problem, state)

    def descend(self, problem, state) -> None:
        HardThresholding.step(self, problem, state, 0)


@dataclass(frozen=True, kw_only=True)
class MeasuresWhatItDoesNotReturn(HardThresholding):
    def measure(self, state, iteration) -> Progress:
        return Progress(iteration=iteration, objective=0.0)


@dataclass(frozen=True, kw_only=True)
class IsFeasibleOnlyAtTheEnd(HardThresholding):
    """Projects in its last iteration: stopped before, it returns what it has."""

    def step(self, problem, state, iteration) -> None:
        _, gradient = problem.value_and_gradient(state[0])
        state[0] = state[0] - self.step_size / problem.curvature * gradient
        if iteration + 1 >= 20:
            state[0] = problem.constraint.project(state[0])


@dataclass(frozen=True, kw_only=True)
class WithAnotherStatus(HardThresholding):
    """Says of every run that nothing interrupted that it ended as `says`."""

    says: ClassVar[Status]

    def solve(self, problem, *, start=None, state=None, watch=None) -> Result:
        result = super().solve(problem, start=start, state=state, watch=watch)
        return replace(result, status=self.says) if result.status is Status.MAX_ITERATIONS else result


class SaysSolvedWhenOutOfIterations(WithAnotherStatus):
    says = Status.SOLVED


class SaysClosedFormOfIterations(WithAnotherStatus):
    says = Status.CLOSED_FORM


class SaysItWasOutOfTime(WithAnotherStatus):
    says = Status.TIME_LIMIT


@dataclass(frozen=True, kw_only=True)
class StopsEarly(HardThresholding):
    """Half of the iterations, and says that all were used up."""

    def solve(self, problem, *, start=None, state=None, watch=None) -> Result:
        half = replace(self, max_iterations=(self.max_iterations + 1) // 2)
        return super(StopsEarly, half).solve(problem, start=start, state=state, watch=watch)


@dataclass(frozen=True, kw_only=True)
class ForgetsItsStart(HardThresholding):
    """Begins at zero, so that a good start stays the best point; continued, it knows the start no more."""

    def init(self, problem, start) -> list[Point]:
        (point,) = super().init(problem, start)
        return [point if start is None else point.zeros_like()]

    def solve(self, problem, *, start=None, state=None, watch=None) -> Result:
        result = super().solve(problem, start=start, state=state, watch=watch)
        return replace(result, state=replace(result.state, start=None))


BROKEN_SOLVERS: list[tuple[Callable[[], object], str]] = [
    (LiesAboutItsObjective, "report as objective exactly the value of its solution"),
    (ReturnsTheDenseWeights, "on layer, half must keep no more weights than the constraint admits; 96 of 48"),
    (RightCountWrongPlaces, "return a point of the constraint; .* in the wrong places"),
    (ModifiesTheStart, "not modify the start"),
    (ModifiesTheProblem, "not modify the problem; it changed"),
    (ModifiesALargeProblem, "on a layer of 300 x 600, half must not modify the problem; it changed"),
    (IsRandom, "same bits for the same problem made again"),
    (BoundsByItsOwnObjective, "give a bound that no feasible point is below|lower bound that is not above the optimum"),
    (BoundsByItsOwnObjectiveWhereNoOptimumIsKnown, "give a bound that no feasible point is below"),
    (ReturnsTheTensorOfTheProblem, "return memory of its own"),
    (BoundsAboveItsObjective, "give a bound not above its objective"),
    (IgnoresTheStart, "be never worse than the projection of the start"),
    (RoundsTheDenseWeights, "return the dense weights, bitwise, if nothing is to be pruned"),
    (OverflowsInHalfPrecision, "half precision, half must return a finite solution"),
    (ChangesTheDtype, "return a solution of the form of the dense weights; .*float32"),
    (SaysItStalled, "end with an ok status on a well-posed problem"),
    (SaysItWasStopped, "say STOPPED only where a watcher asked"),
    (MissedItsBest, "return the best point that it measured"),
    (IsWorseThanItsStart, "return nothing worse than its start"),
    (CountsFromTwo, "number its history"),
    (RefusesEverything, "must solve something; it refused everything: RefusesEverything can not do"),
    (RefusesWithoutAName, "name the solver and the problem .*; it raised TypeError: unsupported operand"),
    (Crashes, "on layer, half must solve, or refuse with a TypeError; it raised KeyError"),
    (RemembersInItself, "not modify its own settings"),
    (KeepsStateOutside, "continue from its state to the same bits"),
    (MeasuresWhatItDoesNotReturn, "return the best point that it measured"),
    (SaysSolvedWhenOutOfIterations, "say SOLVED only where its stopping test was met"),
    (SaysClosedFormOfIterations, "not say CLOSED_FORM of what it iterated"),
    (SaysItWasOutOfTime, "say TIME_LIMIT only where there is a limit"),
    (StopsEarly, "say MAX_ITERATIONS only where all were used up"),
    (ForgetsItsStart, "from a good start must return nothing worse than it when continued"),
    (IsFeasibleOnlyAtTheEnd, "= 1 must keep no more weights than the constraint admits"),
]


@pytest.mark.parametrize(("solver", "message"), BROKEN_SOLVERS, ids=[s.__name__ for s, _ in BROKEN_SOLVERS])
def test_broken_solvers(solver, message) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        assert_solver_conforms(solver())
    assert solver.__name__ in str(caught.value)


def test_an_optimum_that_is_lost() -> None:
    class ForgetsGoodStarts(Altered):
        def change(self, result, problem, start) -> Result:
            return Magnitude().solve(problem) if start is not None and len(start["weight"]) < 6 else result

    with pytest.raises(AssertionError, match="from the optimum must be never worse"):
        assert_solver_conforms(ForgetsGoodStarts())


class KeepsOneTooFew(Unstructured):
    def project(self, v, metric=None) -> Point:
        return Unstructured(self.sparsity, keep=max(0, self._count(v.numel()) - 1)).project(v, metric)


class IgnoresTheMetric(Unstructured):
    def project(self, v, metric=None) -> Point:
        return super().project(v)


class ComparesSquaresOfTheMetric(RowWise):
    def project(self, v, metric=None) -> Point:
        return super().project(v, None if metric is None else metric * metric)


class WritesIntoItsArgument(Unstructured):
    def project(self, v, metric=None) -> Point:
        return v.copy_(super().project(v, metric))


class RoundsWhatItKeeps(NofM):
    def project(self, v, metric=None) -> Point:
        return super().project(v, metric).map(lambda x: x.float().to(x.dtype))


class AnswersInFloat64(NofM):
    def project(self, v, metric=None) -> Point:
        return super().project(v, metric).map(torch.Tensor.double)


class TakesNaN(Unstructured):
    def project(self, v, metric=None) -> Point:
        return super().project(v.map(torch.nan_to_num), metric)


class LeavesZerosOut(RowWise):
    def select(self, score) -> Point:
        return super().select(score).map(lambda kept, s: kept & (s > 0), score)


class ContainsTooMuch(RowWise):
    def contains(self, z) -> bool:
        return Unstructured(self.sparsity).contains(z)


class ContainsOnlyFullOnes(Unstructured):
    def contains(self, z) -> bool:
        return z.count_nonzero() == self._count(z.numel())


class SharesRoundDown(Unstructured):
    def column_slice(self, start, stop, shape) -> Unstructured:
        return Unstructured(0.0, keep=int(self._count(shape[0] * shape[1]) * (stop - start) / shape[1]))


class TightensTooMuch(Unstructured):
    def scaled_to(self, fraction) -> Unstructured:
        return type(self)(self.sparsity * fraction**0.5 + 0.1 * (1 - fraction))


class TightensBackAndForth(Unstructured):
    def scaled_to(self, fraction) -> Unstructured:
        return type(self)(self.sparsity * {0.3: 0.9, 0.7: 0.4}.get(fraction, fraction))


BROKEN_CONSTRAINTS = [
    (KeepsOneTooFew(0.5), "closest point of all supports|full support"),
    (IgnoresTheMetric(0.5), "closest point of all supports that it admits; its projection costs"),
    (ComparesSquaresOfTheMetric(0.5), "closest point of all supports"),
    (WritesIntoItsArgument(0.5), "not modify the arguments of project"),
    (RoundsWhatItKeeps(2, 3), "keep the entries of v that it does not drop, bitwise|closest point"),
    (AnswersInFloat64(2, 3), "float16 must keep names, shapes, dtypes"),
    (TakesNaN(0.5), "refuse a point that contains NaN"),
    (LeavesZerosOut(0.5), "full size, also where scores are zero"),
    (ContainsTooMuch(0.5), "closest point of all supports|full size"),
    (ContainsOnlyFullOnes(0.5), "contain"),
    (SharesRoundDown(0.3), "columns cut at .* must have shares that add up"),
    (TightensTooMuch(0.5), r"prune nothing when scaled_to\(0\)"),
    (TightensBackAndForth(0.5), "shrink as the fraction of scaled_to rises"),
]


@pytest.mark.parametrize(
    ("broken", "message"), BROKEN_CONSTRAINTS, ids=[type(broken).__name__ for broken, _ in BROKEN_CONSTRAINTS]
)
def test_broken_constraints(broken: SparseSet, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        assert_constraint_conforms(broken)
    assert type(broken).__name__ in str(caught.value)


class ByIndexBelowFloat64(RowWise):
    def select(self, score) -> Point:
        exact = all(x.dtype is torch.float64 for x in score.values())
        return super().select(score if exact else score.map(torch.ones_like))


class KeepsTheHigherOfEqualScores(RowWise):
    def select(self, score) -> Point:
        return super().select(score.map(lambda s: s.flip(1))).map(lambda kept: kept.flip(1))


class OneBudgetForAllMatrices(Unstructured):
    def select_each(self, score) -> torch.Tensor:
        return super().select(Point(weight=score.flatten(0, 1)))["weight"].view(score.shape)


class TightensByTheSquare(Unstructured):
    def scaled_to(self, fraction) -> Unstructured:
        return type(self)(self.sparsity * fraction**2)


class TightensToAnotherKind(RowWise):
    def scaled_to(self, fraction) -> RowWise | Unstructured:
        return self if fraction == 1 else Unstructured(self.sparsity * fraction)


class SharesGoToTheFirst(Unstructured):
    def column_slice(self, start, stop, shape) -> Unstructured:
        budget = self._count(shape[0] * shape[1])
        return Unstructured(0.0, keep=min(budget, shape[0] * stop) - min(budget, shape[0] * start))


class OverlooksNaN(Unstructured):
    def contains(self, z) -> bool:
        return super().contains(z.map(torch.nan_to_num))


class OverlooksTinyEntries(Unstructured):
    def contains(self, z) -> bool:
        return super().contains(z.map(lambda x: x.masked_fill(x.abs() < 1e-12, 0)))


class ReturnsItsArgument(Unstructured):
    def project(self, v, metric=None) -> Point:
        z = super().project(v, metric)
        return v if all(torch.equal(z[name], v[name]) for name in v) else z


class InheritsItsRuns(Unstructured):
    """Budgets per row, with the runs of a budget for the matrix: they are read on GPUs alone."""

    def select(self, score) -> Point:
        return RowWise(self.sparsity).select(score)

    def select_each(self, score) -> torch.Tensor:
        return RowWise(self.sparsity).select_each(score)

    def contains(self, z) -> bool:
        return RowWise(self.sparsity).contains(z)

    def column_slice(self, start, stop, shape):
        return RowWise(self.sparsity).column_slice(start, stop, shape)


class ClaimsColumns(RowWise):
    def strips(self, shape) -> tuple[Strips]:
        return (Strips(shape[0], shape[0], 1),)


class ClaimsOneBudget(RowWise):
    def strips(self, shape) -> tuple[Strips]:
        return (Strips(shape[0], 1, 1),)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ByIndexBelowFloat64(0.5), "select in each dtype as in float64|closest|full support"),
        (KeepsTheHigherOfEqualScores(0.5), "select the lowest indices among supports of equal sums"),
        (OneBudgetForAllMatrices(0.5), "select in select_each what select selects"),
        (TightensByTheSquare(0.5), "prune in proportion to the fraction of scaled_to"),
        (TightensToAnotherKind(0.5), "be of its own class and group width"),
        (SharesGoToTheFirst(0.5), "share its budget in proportion"),
        (OverlooksNaN(0.5), "count every entry that is not zero in contains; nan"),
        (OverlooksTinyEntries(0.5), "count every entry that is not zero in contains; 1e-300"),
        (ReturnsItsArgument(0.5), "return a new point from project"),
        (
            InheritsItsRuns(0.5),
            "select the largest scores of each of its runs, or have `runs` return None; 6 of every 12",
        ),
        (ClaimsColumns(0.5), "select whole tiles of its strips"),
        (ClaimsOneBudget(0.5), "contain its members with the tiles of a strip exchanged"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_constraints_that_used_to_pass(broken, message) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        assert_constraint_conforms(broken, examples=2)
    assert type(broken).__name__ in str(caught.value)


def test_large_sets_are_seen_through_too() -> None:
    class DropsTheLastTile(Blocks):
        def project(self, v, metric=None) -> Point:
            z = super().project(v, metric)
            z["weight"][-self.height :, -self.width :] = 0
            return z

    class CountsPerMatrix(RowWise):
        def select(self, score) -> Point:
            return Unstructured(self.sparsity).select(score)

    for broken in (DropsTheLastTile(0.5, 2, 4), CountsPerMatrix(0.6)):
        with pytest.raises(AssertionError, match=type(broken).__name__):
            assert_constraint_conforms(broken, shape=(4, 12))


def test_a_box_that_is_not_closed_under_its_projection() -> None:
    class Shrinks(Box):
        def project(self, v, metric=None) -> Point:
            return 0.9 * super().project(v, metric)

    class IsNotClosest(Box):
        def project(self, v, metric=None) -> Point:
            return super().project(v).map(lambda inside, x: inside if inside.equal(x) else x / x.abs().amax(), v)

    with pytest.raises(AssertionError, match="change nothing by projecting twice"):
        assert_constraint_conforms(Shrinks())
    with pytest.raises(AssertionError, match="project to the closest of its points"):
        assert_constraint_conforms(IsNotClosest())


def test_a_constraint_that_shows_half_of_a_protocol() -> None:
    class Half(Box):
        def select(self, score) -> Point:
            return score.map(torch.isfinite)

    with pytest.raises(AssertionError, match=r"show all of a SupportConstraint; it lacks .*group_width"):
        assert_constraint_conforms(Half())


class Changed(LayerReconstruction):
    """A layer on which a subclass breaks one promise."""

    @classmethod
    def of(cls, seed: int) -> Changed:
        right = layer(Unstructured(0.5), rows=3, width=6, seed=seed)
        return cls(right.weight, right.gram, right.constraint, ridge=0.01)


class WrongGradient(Changed):
    def value_and_gradient(self, x) -> tuple[float, Point]:
        return self.value(x), Point(weight=x["weight"] @ self.hessian - self.linear)  # half of it


class GradientOfAnother(Changed):
    def value_and_gradient(self, x) -> tuple[float, Point]:
        return self.value(x) + 1, Point(weight=2 * (x["weight"] @ self.hessian - self.linear))


class ProxAtTwiceRho(Changed):
    def prox(self, v, rho) -> Point:
        return super().prox(v, 2 * rho)


class ProxWithoutCurvature(Changed):
    def prox(self, v, rho) -> Point:
        return super().prox(v, rho / self.curvature)


class ProxWithALittleNoise(Changed):
    def prox(self, v, rho) -> Point:
        return super().prox(v, rho) + Point(weight=1e-5 * self.weight)


class RefitLeavesTheMask(Changed):
    def refit(self, mask) -> Point:
        return super().refit(mask).map(lambda v: v + 1e-20)


class RefitDoesNotFit(Changed):
    def refit(self, mask) -> Point:
        return Point(weight=self.weight * mask["weight"])


class HessianOfTwice(Changed):
    @property
    def hessian(self) -> torch.Tensor:
        return 2 * self._right.hessian

    @property
    def _right(self) -> LayerReconstruction:
        return LayerReconstruction(self.weight, self.gram, self.constraint, ridge=0.01)

    def value(self, x) -> float:
        return self._right.value(x)


class SkewHessian(Changed):
    @property
    def linear(self) -> torch.Tensor:
        return self.minimizer @ super().hessian

    @property
    def hessian(self) -> torch.Tensor:
        right = LayerReconstruction(self.weight, self.gram, self.constraint, ridge=0.01).hessian
        return right + 1e-6 * right.diagonal().mean() * torch.ones_like(right).triu(1)


class WrongLinear(Changed):
    @property
    def linear(self) -> torch.Tensor:
        return super().linear * (1 + 1e-6)


class WrongMinimizer(Changed):
    @property
    def minimizer(self) -> torch.Tensor:
        return self.weight * (1 + 1e-4)

    def value(self, x) -> float:
        return LayerReconstruction(self.weight, self.gram, self.constraint, ridge=0.01).value(x)

    @property
    def linear(self) -> torch.Tensor:
        return self.weight @ self.hessian


class CurvatureOfTheHessian(Changed):
    @property
    def curvature(self) -> float:
        return 2 * float(self.hessian.diagonal().mean())


class ValueDrifts(Changed):
    drift = count()

    def value(self, x) -> float:
        return super().value(x) + next(self.drift)


class ValueIsATensor(Changed):
    def value(self, x) -> float:
        return torch.tensor(super().value(x))


class ChangesItsInitialPoint(Changed):
    def refit(self, mask) -> Point:
        self.weight.mul_(1 + 1e-9)
        return super().refit(mask)


class ChangesItsArgument(Changed):
    def prox(self, v, rho) -> Point:
        return v.copy_(super().prox(v, rho))


class SamplesAreNotRepeated(Changed):
    def sample_gradient(self, x, draw) -> tuple[float, Point]:
        return self.value(x), x.map(torch.rand_like)


class BlocksLeaveHalfOut(Changed):
    order = ("weight",)

    def block(self, name, x) -> LayerReconstruction:
        return LayerReconstruction(self.weight, self.gram / 2, self.constraint, ridge=0.01)


class MinimumOfAnotherSet(Changed):
    def minimize(self) -> Point:
        return Point(weight=self.minimizer)


class MinimizesNothing(Changed):
    def minimize(self) -> Point:
        return self.initial().zeros_like()


class InBlocks(Changed):
    """The layer as its own only block."""

    order = ("weight",)

    def block(self, name, x) -> LayerReconstruction:
        return LayerReconstruction(self.weight, self.gram, self.constraint, ridge=0.01)

    def part(self, x, name) -> Point:
        return x

    def joined(self, x, name, block, solution) -> Point:
        return solution

    def validation_loss(self, x) -> float:
        return self.value(x)


class JoinsNothing(InBlocks):
    def joined(self, x, name, block, solution) -> Point:
        return x


class JoinsHalf(InBlocks):
    def joined(self, x, name, block, solution) -> Point:
        return 0.5 * (x + solution)


class JudgesByATensor(InBlocks):
    def validation_loss(self, x) -> float:
        return torch.tensor(self.value(x))


class Viewed(OnlyStochastic):
    """A layer of which values and sampled gradients are seen alone, with a subclass's fault."""

    @classmethod
    def of(cls, seed: int) -> Viewed:
        return cls(layer(Unstructured(0.5), rows=3, width=6, seed=seed))


class CurvatureAHundredTimesTooLarge(Viewed):
    @property
    def curvature(self) -> float:
        return 100 * super().curvature


class CurvatureAHundredTimesTooSmall(Viewed):
    @property
    def curvature(self) -> float:
        return super().curvature / 100


class SamplesHalfTheLoss(Viewed):
    def sample_gradient(self, x, draw) -> tuple[float, Point]:
        loss, gradient = super().sample_gradient(x, draw)
        return loss / 2, 0.5 * gradient


class SamplesAnotherTarget(Viewed):
    def sample_gradient(self, x, draw) -> tuple[float, Point]:
        return super().sample_gradient(x - 0.3 * self.initial(), draw)


BROKEN_PROBLEMS = [
    (CurvatureAHundredTimesTooLarge, "have as curvature half the mean diagonal of the Hessian of its value"),
    (CurvatureAHundredTimesTooSmall, "have as curvature half the mean diagonal of the Hessian of its value"),
    (SamplesHalfTheLoss, "sample losses whose mean over the draws differs between two points as its value does"),
    (SamplesAnotherTarget, "sample losses whose mean over the draws differs between two points as its value does"),
    (WrongGradient, "as a Differentiable must give a gradient that equals central differences"),
    (GradientOfAnother, "give the value that `value` gives"),
    (ProxAtTwiceRho, r"minimize value\(x\) \+ rho \* curvature"),
    (ProxWithoutCurvature, r"minimize value\(x\) \+ rho \* curvature"),
    (ProxWithALittleNoise, r"minimize value\(x\) \+ rho \* curvature"),
    (RefitLeavesTheMask, "refit to a point that vanishes off the mask"),
    (RefitDoesNotFit, "refit to the minimum on the mask"),
    (HessianOfTwice, r"have the value tr\(V A V\^T\)"),
    (SkewHessian, "have a symmetric hessian"),
    (WrongLinear, r"have the value tr\(V A V\^T\)"),
    (WrongMinimizer, "at its minimizer"),
    (CurvatureOfTheHessian, "have as curvature the mean diagonal of A"),
    (ValueDrifts, "return the same when value is called again"),
    (ValueIsATensor, "have a finite float as value"),
    (ChangesItsInitialPoint, "not change its initial point|return the same"),
    (ChangesItsArgument, "not modify the arguments of prox|return the same when prox"),
    (SamplesAreNotRepeated, "return the same when sample_gradient is called again"),
    (BlocksLeaveHalfOut, "have blocks whose values differ as its own do"),
    (MinimumOfAnotherSet, "have a minimum that lies in its constraint"),
    (MinimizesNothing, "as a Minimizable must give its minimum"),
    (JoinsNothing, "join a solution of the block"),
    (JoinsHalf, "return as part what it joined"),
    (JudgesByATensor, "return a finite float from `validation_loss`"),
]


@pytest.mark.parametrize(("problem", "message"), BROKEN_PROBLEMS, ids=[p.__name__ for p, _ in BROKEN_PROBLEMS])
def test_broken_problems(problem, message) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        assert_problem_conforms(problem.of)
    assert f"{problem.__name__} on seed" in str(caught.value)


class Judged(InBlocks):
    """The layer, judged by the error against other weights, its held-out data."""

    held_out: torch.Tensor

    @classmethod
    def of(cls, seed: int, held_out: int = 1) -> Judged:
        problem = super().of(seed)
        problem.held_out = random_weight(3, 6, held_out)
        return problem

    def validation_loss(self, x) -> float:
        return float((x["weight"] - self.held_out).square().sum())


class FitsOnHeldOutData(Judged):
    def refit(self, mask) -> Point:
        return super().refit(mask) + Point(weight=1e-14 * self.held_out * mask["weight"])


class ItsBlockFitsOnHeldOutData(Judged):
    def block(self, name, x) -> LayerReconstruction:
        weight = self.weight + 1e-14 * self.held_out
        return LayerReconstruction(weight, self.gram, self.constraint, ridge=0.01)


class CurvatureOfHeldOutData(Judged):
    @property
    def curvature(self) -> float:
        return super().curvature * (1 + 1e-12 * float(self.held_out.norm()))


class JudgesByWhatItFits(Judged):
    def validation_loss(self, x) -> float:
        return self.value(x)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (FitsOnHeldOutData, "have a refit that does not depend on held-out data"),
        (ItsBlockFitsOnHeldOutData, "of block weight that does not depend on held-out data"),
        (CurvatureOfHeldOutData, "have a curvature that does not depend on held-out data"),
        (JudgesByWhatItFits, "use its held-out data in `validation_loss`"),
    ],
)
def test_problems_that_fit_on_held_out_data(problem, message) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_problem_conforms(problem.of, other_held_out=partial(problem.of, held_out=2))


def test_a_problem_that_holds_out_data_is_sound() -> None:
    assert_problem_conforms(Judged.of, other_held_out=partial(Judged.of, held_out=2), examples=3)


def test_the_layer_that_they_break_is_sound() -> None:
    assert isinstance(Changed.of(0), Quadratic)
    assert_problem_conforms(Changed.of)
    assert_problem_conforms(InBlocks.of)


def test_the_solver_that_they_break_is_sound() -> None:
    assert_solver_conforms(Altered())


def test_a_part_that_fails_now_and_then_is_said_to() -> None:
    calls = count()

    class NowAndThen(Unstructured):
        def project(self, v, metric=None) -> Point:
            return super().project(v, metric) if next(calls) != 150 else v.clone()

    with pytest.raises(AssertionError, match="the same input gave two outcomes"):
        assert_constraint_conforms(NowAndThen(0.5))


def test_one_that_prunes_more_than_asked() -> None:
    with pytest.raises(AssertionError, match="keep as many weights as the constraint admits"):
        assert_solver_conforms(PrunesMore())
    assert_solver_conforms(PrunesMore(), fills=False)
