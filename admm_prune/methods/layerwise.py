"""Layer-wise pruning: every weight by its own local problem, block after block, on the outputs of the pruned blocks."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.methods.base import Convergence, LayerReport, Outcome, Request
from admm_prune.methods.block_loop import Visit, walk
from admm_prune.methods.local import Method
from admm_prune.methods.part_checks import Part, check_result, check_set, explained_parts, is_foreign, suppress_refusals
from admm_prune.methods.ridge import Damping, settle_ridge
from admm_prune.methods.struprune.sublayer import report_of
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import SparseSet, StackedRows
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Result
from admm_prune.solvers.base import Solver
from admm_prune.solvers.diagnostics import diagnose
from admm_prune.solvers.reference import lower_bound
from admm_prune.solvers.together import Shape, batches, solve_batch


@dataclass(frozen=True)
class Layerwise:
    """A recipe that solves the layer problem of every matrix in the decoder blocks by one method.

    For each block: replay it on the outputs of the pruned blocks before it, capture one Gram per shared input, solve
    the layer problems, write back, replay the pruned block to get the next block's inputs.
    """

    method: Method
    samples: int = 128

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def summary(self) -> str:
        return self.method.summary

    @property
    def budget(self) -> Literal["matrix", "model"]:
        return "matrix"

    def check(self, model: nn.Module, target: Target) -> None:
        check_target(decoder_blocks(model), self.method, target)

    def prune(self, model: nn.Module, request: Request) -> Outcome:
        self.check(model, request.target)

        def visit(stream: BlockStream, index: int, block: Block) -> Visit:
            chosen = {view.name for view in block.weights if request.target.at(view.name) is not None}
            inputs = stream.collect(index, chosen, weigh=self.method.problem.token_weights) if chosen else []
            return Visit(layers=[*prune_all(inputs, self.method, request), *untouched(block, chosen)])

        visits = walk(model, request, visit)
        request.tell(len(visits), len(visits))
        return Outcome(layers=[report for found in visits for report in found.layers])


def prune_all(inputs: list[SharedInput], method: Method, request: Request) -> list[LayerReport]:
    """Prunes the weights of a block: several processes distribute the solves and broadcast the results."""
    pieces = inputs if method.stacks else [SharedInput((v,), one.statistics) for one in inputs for v in one.weights]
    reports = request.world.divided(
        [_cost(piece) for piece in pieces],
        lambda own: prune_several([pieces[i] for i in own], method, request),
        lambda i: [view.read() for view in pieces[i].weights],
    )
    return [report for found in reports for report in found]


def _cost(piece: SharedInput) -> float:
    """The relative cost of a solve: a factorization, and products with its inverse."""
    width = float(piece.weights[0].shape[1])
    return width**3 + width**2 * sum(view.shape[0] for view in piece.weights)


def check_target(blocks: Iterable[Block], method: Method, target: Target) -> None:
    """Refuses a target before any weight is touched.

    Raises:
        UserError: a weight does not admit it; the message names the weight.
    """
    tried: set[tuple[str, tuple[int, int]]] = set()
    for view in (view for block in blocks for view in block.weights):
        own = target.at(view.name)
        try:
            if own is not None:
                constraint = method.constraint(own)
                with explained_parts(constraint=type(constraint)):
                    _try(constraint, view.shape)
                if (str(own), view.shape) not in tried:
                    check_set(constraint, view.shape, own.fraction)
                    tried.add((str(own), view.shape))
        except ValueError as error:
            raise UserError(f"{view.name}: {error}") from error
    if target.fraction:
        _check_parts(method, target)


def _check_parts(method: Method, target: Target) -> None:
    """Tries a third-party solver or objective on a small random problem, so that errors show before any work.

    Raises:
        UserError: a part fails, or violates its protocol.
    """
    solver, problem = method.make(), method.problem
    if not (is_foreign(type(solver)) or is_foreign(problem.build)):
        return
    constraint = method.constraint(replace(target, layers=()))
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, max(16, 4 * constraint.group_width), generator=g)
    inputs = torch.randn(64, weight.shape[1], generator=g)
    weigh = problem.token_weights
    if weigh is not None:
        weigh(inputs)
    parts: dict[str, object] = {"solver": type(solver), "constraint": type(constraint), "problem": problem.build}
    with suppress_refusals(), torch.random.fork_rng(devices=[]), explained_parts(**parts):
        posed = problem.posed(weight, inputs.T @ inputs, constraint, ridge=method.ridge, damping=method.damping)
        result = solver.solve(posed)
        check_result(result, posed, solver, [Part(len(weight), constraint, target.fraction)])


def _try(constraint: Constraint, shape: tuple[int, int]) -> None:
    """Raises ValueError where matrices of this shape do not admit the set; one row suffices for all but tiles."""
    try:
        constraint.contains(Point(weight=torch.zeros(1, shape[1])))
    except ValueError:
        constraint.contains(Point(weight=torch.zeros(()).expand(shape)))


def untouched(block: Block, pruned: Collection[str]) -> list[LayerReport]:
    """Reports of the weights of a block that were not among those to prune."""
    left = [view for view in block.weights if view.name not in pruned]
    return [replace(report_of(view, view.shape), notes=("not selected: left unchanged",)) for view in left]


def prune_shared(shared: SharedInput, method: Method, request: Request) -> list[LayerReport]:
    """Prunes the weights that read one input, in place: see `prune_several`."""
    return prune_several([shared], method, request)[0]


def prune_several(inputs: Sequence[SharedInput], method: Method, request: Request) -> list[list[LayerReport]]:
    """Prunes the weights that read each of some inputs, in place.

    If the method supports it, weights that share an input are solved stacked, each within its own budget: the Gram of
    q, k and v is factored once. Status, iterations, notes and diagnosis are then those of the joint solve, and its
    seconds are divided by the number of entries, so that the seconds of all weights add up to the total. Problems of
    equal shape, such as the experts of a mixture, may be solved in one batch, each with its own result.

    Raises:
        UserError: a weight cannot be pruned; the message names it.
    """
    owned = [(i, job) for i, shared in enumerate(inputs) for job in _jobs(shared, method, request)]
    jobs = [job for _, job in owned]
    solver = method.make()
    done: dict[int, list[LayerReport]] = {}
    for batch in batches(solver, [_shape(job, method, request) for job in jobs]):
        done |= zip(batch, _prune([jobs[i] for i in batch], method, solver, request), strict=True)
    reports: list[list[LayerReport]] = [[] for _ in inputs]
    for number, (i, _) in enumerate(owned):
        reports[i] += done[number]
    return reports


def _jobs(shared: SharedInput, method: Method, request: Request) -> list[SharedInput]:
    """The weights that are solved as one."""
    groups: dict[object, tuple[WeightView, ...]] = {}
    for view in shared.weights:
        alike = None if method.stacks_targets else request.target.at(view.name)
        key: object = alike if method.stacks else view.name
        groups[key] = (*groups.get(key, ()), view)
    return [SharedInput(views, shared.statistics) for views in groups.values()]


def _constraint(job: SharedInput, method: Method, request: Request) -> SparseSet:
    constraints = [method.constraint(target_of(request, view)) for view in job.weights]
    if len(constraints) == 1:
        return constraints[0]
    return StackedRows(tuple(zip((view.shape[0] for view in job.weights), constraints, strict=True)))


def _shape(job: SharedInput, method: Method, request: Request) -> Shape:
    gram = job.statistics.gram
    rows = sum(view.shape[0] for view in job.weights)
    return Shape(rows, len(gram), gram.dtype, gram.device, _constraint(job, method, request))


@dataclass(frozen=True)
class _Posed:
    """A problem, its damping, the dense weights, and the seconds spent on building it."""

    problem: LayerReconstruction
    asked: Damping
    stacked: Tensor
    seconds: float


def _prune(jobs: Sequence[SharedInput], method: Method, solver: Solver, request: Request) -> list[list[LayerReport]]:
    """Prunes the weights of some jobs, each by one solve, or all by one batch of solves."""
    posed = [_pose(job, method, request) for job in jobs]
    began = time.perf_counter()
    with explained_parts(
        solver=type(solver), constraint=_kind_of_set(jobs[0], method, request), problem=type(posed[0].problem)
    ):
        results = solve_batch(solver, [one.problem for one in posed], [_naming(job) for job in jobs])
    share = (time.perf_counter() - began) / len(jobs)
    for job, one, result in zip(jobs, posed, results, strict=True):
        with _naming(job):
            check_result(result, one.problem, solver, [_part(view, method, request) for view in job.weights])
    return [
        _write(job, one, result, share, method, request) for job, one, result in zip(jobs, posed, results, strict=True)
    ]


def _part(view: WeightView, method: Method, request: Request) -> Part:
    target = target_of(request, view)
    return Part(view.shape[0], method.constraint(target), target.fraction)


def _kind_of_set(job: SharedInput, method: Method, request: Request) -> type:
    return type(method.constraint(target_of(request, job.weights[0])))


@contextmanager
def _naming(job: SharedInput) -> Generator[None]:
    """Names the weights in errors of their problem."""
    try:
        yield
    except (ValueError, LinAlgError) as error:
        raise UserError(f"{', '.join(view.name for view in job.weights)}: {error}") from error


def _pose(job: SharedInput, method: Method, request: Request) -> _Posed:
    began = time.perf_counter()
    statistics = job.statistics
    # A copy: `read` returns a view of the parameter, which is about to be overwritten.
    stacked = torch.cat([view.read() for view in job.weights])
    kind = _kind_of_set(job, method, request)
    with _naming(job), explained_parts(problem=method.problem.build, constraint=kind):
        alone = method.constraint(target_of(request, job.weights[0]))
        asked = settle_ridge(request.ridge, method, stacked, statistics.gram, statistics.validation, alone)
        constraint = _constraint(job, method, request)
        problem = method.problem.posed(stacked, statistics.gram, constraint, ridge=asked.ridge, damping=asked.damping)
    return _Posed(problem, asked, stacked, time.perf_counter() - began)


def _write(
    job: SharedInput, posed: _Posed, result: Result, seconds: float, method: Method, request: Request
) -> list[LayerReport]:
    """Writes the solution of a job to its weights, and yields their reports.

    Args:
        seconds: that the solve took.
    """
    began = time.perf_counter()
    problem, asked, stacked, statistics = posed.problem, posed.asked, posed.stacked, job.statistics
    sizes = [view.shape[0] for view in job.weights]
    with _naming(job):
        for view, weight in zip(job.weights, result.solution["weight"].split(sizes), strict=True):
            view.write(weight)
    diagnosis = diagnose(
        result,
        width=stacked.shape[1],
        tokens=statistics.tokens,
        dead=int(problem.dead.sum()),
        ridge_asked=asked.ridge,
        ridge_used=problem.ridge,
        ridge_matters=method.damped,
    )
    seconds += posed.seconds + time.perf_counter() - began
    reports: list[LayerReport] = []
    for view, weight in zip(job.weights, stacked.split(sizes), strict=True):
        constraint = method.constraint(target_of(request, view))
        own = method.problem.posed(weight, statistics.gram, constraint, ridge=problem.ridge, damping=problem.damping)
        written = Point(weight=view.read().to(own.weight.dtype))
        validation = statistics.validation
        reports.append(
            LayerReport(
                name=view.name,
                shape=view.shape,
                sparsity=written.sparsity(),
                relative_error=own.relative_error(written),
                relative_error_validation=None if validation is None else own.relative_error(written, validation),
                status=result.status.name,
                iterations=result.iterations,
                seconds=seconds * weight.numel() / stacked.numel(),
                tokens=statistics.tokens,
                ridge=problem.ridge,
                damping=problem.damping,
                ridge_trials=asked.trials,
                notes=(*statistics.notes, *result.notes),
                diagnosis=diagnosis,
                convergence=None if reports else Convergence.of(result.history),
                **(_bound(own, written) if request.bounds else {}),
            )
        )
    return reports


def target_of(request: Request, view: WeightView) -> Target:
    """The target of a weight that is to be pruned."""
    target = request.target.at(view.name)
    assert target is not None, f"{view.name} is not to be pruned"
    return target


def _bound(problem: LayerReconstruction, written: Point) -> dict[str, float]:
    """The objective reached and a lower bound of all that can be, both relative to tr(W H W^T).

    Empty where nothing is proven: the layer is never used, or the bound does not support the constraint.
    """
    energy = quadratic.energy(problem.weight, problem.gram)
    try:
        bound = lower_bound(problem)
    except (TypeError, ValueError):
        return {}
    if bound is None or energy == 0:
        return {}
    return {"objective": problem.value(written) / energy, "bound": bound.value / energy}
