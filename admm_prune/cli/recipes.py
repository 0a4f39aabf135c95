"""admm-prune recipe and reproduce: recipe files, and protocols of papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.cli.run import carry_out, recipe_and_machine, show_plan

recipe = typer.Typer(help="Inspect recipe files.\n\nExample: admm-prune recipe show sparsegpt", no_args_is_help=True)


@recipe.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors and other programs.

    Example: admm-prune recipe schema
    """
    from admm_prune.runs.recipe_schema import schema as schema_of_recipes

    common.emit(schema_of_recipes())


@recipe.command("list")
def list_(json: common.Json = False) -> None:
    """List the built-in protocols of papers.

    Example: admm-prune recipe list
    """
    from admm_prune.runs.recipe_file import packaged_names, read_packaged

    recipes = {name: read_packaged(name) for name in packaged_names()}
    if json:
        common.emit({"recipes": {name: one.as_content() for name, one in recipes.items()}})
        return
    rows = [[name, one.as_content()["model"], one.summary or ""] for name, one in recipes.items()]
    common.show_table("recipes (reproduce)", ["name", "model", "protocol"], rows, prose=True)


@recipe.command()
def show(name: Annotated[str, typer.Argument(help="Name of a recipe (see 'admm-prune recipe list').")]) -> None:
    """Print a built-in recipe, to be edited and run with run --recipe.

    Example: admm-prune recipe show wanda
    """
    from admm_prune.runs.recipe_file import read_packaged, written

    print(written(read_packaged(name).as_content()), end="")


@recipe.command()
def check(file: Annotated[Path, typer.Argument(help="A recipe file, or the folder of a run.")]) -> None:
    """Check a recipe file. Exit status 0: it can be run; 2: it cannot, with the reason.

    Example: admm-prune recipe check pruned
    """
    from admm_prune.runs.recipe_file import read_recipe

    read_recipe(file).arguments()
    print(f"{file}: a recipe that can be run")


@common.takes("reproduce", replaces=True)
def reproduce(
    name: Annotated[str, typer.Argument(help="Name of a recipe (see 'admm-prune recipe list').")],
    dry_run: common.DryRun = False,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Run a paper's protocol: model, text, segment length, split, number of samples. Options override the protocol.

    Example: admm-prune reproduce sparsegpt --dry-run
    """
    from admm_prune.runs.recipe_file import read_packaged

    arguments, machine = recipe_and_machine(options)
    recipe = read_packaged(name).with_options({key: value for key, value in arguments.items() if value is not None})
    if dry_run:
        show_plan(recipe.as_content(), machine["out"], json)
    else:
        carry_out(recipe.arguments(), json, **machine)
