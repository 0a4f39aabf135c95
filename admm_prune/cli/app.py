"""The command-line application: all commands."""

from __future__ import annotations

import typer

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

app = typer.Typer(
    name="admm-prune",
    help="A modular optimization toolbox for pruning language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("eval")(evaluate.evaluate)
app.command("capture")(layers.capture)
app.command("solve")(layers.solve)
app.command("verify")(verify.verify)
app.command("plan")(plan.plan)
app.command("report")(report.report)
app.command("reproduce")(recipes.reproduce)
app.command("pack")(pack.pack)
app.command("unpack")(pack.unpack)
app.command("push")(push.push)
app.command("check-plugin")(check_plugin.check_plugin)
app.command("list")(listing.list_)
app.add_typer(recipes.recipe, name="recipe")
app.add_typer(bench.bench, name="bench")
