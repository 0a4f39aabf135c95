"""admm-prune solve: one layer problem by one solver."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admm_prune.cli import common

if TYPE_CHECKING:
    from admm_prune.runs.solving import SolvedLayer


def solve(
    file: Annotated[Path, typer.Argument(help="A layer problem file, such as 'admm-prune capture' writes.")],
    solver: Annotated[str, typer.Option(help="A name that 'admm-prune list' prints.")] = "admm",
    sparsity: Annotated[str | None, typer.Option(help="Fraction to go, such as 0.7, or several: 0.5,0.7,0.9.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, N kept of every M inputs, such as 2:4, or several: 2:4,4:8.")
    ] = None,
    problem: common.OwnProblem = None,
    constraint: common.Constraint = None,
    ridge: common.Ridge = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the pruned weight and its claims as safetensors, for 'verify'; one file a target."),
    ] = None,
    overwrite: common.Overwrite = False,
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Prune one layer and report its error on the calibration and on the held-out Gram.

    Several targets are solved as a path that shares the work.

    Example: admm-prune solve layer.safetensors --solver admm --sparsity 0.5,0.7 --json
    """
    from admm_prune.recipes.local_methods import method_named, with_parts
    from admm_prune.recipes.parts import check_one_set
    from admm_prune.recipes.targets import parse_path
    from admm_prune.runs.solving import solve_path

    check_one_set(constraint, pattern)
    method, targets = with_parts(method_named(solver), problem, constraint), parse_path(sparsity, pattern)
    path = solve_path(file, method, targets, ridge=ridge, out=out, overwrite=overwrite, device=device)
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
