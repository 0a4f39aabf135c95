"""Layer-wise pruning: a problem for every weight, block after block, on the outputs of the pruned blocks before it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError, check_at_least
from admm_prune.methods.base import (
    IN_PROCESS,
    Budget,
    Capabilities,
    LayerReport,
    Outcome,
    Ridge,
    Runtime,
    Stages,
    Task,
    TextUse,
    untouched,
)
from admm_prune.methods.block_loop import BlockResult, PassSettings, for_each_block
from admm_prune.methods.joint import Joint
from admm_prune.methods.local import Method, with_parts
from admm_prune.methods.part_checks import Part, check_result, check_set, explained_parts, is_foreign, suppress_refusals
from admm_prune.methods.parts import ProblemLike, SetLike
from admm_prune.methods.ridge import Damping, settle_ridge
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import SharedInput, check_tokens_known
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.ops import quadratic
from admm_prune.point import Point
from admm_prune.problem import Constraint
from admm_prune.problems.constraints import SparseSet, StackedRows
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Convergence, Result
from admm_prune.solvers.base import Solver
from admm_prune.solvers.diagnostics import diagnose
from admm_prune.solvers.reference import lower_bound
from admm_prune.solvers.together import Shape, batches, solve_batch
from admm_prune.statistics import LayerStatistics


@dataclass(frozen=True)
class Layerwise(Capabilities):
    """Solves the layer problem of every matrix in the decoder blocks by one layer method.

    For each block: run it on the outputs of the pruned blocks before it, accumulate one Gram matrix for each input that
    matrices share, solve the layer problems, write the solutions, and run the pruned block for the inputs of the next.

    Args:
        method: the solver of the layer problems, with its regularization.
        samples: the default number of calibration sequences.
        joint: joint steps on several matrices of a block.
    """

    stages: ClassVar[Stages | None] = "layers"

    method: Method
    samples: int = 128
    joint: Joint = Joint()

    def __post_init__(self) -> None:
        check_at_least(self, samples=1)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def budget(self) -> Budget:
        return "matrix"

    @property
    def summary(self) -> str:
        return self.method.summary

    @property
    def text_use(self) -> TextUse:
        return "calibration" if self.method.reads_inputs or self.joint else "measurement"

    def with_parts(self, solver: Method | None, problem: ProblemLike, constraint: SetLike) -> Self:
        if solver is not None:
            raise UserError(f"{self.name} is a solver itself: give either a method or a solver")
        return replace(self, method=with_parts(self.method, problem, constraint))

    def with_joint(self, joint: Joint) -> Self:
        return replace(self, joint=joint)

    def check(self, model: nn.Module, target: Target) -> None:
        check_target(decoder_blocks(model), self.method, target)
        self.joint.check(model, self.method)

    def ridge_obstacle(self, task: Task) -> str | None:
        if task.ridge is None or uses_ridge(self.method, self.joint, bounds=task.bounds):
            return None
        return f"{self.name} only scores weights, whatever the ridge: leave --ridge out"

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        self.check(model, task.target)
        self.check_task(task)
        task = self.joint.task(task, runtime)

        def prune_block(stream: BlockStream, index: int, block: Block) -> BlockResult:
            chosen = {view.name for view in block.weights if task.target.at(view.name) is not None}
            joint = self.joint.begin(stream, index, block, chosen)
            reports: list[LayerReport] = []
            outputs = joint.outputs if self.joint.refit else None
            for names in joint.stages(chosen):
                inputs = stream.collect(index, names, None if reports else outputs)
                reports += joint.coordinated(prune_all(inputs, self.method, task, runtime.world), self.method, task)
            reports = joint.finished(reports, self.method, task)
            return BlockResult(layers=[*reports, *untouched(block, chosen)], details=joint.figures)

        block_results = for_each_block(
            model, task, runtime, prune_block, PassSettings(weighting=self.method.problem.weighting)
        )
        runtime.report_progress(len(block_results), len(block_results))
        figures = [result.details or {} for result in block_results]
        return Outcome(
            layers=[report for result in block_results for report in result.layers],
            notes=self.joint.notes(figures, task),
            details={"joint": figures} if self.joint else {},
        )


def uses_ridge(method: Method, joint: Joint, *, bounds: bool) -> bool:
    """Whether any result depends on the ridge of the layer problems. For methods that only score weights it matters to
    bounds, to coordinated attention, and possibly to a third-party objective."""
    return method.damped or bounds or bool(joint.coordinate) or is_foreign(method.problem.build)


def prune_all(inputs: list[SharedInput], method: Method, task: Task, world: World = ALONE) -> list[LayerReport]:
    """Prunes the weights of a block in place. Several processes share the solves and broadcast their results."""
    pieces = inputs if method.stacks else [SharedInput((v,), one.statistics) for one in inputs for v in one.weights]
    reports = world.divided(
        [_cost(piece) for piece in pieces],
        lambda indices: prune_several([pieces[i] for i in indices], method, task),
        lambda i: [view.read() for view in pieces[i].weights],
    )
    return [report for group in reports for report in group]


def _cost(piece: SharedInput) -> float:
    """The relative cost of a solve: a factorization of the Gram matrix, and products of weights with its inverse."""
    width = float(piece.weights[0].shape[1])
    return width**3 + width**2 * sum(view.shape[0] for view in piece.weights)


def check_target(blocks: Iterable[Block], method: Method, target: Target) -> None:
    """Rejects a target that cannot be reached, before any weight is changed.

    Raises:
        UserError: a weight does not admit the target; the message names the weight.
    """
    tried: set[tuple[str, tuple[int, int]]] = set()
    weighting = method.problem.weighting
    for view in (view for block in blocks for view in block.weights):
        layer_target = target.at(view.name)
        try:
            if layer_target is not None:
                check_tokens_known([view], weighting)
                constraint = method.constraint(layer_target)
                with explained_parts(constraint=type(constraint)):
                    _check_shape(constraint, view.shape)
                if (str(layer_target), view.shape) not in tried:
                    check_set(constraint, view.shape, layer_target.fraction)
                    tried.add((str(layer_target), view.shape))
        except ValueError as error:
            raise UserError(f"{view.name}: {error}") from error
    if target.fraction:
        _check_parts(method, target)


def _check_parts(method: Method, target: Target) -> None:
    """Tries a third-party solver or objective on a small random problem, so that errors appear before any work.

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
    with suppress_refusals():
        problem.trial_weights(inputs, weight)
    parts: dict[str, object] = {"solver": type(solver), "constraint": type(constraint), "problem": problem.build}
    with suppress_refusals(), torch.random.fork_rng(devices=[]), explained_parts(**parts):
        posed = problem.posed(weight, inputs.T @ inputs, constraint, ridge=method.ridge, damping=method.damping)
        result = solver.solve(posed)
        check_result(result, posed, solver, [Part(len(weight), constraint, target.fraction)])


def _check_shape(constraint: Constraint, shape: tuple[int, int]) -> None:
    """Raises ValueError if the set does not admit matrices of this shape."""
    try:
        constraint.contains(Point(weight=torch.zeros(1, shape[1])))  # inexpensive, and enough for most sets
    except ValueError:  # blocks of several rows need the whole matrix
        constraint.contains(Point(weight=torch.zeros(()).expand(shape)))


def prune_shared(shared: SharedInput, method: Method, task: Task) -> list[LayerReport]:
    """Prunes the weights that read one input, in place, as `prune_several` does for several inputs."""
    return prune_several([shared], method, task)[0]


def prune_several(inputs: Sequence[SharedInput], method: Method, task: Task) -> list[list[LayerReport]]:
    """Prunes the weights that read the given inputs, in place.

    If the method supports it, the weights that share an input are stacked into one problem, each within its own budget,
    so that the Gram matrix of q, k and v is factored once. Their reports then have the status, iterations, notes and
    diagnosis of the stacked solve, and its seconds in proportion to their sizes. Problems of equal shape, such as those
    of the experts of a mixture, may be solved in one batch, each with a result of its own.

    Returns:
        For each input, the reports of its weights.

    Raises:
        UserError: a weight cannot be pruned; the message names it.
    """
    owned = [(i, job) for i, shared in enumerate(inputs) for job in _jobs(shared, method, task.target)]
    jobs = [job for _, job in owned]
    solver = method.make()
    done: dict[int, list[LayerReport]] = {}
    for batch in batches(solver, [job.shape for job in jobs]):
        done |= zip(batch, _prune([jobs[i] for i in batch], method, solver, task), strict=True)
    reports: list[list[LayerReport]] = [[] for _ in inputs]
    for number, (i, _) in enumerate(owned):
        reports[i] += done[number]
    return reports


@dataclass(frozen=True)
class _Job:
    """Weights that are solved as one problem.

    Attributes:
        statistics: of their shared inputs.
        parts: the rows, the sparse set and the sparsity of each weight, in order.
        constraint: the sparse set of the stacked rows.
    """

    weights: tuple[WeightView, ...]
    statistics: LayerStatistics
    parts: tuple[Part, ...]
    constraint: SparseSet

    @property
    def shape(self) -> Shape:
        gram = self.statistics.gram
        return Shape(sum(part.rows for part in self.parts), len(gram), gram.dtype, gram.device, self.constraint)


def _jobs(shared: SharedInput, method: Method, target: Target) -> Iterator[_Job]:
    """The jobs of one input: all of its weights in one job, or one for each target or weight."""
    groups: dict[object, list[tuple[WeightView, Target]]] = {}
    for view in shared.weights:
        layer_target = target.of_pruned(view.name)
        alike = None if method.stacks_targets else layer_target
        groups.setdefault(alike if method.stacks else view.name, []).append((view, layer_target))
    for group in groups.values():
        parts = tuple(Part(view.shape[0], method.constraint(to), to.fraction) for view, to in group)
        constraint = parts[0].constraint
        if len(parts) > 1:
            constraint = StackedRows(tuple((part.rows, part.constraint) for part in parts))
        yield _Job(tuple(view for view, _ in group), shared.statistics, parts, constraint)


@dataclass(frozen=True)
class _Posed:
    """The problem of a job, with its ridge and damping, the dense weights, and the seconds spent on building it."""

    problem: LayerReconstruction
    damping: Damping
    stacked: Tensor
    seconds: float


def _prune(jobs: Sequence[_Job], method: Method, solver: Solver, task: Task) -> list[list[LayerReport]]:
    """Prunes the weights of some jobs, by one solve each or all in one batch."""
    posed = [_pose(job, method, task.ridge) for job in jobs]
    began = time.perf_counter()
    parts = {"solver": type(solver), "constraint": type(jobs[0].parts[0].constraint), "problem": type(posed[0].problem)}
    with explained_parts(**parts):
        results = solve_batch(solver, [one.problem for one in posed], [_naming(job) for job in jobs])
    share = (time.perf_counter() - began) / len(jobs)
    for job, one, result in zip(jobs, posed, results, strict=True):
        with _naming(job):
            check_result(result, one.problem, solver, job.parts)
    return [
        _write(job, one, result, share, method, bounds=task.bounds)
        for job, one, result in zip(jobs, posed, results, strict=True)
    ]


@contextmanager
def _naming(job: _Job) -> Generator[None]:
    """Context that puts the names of the job's weights before the message of an error."""
    try:
        yield
    except (ValueError, LinAlgError) as error:
        raise UserError(f"{', '.join(view.name for view in job.weights)}: {error}") from error


def _pose(job: _Job, method: Method, ridge: Ridge) -> _Posed:
    """Builds the problem of a job."""
    began = time.perf_counter()
    statistics, first = job.statistics, job.parts[0].constraint
    # A copy: `read` returns a view of the parameter, which is about to be overwritten.
    stacked = torch.cat([view.read() for view in job.weights])
    with _naming(job), explained_parts(problem=method.problem.build, constraint=type(first)):
        damping = settle_ridge(ridge, method, stacked, statistics.gram, statistics.validation, first)
        problem = method.problem.posed(
            stacked, statistics.gram, job.constraint, ridge=damping.ridge, damping=damping.damping
        )
    return _Posed(problem, damping, stacked, time.perf_counter() - began)


def _write(
    job: _Job, posed: _Posed, result: Result, seconds: float, method: Method, *, bounds: bool
) -> list[LayerReport]:
    """Writes the solution of a job to its weights, and returns their reports.

    Args:
        seconds: the duration of the solve.
        bounds: whether to prove a lower bound for each weight.
    """
    began = time.perf_counter()
    problem, damping, stacked, statistics = posed.problem, posed.damping, posed.stacked, job.statistics
    sizes = [part.rows for part in job.parts]
    with _naming(job):
        for view, weight in zip(job.weights, result.solution["weight"].split(sizes), strict=True):
            view.write(weight)
    diagnosis = diagnose(
        result,
        width=stacked.shape[1],
        tokens=statistics.tokens,
        dead=int(problem.dead.sum()),
        ridge_asked=damping.ridge,
        ridge_used=problem.ridge,
        ridge_matters=method.damped,
    )
    seconds += posed.seconds + time.perf_counter() - began
    regularized = method.damped or problem.ridge > 0 or problem.damping > 0
    reports: list[LayerReport] = []
    for view, weight, part in zip(job.weights, stacked.split(sizes), job.parts, strict=True):
        layer = problem
        if len(job.parts) > 1:
            layer = method.problem.posed(
                weight, statistics.gram, part.constraint, ridge=problem.ridge, damping=problem.damping
            )
        written = Point(weight=view.read().to(layer.weight.dtype))
        # A method that reads the inputs is fitted to the validation tokens too: they are part of its Gram matrix.
        held_out = None if method.reads_inputs else statistics.validation
        reports.append(
            LayerReport(
                name=view.name,
                shape=view.shape,
                sparsity=written.sparsity(),
                relative_error=layer.relative_error(written),
                relative_error_validation=None if held_out is None else layer.relative_error(written, held_out),
                status=result.status.name,
                iterations=result.iterations,
                seconds=seconds * weight.numel() / stacked.numel(),
                tokens=statistics.tokens,
                ridge=problem.ridge if regularized else None,
                damping=problem.damping if regularized else None,
                ridge_trials=damping.trials,
                notes=(*statistics.notes, *result.notes),
                diagnosis=diagnosis,
                convergence=None if reports else Convergence.of(result.history),
                **(_bound(layer, written) if bounds else {}),
            )
        )
    return reports


def _bound(problem: LayerReconstruction, written: Point) -> dict[str, float]:
    """The objective of the written weights and a lower bound on the optimum, both relative to tr(W H W^T).

    Empty if there is no bound: the layer is never used, or no bound is known for the constraint.
    """
    energy = quadratic.energy(problem.weight, problem.gram)
    try:
        bound = lower_bound(problem)
    except (TypeError, ValueError):
        return {}
    if bound is None or energy == 0:
        return {}
    return {"objective": problem.value(written) / energy, "bound": bound.value / energy}
