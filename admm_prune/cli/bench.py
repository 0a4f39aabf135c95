"""admm-prune bench: the scaled benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from admm_prune.cli import common
from admm_prune.cli.progress import shown_progress
from admm_prune.errors import UserError

bench = typer.Typer(
    cls=common.Group,
    help="Measure memory, a GPU, or inference.\n\nExample: admm-prune bench memory --most 1e8 --out memory",
    no_args_is_help=True,
)


@bench.command(cls=common.Command)
def memory(
    out: common.Out,
    most: Annotated[float, typer.Option(help="Largest number of parameters of a model.")] = 1.1e9,
    tokens: Annotated[
        int, typer.Option(min=256, help="Calibration tokens, a multiple of 256, the same for every model.")
    ] = 1024,
    sparsity: Annotated[float, typer.Option(min=0.01, max=0.9, help="Fraction of block parameters to remove.")] = 0.3,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Measure how the memory of structured pruning grows with the model, from disk to disk, with one process per model.

    Example: admm-prune bench memory --most 1e8 --out memory
    """
    from admm_prune.bench.memory import bench_memory

    with shown_progress("measuring") as progress:
        content = bench_memory(
            out, most=most, tokens=tokens, sparsity=sparsity, overwrite=overwrite, progress=progress.step
        )
    if json:
        common.emit({"out": str(out), "exponents": content["exponents"], "peaks": content["peaks"]})
        return
    print((out / "memory.txt").read_text(encoding="utf-8"))


@bench.command(cls=common.Command)
def gpu(
    out: common.Out,
    device: common.Device = "auto",
    small: Annotated[bool, typer.Option("--small", help="Use tiny shapes: a trial run on any machine.")] = False,
    budget: Annotated[float, typer.Option(min=1.0, help="Time budget in seconds; rows beyond it are skipped.")] = 450.0,
    sections: Annotated[
        str, typer.Option(help="Comma-separated sections to run.")
    ] = "layers,selection,training,models,batches",
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Measure solvers, selection, training steps, whole blocks and batches on one GPU, with lower bounds.

    Example: admm-prune bench gpu --out gpu
    """
    from admm_prune.bench.suite import bench_gpu
    from admm_prune.runs.machine import pick_device

    with shown_progress("measuring") as progress:
        content = bench_gpu(
            out,
            device=pick_device(device),
            small=small,
            budget=budget,
            sections=[name.strip() for name in sections.split(",")],
            overwrite=overwrite,
            progress=progress.step,
        )
    if json:
        rows = [{key: row[key] for key in ("section", "name", "case", "status", "seconds")} for row in content["rows"]]
        common.emit({"out": str(out), "claims": content["claims"], "rows": rows})
        return
    print((out / "gpu.txt").read_text(encoding="utf-8"))


@bench.command(cls=common.Command)
def inference(
    model: common.Model,
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of prefill tokens.")] = 256,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Number of decoded tokens, after a prompt of 16, which is not timed.")
    ] = 16,
    batches: Annotated[
        str, typer.Option(help="Comma-separated numbers of texts that are decoded together.")
    ] = "1,4,16",
    repeats: Annotated[int, typer.Option(min=1, help="Number of repeats, of which the minimum counts.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Folder for inference.json and a plot, inference.svg.")] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Number of CPU threads; CPU time with one, else elapsed time.")
    ] = 1,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    trust_remote_code: common.TrustRemoteCode = False,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Measure bytes on disk and in memory, prefill and decoding, dense and packed, and report what pruning gains.

    Example: admm-prune bench inference pruned --against embedded --tokens 128
    """
    import torch

    from admm_prune.inference.timing import bench_inference

    torch.set_num_threads(threads)
    content = bench_inference(
        model,
        against,
        tokens=tokens,
        new_tokens=new_tokens,
        batches=_whole_numbers(batches),
        repeats=repeats,
        out=out,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    if json:
        common.emit(content)
        return
    rows = [
        [
            row["form"],
            f"{row['parameters']:,}",
            f"{100 * row['zeros']:.1f}%",
            _mib(row["disk_bytes"]),
            _mib(row["packed_bytes"]),
            _mib(row["memory_bytes"]),
            f"{1000 * row['prefill']['seconds']:.1f}",
            _ratio(row["prefill"], first=i == 0),
            *(
                cell
                for d in row["decoding"]
                for cell in (f"{d['tokens_per_second']:.1f}", _ratio(d["speed"], first=i == 0))
            ),
        ]
        for i, row in enumerate(content["rows"])
    ]
    columns = [
        "",
        "parameters",
        "zeros",
        "disk\nMiB",
        "packed\nMiB",
        "memory\nMiB",
        f"prefill {tokens}\nms",
        "times\nas fast",
        *(
            column
            for d in content["rows"][0]["decoding"]
            for column in (f"decode {d['batch']}\ntokens/s", "times\nas fast")
        ),
    ]
    common.show_table(f"{model} on {content['device']}", columns, rows)
    for sentence in content["sentences"]:
        print(sentence)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"--batches {text}: give whole numbers, such as 1,4,16") from error


def _ratio(speed: dict[str, Any], *, first: bool) -> str:
    """The speedup over the first row; a difference within the spread of the repeats is none."""
    return f"{speed['speedup']:.2f}" if first or speed["differs"] else "none"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.2f}"
