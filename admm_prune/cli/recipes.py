"""admm-prune recipe and reproduce: recipe files, and protocols of papers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.cli.run import carry_out, recipe_and_machine, show_plan, show_report

if TYPE_CHECKING:
    from admm_prune.runs.recipe_schema import Recipe


def _recipe_names() -> list[str]:
    from admm_prune.runs.recipe_file import packaged_names

    return packaged_names()


_RecipeName = Annotated[
    str,
    typer.Argument(help="Name of a recipe (see 'admm-prune recipe list').", autocompletion=_recipe_names),
]
recipe = typer.Typer(
    help="Inspect recipe files.\n\nExample: admm-prune recipe show sparsegpt", cls=common.Group, no_args_is_help=True
)


@recipe.command(cls=common.Command)
def schema() -> None:
    """Print the JSON schema of recipe files, for editors and other programs.

    Example: admm-prune recipe schema
    """
    from admm_prune.runs.recipe_schema import schema as schema_of_recipes

    common.emit(schema_of_recipes())


@recipe.command("list", cls=common.Command)
def list_(json: common.Json = False) -> None:
    """List the built-in protocols of papers.

    Example: admm-prune recipe list
    """
    from admm_prune.runs.recipe_file import packaged_names, read_packaged

    recipes = {name: read_packaged(name) for name in packaged_names()}
    if json:
        common.emit({"recipes": {name: one.as_content() for name, one in recipes.items()}})
        return
    rows = []
    for name, one in recipes.items():
        ratio = "" if one.expected is None else f"{one.expected.ratio:.3f}"
        rows.append([name, one.as_content()["model"], ratio, one.summary or ""])
    common.show_table("recipes (reproduce)", ["name", "model", "expected ratio", "protocol"], rows, prose=True)


@recipe.command(cls=common.Command)
def show(name: _RecipeName) -> None:
    """Print a built-in recipe, to be edited and run with run --recipe.

    Example: admm-prune recipe show wanda
    """
    from admm_prune.runs.recipe_file import read_packaged, written

    print(written(read_packaged(name).as_content()), end="")


@recipe.command(cls=common.Command)
def check(file: Annotated[Path, typer.Argument(help="A recipe file, or the folder of a run.")]) -> None:
    """Check a recipe file. Exit status 0: it can be run; 2: it cannot, with the reason.

    Example: admm-prune recipe check pruned
    """
    from admm_prune.runs.recipe_file import read_recipe
    from admm_prune.runs.resolved import parsed
    from admm_prune.settings import Settings

    parsed(Settings(**read_recipe(file).arguments()))  # raises where it cannot be run
    print(f"{file}: a recipe that can be run")


@common.logs
@common.takes("reproduce", replaces=True)
def reproduce(
    name: _RecipeName,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Run a paper's protocol: model, text, segment length, split, number of samples. Options override the protocol.

    Perplexity pruned / dense is compared with what the paper reports, unless an option changes the protocol.

    Exit status 0: within the tolerance, or not compared; 1: outside the tolerance; 2: wrong input.

    Example: admm-prune reproduce sparsegpt --dry-run
    """
    from admm_prune.runs.recipe_file import read_packaged

    arguments, machine = recipe_and_machine(options)
    given = {key: value for key, value in arguments.items() if value is not None}
    protocol = read_packaged(name)
    recipe = protocol.with_options(given)
    if dry_run:
        show_plan(recipe, machine, json)
        return
    report = carry_out(recipe.arguments(), **machine)
    if report is None:
        return
    expected, ratio = recipe.expected, report.pruned.perplexity / report.dense.perplexity
    passed = None if expected is None else expected.passed(ratio)
    reason = None if expected is not None else _why_not_compared(protocol, recipe, given)
    content = None if expected is None else {**expected.model_dump(), "ratio": expected.ratio}
    show_report(report, json, expected=content, ratio=ratio, passed=passed, not_compared=reason)
    if not json:
        print(f"perplexity pruned / dense: {ratio:.4g}", end="; " if expected is None else ", ")
        if expected is None:
            print(f"not compared: {reason}")
        else:
            print(f"expected {expected.ratio:.4g} +- {100 * expected.tolerance:g} %: {'pass' if passed else 'FAIL'}")
            print(f"expected: {expected.pruned:g} / {expected.dense:g}, {expected.table}")
            print(f"tolerance: {expected.reason}")
    if passed is False:
        raise typer.Exit(1)


def _why_not_compared(protocol: Recipe, recipe: Recipe, given: Collection[str]) -> str:
    if protocol.expected is None:
        return f"the recipe '{protocol.name}' names no published figures of its model and sparsity"
    different = recipe.differences(protocol)
    names = sorted(different.intersection(given) or different)
    listed = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    return f"{listed} {'differs' if len(names) == 1 else 'differ'} from the protocol"
