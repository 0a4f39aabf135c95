"""admm-prune run: prune one model by one method."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from admm_prune.cli import common


def run(
    ctx: typer.Context,
    out: common.OptionalOut = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe.yaml, or the folder of a run that has one: options go before it.")
    ] = None,
    model: common.Model = "embedded",
    method: Annotated[str, typer.Option(help="A name that 'admm-prune list' prints.")] = "admm",
    sparsity: Annotated[str | None, typer.Option(help="Fraction of every matrix to go, such as 0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N kept of every M inputs, such as 2:4.")] = None,
    problem: common.OwnProblem = None,
    constraint: common.Constraint = None,
    targets: common.Targets = None,
    ignore: common.Ignore = None,
    override: common.Override = None,
    data: common.Data = None,
    column: common.Column = None,
    split: common.Split = "train",
    documents: common.Documents = None,
    eval_data: common.EvalData = None,
    eval_split: common.EvalSplit = None,
    eval_documents: common.EvalDocuments = None,
    samples: common.Samples = None,
    eval_samples: common.EvalSamples = None,
    length: common.Length = None,
    packing: common.Packing = "auto",
    ridge: common.Ridge = None,
    steps: common.Steps = None,
    unit: Annotated[
        str | None, typer.Option(help="Of a structured budget: parameters, bytes, kv-cache, flops, latency.")
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(min=1, help="Neurons that a structured method keeps: a multiple, such as 64.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Take the model from its folder block by block; by default where it would fill the memory.",
        ),
    ] = None,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    activation_memory: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of activations between blocks to hold in memory; the others go to disk."),
    ] = None,
    trust_remote_code: common.TrustRemoteCode = False,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Prove a lower bound of every layer's error too: seconds a matrix.")
    ] = False,
    log: common.Log = None,
    dry_run: common.DryRun = False,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    json: common.Json = False,
) -> None:
    """Prune a model, evaluate it, and save it as a from_pretrained folder.

    Example: admm-prune run --model embedded --method admm --sparsity 0.7 --out pruned
    """
    from admm_prune.methods.ridge import parse_ridge
    from admm_prune.runs.recipe_file import read_recipe
    from admm_prune.runs.texts import parse_packing

    asked: dict[str, Any] = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "problem": problem,
        "constraint": constraint,
        "targets": targets or (),
        "ignore": ignore or (),
        "overrides": common.parse_overrides(override),
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
        "packing": parse_packing(packing),
        "seed": seed,
        "ridge": parse_ridge(ridge),
        "steps": steps,
        "unit": unit,
        "multiple": multiple,
        "bounds": bounds,
        "device": device,
        "dtype": dtype,
    }
    if recipe is not None or dry_run:
        given = common.given(ctx, override="overrides")
        if recipe is None:
            from admm_prune.runs.recipe_schema import validated

            chosen = validated({key: asked[key] for key in ("sparsity", "pattern") if asked[key] is not None}, "run")
        else:
            chosen = read_recipe(recipe)
        chosen = chosen.with_options({name: value for name, value in asked.items() if name in given})
        asked = chosen.arguments()
        if dry_run:
            show_plan(chosen.as_content(), out, json)
            return
    carry_out(
        asked,
        out,
        json,
        stream="auto" if stream is None else stream,
        resume=resume,
        overwrite=overwrite,
        activation_bytes=None if activation_memory is None else round(activation_memory * 2**30),
        trust_remote_code=trust_remote_code,
        log=log,
    )


def show_plan(content: dict[str, Any], out: Path | None, json: bool) -> None:
    """Prints the recipe that would be run, and where it would go; nothing is loaded."""
    from admm_prune.runs.recipe_file import written

    if json:
        common.emit({"recipe": content, "out": None if out is None else str(out)})
        return
    print(written(content), end="")
    print(f"# would be written to {out}" if out is not None else "# a run needs --out")


def carry_out(asked: dict[str, Any], out: Path | None, json: bool, **machine: Any) -> None:
    """Runs what is asked for, and says what came of it.

    Args:
        asked: arguments of `prune` that say what to do.
        machine: those that say how.

    Raises:
        UserError: it cannot be done, or there is no `out`.
    """
    from admm_prune.errors import UserError
    from admm_prune.runs.machine import joined
    from admm_prune.runs.prune import prune

    if out is None:
        raise UserError("name the folder to write with --out, or see what would be run with --dry-run")
    with (
        common.resumable(out),
        joined(asked.get("device", "auto")) as world,
        common.progress_bar("pruning", shown=world.first) as progress,
    ):
        report = prune(**asked, **machine, out=out, progress=progress)
    if not world.first:
        return
    if json:
        common.emit(
            {
                "out": str(out),
                "method": report.method,
                "target": report.target,
                "sparsity": report.sparsity,
                "dense": asdict(report.dense),
                "pruned": asdict(report.pruned),
                "seconds": report.seconds,
            }
        )
        return
    rows = [
        [name, f"{figures.perplexity:.3f}", f"{figures.bits_per_char:.4f}"]
        for name, figures in (("dense", report.dense), (f"{report.method} {report.target}", report.pruned))
    ]
    common.show_table(f"{asked['model']}, {report.pruned.tokens:,} tokens", ["model", "perplexity", "bits/char"], rows)
    print(f"{100 * report.sparsity:.2f} % of the block matrices are zero or gone; saved in {out}")
    print(f"report: {out / 'report.html'}")
