"""admm-prune eval: the perplexity of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.settings import TextSettings, names_of


@common.takes("eval")
def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A from_pretrained folder, a Hub id, or 'embedded'.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text, as --data of run; by default the one that the run evaluated on which wrote the folder, and the "
            "embedded one of the embedded model."
        ),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Documents to read; all by default, 20,000 of a Hub id.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences; all of the text by default.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated names of lm-evaluation-harness, in place of perplexity.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as YAML.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; the task's own by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task, for a quick look.")] = None,
    json: common.Json = False,
    **options: Any,
) -> None:
    """Evaluate a model: perplexity, bits per character, sparsity; or tasks of lm-evaluation-harness.

    A file given with --data is evaluated on whole, a Hub id on its validation split, the embedded text on its held-out
    part.

    Example: admm-prune eval pruned --data stories.txt --json
    """
    from admm_prune.runs.evaluate import evaluate_model

    device, dtype = options["device"], options["dtype"]
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _evaluate_tasks(model, names, task_folder, shots, limit, device, dtype, options["seed"], json)
        return
    given = common.given(ctx, documents="eval_documents", samples="eval_samples")
    asked = {**options, "eval_documents": documents, "eval_samples": samples}
    changes = {name: asked[name] for name in names_of(text=True) if name in asked.keys() & given}
    text = None if data is None else TextSettings(data=data, **changes)
    judgement = evaluate_model(
        model,
        text,
        device=device,
        dtype=dtype,
        trust_remote_code=options["trust_remote_code"],
        **(changes if text is None else {}),
    )
    if json:
        common.emit(judgement.as_json())
        return
    figures = judgement.figures
    zeros = f"{100 * judgement.sparsity:.2f}%"
    rows = [[model, f"{figures.perplexity:.3f}", f"{figures.bits_per_char:.4f}", zeros]]
    common.show_table(f"{figures.tokens:,} tokens", ["model", "perplexity", "bits/char", "zeros"], rows)
    print(f"{figures.protocol}; text: {judgement.text.source}")


def _evaluate_tasks(
    model: str,
    names: list[str],
    folder: Path | None,
    shots: int | None,
    limit: int | None,
    device: str,
    dtype: str | None,
    seed: int,
    json: bool,
) -> None:
    from admm_prune.runs.evaluate import evaluate_tasks

    content = evaluate_tasks(
        model, names, folder=folder, shots=shots, limit=limit, device=device, dtype=dtype, seed=seed
    )
    if json:
        common.emit(content)
        return
    rows = [
        [task, metric, f"{value:.4f}" if isinstance(value, float) else str(value)]
        for task, figures in content["results"].items()
        for metric, value in figures.items()
    ]
    common.show_table(f"{model}, lm_eval {content['lm_eval']}", ["task", "metric", "value"], rows)
    if limit is not None:
        print(f"At most {limit} questions a task: a quick look, not a figure to compare.")
