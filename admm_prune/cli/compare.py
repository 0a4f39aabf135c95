"""admm-prune compare: several methods side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.settings import Settings


@common.takes("compare")
def compare(
    out: common.Out,
    methods: Annotated[str, typer.Option(help="Comma-separated names.")] = "magnitude,wanda,sparsegpt,admm",
    sparsity: Annotated[str | None, typer.Option(help="Comma-separated, such as 0.5,0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Comma-separated, such as 2:4,4:8.")] = None,
    baselines: Annotated[
        bool, typer.Option(help="Beside elsa, also what has to stand beside it: tuned-dense, admm-finetuned, gradual.")
    ] = True,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Prune one model by several methods to several targets, from the same text, into one table and one report.

    Example: admm-prune compare --methods magnitude,sparsegpt,admm --sparsity 0.5,0.7 --pattern 2:4 --out compared
    """
    from admm_prune.methods.target import parse_targets
    from admm_prune.runs import compare as comparisons

    settings = comparisons.ComparisonSettings.of(
        Settings(**options),
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        targets=tuple(parse_targets(sparsity, pattern)),
        baselines=baselines,
    )
    with common.resumable(out), common.progress_bar("comparing") as progress:
        result = comparisons.compare(settings, out, progress, resume=options["resume"], overwrite=options["overwrite"])
    if json:
        common.emit(result.as_json())
        return
    dense = result.dense
    table = [["dense", "", f"{dense.perplexity:.3f}", "1.00", f"{dense.bits_per_char:.4f}", "", "", ""]]
    marked = set()
    for row in result.rows:
        if result.is_best(row):
            marked.add(len(table))
        table.append(
            [
                row.method,
                row.target,
                f"{row.perplexity:.3f}",
                f"{row.perplexity / dense.perplexity:.2f}",
                f"{row.bits_per_char:.4f}",
                "" if row.relative_error is None else f"{row.relative_error:.4f}",
                f"{100 * row.sparsity:.2f}%",
                f"{row.seconds:.1f}",
            ]
        )
    columns = ["method", "pruned", "perplexity", "/ dense", "bits/char", "layer\nerror", "zeros", "seconds"]
    title = f"{options['model']}: {result.parameters:,} parameters, {dense.tokens:,} tokens evaluated"
    common.show_table(title, columns, table, mark=marked)
    print("Every pruned model was saved, loaded again, and gave the same perplexity.")
    print(f"report: {out / 'report.html'}   plot: {out / 'perplexity.png'}   models: {out / 'models'}")
