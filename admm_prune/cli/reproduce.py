"""admm-prune reproduce: a paper's protocol, as packaged."""

from __future__ import annotations

from typing import Annotated

import typer

from admm_prune.cli import common
from admm_prune.cli.run import carry_out, show_plan


def reproduce(
    name: Annotated[str, typer.Argument(help="A name that 'admm-prune recipe list' prints.")],
    out: common.OptionalOut = None,
    model: Annotated[str | None, typer.Option(help="In place of the paper's: 'embedded', a folder, a Hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Calibration text in place of the paper's.")] = None,
    column: common.Column = None,
    split: Annotated[str | None, typer.Option(help="Split to calibrate on, in place of the paper's.")] = None,
    documents: common.Documents = None,
    eval_data: common.EvalData = None,
    eval_split: common.EvalSplit = None,
    eval_documents: common.EvalDocuments = None,
    samples: common.Samples = None,
    eval_samples: common.EvalSamples = None,
    length: common.Length = None,
    sparsity: Annotated[str | None, typer.Option(help="In place of the paper's.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, in place of the paper's sparsity.")] = None,
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
    """Run a paper's protocol: model, text, segment length, split, number of samples; any of them may be replaced.

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
