"""admm-prune run: prune one model by one method."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from admm_prune.cli import common


def run(
    out: common.Out,
    model: common.Model = "embedded",
    method: Annotated[str, typer.Option(help="A name that 'admm-prune list' prints.")] = "admm",
    sparsity: Annotated[str | None, typer.Option(help="Fraction of every matrix to go, such as 0.7.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N kept of every M inputs, such as 2:4.")] = None,
    problem: common.OwnProblem = None,
    constraint: common.Constraint = None,
    data: common.Data = "embedded",
    eval_data: common.EvalData = None,
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, given the same arguments.")
    ] = False,
    activation_memory: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of activations between blocks to hold in memory; the others go to disk."),
    ] = None,
    trust_remote_code: common.TrustRemoteCode = False,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    json: common.Json = False,
) -> None:
    """Prune a model, evaluate it, and save it as a from_pretrained folder.

    Example: admm-prune run --model embedded --method admm --sparsity 0.7 --out pruned
    """
    from admm_prune.cli import interrupts
    from admm_prune.recipes.ridge import parse_ridge
    from admm_prune.runs.journal import home_of
    from admm_prune.runs.pruning import prune
    from admm_prune.runs.texts import parse_packing

    try:
        with common.progress_bar("pruning") as progress:
            report = prune(
                model,
                method=method,
                sparsity=sparsity,  # type: ignore[arg-type]  # as typed: parsed, and refused, in one place
                pattern=pattern,
                problem=problem,
                constraint=constraint,
                data=data,
                eval_data=eval_data,
                out=out,
                samples=samples,
                eval_samples=eval_samples,
                length=length,
                packing=parse_packing(packing),
                seed=seed,
                ridge=parse_ridge(ridge),
                steps=steps,
                unit=unit,
                multiple=multiple,
                device=device,
                dtype=dtype,
                stream="auto" if stream is None else stream,
                resume=resume,
                activation_bytes=None if activation_memory is None else round(activation_memory * 2**30),
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    except KeyboardInterrupt:
        if home_of(out).is_dir():
            interrupts.advise(f"go on with the same command and --resume ({out}.partial holds what is finished)")
        raise
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
        for name, figures in (("dense", report.dense), (f"{method} {report.target}", report.pruned))
    ]
    common.show_table(f"{model}, {report.pruned.tokens:,} tokens", ["model", "perplexity", "bits/char"], rows)
    print(f"{100 * report.sparsity:.2f} % of the block matrices are zero or gone; saved in {out}")
