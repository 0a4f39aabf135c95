"""admm-prune verify: a finished run or a solved layer, checked from its files alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from admm_prune.cli import common
from admm_prune.errors import UserError


@common.logs
def verify(
    ctx: typer.Context,
    target: Annotated[Path, typer.Argument(help="Output of 'run', 'compare' or 'solve --out'.")],
    layer: Annotated[Path | None, typer.Option(help="The layer problem; default: its path in the solution.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The evaluation text of a run; default: the path used by the run.")
    ] = None,
    bound: Annotated[
        Literal["quick", "dual", "block"],
        typer.Option(
            help="Lower bound to prove for a solved layer; 'dual' and 'block' are stronger, in seconds to minutes."
        ),
    ] = "quick",
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip the perplexity of a run, which can then be verified without it.")
    ] = False,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    trust_remote_code: common.TrustRemoteCode = False,
    json: common.Json = False,
) -> None:
    """Check every field of a run or a solved layer: recompute it, compare its fingerprint, or list it as not checked.

    Exit status 0: verified; 1: rejected; 2: wrong input; 3: incomplete (nothing refuted, but a claim not checked).

    Example: admm-prune verify pruned --json
    """
    _refuse_unused(target, common.given(ctx))
    if target.is_dir():
        from admm_prune.verify.run import verify_folder

        report = verify_folder(target, data=data, quick=quick, device=device, trust_remote_code=trust_remote_code)
    else:
        from admm_prune.verify.layer import verify_layer

        report = verify_layer(target, layer, seed=seed, bound=bound)
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
        common.show_table(f"{target}: recomputed", ["figure", "value"], rows)
        print(f"recomputed: {_grouped(report.checked)}")
        if report.fingerprinted:
            print(f"checked by fingerprint alone: {_grouped(report.fingerprinted)}")
        for sentence in report.certificates:
            print(sentence)
        for note in report.notes:
            print(f"note: {note}")
        for note in report.unchecked:
            print(f"not checked: {note}")
        for note in report.left_out:
            print(f"left out: {note}")
        print(report.summary())
    if report.verdict.exit_status:
        raise typer.Exit(report.verdict.exit_status)


def _refuse_unused(target: Path, given: set[str]) -> None:
    """A layer has no model and no text; a run has no layer problems to examine."""
    if not target.exists():
        return  # reported by what would read it
    unused: tuple[str, ...]
    if target.is_dir():
        unused, what = ("layer", "bound", "seed"), "a folder: --{} is for a layer that 'admm-prune solve --out' wrote"
    else:
        unused = ("data", "quick", "device", "trust_remote_code")
        what = "a file: --{} is for a folder that 'admm-prune run' or 'compare' wrote"
    for name in unused:
        if name in given:
            raise UserError(f"{target} is {what.format(name.replace('_', '-'))}")
    if {"data", "quick"} <= given:
        raise UserError("--data is the text for the perplexity, which --quick skips: leave one of them out")


def _grouped(names: list[str]) -> str:
    """The names, those in a file behind its name, the fields of one object as their number; `--json` has all."""
    files: dict[str, dict[str, int]] = {}
    for name in names:
        file, _, field = name.rpartition(": ")
        part = re.sub(r"^([\w\[\]]+)\..+", r"\1", field) if file else field
        files.setdefault(file, {}).setdefault(part, 0)
        files[file][part] += 1
    listed = {
        file: ", ".join(part if count == 1 else f"{part} ({count} fields)" for part, count in parts.items())
        for file, parts in files.items()
    }
    return "; ".join(f"{file}: {text}" if file else text for file, text in listed.items())
