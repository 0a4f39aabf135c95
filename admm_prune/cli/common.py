"""Shared by the commands: options, progress on stderr, results on stdout."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from admm_prune.cli import interrupts
from admm_prune.settings import Option, Settings, options

_DECLARED = options(Settings)


def _typed(name: str, declared: Option) -> Any:
    """The typer option of a setting."""
    ranged = declared.typed not in (str, str | None)
    flags = (f"--{name.replace('_', '-')}",) if declared.typed is bool else ()
    return typer.Option(
        *(declared.flags or flags),
        help=declared.help,
        min=declared.least if ranged else None,
        max=declared.most if ranged else None,
        rich_help_panel=declared.group,
    )


Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON to stdout.")]
Model = Annotated[str, typer.Argument(help="A from_pretrained folder, a Hub id, a .gguf file, or 'embedded'.")]
Out = Annotated[Path, typer.Option(help="Output folder, written atomically.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and exit.")]
Seed = Annotated[int, _typed("seed", _DECLARED["seed"])]
Device = Annotated[str, _typed("device", _DECLARED["device"])]
Dtype = Annotated[str | None, _typed("dtype", _DECLARED["dtype"])]
Overwrite = Annotated[bool, _typed("overwrite", _DECLARED["overwrite"])]


def takes(command: str, kind: type = Settings, *, replaces: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Gives a command, in place of its `**options`, the options of the settings that name it.

    The command receives them by the names of their fields, parsed.

    Args:
        replaces: options that a recipe holds default to None.
    """
    declared = {name: one for name, one in options(kind).items() if command in one.commands.split()}

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(**given: Any) -> None:
            values: dict[str, Any] = {}
            for name, one in declared.items():
                value = given.pop(one.spelled)
                values[name] = value if one.parse is None or (replaces and value is None) else one.parse(value)
            function(**given, **values)

        parameters: list[inspect.Parameter] = []
        for one in declared.values():
            unset = replaces and one.saved_in == "recipe"
            annotation: Any = one.typed | None if unset else one.typed
            default = None if unset else one.typed_default
            parameters.append(_keyword(one.spelled, Annotated[annotation, _typed(one.spelled, one)], default))
        hints = get_type_hints(function, vars(sys.modules[function.__module__]), include_extras=True)
        explicit = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [_keyword(p.name, hints[p.name], p.default) for p in explicit]
        made: Any = call
        made.__signature__ = inspect.Signature(parameters)
        made.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return wrap


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is at the time, which a progress bar replaces."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None: ...


def logs(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options -v and -q, which set what the logger "admm_prune" writes to stderr.

    Notes by default; with -v also phases and the figures of every block, with -vv everything, with -q nothing. Of
    several processes the first one logs.
    """
    options = {
        "verbose": Annotated[
            int, typer.Option("--verbose", "-v", count=True, help="Log phases and blocks; -vv: everything.")
        ],
        "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress: only results.")],
    }

    @functools.wraps(function)
    def call(*, verbose: int, quiet: bool, **given: Any) -> None:
        from admm_prune.errors import UserError

        if verbose and quiet:
            raise UserError("--verbose and --quiet exclude each other")
        logger, handler = logging.getLogger("admm_prune"), _Stderr()
        if verbose:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        silent = quiet or os.environ.get("RANK", "0") != "0"
        before = logger.level
        logger.setLevel(logging.ERROR if silent else {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
        logger.addHandler(handler)
        try:
            function(**given)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    hints = get_type_hints(function, vars(sys.modules[function.__module__]), include_extras=True)
    parameters = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
    made: Any = call
    added = [_keyword(name, annotation, 0 if name == "verbose" else False) for name, annotation in options.items()]
    made.__signature__ = inspect.Signature([*parameters, *added])
    made.__annotations__ = {p.name: p.annotation for p in (*parameters, *added)}
    return call


Report = Callable[[int, int, str], None]
_WIDE = 160


@contextmanager
def progress_bar(what: str, *, shown: bool = True) -> Generator[Report]:
    """A progress bar on stderr, plain lines if stderr is not a terminal; yields the callback (done, total, label)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    shown = shown and logging.getLogger("admm_prune").isEnabledFor(logging.WARNING)  # no bar with --quiet
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


def given(ctx: typer.Context, **renamed: str) -> set[str]:
    """The fields of the options that were given, not left at their defaults; some under another name."""
    renamed |= {one.spelled: name for name, one in _DECLARED.items() if one.spelled != name}
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


def show_tasks(model: str, content: dict[str, Any]) -> None:
    """Results on tasks of lm-evaluation-harness, as a table on stdout."""
    rows = [
        [task, metric, f"{value:.4f}" if isinstance(value, float) else str(value)]
        for task, figures in content["results"].items()
        for metric, value in figures.items()
    ]
    show_table(f"{model}, lm_eval {content['lm_eval']}", ["task", "metric", "value"], rows)
    if content["limit"] is not None:
        print(f"At most {content['limit']} questions per task: a quick check, not a figure to compare.")
