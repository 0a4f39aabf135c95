"""admm-prune compare: several methods side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.cli.progress import Shown, shown_progress
from admm_prune.settings import Settings


@common.logs
@common.takes("compare")
def compare(
    out: common.Out,
    methods: Annotated[str, typer.Option(help="Comma-separated names.")] = "magnitude,wanda,sparsegpt,admm",
    sparsity: Annotated[str | None, typer.Option(help="Comma-separated, such as 0.5,0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Comma-separated, such as 2:4,4:8.")] = None,
    baselines: Annotated[
        bool,
        typer.Option(help="Beside elsa, also its baselines: tuned-dense, admm-finetuned, gradual, staged."),
    ] = True,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Prune one model by several methods to several targets, from the same text, into one table and one report.

    Example: admm-prune compare --methods magnitude,sparsegpt,admm --sparsity 0.5,0.7 --pattern 2:4 --out compared
    """
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    common.check_names("method", *names)
    from admm_prune.methods.target import parse_targets
    from admm_prune.models.evaluate import headings
    from admm_prune.runs import compare as comparisons

    settings = comparisons.ComparisonSettings(
        run=Settings(**options),
        methods=names,
        targets=tuple(parse_targets(sparsity, pattern)),
        baselines=baselines,
    )
    with common.resumable(out), shown_progress("comparing") as progress:
        result = comparisons.compare(settings, out, progress.count, callbacks=Shown(progress))
    if json:
        common.emit(result.as_json())
        return
    dense = result.dense
    table = [["dense", "", *dense.formatted(dense), "", "", ""]]
    for row in result.rows:
        error = "" if row.relative_error is None else f"{row.relative_error:.4f}"
        others = [error, f"{100 * row.sparsity:.2f}%", "" if row.seconds is None else f"{row.seconds:.1f}"]
        table.append([row.method, row.target, *row.formatted(dense), *others])
    columns = ["method", "pruned", *headings(ratios=True), "layer\nerror", "zeros", "seconds"]
    title = f"{options['model']}: {result.parameters:,} parameters, {dense.tokens:,} tokens evaluated"
    common.show_table(title, columns, table, mark={i for i, row in enumerate(result.rows, 1) if result.is_best(row)})
    common.show_tasks_compared({"dense": result.tasks, **{f"{r.method} {r.target}": r.tasks for r in result.rows}})
    if any(row.seconds is None for row in result.rows):
        print("No seconds are given where pruning was interrupted and resumed.")
    print("Every pruned model was saved, loaded again, and gave the same perplexity.")
    print(f"report: {out / 'report.html'}   plot: {out / 'perplexity.png'}   models: {out / 'models'}")
