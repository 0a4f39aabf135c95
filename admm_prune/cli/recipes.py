"""admm-prune recipe and reproduce: recipe files, and protocols of papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common
from admm_prune.cli.run import carry_out, show_plan

recipe = typer.Typer(
    help="Inspect recipe files.\n\nExample: admm-prune recipe show sparsegpt",
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
    """List the built-in protocols of papers.

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


def reproduce(
    name: Annotated[str, typer.Argument(help="Name of a recipe (see 'admm-prune recipe list').")],
    out: common.OptionalOut = None,
    model: Annotated[str | None, typer.Option(help="Override the paper's model: 'embedded', folder or Hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Override the paper's calibration text.")] = None,
    column: common.Column = None,
    split: Annotated[str | None, typer.Option(help="Override the paper's calibration split.")] = None,
    documents: common.Documents = None,
    eval_data: common.EvalData = None,
    eval_split: common.EvalSplit = None,
    eval_documents: common.EvalDocuments = None,
    samples: common.Samples = None,
    eval_samples: common.EvalSamples = None,
    length: common.Length = None,
    sparsity: Annotated[str | None, typer.Option(help="Override the paper's sparsity.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M pattern, instead of the paper's sparsity.")] = None,
    steps: common.Steps = None,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    log: common.Log = None,
    dry_run: common.DryRun = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the sequences.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: common.Dtype = None,
    json: common.Json = False,
) -> None:
    """Run a paper's protocol: model, text, segment length, split, number of samples. Options override the protocol.

    Example: admm-prune reproduce sparsegpt --dry-run
    """
    from admm_prune.runs.recipe_file import read_packaged

    given = {
        "model": model,
        "data": data,
        "column": column,
        "split": split,
        "documents": documents,
        "eval_data": eval_data,
        "eval_split": eval_split,
        "eval_documents": eval_documents,
        "samples": samples,
        "eval_samples": eval_samples,
        "length": length,
        "sparsity": sparsity,
        "pattern": pattern,
        "steps": steps,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    recipe = read_packaged(name).with_options({key: value for key, value in given.items() if value is not None})
    if dry_run:
        show_plan(recipe.as_content(), out, json)
    else:
        carry_out(recipe.arguments(), out, json, resume=resume, overwrite=overwrite, log=log)
