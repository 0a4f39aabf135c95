"""admm-prune verify: a finished run or a solved layer, checked from its files alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common


@common.logs
def verify(
    target: Annotated[Path, typer.Argument(help="Output of 'run', 'compare' or 'solve --out'.")],
    layer: Annotated[Path | None, typer.Option(help="The layer problem; default: its path in the solution.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The evaluation text of a run; default: the path used by the run.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the perplexity of a run.")] = False,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Check every field of a run or a solved layer: recompute it, compare its fingerprint, or list it as not checked.

    Exit status 0: verified; 1: rejected; 2: wrong input; 3: incomplete (nothing refuted, but a claim not checked).

    Example: admm-prune verify pruned --json
    """
    if target.is_dir():
        from admm_prune.verify.run import verify_folder

        report = verify_folder(target, data=data, quick=quick, device=device)
    else:
        from admm_prune.verify.layer import verify_layer

        report = verify_layer(target, layer, seed=seed)
    for failure in report.failures:
        print(f"admm-prune: {failure}", file=sys.stderr)
    if json:
        common.emit(report.as_json())
    else:
        rows = [
            [name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)]
            for name, value in report.numbers.items()
            if value is not None
        ]
        common.show_table(f"{target}: recomputed", ["", ""], rows)
        print(f"recomputed: {', '.join(report.checked)}")
        if report.fingerprinted:
            print(f"checked by fingerprint alone: {', '.join(report.fingerprinted)}")
        for sentence in report.certificates:
            print(sentence)
        for note in report.unchecked:
            print(f"not checked: {note}")
        for note in report.left_out:
            print(f"left out: {note}")
        print(report.summary())
    if report.verdict.exit_status:
        raise typer.Exit(report.verdict.exit_status)
