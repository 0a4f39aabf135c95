"""Shared by the commands: options, progress on stderr, results on stdout."""

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
        "'embedded', the default for the embedded model only."
    ),
]
Column = Annotated[
    str | None,
    typer.Option(help="Column with the text or conversation; default: 'text', or the only column with text."),
]
Documents = Annotated[
    int | None, typer.Option(min=1, help="Number of calibration documents; default: all, or 20,000 for a Hub id.")
]
EvalDocuments = Annotated[
    int | None, typer.Option(min=1, help="Number of evaluation documents; default: all, or 20,000 for a Hub id.")
]
Split = Annotated[str, typer.Option(help="Calibration split of a Hub or saved dataset.")]
EvalSplit = Annotated[
    str | None,
    typer.Option(help="Evaluation split of a Hub or saved dataset; default: 'validation' or 'test'."),
]
EvalData = Annotated[str | None, typer.Option(help="Evaluation text; default: a held-out part of --data.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Number of calibration sequences; the default depends on the method.")
]
EvalSamples = Annotated[int | None, typer.Option(min=1, help="Evaluation sequences; default: the whole text.")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Sequence length in tokens; default: the model's context, at most 2048.")
]
Packing = Annotated[
    str,
    typer.Option(
        help="'documents' (one a sequence), 'windows' (contiguous), 'segments' (as in code of GPTQ and Wanda), 'auto'."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed for sampling sequences.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON to stdout.")]
Out = Annotated[Path, typer.Option(help="Output folder, written atomically.")]
OptionalOut = Annotated[Path | None, typer.Option(help="Output folder, written atomically.")]
Ridge = Annotated[
    str | None,
    typer.Option(help="Ridge relative to diag(H), overriding the solver's; 'auto' selects it on validation tokens."),
]

Problem = Annotated[str, typer.Option(help="Layer objective, by name (see 'admm-prune list').")]
OwnProblem = Annotated[
    str | None,
    typer.Option(help="Layer objective, by name (see 'admm-prune list'); default: the method's."),
]
Constraint = Annotated[
    str | None,
    typer.Option(help="Constraint for --sparsity, by name (see 'admm-prune list'); default: the method's."),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Optimizer steps of methods that train; the default depends on the method.")
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow running code from the model's folder or repository.")
]

Targets = Annotated[
    list[str] | None,
    typer.Option(help="Prune only matching weights: a class (LlamaMLP), a module name, or re:REGEX; repeatable."),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Do not prune matching weights (see --targets); repeatable.")]
Override = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=0.5, PATTERN=2:4 or PATTERN=dense: target for matching weights; repeatable."),
]
Log = Annotated[str | None, typer.Option(help="Log the run: tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run with the same arguments.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and exit.")]

Report = Callable[[int, int, str], None]
_WIDE = 160


@contextmanager
def progress_bar(what: str, *, shown: bool = True) -> Generator[Report]:
    """A progress bar on stderr, plain lines if stderr is not a terminal; yields the callback (done, total, label)."""
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
    """Adds advice on resuming to errors that interrupt a run with a journal beside `out`."""
    from admm_prune.models.parallel import LostProcessError
    from admm_prune.runs.journal.journal import home_of

    try:
        yield
    except (KeyboardInterrupt, LostProcessError) as error:
        advice = f"continue with the same command and --resume ({out}.partial holds the finished part)"
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
    """The names of the options that were set explicitly; some under another name."""
    names = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    return {renamed.get(name, name) for name in names}


def emit(content: dict[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that are not finite become null."""
    from admm_prune.runs.journal.folder import finite

    print(json.dumps(finite(content), allow_nan=False))


def show_table(
    title: str, columns: list[str], rows: list[list[str]], *, mark: set[int] | None = None, prose: bool = False
) -> None:
    """A table on stdout; the first column is left-aligned, figures are right-aligned.

    Args:
        mark: rows in bold.
        prose: the other columns hold text: they are left-aligned, and the last one wraps.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width limit
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
