"""The command-line application: all commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from admm_prune import __version__
from admm_prune.cli import (
    bench,
    check_plugin,
    compare,
    evaluate,
    layers,
    listing,
    pack,
    plan,
    push,
    recipes,
    report,
    run,
    verify,
)
from admm_prune.cli.common import Command, Group

app = typer.Typer(
    name="admm-prune",
    cls=Group,
    help="Prune language models, and check the result.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_COMMANDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "Prune": {"plan": plan.plan, "run": run.run, "compare": compare.compare, "reproduce": recipes.reproduce},
    "Check and report": {"eval": evaluate.evaluate, "verify": verify.verify, "report": report.report},
    "Single layers": {"capture": layers.capture, "solve": layers.solve},
    "Archive and share": {"pack": pack.pack, "unpack": pack.unpack, "push": push.push},
    "Information": {"list": listing.list_, "check-plugin": check_plugin.check_plugin},
}
for _panel, _commands in _COMMANDS.items():
    for _name, _function in _commands.items():
        app.command(_name, cls=Command, rich_help_panel=_panel)(_function)
app.add_typer(recipes.recipe, name="recipe", rich_help_panel="Information")
app.add_typer(bench.bench, name="bench", rich_help_panel="Information")


def _show_version(version: bool) -> None:
    if version:
        print(f"admm-prune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the application itself."""
