"""Problems solved in batches end as they end alone: bitwise on the CPU, up to the rounding of products on a GPU.

A GPU adds the terms of a batched product in another order than those of a single one. In float64 this moves no score
across a threshold: the supports are equal, and the weights to 1e-9. In float32 and bfloat16 it does, and a support that
differs in one place leads to another local minimum: there the mean over several problems is compared, which must be
large enough that a single place does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune import ADMM, LayerReconstruction, NofM, RowWise, Status, Unstructured
from admm_prune.errors import UserError
from admm_prune.ops import backend
from admm_prune.ops import precision as products
from admm_prune.plan.counting import counted, measured_cost
from admm_prune.problems.constraints import Blocks, SparseSet, StackedRows
from admm_prune.result import Result
from admm_prune.solvers import admm_state, together
from admm_prune.solvers.base import Solver
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.schedules import Constant
from admm_prune.testing.instances import correlated_inputs, random_weight
from admm_prune.testing.supports import OnlyProximable

ROWS, WIDTH = 6, 16
LARGER = 8  # times as many rows and columns, where the error of a solution is compared
CONSTRAINTS: dict[str, SparseSet] = {
    "70%": Unstructured(0.7),
    "rows": RowWise(0.5),
    "rows, uneven": RowWise(0.45),
    "2:4": NofM(2, 4),
    "stacked": StackedRows(((3, Unstructured(0.6)), (3, Unstructured(0.6)))),
    "stacked, unlike": StackedRows(((2, NofM(2, 4)), (4, RowWise(0.5)))),
    "tiles": Blocks(0.5, 2, 4),
}
SOLVERS: dict[str, ADMM] = {
    "default": ADMM(),
    "gradual": ADMM.gradual(),
    "alps": ADMM.alps(),
    "watched": ADMM(objective_every=3, max_iterations=10),
    "frozen": ADMM(freeze_after=5, max_iterations=12),
}


@pytest.fixture(params=["cpu", "device", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`device` is the CPU treated as a device that the host does not wait for."""
    if request.param == "device":
        monkeypatch.setattr(backend, "on_device", lambda x: True)
    return request.param


def drawn(
    seed: int,
    constraint: SparseSet,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    loud: float = 1.0,
    larger: int = 1,
) -> LayerReconstruction:
    rows, width = larger * ROWS, larger * WIDTH
    x = correlated_inputs(5 * width, width, seed, torch.float64)
    x[:, 0] *= loud
    weight, gram = random_weight(rows, width, seed, torch.float64).to(dtype), (x.T @ x).to(dtype)
    where = "cuda" if device == "cuda" else "cpu"
    return LayerReconstruction(weight.to(where), ((gram + gram.T) / 2).to(where), constraint)


def several(
    constraint: SparseSet, device: str = "cpu", dtype: torch.dtype = torch.float32, larger: int = 1
) -> list[LayerReconstruction]:
    return [drawn(seed, constraint, device, dtype, 10.0**seed, larger) for seed in range(4)]


def same_up_to_rounding(ours: Result, alone: Result) -> None:
    """In float64: equal supports at every iteration, and so equal penalties and numbers of iterations."""
    a, b = ours.solution["weight"], alone.solution["weight"]
    assert torch.equal(a != 0, b != 0)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert (ours.status, ours.iterations, ours.notes) == (alone.status, alone.iterations, alone.notes)
    assert [(p.iteration, p.rho, p.support_changes) for p in ours.history] == [
        (p.iteration, p.rho, p.support_changes) for p in alone.history
    ]


def told(result: Result) -> tuple[object, ...]:
    """All that is not a tensor or a time."""
    history = [replace(progress, seconds=0.0) for progress in result.history]
    return result.status, result.iterations, result.best_iteration, result.objective, history, result.notes


def same(ours: Result, alone: Result) -> None:
    assert torch.equal(ours.solution["weight"], alone.solution["weight"])
    assert told(ours) == told(alone)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("target", CONSTRAINTS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_problem_ends_as_alone(device, name, target) -> None:
    compare, dtype = (same_up_to_rounding, torch.float64) if device == "cuda" else (same, torch.float32)
    problems = several(CONSTRAINTS[target], device, dtype)
    alone = [SOLVERS[name].solve(problem) for problem in problems]
    for ours, theirs in zip(SOLVERS[name].solve_all(problems), alone, strict=True):
        compare(ours, theirs)


@pytest.mark.parametrize("target", ["70%", "2:4"])
@pytest.mark.parametrize("name", ["default", "gradual"])
def test_another_order_of_sums_gives_solutions_of_the_same_quality(device, name, target, monkeypatch) -> None:
    """In float32; in float64 the same supports. On the CPU the other order is emulated: the terms are reversed."""

    def reversed_terms(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        for one, by, into in zip(a, b, out, strict=True):
            products.multiply(one.flip(-1).contiguous(), by.flip(-2).contiguous(), out=into)
        return out

    if device != "cuda":
        monkeypatch.setattr(products, "_multiply_each", reversed_terms)
    problems = several(CONSTRAINTS[target], device, larger=LARGER)
    alone = [SOLVERS[name].solve(problem) for problem in problems]
    batch = SOLVERS[name].solve_all(problems)
    ratios = [math.log(ours.objective / theirs.objective) for ours, theirs in zip(batch, alone, strict=True)]
    assert abs(sum(ratios)) / len(ratios) <= 1e-2
    assert all(problem.constraint.contains(ours.solution) for problem, ours in zip(problems, batch, strict=True))
    problems = several(CONSTRAINTS[target], device, torch.float64)
    for ours, theirs in zip(SOLVERS[name].solve_all(problems), map(SOLVERS[name].solve, problems), strict=True):
        same_up_to_rounding(ours, theirs)


def test_they_step_together(monkeypatch) -> None:
    """One factorization serves all: 8 penalties, not 8 for each."""
    counts: list[tuple[int, ...]] = []
    real = torch.linalg.cholesky

    def counting(matrix: Tensor) -> Tensor:
        counts.append(tuple(matrix.shape))
        return real(matrix)

    problems = several(Unstructured(0.7))
    monkeypatch.setattr(torch.linalg, "cholesky", counting)
    ADMM().solve_all(problems)
    assert counts == [(4, WIDTH, WIDTH)] * 8


def test_one_that_stops_is_left_as_it_is_while_others_go_on(device) -> None:
    """With a penalty that does not move they go together to the end: each stops when it is done, not when all are."""
    solver = ADMM(penalty=Constant(1.0, every=2), relaxation=1.0, tolerance=2e-2, max_iterations=60, fast_until=0)
    compare, dtype = (same_up_to_rounding, torch.float64) if device == "cuda" else (same, torch.float32)
    problems = several(Unstructured(0.5), device, dtype)
    batch, alone = solver.solve_all(problems), [solver.solve(problem) for problem in problems]
    assert len({result.iterations for result in alone}) > 1
    assert {result.status for result in alone} == {Status.SOLVED}
    for ours, theirs in zip(batch, alone, strict=True):
        compare(ours, theirs)


def test_penalties_that_part_part_the_batch(monkeypatch) -> None:
    parted = []
    real = admm_state.Batch.part
    monkeypatch.setattr(admm_state.Batch, "part", lambda self: parted.append(len(self.members)) or real(self))
    problems = several(Unstructured(0.7))
    results = ADMM.alps().solve_all(problems)
    assert len({result.history[-1].rho for result in results}) > 1
    assert parted


def test_each_goes_on_from_its_own_state(device) -> None:
    """10 iterations in a batch and 22 alone are 32."""
    problems = several(Unstructured(0.7), device, torch.float64)
    for problem, part in zip(problems, ADMM(max_iterations=10).solve_all(problems), strict=True):
        joined, whole = ADMM().solve(problem, state=part.state), ADMM().solve(problem)
        torch.testing.assert_close(joined.solution["weight"], whole.solution["weight"], rtol=1e-9, atol=1e-12)
        assert [p.support_changes for p in joined.history] == [p.support_changes for p in whole.history]
        assert part.state is not None
        assert part.state.inner.z["weight"].untyped_storage().nbytes() == part.state.inner.z["weight"].nbytes


def test_numbers_that_overflow_in_one_leave_the_others_alone(device) -> None:
    """On a device the rest of the batch goes on; on the CPU, where it is refused at once, each is solved alone."""
    good = several(Unstructured(0.5), device)
    base = good[1]
    bad = LayerReconstruction(base.weight * 1e25, base.gram * 1e30, base.constraint)
    problems = [good[0], bad, good[2]]
    results = together.solve_batch(ADMM(), problems)
    assert [result.status is Status.NONFINITE for result in results] == [False, True, False]
    assert results[1].solution.is_finite()
    if device != "cuda":
        for position in (0, 2):
            same(results[position], ADMM().solve(problems[position]))


class Indefinite(LayerReconstruction):
    """A Hessian that no factorization takes."""

    @property
    def hessian(self) -> Tensor:
        matrix = super().hessian
        matrix[0, 0] *= 1e-9
        matrix[0, 1] = matrix[1, 0] = matrix[1, 1]
        return matrix


def test_one_that_cannot_be_solved_says_so_itself(device) -> None:
    @contextmanager
    def naming(name: str) -> Generator[None]:
        try:
            yield
        except LinAlgError as error:
            raise UserError(f"{name}: {error}") from error

    good = several(Unstructured(0.5), device)
    problems = [good[0], Indefinite(good[1].weight, good[1].gram, good[1].constraint), good[2]]
    with pytest.raises(UserError, match=r"^w1: .*positive"):
        together.solve_batch(ADMM(), problems, [naming(f"w{i}") for i in range(3)])


def test_what_cannot_be_taken_together_is_not() -> None:
    """Other sets, other shapes, and solvers without batches: results in order, each as alone."""
    mixed = [drawn(0, Unstructured(0.7)), drawn(1, NofM(2, 4)), drawn(2, Unstructured(0.7))]
    wide = LayerReconstruction(random_weight(3, 8, 0).float(), torch.eye(8), Unstructured(0.7))
    problems = [*mixed, wide]
    assert together.batches(ADMM(), [together.Shape.of(p) for p in problems]) == [[0, 2], [1], [3]]
    solvers: list[Solver] = [ADMM(max_iterations=4), LocalSearch(ADMM(max_iterations=4))]
    for solver in solvers:
        for ours, problem in zip(together.solve_all(solver, problems), problems, strict=True):
            same(ours, solver.solve(problem))
    for ours, problem in zip(ADMM(max_iterations=4).solve_all(mixed), mixed, strict=True):  # asked for directly
        same(ours, ADMM(max_iterations=4).solve(problem))
    proximal = [OnlyProximable(problem) for problem in mixed]
    for ours, problem in zip(ADMM(max_iterations=4).solve_all(proximal), proximal, strict=True):
        same(ours, ADMM(max_iterations=4).solve(problem))
    assert ADMM().solve_all([]) == []


def test_a_batch_is_cut_so_that_it_fits(monkeypatch) -> None:
    """What a batch takes beyond its problems, counted, is no more than was said."""
    problems = several(Unstructured(0.7)) * 3
    each = 4 * (6 * ROWS * WIDTH + 5 * WIDTH**2)
    monkeypatch.setattr(together, "MOST_BYTES_ON_CPU", 5 * each + each // 2)
    shapes = [together.Shape.of(problem) for problem in problems]
    assert [len(batch) for batch in together.batches(ADMM(), shapes)] == [5, 5, 2]
    large = replace(shapes[0], rows=4096, width=4096)
    assert large.most == 1
    with monkeypatch.context() as patch:
        patch.setattr(backend, "on_device", lambda x: True)
        assert large.most == 5  # 4 GiB


@pytest.mark.parametrize(("rows", "width"), [(64, 96), (160, 64), (40, 128)])
def test_the_bound_of_a_batch_holds(rows, width) -> None:
    problems = []
    for seed in range(16):
        x = correlated_inputs(3 * width, width, seed).float()
        problems.append(LayerReconstruction(random_weight(rows, width, seed).float(), x.T @ x, Unstructured(0.7)))
    with counted() as counting, measured_cost(counting) as found:
        ADMM(max_iterations=6).solve_all(problems)
    assert found.peak <= 16 * 4 * (6 * rows * width + 5 * width**2)
