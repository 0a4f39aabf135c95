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
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    json: common.Json = False,
) -> None:
    """Prune a model, evaluate it, and save it as a from_pretrained folder.

    Example: admm-prune run --model embedded --method admm --sparsity 0.7 --out pruned
    """
    from admm_prune.recipes.ridge import parse_ridge
    from admm_prune.runs.pruning import prune
    from admm_prune.runs.texts import parse_packing

    with common.progress_bar("pruning") as progress:
        report = prune(
            model,
            method=method,
            sparsity=sparsity,  # type: ignore[arg-type]  # as typed: parsed, and refused, in one place
            pattern=pattern,
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
            progress=progress,
        )
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
