"""The measurement of one solve, without evaluations of the objective, together with the unit of its cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from admm_prune.data.layer_file import LayerFile
from admm_prune.methods.local import Method
from admm_prune.methods.target import Target
from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Result
from admm_prune.solvers.base import Iterative
from benchmarks.configurations import problem_for
from benchmarks.instances import instance

# What a solver may raise on a layer that it cannot do; torch's LinAlgError is a RuntimeError.
FAILURES = (ValueError, TypeError, ArithmeticError, RuntimeError)

_SAMPLE_SECONDS = 0.02  # of products, at least, before and after each solve
_CURVE_POINTS, _CURVE_STRIDE = 40, 3  # evaluated along a curve, about; iterations between two of them, at most


class Lap(NamedTuple):
    """Seconds on the wall and of this process's CPUs."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Self:
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, began: Lap) -> Self:
        return cls(time.perf_counter() - began.wall, time.process_time() - began.cpu)

    @classmethod
    def median(cls, laps: Sequence[Lap]) -> Self:
        return cls(statistics.median(lap.wall for lap in laps), statistics.median(lap.cpu for lap in laps))


class Clocked(LayerReconstruction):
    """A layer problem that records the time spent on evaluations of its objective."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.evaluating = Lap(0.0, 0.0)

    def value(self, x: Point) -> float:
        began = Lap.now()
        value = super().value(x)
        self.observe(x, began)
        spent = Lap.since(began)
        self.evaluating = Lap(self.evaluating.wall + spent.wall, self.evaluating.cpu + spent.cpu)
        return value

    def observe(self, x: Point, now: Lap) -> None:
        """Called with every point that is evaluated, off the clock."""


class Recording(Clocked):
    """A layer problem, with the layer's own target, that writes down every point evaluated: when, and its errors.

    A point that is not feasible, as on the way along a sparsity ramp, does not count.
    """

    def begin(self, holdout: Tensor | None) -> None:
        """Starts the clock."""
        self.trace: list[dict[str, float | None]] = []
        self._grams = {"relative_error": self.gram, "relative_error_holdout": holdout}
        self._dense = {name: quadratic.energy(self.weight, h) for name, h in self._grams.items() if h is not None}
        self._began = Lap.now()

    def observe(self, x: Point, now: Lap) -> None:
        if not self.constraint.contains(x):
            return
        away = x["weight"] - self.weight
        errors = {
            name: None if gram is None else quadratic.energy(away, gram) / self._dense[name]
            for name, gram in self._grams.items()
        }
        self.trace.append({"seconds": now.wall - self._began.wall - self.evaluating.wall, **errors})


class Product:
    """The unit of cost: H W^T, once, in float32, of a layer's shape."""

    def __init__(self, layer: LayerFile) -> None:
        self._gram, self._weight = layer.gram.float(), layer.weight.float()
        self._out = torch.empty(self._gram.shape[0], self._weight.shape[0])
        self._repeats = 3
        typical = Lap.median(self.sample()).wall
        self._repeats = max(3, math.ceil(_SAMPLE_SECONDS / max(1e-5, typical)))

    def sample(self) -> list[Lap]:
        """Several in a row."""
        return [self._once() for _ in range(self._repeats)]

    def _once(self) -> Lap:
        began = Lap.now()
        torch.matmul(self._gram, self._weight.T, out=self._out)
        return Lap.since(began)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One solver on one layer. Errors are relative, undamped, in float64.

    Attributes:
        seconds: `result.seconds`, the median over repeats.
        cpu_seconds: of the whole call of `solve`, evaluations of the objective taken out.
        evaluation_seconds: spent in these.
        product_seconds, product_cpu_seconds: of one H W^T, the median of those before and after each solve.
        cost, cost_cpu: `seconds` and `cpu_seconds` in units of these.
    """

    rows: int
    width: int
    relative_error: float
    relative_error_holdout: float | None
    sparsity: float
    feasible: bool
    status: str
    iterations: int
    seconds: float
    cpu_seconds: float
    evaluation_seconds: float
    product_seconds: float
    product_cpu_seconds: float
    cost: float
    cost_cpu: float
    repeats: int
    notes: str

    @classmethod
    def columns(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    layer: LayerFile, method: Method, target: Target, product: Product, *, repeats: int = 3, long: float = 20.0
) -> Measurement:
    """Solves a layer, with products timed before and after each solve.

    Args:
        repeats: solves; times and costs are medians over them.
        long: seconds; a solve that took longer is not repeated.

    Raises:
        one of FAILURES: the solver's own refusal.
    """
    seconds, cpu, evaluations, units, ratios = [], [], [], [], []
    before = product.sample()
    while True:
        problem = problem_for(layer, method, target, Clocked)
        assert isinstance(problem, Clocked)
        solver = method.make()
        began = Lap.now()
        result = solver.solve(problem)
        spent = Lap.since(began)
        after = product.sample()
        unit = Lap.median([*before, *after])
        seconds.append(result.seconds)
        cpu.append(spent.cpu - problem.evaluating.cpu)
        evaluations.append(problem.evaluating.wall)
        units.append(unit)
        ratios.append(Lap(result.seconds / unit.wall, cpu[-1] / unit.cpu))
        before = after
        if len(seconds) >= repeats or spent.wall > long:
            break
    cost, unit = Lap.median(ratios), Lap.median(units)
    return Measurement(
        rows=layer.weight.shape[0],
        width=layer.weight.shape[1],
        relative_error=problem.relative_error(result.solution),
        relative_error_holdout=_holdout_error(problem, layer, result),
        sparsity=result.solution.sparsity(),
        feasible=problem.constraint.contains(result.solution),
        status=result.status.name,
        iterations=result.iterations,
        seconds=statistics.median(seconds),
        cpu_seconds=statistics.median(cpu),
        evaluation_seconds=statistics.median(evaluations),
        product_seconds=unit.wall,
        product_cpu_seconds=unit.cpu,
        cost=cost.wall,
        cost_cpu=cost.cpu,
        repeats=len(seconds),
        notes="; ".join(result.notes),
    )


def curve(layer: LayerFile, method: Method, target: Target, product: Product) -> list[dict[str, float | None]]:
    """The errors of the feasible points that an iterative solver passes, with seconds and cost; a pass of its own.

    The last points are its own last candidates: with and without its finish, and the projected start.

    Raises:
        TypeError: the solver is not iterative.
        ValueError: the layer's target came from other inputs.
    """
    solver = method.make()
    if not isinstance(solver, Iterative):
        raise TypeError(f"{method.name} is not iterative: it has no curve")
    if layer.cross_gram is not None:
        raise ValueError("curves are drawn for layers whose target is their own output")
    problem = problem_for(layer, method, target, Recording)
    assert isinstance(problem, Recording)
    every = max(1, min(_CURVE_STRIDE, solver.max_iterations // _CURVE_POINTS))
    before = product.sample()
    problem.begin(layer.gram_holdout)
    replace(solver, objective_every=every).solve(problem)
    unit = Lap.median([*before, *product.sample()])
    return [{**point, "cost": (point["seconds"] or 0.0) / unit.wall} for point in problem.trace]


def warm_up(method: Method, target: Target) -> None:
    """Solves a tiny layer, so that no library is loaded on the clock."""
    tiny = instance(48, 48, tokens=256)
    method.make().solve(problem_for(tiny, method, target))


def _holdout_error(problem: LayerReconstruction, layer: LayerFile, result: Result) -> float | None:
    if layer.gram_holdout is None or layer.cross_gram is not None:
        return None
    return problem.relative_error(result.solution, layer.gram_holdout)
