"""admm-prune capture and solve: one layer problem as a file, and its solution."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from admm_prune.cli import common
from admm_prune.cli.progress import shown_progress
from admm_prune.settings import Settings

if TYPE_CHECKING:
    from admm_prune.runs.layer import SolvedLayer


@common.logs
@common.takes("capture")
def capture(
    weight: Annotated[str, typer.Option(help="A block matrix, such as model.layers.0.mlp.up_proj.weight.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    eval_samples: Annotated[int, typer.Option(min=1, help="Held-out sequences.")] = 128,
    problem: Annotated[str, typer.Option(help="Objective of a layer, a name that 'admm-prune list' prints.")] = "layer",
    json: common.Json = False,
    **options: Any,
) -> None:
    """Write the layer problem of one weight of a dense model: weight, and Gram matrices of its inputs.

    There is one of calibration, of validation and of held-out tokens.

    Example: admm-prune capture --weight model.layers.0.mlp.up_proj.weight --out layer.safetensors
    """
    from admm_prune.runs.layer import capture_layer
    from admm_prune.runs.texts import check_data

    settings = Settings(**options, samples=samples, eval_samples=eval_samples)
    text = settings.text(data=check_data(settings.data, settings.model))
    with shown_progress("capturing") as progress:
        layer = capture_layer(
            str(settings.model),
            weight,
            text,
            out,
            device=settings.device,
            dtype=settings.dtype,
            problem=problem,
            trust_remote_code=settings.trust_remote_code,
            overwrite=settings.overwrite,
            progress=progress.step,
        )
    # Metadata of safetensors are strings; counts are printed as numbers.
    facts = {key: int(value) if key.startswith("tokens") else value for key, value in layer.metadata.items()}
    content = {"out": str(out), "shape": list(layer.weight.shape), **facts}
    if json:
        common.emit(content)
    else:
        print(f"{weight} {tuple(layer.weight.shape)}, {layer.metadata['tokens']} tokens: {out}")


@common.logs
@common.takes("solve")
def solve(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="A layer problem file, as written by 'admm-prune capture'.")],
    solver: Annotated[
        str,
        typer.Option(
            help="Name of a solver (see 'admm-prune list').",
            autocompletion=lambda: common.names_in("methods") + common.names_in("references"),
        ),
    ] = "admm",
    solution: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a solver: weights computed elsewhere, the tensor 'weight' of a safetensors file."
        ),
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Fraction to prune: 0.7, or several: 0.5,0.7,0.9.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, N weights kept of every M inputs: 2:4, or several: 2:4,4:8.")
    ] = None,
    bound: Annotated[
        Literal["quick", "dual", "block"],
        typer.Option(
            help="Lower bound of the error: 'quick', or the stronger 'dual' or 'block' in seconds to minutes."
        ),
    ] = "quick",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the pruned weight and its claims as safetensors, for 'verify'; one file per target."),
    ] = None,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Prune one layer and report its error on the calibration and on the held-out Gram.

    Several targets share the factorization.

    Example: admm-prune solve layer.safetensors --solver admm --sparsity 0.5,0.7 --json
    """
    from admm_prune.data.layer_file import load_solution
    from admm_prune.errors import UserError
    from admm_prune.methods.local import GIVEN, given, method_named, with_parts
    from admm_prune.methods.parts import check_one_set
    from admm_prune.methods.target import parse_path
    from admm_prune.runs.layer import solve_path

    problem, constraint = options.pop("problem"), options.pop("constraint")
    check_one_set(constraint, pattern)
    if solution is not None:
        if "solver" in common.given(ctx):
            raise UserError("give either --solver or --solution")
        solver = GIVEN
    made_by = method_named(solver) if solution is None else given(load_solution(solution))
    method, targets = with_parts(made_by, problem, constraint), parse_path(sparsity, pattern)
    path = solve_path(file, method, targets, bound=bound, out=out, **options)
    if json:
        several = {"path": [{"target": solved.target, **solved.as_json()} for solved in path]}
        common.emit(path[0].as_json() if len(path) == 1 else several)
        return
    for target, solved in zip(targets, path, strict=True):
        _show(f"{file}: {solver} {target.label}", solved)


def _show(title: str, solved: SolvedLayer) -> None:
    rows = [
        [key.replace("_", " "), "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)]
        for key, value in solved.as_json().items()
        if key not in ("notes", "diagnosis", "ridge_trials")
    ]
    common.show_table(title, ["", ""], rows)
    for trial in solved.ridge_trials:
        print(f"tried ridge {trial.ridge:g}, damping {trial.damping:g}: validation error {trial.error:.6g}")
    print(solved.advice)
    for finding in solved.diagnosis:
        print(f"{finding.severity}: {finding.finding}{f' ({finding.advice})' if finding.advice else ''}")
    for note in solved.notes:
        print(f"note: {note}")
