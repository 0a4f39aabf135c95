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
    targets: common.Targets = None,
    ignore: common.Ignore = None,
    override: common.Override = None,
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
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Prove a lower bound of every layer's error too: seconds a matrix.")
    ] = False,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    json: common.Json = False,
) -> None:
    """Prune a model, evaluate it, and save it as a from_pretrained folder.

    Example: admm-prune run --model embedded --method admm --sparsity 0.7 --out pruned
    """
    from admm_prune.cli import interrupts
    from admm_prune.models.parallel import LostProcessError
    from admm_prune.recipes.ridge import parse_ridge
    from admm_prune.runs.journal import home_of
    from admm_prune.runs.processes import joined
    from admm_prune.runs.pruning import prune
    from admm_prune.runs.texts import parse_packing

    try:
        with joined(device) as world, common.progress_bar("pruning", shown=world.first) as progress:
            report = prune(
                model,
                method=method,
                sparsity=sparsity,  # type: ignore[arg-type]  # as typed: parsed, and refused, in one place
                pattern=pattern,
                targets=targets or (),
                ignore=ignore or (),
                overrides=common.parse_overrides(override),
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
                bounds=bounds,
                progress=progress,
            )
    except (KeyboardInterrupt, LostProcessError) as error:
        advice = f"go on with the same command and --resume ({out}.partial holds what is finished)"
        if home_of(out).is_dir():
            interrupts.advise(advice)
            if isinstance(error, LostProcessError):
                raise LostProcessError(f"{error}: {advice}") from error
        raise
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
    common.show_table(f"{model}, {report.pruned.tokens:,} tokens", ["model", "perplexity", "bits/char"], rows)
    print(f"{100 * report.sparsity:.2f} % of the block matrices are zero or gone; saved in {out}")
    print(f"report: {out / 'report.html'}")
