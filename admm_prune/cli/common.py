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
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from admm_prune.cli import interrupts
from admm_prune.settings import Option, Settings, options

_DECLARED = options(Settings)
# The options that name parts: the group of their entry points, and their lists in the catalogue.
_NAMED = {
    "method": ("solvers", "methods", "references"),
    "problem": ("problems", "problems"),
    "constraint": ("constraints", "constraints"),
}


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
        autocompletion=(lambda: names_in(f"{name}s")) if name in ("method", "problem", "constraint") else None,
    )


def catalogue() -> dict[str, Any]:
    """The parts that come with the package, as `make catalogue` writes them down: reading it needs no heavy imports."""
    text = files("admm_prune").joinpath("assets/catalogue.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def names_in(kind: str) -> list[str]:
    """The names that an option takes for parts of a kind: "methods", "references", "problems", "constraints"."""
    named = (one.get("option", one["name"]) for one in catalogue()[kind])
    return [name for name in named if name]


def check_names(kind: str, *names: str) -> None:
    """Refuses a name that no part has, built in or of a plug-in, before the seconds that importing torch takes.

    Raises:
        UserError: there is none of this name.
    """
    from importlib.metadata import entry_points

    from admm_prune.errors import unknown

    group, *listed = _NAMED[kind]
    plugins = sorted(point.name for point in entry_points(group=f"admm_prune.{group}"))
    known = list(dict.fromkeys([*(name for one in listed for name in names_in(one)), *plugins]))
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


class _FlagsWithoutTypes:
    """Shows flags without a type in the help: they take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of a command
        for one in parameters:
            if getattr(one, "is_flag", False):
                one.metavar = ""
        return parameters


class Command(_FlagsWithoutTypes, TyperCommand):
    """A command of `admm-prune`."""


class Group(_FlagsWithoutTypes, TyperGroup):
    """A command with commands of its own."""


Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON to stdout.")]
Model = Annotated[str, typer.Argument(help="A from_pretrained folder, a Hub id, a .gguf file, or 'embedded'.")]
Out = Annotated[Path, typer.Option(help="Output folder, written atomically.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and exit.")]
Seed = Annotated[int, _typed("seed", _DECLARED["seed"])]
Device = Annotated[str, _typed("device", _DECLARED["device"])]
Dtype = Annotated[str | None, _typed("dtype", _DECLARED["dtype"])]
Overwrite = Annotated[bool, _typed("overwrite", _DECLARED["overwrite"])]
TrustRemoteCode = Annotated[bool, _typed("trust_remote_code", _DECLARED["trust_remote_code"])]


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
            for part in _NAMED.keys() & declared.keys():  # first: parsing may import torch
                if given[part] is not None:
                    check_names(part, given[part])
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
        return _with_parameters(call, [*parameters, *_own_parameters(function)])

    return wrap


def _own_parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters of a command but its `**options`, with their annotations resolved."""
    hints = get_type_hints(function, vars(sys.modules[function.__module__]), include_extras=True)
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return [_keyword(p.name, hints[p.name], p.default) for p in named]


def _with_parameters(call: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """A command as typer is to see it."""
    made: Any = call
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


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

    added = [_keyword(name, annotation, 0 if name == "verbose" else False) for name, annotation in options.items()]
    return _with_parameters(call, [*_own_parameters(function), *added])


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


_WIDEST = 10_000  # columns of text


def emit(content: dict[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that are not finite become null."""
    from admm_prune.runs.journal.folder import finite

    print(json.dumps(finite(content), allow_nan=False))


def show_table(
    title: str, columns: list[str], rows: list[list[str]], *, mark: set[int] | None = None, prose: bool = False
) -> None:
    """A table on stdout; the first column is left-aligned, figures are right-aligned.

    Nothing but prose is wrapped or cut: names and paths stay whole, on narrow terminals and in pipes too.

    Args:
        mark: rows in bold.
        prose: the other columns hold text: they are left-aligned, and the last one wraps on a terminal.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    wraps = prose and console.is_terminal
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        left, last = i == 0 or prose, i == len(columns) - 1
        table.add_column(column, justify="left" if left else "right", no_wrap=not (wraps and last))
    for i, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if mark and i in mark else None)
    console.print(title, style="bold", soft_wrap=True, markup=False)
    if not wraps:
        console.width = max(
            console.width, console.measure(table, options=console.options.update_width(_WIDEST)).maximum
        )
    console.print(table)


def show_tasks(model: str, content: dict[str, Any]) -> None:
    """Results on tasks of lm-evaluation-harness, as a table on stdout."""
    from admm_prune.runs.card import task_rows

    shots = content["shots"]
    rows = [
        [task, metric, str(shots.get(task, "")), f"{value:.4f}", "" if error is None else f"{error:.4f}"]
        for task, metric, value, error in task_rows(content)
    ]
    columns = ["task", "metric", "shots", "value", "standard error"]
    show_table(f"{model}, lm-evaluation-harness {content['lm_eval']}", columns, rows)
    if content["limit"] is not None:
        print(f"At most {content['limit']} questions per task: a quick check, not a figure to compare.")
