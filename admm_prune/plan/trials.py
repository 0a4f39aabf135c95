"""The cost of a solver, extrapolated from a small instance that is solved while operations are counted.

The tensors of a blockwise method have the size of a weight (out x in), of a Gram matrix (in x in), of the activations
of some tokens (tokens x width), or of a fixed number of their rows. If out, in and the number of tokens are multiplied
by a factor s, the bytes of whole tensors scale by s^2 and those of a fixed number of rows by s; the operations of
products (out x in x in) and factorizations (in^3) scale by s^3, those on every entry by s^2; and the number of calls is
constant. Therefore

    bytes(1) = a + b,   with   bytes(s) = a s^2 + b s   at two values of s,

and no solver needs a cost model of its own. The first iterations of a solver need as much memory as later ones, so
bytes are counted over a few iterations, and operations over all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.methods.base import Ridge, Task
from admm_prune.methods.layerwise import prune_shared
from admm_prune.methods.local import Method
from admm_prune.methods.sparsellm import SparseLLM
from admm_prune.methods.struprune import selectors
from admm_prune.methods.struprune.struprune import StruPrune
from admm_prune.methods.target import Target
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import WeightView
from admm_prune.ops.activations import Activation
from admm_prune.ops.precision import at_least_float32
from admm_prune.plan.counting import Cost, counted, measured_cost
from admm_prune.point import Point
from admm_prune.problems.constraints import Groups
from admm_prune.problems.feed_forward import Network
from admm_prune.problems.network_output import gradient_sample
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.statistics import LayerStatistics

_BYTES_AT = (1 << 20, 1 << 21)  # entries of the instances for bytes: more than code works on at once
_WORK_AT = 1 << 16  # entries of the instance for operations
_FEW = 4  # iterations that reach the peak memory: every schedule has set its first penalty by then
_ITERATIONS = ("max_iterations", "rounds")


class Trial(Protocol):
    """A problem whose cost can be measured at a smaller scale."""

    @property
    def entries(self) -> int:
        """The number of entries of its largest tensor."""
        ...

    def __call__(self, scale: float, whole: bool) -> Cost:
        """The cost with all sizes multiplied by `scale`: of all iterations if `whole`, otherwise of a few."""
        ...


@lru_cache(maxsize=256)  # blocks have equal shapes
def estimated(trial: Trial) -> Cost:
    """The cost of a problem, extrapolated from smaller instances if it is large."""
    entries = trial.entries
    if entries <= 2 * _WORK_AT:
        return trial(1.0, True)
    scale = (_WORK_AT / entries) ** 0.5
    work = trial(scale, True).work.scaled(1 / scale)
    if entries <= _BYTES_AT[1]:
        whole = trial(1.0, False)
        return Cost(peak=whole.peak, left=whole.left, work=work)
    small, large = ((at / entries) ** 0.5 for at in _BYTES_AT)
    at_small, at_large = trial(small, False), trial(large, False)
    peak = _at_full_size(small, at_small.peak, large, at_large.peak)
    left = _at_full_size(small, at_small.left, large, at_large.left)
    return Cost(peak=peak, left=left, work=work)


def _at_full_size(small: float, at_small: int, large: float, at_large: int) -> int:
    """a + b for the a and b with bytes(s) = a s^2 + b s at both scales."""
    a = (at_large / large - at_small / small) / (large - small)
    b = at_large / large - a * large
    return round(a + max(b, 0.0)) if b > 0 else round(at_large / large**2)


@dataclass(frozen=True)
class LayerTrial:
    """The layer problems of weights that share an input, solved by a layer method.

    Args:
        rows: the number of rows of each weight.
        width: of the input.
        dtype: of the weights.
        validation: whether there are also statistics of validation tokens.
    """

    method: Method
    target: Target
    ridge: Ridge
    rows: tuple[int, ...]
    width: int
    dtype: torch.dtype
    validation: bool

    def __call__(self, scale: float, whole: bool) -> Cost:
        multiple = 1 if self.target.pattern is None else self.target.pattern[1]
        width = _shrunk(self.width, scale, multiple)
        views = tuple(view_of(torch.randn(_shrunk(r, scale), width, dtype=self.dtype)) for r in self.rows)
        gram = random_gram(width)
        statistics = LayerStatistics(
            gram, 2 * width, gram / 2 if self.validation else None, width if self.validation else 0
        )
        method = self.method if whole else _shortened_method(self.method)
        with counted() as counting, torch.no_grad():
            counting.know(gram, *(view.parameter for view in views))
            if statistics.validation is not None:
                counting.know(statistics.validation)
            with measured_cost(counting) as cost:
                prune_shared(SharedInput(views, statistics), method, task_for(self.target, self.ridge))
        return cost

    @property
    def entries(self) -> int:
        """The entries of all weights together or of their Gram matrix, whichever are more."""
        return max(sum(self.rows), self.width) * self.width


@dataclass(frozen=True)
class NetworkTrial:
    """The problem of one feed-forward network, solved by `SparseLLM` on given numbers of tokens.

    Args:
        inputs, hidden, outputs: the widths of the network.
        tokens: the numbers of calibration and of validation tokens, the latter possibly 0.
        dtype: of the weights and the activations.
    """

    recipe: SparseLLM
    target: Target
    ridge: Ridge
    activation: Activation
    gated: bool
    inputs: int
    hidden: int
    outputs: int
    tokens: tuple[int, int]
    dtype: torch.dtype

    def __call__(self, scale: float, whole: bool) -> Cost:
        pattern = self.target.pattern
        multiple = 1 if pattern is None else pattern[1]
        d, width, out = (_shrunk(size, scale, multiple) for size in (self.inputs, self.hidden, self.outputs))
        up = [torch.randn(width, d, dtype=self.dtype) for _ in range(2 if self.gated else 1)]
        weights = Point(dict(zip(("up", "gate"), up, strict=False)))
        weights["down"] = torch.randn(out, width, dtype=self.dtype)
        pairs = {
            part: (
                torch.randn(_shrunk(n, scale), d, dtype=self.dtype),
                torch.randn(_shrunk(n, scale), out, dtype=self.dtype),
            )
            for part, n in zip(("calibration", "validation"), self.tokens, strict=True)
            if n
        }
        recipe = self.recipe
        if not whole:
            recipe = replace(recipe, method=_shortened_method(recipe.method), descent=min(2, recipe.descent))
        with counted() as counting, torch.no_grad():
            counting.know(*weights.values(), *(x for pair in pairs.values() for x in pair))
            with measured_cost(counting) as cost:
                network = Network(self.activation, Point(weights).map(at_least_float32))
                constraints = dict.fromkeys(network.weights, recipe.method.constraint(self.target))
                damped = recipe.damped(network, pairs, task_for(self.target, self.ridge), constraints)
                sample = _shrunk(gradient_sample(self.tokens[0]), scale)
                recipe.solve(network, damped, pairs, constraints, sample=sample)
        return cost

    @property
    def entries(self) -> int:
        return (2 if self.gated else 1) * self.hidden * max(self.inputs, self.outputs)


@dataclass(frozen=True)
class GroupTrial:
    """The group problem of a sublayer with the settings of `StruPrune`: its loss curve, or its solution.

    Args:
        outputs, columns: the shape of its output matrix.
        unit: the number of columns in a structured group.
        removed: the fraction of the groups to remove; None for the loss curve.
        dtype: of the weight.
        centred: whether the output has a bias, which absorbs the mean of the error.
    """

    recipe: StruPrune
    outputs: int
    columns: int
    unit: int
    removed: float | None
    dtype: torch.dtype
    centred: bool

    def __call__(self, scale: float, whole: bool) -> Cost:
        unit = _shrunk(self.unit, scale) if self.unit > 1 else 1
        count = max(2, round(self.columns * scale / unit))
        gram = random_gram(unit * count)
        weight = torch.randn(_shrunk(self.outputs, scale), unit * count, dtype=self.dtype)
        keep = count if self.removed is None else max(1, round(count * (1 - self.removed)))
        with counted() as counting, torch.no_grad():
            counting.know(gram, weight)
            with measured_cost(counting) as cost:
                problem = GroupReconstruction(
                    weight.clone(),
                    gram,
                    Groups(1 - keep / count, unit, keep),
                    mean=torch.zeros(unit * count, dtype=torch.float64) if self.centred else None,
                    centred_gram=gram if self.centred else None,
                    ridge=self.recipe.ridge,
                )
                if self.removed is None:
                    selectors.losses(problem, unit, self.recipe.selector, self.recipe.compensate)
                else:
                    result, _ = selectors.solve(problem, self.recipe.selector, self.recipe.compensate)
                    problem.relative_error(result.solution)
        return cost

    @property
    def entries(self) -> int:
        return self.columns * max(self.outputs, self.columns)


def _shortened_method(method: Method) -> Method:
    return replace(method, make=lambda: shortened(method.make()))


def shortened(solver: Any) -> Any:
    """The solver with a few iterations, also of the solvers inside it."""
    if not is_dataclass(solver) or isinstance(solver, type):
        return solver
    changes: dict[str, Any] = {}
    for field in fields(solver):
        value = getattr(solver, field.name)
        if field.name in _ITERATIONS and isinstance(value, int):
            changes[field.name] = min(value, _FEW)
        elif hasattr(value, "solve"):
            changes[field.name] = shortened(value)
    return replace(solver, **changes)


def task_for(target: Target, ridge: Ridge) -> Task:
    """A task without a text."""
    return Task(target=target, calibration=Sequences((), "windows", 2, None, 1), ridge=ridge)


def view_of(weight: Tensor) -> WeightView:
    """A view of a matrix as the weight of a linear layer."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return WeightView("trial.weight", module)


def random_gram(width: int, tokens: int | None = None) -> Tensor:
    inputs = torch.randn(tokens or 2 * width, width)
    return inputs.T @ inputs


def _shrunk(size: int, scale: float, multiple: int = 1) -> int:
    return multiple * max(1, round(size * scale / multiple))
