"""admm-prune eval: the perplexity of a saved model."""

from __future__ import annotations

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
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    trust_remote_code: common.TrustRemoteCode = False,
    json: common.Json = False,
) -> None:
    """Evaluate a model: perplexity, bits per character, sparsity.

    A local file is judged whole, the embedded text by its held-out part.

    Example: admm-prune eval pruned --data stories.txt --json
    """
    from admm_prune.runs.evaluating import evaluate_model
    from admm_prune.runs.texts import TextSettings, parse_packing

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
