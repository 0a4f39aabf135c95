"""Solvers on a GPU beside their own float64 solves on the CPU; the same bodies on the CPU at small shapes.

On the CPU `device` also stands for a device that the host does not wait for, but on which no Triton runs: what is done
there (measures read in bulk, products split in bfloat16, inverses by products) is done with plain torch.
"""

from __future__ import annotations

import math

import pytest
import torch

from admm_prune import ADMM, LayerReconstruction, NofM, Status
from admm_prune.ops import backend, quadratic, selection
from admm_prune.ops import precision as products
from admm_prune.problems.constraints import RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.result import Result
from admm_prune.solvers.base import Solver
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.refit import Refit

SHAPES = {"cpu": ((32, 48), (17, 29)), "device": ((32, 48), (17, 29)), "cuda": ((512, 1024), (1000, 333))}
# Beside solves in float64 on one core. No single row: one other place in its support is some percent of its error.
COMPARED = {**SHAPES, "cuda": ((256, 384), (300, 111))}
SOLVERS: dict[str, tuple[Solver, float]] = {  # with the error that float32 may add, relative
    "magnitude": (Magnitude(), 1e-5),
    "wanda": (Wanda(), 1e-5),
    "sparsegpt": (SparseGPT(), 5e-3),
    "sparsegpt-polished": (Refit(SparseGPT()), 5e-3),
    "admm-fast": (ADMM.fast(), 3e-2),  # products in bfloat16 choose a support as good, not the same one
    "admm": (ADMM(), 3e-2),
    "admm-best": (LocalSearch(ADMM.best()), 3e-2),
    "alps": (ADMM.alps(), 5e-3),
    "gradual": (ADMM.gradual(), 5e-3),
}
DRAWS = 3
LONG = {"admm-best", "alps"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in SOLVERS]


@pytest.fixture(params=["cpu", "device", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "device":
        monkeypatch.setattr(backend, "on_device", lambda x: True)
    return request.param


def torch_device(device: str) -> str:
    return "cuda" if device == "cuda" else "cpu"


def problem(
    shape: tuple[int, int], constraint: SparseSet, device: str, dtype: torch.dtype, seed: int = 0
) -> LayerReconstruction:
    """Correlated inputs with a few loud channels. The problem is drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(seed + shape[0])
    rows, width = shape
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(6 * width, width, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(width))
    x[:, :2] *= 12
    w = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    # Both see the numbers that float32 holds.
    weight, gram = w.float().to(dtype), (x.T @ x).float().to(dtype)
    gram = (gram + gram.T) / 2
    return LayerReconstruction(weight.to(torch_device(device)), gram.to(torch_device(device)), constraint)


def solved(solver: Solver, shape: tuple[int, int], constraint: SparseSet, device: str, seed: int = 0) -> Result:
    return solver.solve(problem(shape, constraint, device, torch.float32, seed))


def pattern(name: str, shape: tuple[int, int]) -> SparseSet:
    """Where the width is odd, groups of one: 61 and 333 have few divisors."""
    if name == "2:4":
        return NofM(2, 4) if shape[1] % 4 == 0 else NofM(1, shape[1] // (3 if shape[1] % 3 == 0 else 1))
    if name == "stacked":
        half = shape[0] // 2
        return StackedRows(((half, Unstructured(0.6)), (shape[0] - half, Unstructured(0.6))))
    return RowWise(0.5) if name == "rows" else Unstructured(0.7)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["70%", "2:4"])
def test_a_solve_is_as_good_as_in_float64(device, name, target) -> None:
    """In the geometric mean over fresh layers: which local minimum a search ends in may hang on the last digit."""
    solver, tolerance = SOLVERS[name]
    for shape in COMPARED[device]:
        ratios = []
        for seed in range(DRAWS):
            constraint = pattern(target, shape)
            ours = solved(solver, shape, constraint, device, seed)
            exact = problem(shape, constraint, "cpu", torch.float64, seed)
            reference = exact.relative_error(solver.solve(exact).solution)
            ratios.append(exact.relative_error(ours.solution.map(lambda x: x.cpu().double())) / reference)
            assert exact.constraint.contains(ours.solution)
            assert ours.solution["weight"].device.type == torch_device(device)
        assert abs(math.log(math.prod(ratios))) / DRAWS <= tolerance, f"{shape}: {ratios}"


@pytest.mark.parametrize("name", NAMES)
def test_a_single_row_in_float64_has_the_support_that_it_has_on_the_cpu(device, name) -> None:
    """In float32 a score may cross the threshold by rounding; in float64 none does."""
    solver, _ = SOLVERS[name]
    for target in ("70%", "2:4"):
        constraint = pattern(target, (1, 64))
        ours = solver.solve(problem((1, 64), constraint, device, torch.float64)).solution["weight"].cpu()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "on_device", lambda x: False)
            theirs = solver.solve(problem((1, 64), constraint, "cpu", torch.float64)).solution["weight"]
        assert torch.equal(ours != 0, theirs != 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.bitwise
@pytest.mark.parametrize("target", ["rows", "stacked", "2:4"])
@pytest.mark.parametrize("solver", [ADMM(), SparseGPT()], ids=["admm", "sparsegpt"])
def test_two_solves_give_the_same_bits(device, solver, target) -> None:
    shape = SHAPES[device][0]
    first, second = (solved(solver, shape, pattern(target, shape), device) for _ in range(2))
    assert torch.equal(first.solution["weight"], second.solution["weight"])
    assert [p.primal_residual for p in first.history] == [p.primal_residual for p in second.history]


@pytest.mark.bitwise
def test_a_run_continues_exactly(device) -> None:
    """10 + 22 iterations are 32, though measures are read at other times."""
    task = problem(SHAPES[device][0], Unstructured(0.7), device, torch.float32)
    whole = ADMM().solve(task)
    part = ADMM(max_iterations=10).solve(task)
    joined = ADMM().solve(task, state=part.state)
    assert torch.equal(whole.solution["weight"], joined.solution["weight"])
    assert [(p.iteration, p.support_changes) for p in whole.history] == [
        (p.iteration, p.support_changes) for p in joined.history
    ]
    assert [p.iteration for p in whole.history] == list(range(1, 33))


def test_measures_are_read_in_bulk(device) -> None:
    """A watcher hears of every iteration, on a device of several at once; and can stop the run."""
    seen: list[int] = []
    task = problem(SHAPES[device][0], Unstructured(0.7), device, torch.float32)
    result = ADMM().solve(task, watch=lambda progress: bool(seen.append(progress.iteration)) or progress.iteration >= 6)
    assert result.status is Status.STOPPED
    assert seen == [1, 2, 3, 4, 5, 6]
    assert result.iterations == (6 if device == "cpu" else 8)  # the penalty moves every 4
    evaluated = ADMM(objective_every=3, max_iterations=7).solve(task)
    assert [p.iteration for p in evaluated.history if p.objective is not None] == [3, 6]


def test_numbers_that_overflow_are_reported(device) -> None:
    """Scores |z| sqrt(A_jj) beyond float32: the residual is not finite, and the result is a point that is."""
    task = problem(SHAPES[device][0], Unstructured(0.5), device, torch.float32)
    huge = LayerReconstruction(task.weight * 1e25, task.gram * 1e30, task.constraint)
    result = ADMM().solve(huge)
    assert result.status is Status.NONFINITE
    assert result.iterations == (1 if device == "cpu" else 4)
    assert result.solution.is_finite()
    assert huge.constraint.contains(result.solution)


def test_a_matrix_that_is_not_positive_definite_is_found_out(device) -> None:
    hessian = torch.diag(torch.tensor([1.0, -1.0, 2.0], device=torch_device(device)))

    def invert() -> None:
        failed: list[torch.Tensor] = []
        quadratic.inverse(hessian, failed)
        quadratic.check_factored(failed)

    with pytest.raises(RuntimeError, match="positive"):
        invert()


@pytest.mark.parametrize(("precision", "bound"), [("exact", 1e-6), ("bfloat16x3", 3e-5), ("bfloat16", 1e-2)])
def test_products_keep_their_bounds(device, precision, bound) -> None:
    """Relative to |A| |B|, entry by entry, against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(600, 96, generator=generator).to(torch_device(device)) for _ in range(2))
    b = b[:80].T.contiguous()
    out = torch.empty(600, 80, device=a.device)
    products.multiply(a, products.prepared(b, precision), out=out)
    error = (out.double() - a.double() @ b.double()).abs() / (a.abs().double() @ b.abs().double())
    assert float(error.max()) <= bound
    assert precision == "exact" or float(error.max()) > 1e-8  # it is what it says


def test_split_products_do_not_move_the_error(device, monkeypatch) -> None:
    """Over fresh layers: the whole of ADMM with bfloat16 x 3 against float64 products, and what it ends at."""
    from admm_prune.solvers import x_updates

    monkeypatch.setattr(x_updates, "splits_products", lambda x: x.dtype is torch.float32)
    solver = ADMM(fast_until=0)
    for seed in range(2):
        shape = COMPARED[device][0]
        ours = solved(solver, shape, Unstructured(0.7), device, seed)
        exact = problem(shape, Unstructured(0.7), "cpu", torch.float64, seed)
        reference = exact.relative_error(solver.solve(exact).solution)
        ratio = exact.relative_error(ours.solution.map(lambda x: x.cpu().double())) / reference
        assert ratio < 1.003
        assert math.isfinite(ratio)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [ADMM(), SparseGPT(), Wanda()], ids=["admm", "sparsegpt", "wanda"])
def test_nothing_falls_back_to_the_host_or_to_plain_torch(solver, monkeypatch) -> None:
    """The plain twins fail, and so does what would copy a matrix to the host."""

    def refuse(*_, **__):
        raise AssertionError("a plain twin ran on CUDA tensors")

    shape = SHAPES["cuda"][0]
    for target in ("70%", "rows", "2:4"):
        task = problem(shape, pattern(target, shape), "cuda", torch.float32)
        monkeypatch.setattr(selection, "_threshold", refuse)
        monkeypatch.setattr(selection, "_select", refuse)
        real = torch.Tensor.cpu

        def small_only(x, *arguments, real=real, **options):
            assert x.numel() < 4096, f"{tuple(x.shape)} goes to the host"
            return real(x, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, "cpu", small_only)
        result = solver.solve(task)
        assert result.notes == () or "triton" not in " ".join(result.notes)
