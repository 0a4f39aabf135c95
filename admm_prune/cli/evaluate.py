"""admm-prune eval: the perplexity of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.cli.progress import shown_progress
from admm_prune.errors import UserError
from admm_prune.settings import TextSettings, names_of


@common.logs
@common.takes("eval")
def evaluate(
    ctx: typer.Context,
    model: common.Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text, as --data of run; default: the text of the run that wrote the folder, or the"
            " embedded text for the embedded model."
        ),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Number of documents; default: all, or 20,000 for a Hub id.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of sequences; default: the whole text.")] = None,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Evaluate a model: perplexity, bits per character and sparsity, or with --tasks, tasks of lm-evaluation-harness.

    --data is evaluated in full if it is a file, on the validation split if it is a Hub id, and on the held-out part if
    it is the embedded text.

    Example: admm-prune eval pruned --data stories.txt --json
    """
    from admm_prune.models.evaluate import headings
    from admm_prune.runs.evaluate import evaluate_model, evaluate_tasks

    given = common.given(ctx)
    _refuse_unused(given, with_tasks="tasks" in given)
    how: dict[str, Any] = {name: options[name] for name in ("device", "dtype", "trust_remote_code")}
    if "tasks" in given:
        of_tasks = {"folder": "task_folder", "shots": "shots", "limit": "task_limit", "seed": "seed"}
        how |= {argument: options[name] for argument, name in of_tasks.items()}
        content = evaluate_tasks(model, options["tasks"], **how)
        if json:
            common.emit(content)
        else:
            common.show_tasks(model, content)
        return
    given = common.given(ctx, documents="eval_documents", samples="eval_samples")
    values: dict[str, Any] = {**options, "eval_documents": documents, "eval_samples": samples}
    changes: dict[str, Any] = {name: values[name] for name in names_of(text=True) if name in values.keys() & given}
    text = None if data is None else TextSettings(data=data, **changes)
    with shown_progress("evaluating") as progress:
        how |= changes if text is None else {}
        evaluation = evaluate_model(model, text, on_progress=progress.step, **how)
    if json:
        common.emit(evaluation.as_json())
        return
    figures = evaluation.figures
    columns = ["model", *headings(), "zeros"]
    row = [Path(model).name, *figures.formatted(), f"{100 * evaluation.sparsity:.2f}%"]
    common.show_table(f"{model}, {figures.tokens:,} tokens", columns, [row])
    print(f"{figures.protocol}; text: {evaluation.text.source}")


def _refuse_unused(given: set[str], *, with_tasks: bool) -> None:
    """Tasks bring their own text; perplexity has no shots."""
    text = {"data", "documents", "samples", *names_of(text=True)} - {"seed"}
    unused = sorted(given & (text if with_tasks else {"task_folder", "shots", "task_limit"}))
    if unused:
        option = "--" + unused[0].replace("_", "-")
        raise UserError(
            f"{option} is of the text for the perplexity, which --tasks replaces: leave one of them out"
            if with_tasks
            else f"{option} is of tasks: name them with --tasks"
        )
