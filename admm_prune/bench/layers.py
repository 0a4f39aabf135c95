"""Layer solves: every method at the layer shapes of language models, with its lower bound and the baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from admm_prune.bench import baselines
from admm_prune.bench.baselines import Work, synchronize
from admm_prune.bench.rows import Case, Figures, SharedData
from admm_prune.methods.local import LOCAL_METHODS, Method
from admm_prune.methods.target import Target
from admm_prune.ops import backend, quadratic
from admm_prune.point import Point
from admm_prune.problems.constraints import NofM, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver

SECTION = "layers"
_LONG = 2.0  # seconds
TARGETS = (Target(0.5), Target(0.7), Target(0.9), Target(pattern=(2, 4)))
_PASSES = 67  # bytes that an iteration of ADMM moves per weight, beside its product: see `solver_work`


@dataclass(frozen=True)
class Layer:
    """W (rows, width) and its Gram (width, width), float32, on the device."""

    weight: Tensor
    gram: Tensor

    @property
    def name(self) -> str:
        return f"{self.weight.shape[0]}x{self.weight.shape[1]}"


class Watched(LayerReconstruction):
    """A layer problem that measures the time of its objective, with the device idle before and after."""

    evaluating = 0.0

    def value(self, x: Point) -> float:
        synchronize(self.weight.device)
        began = time.perf_counter()
        result = super().value(x)
        self.evaluating += time.perf_counter() - began
        return result


def drawn(rows: int, width: int, device: torch.device, seed: int = 0) -> Layer:
    """Inputs with a falling spectrum, log-normal gains and a few massive channels; weights with heavy tails.

    Drawn on the device: cheaper to make than the instances of `benchmarks`, of the same kind but not the same.
    """
    g = torch.Generator(device).manual_seed(1000003 * seed + 7919 * rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    rank = max(4, width // 8)
    mixing = normal(rank, width) * torch.arange(1, rank + 1, device=device).pow(-0.55)[:, None]
    gain = torch.exp(0.35 * normal(width))
    massive = torch.randperm(width, generator=g, device=device)[: max(2, round(0.004 * width))]
    gain[massive] *= 25.0
    gram = torch.zeros(width, width, device=device)
    for _ in range(4):
        inputs = (normal(width, rank) @ mixing + 0.5 * normal(width, width)) * gain
        gram.addmm_(inputs.T, inputs)
    weight = normal(rows, width) / (normal(rows, width).square() + normal(rows, width).square()).div(2).sqrt().add_(0.1)
    weight[:, massive] /= 5.0
    return Layer(weight / weight.norm() * rows**0.5, (gram + gram.T) / 2)


def cases(
    shapes: list[tuple[int, int]], device: torch.device, *, targets: tuple[Target, ...] = TARGETS, baseline_rows: bool
) -> Iterator[Case]:
    """Every method on every shape; the baselines on the first shape alone.

    A layer is created for its first case and released before the next layer.
    """
    for index, (rows, width) in enumerate(shapes):
        layer = SharedData(drawn, rows, width, device)
        needs = 4.0 * (6 * rows * width + 4 * width**2)
        for target in targets:
            for name in ("magnitude", "wanda", "sparsegpt", "admm-fast", "admm", "admm-best"):
                method = LOCAL_METHODS[name]
                solver = ADMM.best() if name == "admm-best" else method.make()
                label = "admm-best, no swaps" if name == "admm-best" else name
                yield _case(layer, label, method, solver, target, needs)
            if index == 0 and baseline_rows:
                yield from _baselines(layer, target)
        if index == 0 and baseline_rows:
            method = LOCAL_METHODS["admm-best"]
            yield _case(layer, "admm-best", method, method.make(), targets[min(1, len(targets) - 1)], needs, limit=20.0)
        layer.release()


def _case(
    layer: SharedData[Layer],
    label: str,
    method: Method,
    solver: Solver,
    target: Target,
    needs: float,
    limit: float = 30.0,
) -> Case:
    def run() -> Figures:
        data = layer()
        constraint = method.constraint(target)
        problem = Watched(data.weight, data.gram, constraint, ridge=method.ridge, damping=method.damping)
        problem.evaluating = 0.0
        synchronize(data.weight.device)
        began = time.perf_counter()
        result = solver.solve(problem)
        synchronize(data.weight.device)
        return Figures(
            seconds=time.perf_counter() - began - problem.evaluating,
            work=solver_work(label, solver, layer.rows, layer.width, result.iterations),
            error=problem.relative_error(result.solution),
            more={
                "iterations": result.iterations,
                "status": result.status.name,
                "kernels": backend.described(data.weight.device),
                "sparsity": result.solution.sparsity(),
            },
            note="; ".join(result.notes),
        )

    name = f"{layer.rows}x{layer.width} {target}"
    return Case(section=SECTION, name=label, case=name, run=partial(_fastest, run), needs=needs, limit=limit)


def _fastest(run: Callable[[], Figures]) -> Figures:
    """The faster of two runs: the first one may load libraries and compile kernels. A long one is not repeated."""
    first = run()
    return first if first.seconds > _LONG else min(first, run(), key=lambda figures: figures.seconds)


def _baselines(layer: SharedData[Layer], target: Target) -> Iterator[Case]:
    constraint: SparseSet = NofM(*target.pattern) if target.pattern else Unstructured(target.sparsity or 0.0)
    size = layer.rows * layer.width

    def timed(solve: Callable[[Layer], baselines.Solution], work: Callable[[int], Work]) -> Callable[[], Figures]:
        def run() -> Figures:
            data = layer()
            synchronize(data.weight.device)
            began = time.perf_counter()
            solution = solve(data)
            synchronize(data.weight.device)
            spent = time.perf_counter() - began
            h = data.gram
            error = quadratic.energy(solution.weight.float(), h, data.weight) / quadratic.energy(data.weight, h)
            more = {"iterations": solution.iterations}
            return Figures(seconds=spent, work=work(solution.iterations), error=error, more=more)

        return partial(_fastest, run)  # as ours

    def alps_work(iterations: int, dtype: str) -> Work:
        products = 2.0 * size * layer.width * (iterations + 11) + 2.0 * layer.width**3 * (1 + iterations / 3)
        return Work({dtype: products + 9.0 * layer.width**3})

    def sparsegpt_work(iterations: int) -> Work:
        return Work({"float32": float(size) * layer.width + 4 / 3 * layer.width**3}, 8.0 * size)

    case = f"{layer.rows}x{layer.width} {target}"
    named: dict[str, Any] = {"section": SECTION, "case": case, "baseline": True}
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield Case(
            **named,
            name=f"ALPS, straightforward {name}",
            run=timed(
                partial(_alps, constraint=constraint, dtype=dtype),
                partial(alps_work, dtype=name),
            ),
            needs=dtype.itemsize * (9 * size + 6 * layer.width**2),
            limit=25.0,
        )
    yield Case(
        **named,
        name="SparseGPT, straightforward",
        run=timed(
            lambda data: baselines.sparsegpt(
                data.weight, data.gram, sparsity=target.sparsity or 0.5, pattern=target.pattern
            ),
            sparsegpt_work,
        ),
        needs=4.0 * (4 * size + 5 * layer.width**2),
        limit=25.0,
    )


def _alps(layer: Layer, constraint: SparseSet, dtype: torch.dtype) -> baselines.Solution:
    return baselines.alps(layer.weight, layer.gram, constraint, dtype=dtype)


def solver_work(name: str, solver: Solver, rows: int, width: int, iterations: int) -> Work:
    """The least work of a solve: m = rows, d = width.

    Magnitude and Wanda read m d weights and write them and their mask. SparseGPT: m d^2 of the sweep, 2/3 d^3 of the
    factor. ADMM: an iteration is a product 2 m d^2, in bfloat16 or split in three, and 67 m d bytes (target 20, relaxed
    sum 24, selection 9, split 14); a penalty is d^3 (Cholesky and triangular inverse 2/3 d^3, in float32) and a split
    product 2 d^3; the refit one product per iteration and one more.
    """
    size = float(rows * width)
    if not isinstance(solver, ADMM):
        if name == "sparsegpt":
            return Work({"float32": size * width + 2 / 3 * width**3}, 8.0 * size)
        return Work({}, 9.0 * size)
    fast = min(iterations, solver.fast_until)
    penalties = -(-iterations // solver.penalty.every)
    refit = solver.refit_iterations + 1 if solver.refit else 0
    return Work(
        {
            "bfloat16": 2.0 * size * width * fast,
            "bfloat16x3": 2.0 * size * width * (iterations - fast) + 2.0 * width**3 * penalties,
            "float32": 2 / 3 * width**3 * penalties + 2.0 * size * width * refit,
        },
        _PASSES * size * iterations,
    )
