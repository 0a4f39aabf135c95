"""admm-prune run: prune one model by one method."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admm_prune import settings
from admm_prune.cli import common
from admm_prune.cli.progress import Shown, shown_progress

if TYPE_CHECKING:
    from admm_prune.runs.recipe_schema import Recipe
    from admm_prune.runs.results import Report


@common.logs
@common.takes("run")
def run(
    ctx: typer.Context,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A recipe.yaml, or the folder of a run that has one; options given beside it take precedence."
        ),
    ] = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Prune a model, evaluate it, and save it as a from_pretrained folder.

    Example: admm-prune run --model embedded --method admm --sparsity 0.7 --out pruned
    """
    arguments, machine = recipe_and_machine(options)
    if recipe is not None or dry_run:
        given = common.given(ctx)
        if recipe is None:
            from admm_prune.runs.recipe_schema import validated

            chosen = validated(
                {key: arguments[key] for key in ("sparsity", "pattern") if arguments[key] is not None}, "run"
            )
        else:
            from admm_prune.runs.recipe_file import read_recipe

            chosen = read_recipe(recipe)
        chosen = chosen.with_options({name: value for name, value in arguments.items() if name in given})
        arguments = chosen.arguments()
        if dry_run:
            show_plan(chosen, machine, json)
            return
    report = carry_out(arguments, **machine)
    if report is not None:
        show_report(report, json)


def recipe_and_machine(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that a recipe can hold, and those that say how and where it is run."""
    declared = settings.options(settings.Settings)
    recipe = {name: value for name, value in options.items() if declared[name].saved_in == "recipe"}
    return recipe, {name: value for name, value in options.items() if name not in recipe}


def show_plan(recipe: Recipe, machine: dict[str, Any], json: bool) -> None:
    """Prints the recipe that would be run, and where it would go; nothing is loaded. Of several processes the first
    one prints.

    Raises:
        UserError: it cannot be run.
    """
    from admm_prune.runs.machine import started
    from admm_prune.runs.recipe_file import written
    from admm_prune.runs.resolved import parsed

    parsed(settings.Settings(**recipe.arguments(), **machine))  # raises where it cannot be run
    rank, _ = started()
    if rank != 0:
        return
    content, out = recipe.as_content(), machine["out"]
    if json:
        common.emit({"recipe": content, "out": None if out is None else str(out)})
        return
    print(written(content), end="")
    print(f"# would be written to {out}" if out is not None else "# a run needs --out")


def carry_out(arguments: dict[str, Any], *, out: Path | None, **machine: Any) -> Report | None:
    """Prunes as the arguments specify; of several processes the first returns the report, the others None.

    Args:
        arguments: of `prune`, those that define the result.
        machine: those that say how.

    Raises:
        UserError: it cannot be done, or there is no `out`.
    """
    from admm_prune.errors import UserError

    if out is None:  # before what takes seconds to import
        raise UserError("name the folder to write with --out, or see what would be run with --dry-run")
    from admm_prune.runs.machine import joined
    from admm_prune.runs.prune import prune

    with (
        common.resumable(out),
        joined(arguments.get("device", "auto")) as world,
        shown_progress("starting", shown=world.first) as progress,
    ):
        report = prune(**arguments, **machine, out=out, callbacks=Shown(progress))
    return report if world.first else None


def show_report(report: Report, json: bool, **further: Any) -> None:
    """Prints the figures of a run that was written to a folder; `further` ones in JSON alone."""
    from admm_prune.models.evaluate import headings

    out = report.out
    assert out is not None
    if json:
        common.emit(
            {
                "out": str(out),
                "method": report.method,
                "target": report.target,
                "sparsity": report.sparsity,
                "dense": asdict(report.dense),
                "pruned": asdict(report.pruned),
                "tasks": report.tasks,
                "seconds": report.seconds,
                **further,
            }
        )
        return
    rows = [["dense", *report.dense.formatted()], [f"{report.method} {report.label}", *report.pruned.formatted()]]
    model = report.manifest["settings"]["model"]
    common.show_table(f"{model}, {report.pruned.tokens:,} tokens", ["model", *headings()], rows)
    if report.tasks is not None:
        common.show_tasks(f"{report.method} {report.label}", report.tasks)
    print(f"{100 * report.sparsity:.2f} % of the block matrices are pruned; saved in {out}")
    print(f"report: {out / 'report.html'}")
