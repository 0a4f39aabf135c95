"""admm-prune report: the HTML page of a finished run or comparison, or of the difference between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common


def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of 'run' or 'compare'.")],
    other: Annotated[Path | None, typer.Argument(help="A second run, for a page on the difference.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output file for a difference; default: difference.html.")] = None,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Regenerate the HTML page of a run or a comparison, or write a page on the difference between two runs.

    Example: admm-prune report pruned compared/models/wanda-50 --out difference.html
    """
    from admm_prune.errors import UserError
    from admm_prune.runs.report import write_difference, write_report

    if other is None:
        if out is not None:
            raise UserError(f"--out is for the difference of two runs: the page of {folder} stands in it")
        path = write_report(folder)
        if json:
            common.emit({"out": str(path)})
        else:
            print(f"report: {path}")
        return
    path = out or Path("difference.html")
    difference = write_difference(folder, other, path, overwrite=overwrite)
    if json:
        common.emit({"out": str(path), **difference})
        return
    rows = [
        [name, *("" if value is None else f"{value:.6g}" for value in (pair["a"], pair["b"]))]
        for name, pair in difference["figures"].items()
    ]
    common.show_table(f"A: {folder}   B: {other}", ["figure", "A", "B"], rows)
    if not difference["same_text"]:
        print("The runs were evaluated on different texts: their perplexities are not comparable.")
    print(f"report: {path}")
