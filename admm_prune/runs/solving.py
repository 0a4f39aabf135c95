"""A layer problem file solved, measured, and written down."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.layer_file import LayerFile, load_layer_file, write_tensors
from admm_prune.errors import UserError
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.catalogue import Method, Target
from admm_prune.result import Result
from admm_prune.runs.claims import Claims, layer_sha256, tensor_sha256
from admm_prune.runs.device import pick_device
from admm_prune.runs.folder import check_output_file
from admm_prune.runs.memory import PeakMemory
from admm_prune.runs.pruning import check_ridge
from admm_prune.solvers.doctor import Diagnosis, diagnose
from admm_prune.solvers.reference import Bound, lower_bound

_WIDEST_BOUND = 4096  # inputs: two eigendecompositions of so many take minutes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a solver reached on a layer file. Errors are relative, undamped, in float64."""

    relative_error: float
    relative_error_holdout: float | None
    sparsity: float
    objective: float
    bound: float | None
    bound_kind: str | None
    ridge: float
    damping: float
    status: str
    iterations: int
    seconds: float
    peak_mib: float
    notes: tuple[str, ...]
    diagnosis: tuple[Diagnosis, ...]
    advice: str

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "advice"}


def solve_layer_file(
    path: Path,
    method: Method,
    target: Target,
    *,
    ridge: float | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> Outcome:
    """Solves the layer problem in `path`.

    Args:
        ridge: in place of the method's own.
        out: where to write the pruned weight with all that is claimed of it, as safetensors for `verify`.

    Raises:
        UserError: the file is no layer problem, its weight does not admit the target, or `out` cannot be written.
    """
    check_ridge(ridge)
    place = pick_device(device)
    layer = load_layer_file(path)
    if out is not None:
        check_output_file(out)
    cross = None if layer.cross_gram is None else layer.cross_gram.to(place)
    asked = method.ridge if ridge is None else ridge
    try:
        with PeakMemory(place) as memory:
            problem = LayerReconstruction(
                layer.weight.to(place),
                layer.gram.to(place),
                method.constraint(target),
                ridge=asked,
                damping=method.damping,
                cross_gram=cross,
                target_energy=layer.target_energy,
            )
            result = method.make().solve(problem)
    except LinAlgError as error:
        raise UserError(f"{path}: gram cannot be factored, it is not X^T X: give a larger --ridge") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    holdout = layer.gram_holdout if cross is None else None
    bound, notes = _bound(problem, result)
    outcome = Outcome(
        relative_error=problem.relative_error(result.solution),
        relative_error_holdout=None if holdout is None else problem.relative_error(result.solution, holdout.to(place)),
        sparsity=result.solution.sparsity(),
        objective=result.objective,
        bound=None if bound is None else bound.value,
        bound_kind=None if bound is None else bound.kind,
        ridge=problem.ridge,
        damping=problem.damping,
        status=result.status.name,
        iterations=result.iterations,
        seconds=result.seconds,
        peak_mib=memory.extra_mib,
        notes=(*result.notes, *notes),
        diagnosis=diagnose(
            result,
            width=layer.weight.shape[1],
            tokens=_tokens(layer),
            dead=int(problem.dead.sum()),
            ridge_asked=asked,
            ridge_used=problem.ridge,
        ),
        advice=result.status.value,
    )
    if out is not None:
        weight = result.solution["weight"].cpu().contiguous()
        write_tensors(out, {"weight": weight}, _claims(outcome, path, layer, weight, method, target).metadata())
    return outcome


def _bound(problem: LayerReconstruction, result: Result) -> tuple[Bound | None, tuple[str, ...]]:
    """The solver's own bound, else the best cheap one, and a word where it says next to nothing."""
    if result.bound is not None:
        return Bound(result.bound, "solver"), ()
    if len(problem.hessian) > _WIDEST_BOUND:
        return None, (f"no lower bound: the layer is wider than {_WIDEST_BOUND}",)
    try:
        bound = lower_bound(problem, result.objective)
    except (TypeError, ValueError, LinAlgError) as error:
        return None, (f"no lower bound: {error}",)
    if bound.vacuous:
        return bound, (f"the lower bound is {bound.ratio:.1g} of the loss reached: it certifies nothing",)
    return bound, ()


def _claims(outcome: Outcome, path: Path, layer: LayerFile, weight: Tensor, method: Method, target: Target) -> Claims:
    pattern = target.pattern
    return Claims(
        method=method.name,
        status=outcome.status,
        target=f"{pattern[0]}:{pattern[1]}" if pattern else repr(target.sparsity),
        budget="group" if pattern else "row" if method.row_wise else "matrix",
        sparsity=outcome.sparsity,
        relative_error=outcome.relative_error,
        relative_error_holdout=outcome.relative_error_holdout,
        objective=outcome.objective,
        bound=outcome.bound,
        bound_kind=outcome.bound_kind,
        ridge=outcome.ridge,
        damping=outcome.damping,
        layer=str(path),
        layer_sha256=layer_sha256(layer),
        weight_sha256=tensor_sha256(weight),
    )


def _tokens(layer: LayerFile) -> int | None:
    text = layer.metadata.get("tokens", "")
    return int(text) if text.isdecimal() else None
