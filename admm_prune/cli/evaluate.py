"""admm-prune eval: the perplexity of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common


def evaluate(
    model: Annotated[str, typer.Argument(help="A from_pretrained folder, a Hub id, or 'embedded'.")],
    data: common.Data = "embedded",
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences; all of the text by default.")] = None,
    length: common.Length = None,
    packing: common.Packing = "auto",
    seed: common.Seed = 0,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated names of lm-evaluation-harness, in place of perplexity.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as YAML.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; the task's own by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task, for a quick look.")] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    trust_remote_code: common.TrustRemoteCode = False,
    json: common.Json = False,
) -> None:
    """Evaluate a model: perplexity, bits per character, sparsity; or tasks of lm-evaluation-harness.

    A local file is judged whole, the embedded text by its held-out part.

    Example: admm-prune eval pruned --data stories.txt --json
    """
    from admm_prune.runs.evaluating import evaluate_model
    from admm_prune.runs.texts import TextSettings, parse_packing

    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _evaluate_tasks(model, names, task_folder, shots, limit, device, dtype, seed, json)
        return
    text = TextSettings(
        data=data,
        eval_samples=samples,
        length=length,
        packing=parse_packing(packing),
        seed=seed,
    )
    judgement = evaluate_model(model, text, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if json:
        common.emit(judgement.as_json())
        return
    figures = judgement.figures
    zeros = f"{100 * judgement.sparsity:.2f}%"
    rows = [[model, f"{figures.perplexity:.3f}", f"{figures.bits_per_char:.4f}", zeros]]
    common.show_table(f"{figures.tokens:,} tokens", ["model", "perplexity", "bits/char", "zeros"], rows)
    print(figures.protocol)


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
    from admm_prune.runs.tasks import evaluate_tasks

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
