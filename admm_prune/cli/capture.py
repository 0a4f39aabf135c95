"""admm-prune capture: one layer's problem as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common


def capture(
    weight: Annotated[str, typer.Option(help="A block matrix, such as model.layers.0.mlp.up_proj.weight.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: common.Model = "embedded",
    data: common.Data = None,
    column: common.Column = None,
    split: common.Split = "train",
    documents: common.Documents = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text of the held-out Gram; by default held out of --data.")
    ] = None,
    eval_split: common.EvalSplit = None,
    eval_documents: common.EvalDocuments = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    eval_samples: Annotated[int, typer.Option(min=1, help="Held-out sequences.")] = 128,
    length: common.Length = None,
    packing: common.Packing = "auto",
    seed: common.Seed = 0,
    problem: common.Problem = "layer",
    overwrite: common.Overwrite = False,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    json: common.Json = False,
) -> None:
    """Write the layer problem of one weight of a dense model: weight, Gram, validation Gram, held-out Gram.

    Example: admm-prune capture --weight model.layers.0.mlp.up_proj.weight --out layer.safetensors
    """
    from admm_prune.runs.capturing import capture_layer
    from admm_prune.runs.texts import TextSettings, check_data, parse_packing

    text = TextSettings(
        data=check_data(data, model),
        column=column,
        split=split,
        documents=documents,
        eval_data=eval_data,
        eval_split=eval_split,
        eval_documents=eval_documents,
        samples=samples,
        eval_samples=eval_samples,
        length=length,
        packing=parse_packing(packing),
        seed=seed,
    )
    with common.progress_bar("capturing") as progress:
        layer = capture_layer(
            model,
            weight,
            text,
            out,
            device=device,
            dtype=dtype,
            problem=problem,
            overwrite=overwrite,
            progress=progress,
        )
    # Metadata of safetensors are strings; counts go out as numbers.
    facts = {key: int(value) if key.startswith("tokens") else value for key, value in layer.metadata.items()}
    content = {"out": str(out), "shape": list(layer.weight.shape), **facts}
    if json:
        common.emit(content)
    else:
        print(f"{weight} {tuple(layer.weight.shape)}, {layer.metadata['tokens']} tokens: {out}")
