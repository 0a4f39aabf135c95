"""admm-prune recipe: recipe files, what they may hold and which come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common

recipe = typer.Typer(
    help="Look at recipe files.\n\nExample: admm-prune recipe show sparsegpt",
    no_args_is_help=True,
)


@recipe.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors and other programs.

    Example: admm-prune recipe schema
    """
    from admm_prune.runs.recipe_schema import schema as schema_of_recipes

    common.emit(schema_of_recipes())


@recipe.command("list")
def list_(json: common.Json = False) -> None:
    """List the protocols of papers that come with the package.

    Example: admm-prune recipe list
    """
    from admm_prune.runs.recipe_file import packaged_names, read_packaged

    found = {name: read_packaged(name) for name in packaged_names()}
    if json:
        common.emit({"recipes": {name: one.as_content() for name, one in found.items()}})
        return
    rows = [[name, one.model, one.summary or ""] for name, one in found.items()]
    common.show_table("recipes (reproduce)", ["name", "model", "protocol"], rows, prose=True)


@recipe.command()
def show(name: Annotated[str, typer.Argument(help="A name that 'admm-prune recipe list' prints.")]) -> None:
    """Print a recipe that comes with the package, to be changed and run by run --recipe.

    Example: admm-prune recipe show wanda
    """
    from admm_prune.runs.recipe_file import read_packaged, written

    print(written(read_packaged(name).as_content()), end="")


@recipe.command()
def check(file: Annotated[Path, typer.Argument(help="A recipe file, or the folder of a run.")]) -> None:
    """Check a recipe file. Status 0: it can be run; 2: it cannot, and why.

    Example: admm-prune recipe check pruned
    """
    from admm_prune.runs.recipe_file import read_recipe

    read_recipe(file).arguments()
    print(f"{file}: a recipe that can be run")
