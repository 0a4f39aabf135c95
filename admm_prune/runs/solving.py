"""A layer problem file solved, measured, and written down."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.layer_file import load_layer_file, write_tensors
from admm_prune.errors import UserError
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.recipes.catalogue import Method, Target
from admm_prune.runs.device import pick_device
from admm_prune.runs.folder import check_output_file
from admm_prune.runs.memory import PeakMemory
from admm_prune.runs.pruning import check_ridge


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a solver reached on a layer file. Errors are relative, undamped, in float64."""

    relative_error: float
    relative_error_holdout: float | None
    sparsity: float
    objective: float
    bound: float | None
    status: str
    iterations: int
    seconds: float
    peak_mib: float
    notes: tuple[str, ...]
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
        out: where to write the pruned weight, as safetensors.

    Raises:
        UserError: the file is no layer problem, its weight does not admit the target, or `out` cannot be written.
    """
    check_ridge(ridge)
    place = pick_device(device)
    layer = load_layer_file(path)
    if out is not None:
        check_output_file(out)
    cross = None if layer.cross_gram is None else layer.cross_gram.to(place)
    try:
        with PeakMemory(place) as memory:
            problem = LayerReconstruction(
                layer.weight.to(place),
                layer.gram.to(place),
                method.constraint(target),
                ridge=method.ridge if ridge is None else ridge,
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
    if out is not None:
        write_tensors(out, {"weight": result.solution["weight"]})
    return Outcome(
        relative_error=problem.relative_error(result.solution),
        relative_error_holdout=None if holdout is None else problem.relative_error(result.solution, holdout.to(place)),
        sparsity=result.solution.sparsity(),
        objective=result.objective,
        bound=result.bound,
        status=result.status.name,
        iterations=result.iterations,
        seconds=result.seconds,
        peak_mib=memory.extra_mib,
        notes=result.notes,
        advice=result.status.value,
    )
