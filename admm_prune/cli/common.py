"""Code that the commands share: options, logging to stderr, results on stdout."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
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
from admm_prune.errors import UserError, unknown
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
    """The built-in parts, from the file that `make catalogue` writes, which can be read without heavy imports."""
    text = files("admm_prune").joinpath("assets/catalogue.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def names_in(kind: str) -> list[str]:
    """The names that an option accepts for a kind of parts: "methods", "references", "problems" or "constraints"."""
    named = (one.get("option", one["name"]) for one in catalogue()[kind])
    return [name for name in named if name]


def check_names(kind: str, *names: str) -> None:
    """Refuses a name that no part has, built in or of a plug-in, before the seconds that importing torch takes.

    Raises:
        UserError: there is none of this name.
    """
    from importlib.metadata import entry_points

    group, *listed = _NAMED[kind]
    plugins = sorted(point.name for point in entry_points(group=f"admm_prune.{group}"))
    known = list(dict.fromkeys([*(name for one in listed for name in names_in(one)), *plugins]))
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


class _FlagsWithoutTypes:
    """Hides the type of flags in the help, because they take no value."""

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
    """Decorator that replaces the `**options` of a command by the settings whose declarations name the command.

    The command receives their parsed values by the names of the fields.

    Args:
        command: the name of the command.
        kind: the class of the settings.
        replaces: whether settings that a recipe can have default to None.
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
                if isinstance(value, float) and math.isnan(value):  # which old versions of click find in every range
                    raise UserError(f"--{one.spelled.replace('_', '-')} must be a number, not nan")
                left_out = value is None and replaces and one.saved_in == "recipe"
                values[name] = value if one.parse is None or left_out else one.parse(value)
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
    """The parameters of a command without its `**options`, with resolved annotations."""
    hints = get_type_hints(function, vars(sys.modules[function.__module__]), include_extras=True)
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return [_keyword(p.name, hints[p.name], p.default) for p in named]


def _with_parameters(call: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """The command with these parameters as its signature, which typer reads."""
    made: Any = call
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to the current `sys.stderr`, which a progress bar replaces temporarily."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None: ...


def logs(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator that adds the options -v and -q to a command, which control what the logger "admm_prune" writes to
    stderr: notes by default, with -v also phases and the figures of blocks, with -vv everything, with -q nothing. Only
    the first of several processes logs.
    """
    options = {
        "verbose": Annotated[
            int, typer.Option("--verbose", "-v", count=True, help="Log phases and blocks; -vv: everything.")
        ],
        "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress: only results.")],
    }

    @functools.wraps(function)
    def call(*, verbose: int, quiet: bool, **given: Any) -> None:
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
    """Context that adds advice on resuming to errors that interrupt a run with a journal next to `out`."""
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
    """The settings that were given on the command line; `renamed` maps options to fields with other names."""
    renamed |= {one.spelled: name for name, one in _DECLARED.items() if one.spelled != name}
    names = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    return {renamed.get(name, name) for name in names}


_WIDEST = 10_000  # columns of text


def emit(content: dict[str, Any]) -> None:
    """Prints a JSON object on one line, with null for numbers that are not finite."""
    from admm_prune.runs.journal.folder import finite

    print(json.dumps(finite(content), allow_nan=False))


def show_table(
    title: str, columns: list[str], rows: list[list[str]], *, mark: set[int] | None = None, prose: bool = False
) -> None:
    """Prints a table with a left-aligned first column and right-aligned figures.

    Names and paths are never wrapped or truncated, even on narrow terminals.

    Args:
        mark: the rows to print in bold.
        prose: whether the other columns contain text; they are then left-aligned, and the last one wraps on a terminal.
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
    """Prints the results on tasks of lm-evaluation-harness as a table."""
    from admm_prune.runs.card import task_rows

    shots = content["shots"]
    rows = [
        [task, metric, str(shots.get(task, "")), f"{value:.4f}", "" if error is None else f"{error:.4f}"]
        for task, metric, value, error in task_rows(content)
    ]
    columns = ["task", "metric", "shots", "value", "standard error"]
    show_table(f"{model}, lm-evaluation-harness {content['lm_eval']}", columns, rows)
    _warn_of_limit(content)


def show_tasks_compared(models: dict[str, dict[str, Any] | None]) -> None:
    """Prints results of several models, by their names, as a table with a column for each; nothing without results."""
    from admm_prune.runs.card import tasks_compared

    measured = [content for content in models.values() if content is not None]
    if not measured:
        return
    rows = [
        [task, metric, *("" if result is None else f"{result[0]:.4f}" for result in results)]
        for task, metric, results in tasks_compared(list(models.values()))
    ]
    show_table(f"lm-evaluation-harness {measured[0]['lm_eval']}", ["task", "metric", *models], rows)
    _warn_of_limit(measured[0])


def _warn_of_limit(content: dict[str, Any]) -> None:
    if content["limit"] is not None:
        print(f"At most {content['limit']} questions per task: a quick check, not a figure to compare.")
