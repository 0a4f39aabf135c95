"""admm-prune solve: one layer problem by one solver."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common


def solve(
    file: Annotated[Path, typer.Argument(help="A layer problem file, such as 'admm-prune capture' writes.")],
    solver: Annotated[str, typer.Option(help="A name that 'admm-prune list' prints.")] = "admm",
    sparsity: Annotated[str | None, typer.Option(help="Fraction to go, such as 0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N kept of every M inputs, such as 2:4.")] = None,
    ridge: common.Ridge = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the pruned weight and its claims as safetensors, for 'verify'.")
    ] = None,
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Prune one layer and report its error on the calibration and on the held-out Gram.

    Example: admm-prune solve layer.safetensors --solver admm --sparsity 0.7 --json
    """
    from admm_prune.recipes.catalogue import method_named, parse_target
    from admm_prune.runs.solving import solve_layer_file

    method, target = method_named(solver), parse_target(sparsity, pattern)
    outcome = solve_layer_file(file, method, target, ridge=ridge, out=out, device=device)
    if json:
        common.emit(outcome.as_json())
        return
    rows = [
        [key.replace("_", " "), "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)]
        for key, value in outcome.as_json().items()
        if key not in ("notes", "diagnosis")
    ]
    common.show_table(f"{file}: {solver} {target.label}", ["", ""], rows)
    print(outcome.advice)
    for finding in outcome.diagnosis:
        print(f"{finding.severity}: {finding.finding}{f' ({finding.advice})' if finding.advice else ''}")
    for note in outcome.notes:
        print(f"note: {note}")
