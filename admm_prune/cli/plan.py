"""admm-prune plan: what a run will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admm_prune.cli import common

if TYPE_CHECKING:
    from admm_prune.plan.plan import Plan


def plan(
    model: common.Model = "embedded",
    method: Annotated[str, typer.Option(help="A name that 'admm-prune list' prints.")] = "admm",
    sparsity: Annotated[str | None, typer.Option(help="Fraction of every matrix to go, such as 0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N kept of every M inputs, such as 2:4.")] = None,
    data: Annotated[str | None, typer.Option(help="The text: how much there is to evaluate is told by it.")] = None,
    column: common.Column = None,
    split: common.Split = "train",
    documents: common.Documents = None,
    eval_data: common.EvalData = None,
    eval_split: common.EvalSplit = None,
    eval_documents: common.EvalDocuments = None,
    samples: common.Samples = None,
    eval_samples: common.EvalSamples = None,
    length: common.Length = None,
    ridge: common.Ridge = None,
    steps: common.Steps = None,
    unit: Annotated[str | None, typer.Option(help="Of a structured budget, as of run.")] = None,
    multiple: Annotated[int | None, typer.Option(min=1, help="Of neurons, as of run.")] = None,
    dtype: common.Dtype = None,
    stream: Annotated[bool, typer.Option("--stream", help="One block in memory at a time.")] = False,
    gpu: Annotated[str | None, typer.Option(help="A GPU that is not here: h100, h200, a100.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="So many of them.")] = 1,
    device_memory: Annotated[float | None, typer.Option(min=0.001, help="GB of each; its own by default.")] = None,
    memory: Annotated[float | None, typer.Option(min=0.001, help="GB of the host; what is free by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where a run would write: its disk is measured.")] = None,
    json: common.Json = False,
) -> None:
    """Say what a run will take, from the model's config alone; refuse one that does not fit.

    Example: admm-prune plan --model embedded --method admm --sparsity 0.7
    """
    from admm_prune.errors import UserError
    from admm_prune.methods.ridge import parse_ridge
    from admm_prune.plan.plan import make_plan
    from admm_prune.runs.texts import TextSettings

    text = None
    if data is not None:
        text = TextSettings(
            data=data,
            column=column,
            split=split,
            documents=documents,
            eval_data=eval_data,
            eval_split=eval_split,
            eval_documents=eval_documents,
        )
    made = make_plan(
        model,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        text=text,
        samples=samples,
        eval_samples=eval_samples,
        length=length,
        ridge=parse_ridge(ridge),
        steps=steps,
        unit=unit,
        multiple=multiple,
        dtype=dtype,
        stream=stream,
        gpu=gpu,
        gpus=gpus,
        device_memory=device_memory,
        memory=memory,
        out=out,
    )
    refusal = made.refusal()
    if refusal is not None:
        raise UserError(refusal)
    if json:
        common.emit(made.as_json())
        return
    _show(made)


def _show(made: Plan) -> None:
    content = made.as_json()
    for place, told in content["memory"].items():
        rows = [[name, f"{size / 1e6:,.1f}"] for name, size in told["parts"].items()]
        rows.append(["at most", f"{told['bytes'] / 1e6:,.1f}"])
        title = (
            f"{made.method} {made.target}, {made.parameters:,} parameters: memory on the {place}, at '{told['stage']}'"
        )
        common.show_table(title, ["part", "MB"], rows)
    rows = [
        [name, f"{told['operations'] / 1e9:,.2f}", f"{told['seconds']:,.1f}"]
        for name, told in content["stages"].items()
    ]
    rows.append(
        ["all", f"{sum(t['operations'] for t in content['stages'].values()) / 1e9:,.2f}", f"{made.seconds:,.1f}"]
    )
    common.show_table(f"time on {made.machine.name} ({made.machine.source})", ["stage", "10^9 operations", "s"], rows)
    common.show_table("disk", ["what", "MB"], [[name, f"{size / 1e6:,.1f}"] for name, size in made.disk.items()])
    for note in made.notes:
        print(note)
