"""admm-prune bench: the scaled benchmarks."""

from __future__ import annotations

from typing import Annotated

import typer

from admm_prune.cli import common

bench = typer.Typer(
    help="Run a scaled benchmark.\n\nExample: admm-prune bench memory --most 1e8 --out memory", no_args_is_help=True
)


@bench.command()
def memory(
    out: common.Out,
    most: Annotated[float, typer.Option(help="Leave out models of more parameters.")] = 1.1e9,
    tokens: Annotated[int, typer.Option(min=256, help="Calibration tokens, the same for every model.")] = 1024,
    sparsity: Annotated[float, typer.Option(min=0.01, max=0.9, help="Fraction of the blocks' parameters to go.")] = 0.3,
    json: common.Json = False,
) -> None:
    """Measure how the memory of structured pruning grows with the model, from disk to disk, a process for each model.

    Example: admm-prune bench memory --most 1e8 --out memory
    """
    from admm_prune.runs.memory_scaling import bench_memory

    with common.progress_bar("measuring") as progress:
        content = bench_memory(out, most=most, tokens=tokens, sparsity=sparsity, progress=progress)
    if json:
        common.emit({"out": str(out), "exponents": content["exponents"], "peaks": content["peaks"]})
        return
    print((out / "memory.txt").read_text(encoding="utf-8"))
