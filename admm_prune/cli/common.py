"""What the commands share: their options, progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from admm_prune.cli import interrupts

Model = Annotated[str, typer.Option(help="'embedded', a from_pretrained folder, or a Hub id.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: a file (.txt, .jsonl, .json, .csv, .parquet, or .gz), a folder, a Hub id, or "
        "'embedded', which is the default of the embedded model alone."
    ),
]
Column = Annotated[
    str | None,
    typer.Option(help="Column of rows that holds the text or a chat; 'text' by default, or the only one with text."),
]
Documents = Annotated[
    int | None, typer.Option(min=1, help="Calibration documents to read; all by default, 20,000 of a Hub id.")
]
EvalDocuments = Annotated[
    int | None, typer.Option(min=1, help="Evaluation documents to read; all by default, 20,000 of a Hub id.")
]
Split = Annotated[str, typer.Option(help="Split of a Hub id or saved data set to calibrate on.")]
EvalSplit = Annotated[
    str | None,
    typer.Option(help="Split of a Hub id or saved data set to evaluate on; 'validation' or 'test' by default."),
]
EvalData = Annotated[str | None, typer.Option(help="Text to evaluate on; by default a held-out part of --data.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Calibration sequences; as many as the method asks for by default.")
]
EvalSamples = Annotated[int | None, typer.Option(min=1, help="Evaluation sequences; all of the text by default.")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a sequence; the model's context by default, at most 2048.")
]
Packing = Annotated[
    str,
    typer.Option(
        help="'documents' (one a sequence), 'windows' (contiguous), 'segments' (as in code of GPTQ and Wanda), 'auto'."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws the sequences.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")]
Json = Annotated[bool, typer.Option("--json", help="One machine-readable line on stdout.")]
Out = Annotated[Path, typer.Option(help="Folder to write, whole or not at all.")]
OptionalOut = Annotated[Path | None, typer.Option(help="Folder to write, whole or not at all.")]
Ridge = Annotated[
    str | None,
    typer.Option(help="Relative to diag(H), in place of the solver's own; 'auto' chooses it on validation tokens."),
]

Problem = Annotated[str, typer.Option(help="Objective of a layer, a name that 'admm-prune list' prints.")]
OwnProblem = Annotated[
    str | None,
    typer.Option(help="Objective of a layer, a name that 'admm-prune list' prints; the method's own by default."),
]
Constraint = Annotated[
    str | None,
    typer.Option(help="Sparse set of a --sparsity, a name that 'admm-prune list' prints; the method's own by default."),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Optimizer steps of the methods that train; their own number by default.")
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Never done otherwise.")
]

Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Prune only what fits: a class (LlamaMLP), a module's name, or re: and an expression; repeatable."
    ),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Leave what fits as it is, as for --targets; repeatable.")]
Override = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=0.5, PATTERN=2:4 or PATTERN=dense: another target for what fits; repeatable."),
]
Log = Annotated[str | None, typer.Option(help="Follow the run: tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, given the same arguments.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result there; refused otherwise. Never replaces others.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and do nothing.")]

Report = Callable[[int, int, str], None]
_WIDE = 160


@contextmanager
def progress_bar(what: str, *, shown: bool = True) -> Generator[Report]:
    """A progress bar on stderr, lines where stderr is no terminal; yields the callback (done, total, at work)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not (console.is_terminal and shown)) as bar:
        task = bar.add_task("", total=None)

        def report(done: int, total: int, at_work: str) -> None:
            interrupts.check()
            bar.update(task, completed=done, total=total, description=at_work)
            if shown and not console.is_terminal and at_work:
                print(f"{what}: {done}/{total} {at_work}", file=sys.stderr, flush=True)

        yield report


@contextmanager
def resumable(out: Path) -> Generator[None]:
    """Has what breaks off a run say how to go on, where something is kept of it beside `out`."""
    from admm_prune.models.parallel import LostProcessError
    from admm_prune.runs.journal.journal import home_of

    try:
        yield
    except (KeyboardInterrupt, LostProcessError) as error:
        advice = f"go on with the same command and --resume ({out}.partial holds what is finished)"
        if home_of(out).is_dir():
            interrupts.advise(advice)
            if isinstance(error, LostProcessError):
                raise LostProcessError(f"{error}: {advice}") from error
        raise


def parse_overrides(given: list[str] | None) -> dict[str, float | str]:
    """{pattern: target} from PATTERN=TARGET.

    Raises:
        UserError: there is no "=".
    """
    from admm_prune.errors import UserError

    found: dict[str, float | str] = {}
    for item in given or ():
        pattern, equals, wanted = item.rpartition("=")
        if not (equals and pattern and wanted):
            raise UserError(f"an override is PATTERN=TARGET, such as 're:.*down_proj=0.5', not '{item}'")
        found[pattern] = wanted
    return found


def given(ctx: typer.Context, **renamed: str) -> set[str]:
    """The names of the options that were given, not left at their defaults; some under another name."""
    names = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    return {renamed.get(name, name) for name in names}


def emit(content: dict[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that are not finite become null."""
    from admm_prune.runs.journal.folder import finite

    print(json.dumps(finite(content), allow_nan=False))


def show_table(
    title: str, columns: list[str], rows: list[list[str]], *, mark: set[int] | None = None, prose: bool = False
) -> None:
    """A table on stdout, the first column to the left, figures to the right.

    Args:
        mark: rows in bold.
        prose: the other columns hold words: they go to the left, and the last one wraps.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width that the table would have to fit
        console.width = _WIDE
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for i, column in enumerate(columns):
        left, wraps = i == 0 or prose, prose and i == len(columns) - 1
        table.add_column(column, justify="left" if left else "right", no_wrap=not wraps)
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if mark and i in mark else None)
    console.print(table)
