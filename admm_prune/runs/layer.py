"""Layer problem files: capturing one layer of a dense model in a file, and solving such a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.layer_file import LayerFile, is_problem, is_solution, load_layer_file, write_tensors
from admm_prune.errors import UserError
from admm_prune.methods.base import Ridge, RidgeTrial
from admm_prune.methods.local import REFERENCES, Method, with_parts
from admm_prune.methods.part_checks import Part, check_result, check_set, explained_parts
from admm_prune.methods.parts import LAYER, LayerProblem
from admm_prune.methods.ridge import Damping, parse_ridge, settle_ridge
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import check_tokens_known
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.point import Point
from admm_prune.problems.constraints import SparseSet, StackedRows
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Diagnosis, Result
from admm_prune.runs.claims import Claims, layer_sha256, tensor_sha256
from admm_prune.runs.journal.folder import check_output_file
from admm_prune.runs.machine import PeakMemory, check_dtype, pick_device
from admm_prune.runs.texts import Texts, log_notes
from admm_prune.settings import TextSettings
from admm_prune.solvers.diagnostics import diagnose
from admm_prune.solvers.reference import BlockCertificate, Bound, DualCertificate, block_bound, dual_bound, lower_bound

_WIDEST_BOUND = 4096  # inputs above which no bound is computed: two eigendecompositions of this size take minutes
BoundChoice = Literal["quick", "dual", "block"]  # `lower_bound`, or the larger one of it and another bound
_BOUNDS: dict[BoundChoice, tuple[Callable[..., DualCertificate | BlockCertificate | None], ...]] = {
    "quick": (),
    "dual": (dual_bound,),
    "block": (block_bound,),
}  # in addition to `lower_bound`


def capture_layer(
    model: str,
    weight: str,
    text: TextSettings,
    out: Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    problem: str = LAYER,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> LayerFile:
    """Captures the layer problem of one weight of a dense model, writes it to a file, and returns it.

    Args:
        model: a folder, a Hub id or "embedded".
        weight: the name of the weight.
        text: the settings of the calibration text, and of the holdout text for `gram_holdout`.
        out: the file to write.
        problem: the name of the objective for which the Gram matrices are captured, which may weight the tokens.
        trust_remote_code: allow running code that comes with the model.
        overwrite: replace an earlier layer file `out`, which is an error otherwise.
        progress: called with (blocks done, number of blocks, name of the current block).

    Raises:
        UserError: the model has no such block matrix, there is no such problem, the text cannot be used, or the file
            cannot be written.
    """
    check_output_file(out, overwrite=overwrite, ours=is_problem)
    place = pick_device(device)
    weighting = LayerProblem.of(problem).weighting
    check_dtype(dtype)
    loaded = load(model, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    blocks = decoder_blocks(loaded.model)
    home = next((i for i, block in enumerate(blocks) if weight in [view.name for view in block.weights]), None)
    if home is None:
        examples = ", ".join(view.name for view in blocks[0].weights)
        raise UserError(f"the model has no block matrix '{weight}'; in its first block there are {examples}")
    view = next(view for view in blocks[home].weights if view.name == weight)
    check_tokens_known([view], weighting)
    log_notes(loaded)
    texts = Texts(text, loaded)
    records = texts.records()
    stream = BlockStream(
        loaded.model,
        blocks,
        texts.calibration(),
        loaded.model.device,
        holdout=texts.evaluation,
        weighting=weighting,
    )
    for index in range(home + 1):
        if progress is not None:
            progress(index, home + 1, blocks[index].name)
        if index < home:
            stream.advance(index)
    (shared,) = stream.collect(home, {weight})
    statistics = shared.statistics
    layer = LayerFile(
        weight=view.read().float().cpu(),
        gram=statistics.gram.cpu(),
        gram_validation=None if statistics.validation is None else statistics.validation.cpu(),
        gram_holdout=None if statistics.holdout is None else statistics.holdout.cpu(),
        metadata={
            "model": loaded.source,
            "weight": weight,
            "problem": problem,
            "tokens": str(statistics.tokens),
            "tokens_validation": str(statistics.validation_tokens),
            "tokens_holdout": str(statistics.holdout_tokens),
            "calibration": records["calibration"].token_hash,
            "holdout": records["evaluation"].token_hash,
        },
    )
    layer.save(out)
    return layer


@dataclass(frozen=True, kw_only=True)
class SolvedLayer:
    """The result of a solver on a layer file. Errors are relative, without ridge or damping, in float64.

    Attributes:
        target: "0.7" or "2:4".
        bound: a proved lower bound of the objective over the sparse set; None if none is proved.
        gap: 1 - bound / objective: no feasible point is better by a larger fraction.
        seconds, peak_mib: time and peak memory of the solve; the time includes the selection of the ridge. Targets that
            were solved together share the time evenly, and have the same peak.
        ridge_trials: the trials of the ridge "auto", best first.
    """

    target: str
    relative_error: float
    relative_error_holdout: float | None
    sparsity: float
    objective: float
    bound: float | None
    bound_kind: str | None
    gap: float | None
    ridge: float
    damping: float
    ridge_trials: tuple[RidgeTrial, ...]
    status: str
    iterations: int
    seconds: float
    peak_mib: float
    notes: tuple[str, ...]
    diagnosis: tuple[Diagnosis, ...]
    advice: str

    def as_json(self) -> dict[str, Any]:
        content = {key: value for key, value in asdict(self).items() if key not in ("target", "advice")}
        if not self.ridge_trials:
            del content["ridge_trials"]
        return content


def solve_path(
    path: Path,
    method: Method,
    targets: Sequence[Target],
    *,
    ridge: str | float | None = None,
    bound: BoundChoice = "quick",
    out: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> list[SolvedLayer]:
    """Solves the layer problem in a file to one or several targets.

    If the method supports it (`Method.stacks_targets`), the targets are solved as one problem with stacked copies of
    the weight, each within its own budget, so that factorizations are shared; the results equal those of separate
    solves. No target starts from the solution of another: ADMM's schedule starts with so small a penalty that the start
    does not matter, and shorter schedules of 12 iterations or more gave the same errors (within 0.2 % on the embedded
    model and stories260K).

    Args:
        path: the layer problem file.
        targets: the pruning targets, without duplicates.
        ridge: replaces the default of the method; "auto" selects ridge and damping for each target on
            `gram_validation`.
        bound: "quick" computes `lower_bound`, at the cost of one factorization; "dual" the larger one of this and
            `dual_bound`, which takes seconds to minutes per target; "block" the larger one of this and `block_bound`,
            which takes several times longer. If the solver proved a larger bound itself, that is returned.
        out: the file for the pruned weight and its claims, which `verify` reads; with several targets,
            OUT-0.5.safetensors, OUT-2of4.safetensors and so on.
        overwrite: replace earlier results there, which is an error otherwise.

    Returns:
        The result for each target.

    Raises:
        UserError: the file is not a layer problem, its weight does not admit a target, there is no `gram_validation` to
            select a ridge on, or `out` cannot be written.
    """
    parsed_ridge = parse_ridge(ridge)
    place = pick_device(device)
    layer = load_layer_file(path)
    method = _fitted(method, path, layer)
    if parsed_ridge == "auto" and (layer.gram_validation is None or layer.cross_gram is not None):
        what = "no gram_validation" if layer.gram_validation is None else "a target from other inputs"
        raise UserError(f"{path}: it has {what}, which --ridge auto cannot choose on: give a number")
    outs = [_place_of(out, target, len(targets)) for target in targets]
    for file in outs:
        if file is not None:
            check_output_file(file, overwrite=overwrite, ours=is_solution)
    moved = _mapped(layer, lambda x: x.to(place))
    posed = _in_float64(moved) if method.name in REFERENCES else moved  # their proofs refer to the numbers in the file
    try:
        _check_errors(moved, method, targets[0])
        solved = [_rounded(part, layer.gram.dtype) for part in _solve(posed, method, targets, parsed_ridge, place)]
        reached = [_measured(moved, method, target, part, bound) for target, part in zip(targets, solved, strict=True)]
    except LinAlgError as error:
        raise UserError(f"{path}: gram cannot be factored, it is not X^T X: give a larger --ridge") from error
    except (TypeError, ValueError) as error:  # the solver does not support the constraint or the problem
        raise UserError(f"{path}: {error}") from error
    for target, file, part, figures in zip(targets, outs, solved, reached, strict=True):
        if file is not None:
            weight = part.result.solution["weight"].cpu().contiguous()
            write_tensors(file, {"weight": weight}, _claims(figures, path, layer, weight, method, target).metadata())
    return reached


def _check_errors(layer: LayerFile, method: Method, target: Target) -> None:
    """Raises ValueError, before any work, if the dense weights would have a negative error."""
    if layer.cross_gram is not None:
        problem = _problem(layer, [method.constraint(target)], Damping(1.0, 0.0), method)
        problem.relative_error(problem.initial())


@dataclass(frozen=True)
class _Solved:
    """The problem and the result of one target.

    Attributes:
        whole: the result of the solve of all targets that were stacked with this one.
    """

    problem: LayerReconstruction
    result: Result
    whole: Result
    damping: Damping
    peak_mib: float


def _solve(layer: LayerFile, method: Method, targets: Sequence[Target], ridge: Ridge, place: str) -> list[_Solved]:
    """Solves all targets, stacked if the method supports it."""
    rows, width = layer.weight.shape
    parts = [Part(rows, method.constraint(target), target.fraction) for target in targets]
    dampings: list[Damping] = []
    for part in parts:
        constraint = part.constraint
        check_set(constraint, (rows, width), part.fraction)
        with explained_parts(problem=method.problem.build, constraint=type(constraint)):
            damping = settle_ridge(ridge, method, layer.weight, layer.gram, layer.gram_validation, constraint)
        dampings.append(damping)
    groups: dict[object, list[int]] = {}
    for i, damping in enumerate(dampings):
        groups.setdefault((damping.ridge, damping.damping) if method.stacks_targets else i, []).append(i)
    solved: dict[int, _Solved] = {}
    for members in groups.values():
        damping, constraints = dampings[members[0]], [parts[i].constraint for i in members]
        whole = _problem(layer, constraints, damping, method)
        solver = method.make()
        with (
            PeakMemory(place) as memory,
            explained_parts(solver=type(solver), constraint=type(constraints[0]), problem=type(whole)),
        ):
            result = solver.solve(whole)
        check_result(result, whole, solver, [parts[i] for i in members])
        for i, constraint, weight in zip(members, constraints, result.solution["weight"].split(rows), strict=True):
            part_problem = whole if len(members) == 1 else _problem(layer, [constraint], damping, method)
            solution = Point(weight=weight)
            part_result = replace(
                result,
                solution=solution,
                objective=result.objective if part_problem is whole else part_problem.value(solution),
                seconds=result.seconds / len(members),
            )
            solved[i] = _Solved(part_problem, part_result, result, dampings[i], memory.extra_mib)
    return [solved[i] for i in range(len(targets))]


def _fitted(method: Method, path: Path, layer: LayerFile) -> Method:
    """The method with the objective for which the file was captured, unless it has its own."""
    captured = layer.metadata.get("problem", LAYER)
    if method.problem.name == LAYER:
        return with_parts(method, captured)
    if method.problem.weighting.weigh is not None and method.problem.name != captured:
        raise UserError(
            f"{path}: its Grams were captured for the problem '{captured}', but '{method.problem.name}' weights tokens "
            f"differently: capture the layer with --problem {method.problem.name}"
        )
    return method


def _problem(
    layer: LayerFile, constraints: Sequence[SparseSet], damping: Damping, method: Method
) -> LayerReconstruction:
    """The problem of the layer; with several constraints, the weight is stacked with one copy for each of them."""
    rows, copies = len(layer.weight), len(constraints)
    energy = layer.target_energy
    return method.problem.posed(
        layer.weight.repeat(copies, 1) if copies > 1 else layer.weight,
        layer.gram,
        constraints[0] if copies == 1 else StackedRows(tuple((rows, constraint) for constraint in constraints)),
        ridge=damping.ridge,
        damping=damping.damping,
        cross_gram=layer.cross_gram,
        target_energy=None if energy is None else energy * copies,
    )


def _in_float64(layer: LayerFile) -> LayerFile:
    """The layer in float64, after rounding all tensors to the dtype of its Gram matrix."""
    return _mapped(layer, lambda x: x.to(layer.gram.dtype).double())


def _mapped(layer: LayerFile, change: Callable[[Tensor], Tensor]) -> LayerFile:
    tensors: dict[str, Any] = {name: change(x) for name, x in vars(layer).items() if isinstance(x, Tensor)}
    return replace(layer, **tensors)


def _rounded(solved: _Solved, dtype: torch.dtype) -> _Solved:
    """The solution in the dtype of the file."""
    solution = solved.result.solution.map(lambda x: x.to(dtype))
    return replace(solved, result=replace(solved.result, solution=solution))


def _measured(layer: LayerFile, method: Method, target: Target, solved: _Solved, choice: BoundChoice) -> SolvedLayer:
    """The figures of a solution. In float64, the problem is the one that the file and the claims state: D, which in
    float32 is rounded before it is added to H, moves the objective by 1e-8, and the terms of a target from other inputs
    cancel."""
    problem, result, solution = solved.problem, solved.result, solved.result.solution
    objective = result.objective
    if layer.cross_gram is not None or layer.weight.shape[1] <= _WIDEST_BOUND:
        damping = Damping(problem.ridge, problem.damping)
        constraint: Any = problem.constraint  # the `SparseSet` that it was posed with
        problem = _problem(_in_float64(layer), [constraint], damping, method)
        solution = solution.map(Tensor.double)
        objective = problem.value(solution)
    holdout = layer.gram_holdout if layer.cross_gram is None else None
    proved = result.bound if solved.problem.gram.dtype is torch.float64 else None
    bound, notes = _bound(problem, replace(result, objective=objective, bound=proved), choice)
    return SolvedLayer(
        target=str(target),
        relative_error=problem.relative_error(solution),
        relative_error_holdout=None
        if holdout is None
        else problem.relative_error(solution, holdout.to(problem.gram.dtype)),
        sparsity=solution.sparsity(),
        objective=objective,
        bound=None if bound is None else bound.value,
        bound_kind=None if bound is None else bound.kind,
        gap=None if bound is None else proved_gap(objective, bound.value),
        ridge=problem.ridge,
        damping=problem.damping,
        ridge_trials=solved.damping.trials,
        status=result.status.name,
        iterations=result.iterations,
        seconds=result.seconds + solved.damping.seconds,
        peak_mib=solved.peak_mib,
        notes=(*result.notes, *notes),
        diagnosis=diagnose(
            solved.whole,
            width=layer.weight.shape[1],
            tokens=_tokens(layer),
            dead=int(solved.problem.dead.sum()),
            ridge_asked=solved.damping.ridge,
            ridge_used=problem.ridge,
            ridge_matters=method.damped,
        ),
        advice=result.status.value,
    )


def _bound(problem: LayerReconstruction, result: Result, choice: BoundChoice) -> tuple[Bound | None, tuple[str, ...]]:
    """The solver's bound, or else the best one of the choice, with a note if it is too weak to certify anything."""
    if result.bound is not None:
        return Bound(min(result.bound, result.objective), "solver"), ()
    if len(problem.hessian) > _WIDEST_BOUND:
        return None, (f"no lower bound: the layer is wider than {_WIDEST_BOUND}",)
    bounds: list[Bound] = []
    refusals: list[str] = []
    functions: tuple[Callable[..., Bound | DualCertificate | BlockCertificate | None], ...]
    functions = (lower_bound, *_BOUNDS[choice])
    for one in functions:
        try:
            proved = one(problem, result.objective)
        except (TypeError, ValueError, LinAlgError) as error:
            refusals.append(f"no lower bound: {error}")
            continue
        if proved is not None:
            bounds.append(proved if isinstance(proved, Bound) else proved.bound)
    if not bounds:
        unproved = "no lower bound: float64 does not prove the damped Gram definite: raise the ridge"
        return None, tuple(refusals) or (unproved,)
    best = max(bounds, key=lambda bound: bound.value)
    if best.vacuous:
        return best, (f"the lower bound is {best.ratio:.1g} of the loss reached, too low to say how good it is",)
    return best, ()


def proved_gap(objective: float, bound: float) -> float:
    """1 - bound / objective, between 0 and 1; 0 where the objective is 0."""
    return min(1.0, max(0.0, 1 - bound / objective)) if objective > 0 else 0.0


def _claims(
    solved: SolvedLayer, path: Path, layer: LayerFile, weight: Tensor, method: Method, target: Target
) -> Claims:
    declared = (field.name for field in fields(Claims))
    measured: dict[str, Any] = {name: getattr(solved, name) for name in declared if hasattr(solved, name)}
    return Claims(
        **measured,
        method=method.name,
        budget=method.cell(target),
        constraint=None if method.sets is None else method.sets.name,
        problem=method.problem.name,
        layer=str(path),
        layer_sha256=layer_sha256(layer),
        weight_sha256=tensor_sha256(weight),
    )


def _tokens(layer: LayerFile) -> int | None:
    text = layer.metadata.get("tokens", "")
    return int(text) if text.isdecimal() else None


def _place_of(out: Path | None, target: Target, targets: int) -> Path | None:
    """The file of one target: `out` itself if it is the only one."""
    if out is None or targets == 1:
        return out
    return out.with_name(f"{out.stem}-{str(target).replace(':', 'of')}{out.suffix}")
