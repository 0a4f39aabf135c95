"""Layer problems to measure solvers on, synthetic and from real models, as safetensors files.

    python -m benchmarks.instances OUT [--seed N] [OUTxIN ...]
    python -m benchmarks.instances OUT --model embedded
    python -m benchmarks.instances OUT --model DIR --data FILE [--eval-data FILE]

A drawn instance imitates a layer of a language model. Activations: a power-law covariance spectrum i^-1.1 with a 2 %
floor in a random orthogonal basis, log-normal channel gains, 0.4 % massive biased channels (12 to 40 times), a
log-normal scale per token. Weights: Student-t(4), log-normal row and column scales, a low-rank part with 10 % of the
energy, smaller on massive channels. Seed 0 gives the instances on which public code was measured: see `published`. The
thread count decides the order of sums: the same bits come from the same number of threads.

Real layers are captured at 8192 calibration tokens, as many others held out: every matrix of the first, the middle and
the last block. Files that are there already are left as they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from admm_prune.data.layer_file import LayerFile
from admm_prune.models.families import sequence_length
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.layer import capture_layer
from admm_prune.settings import TextSettings

SHAPES = ("512x512", "2048x512", "2048x2048")
TOKENS = 8192
_VALIDATION = 0.15
_CHUNK = 2048  # tokens summed at once: part of the recipe, it decides rounding


def instance(rows: int, width: int, seed: int = 0, tokens: int = TOKENS) -> LayerFile:
    """W (rows, width) and its Grams (width, width), float32, summed in float64.

    Args:
        tokens: of the calibration Gram, whose last 15 % are those of the validation Gram; as many others are held out.

    Source: ours. The order of the draws is part of the recipe.
    """
    g = torch.Generator().manual_seed(1000003 * seed + 7919 * rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    basis, _ = torch.linalg.qr(normal(width, width))
    spectrum = torch.arange(1, width + 1, dtype=torch.float32).pow(-1.1)
    factor = basis * (spectrum / spectrum.mean() * 0.98 + 0.02).sqrt()
    gain = torch.exp(0.35 * normal(width))
    massive = torch.randperm(width, generator=g)[: max(2, round(0.004 * width))]
    boost = 12 + 28 * torch.rand(len(massive), generator=g)
    gain[massive] *= boost
    mean = 0.1 * normal(width)
    mean[massive] = torch.sign(normal(len(massive))) * 0.6

    def activations() -> Tensor:
        scale = torch.exp(0.25 * normal(tokens, 1))
        inputs: Tensor = ((normal(tokens, width) @ factor.T) * scale + mean) * gain
        return inputs

    calibration, holdout = activations(), activations()
    chi = sum((normal(rows, width) ** 2 for _ in range(4)), start=torch.zeros(())) / 4
    weight = normal(rows, width) / chi.sqrt()
    weight = weight * torch.exp(0.3 * normal(rows, 1)) * torch.exp(0.15 * normal(1, width))
    rank = max(4, width // 32)
    low_rank = normal(rows, rank) @ normal(rank, width)
    weight = weight / weight.norm() * math.sqrt(0.9) + low_rank / low_rank.norm() * math.sqrt(0.1)
    weight[:, massive] /= boost.sqrt()
    weight = weight / weight.norm() * math.sqrt(rows)
    return LayerFile(
        weight=weight,
        gram=_gram(calibration),
        gram_validation=_gram(calibration[-round(_VALIDATION * tokens) :]),
        gram_holdout=_gram(holdout),
        metadata={"seed": str(seed), "tokens": str(tokens)},
    )


def _gram(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(_CHUNK):
        total = total + part.double().T @ part.double()
    return total.float()


def draw(out: Path, shapes: list[str], seed: int) -> Iterator[Path]:
    """Writes OUT/<shape>.safetensors, or <shape>-seed<N> for other seeds than 0."""
    for shape in shapes:
        rows, width = map(int, shape.split("x"))
        path = out / (f"{shape}.safetensors" if seed == 0 else f"{shape}-seed{seed}.safetensors")
        if not path.exists():
            instance(rows, width, seed).save(path)
        yield path


def capture(out: Path, model: str, data: str, eval_data: str | None, seed: int) -> Iterator[Path]:
    """Writes OUT/<model>.<matrix>.safetensors for every matrix of the first, the middle and the last block.

    Raises:
        UserError: the model or the text cannot be used.
    """
    loaded = load(model)
    blocks = decoder_blocks(loaded.model)
    length = sequence_length(loaded.model.config)
    samples = max(1, TOKENS // length)
    text = TextSettings(
        data=data,
        eval_data=eval_data,
        samples=samples,
        eval_samples=samples,
        length=length,
        packing="windows",
        seed=seed,
    )
    chosen = sorted({0, len(blocks) // 2, len(blocks) - 1})
    for name in [view.name for index in chosen for view in blocks[index].weights]:
        path = out / f"{Path(model).name}.{name.removesuffix('.weight')}.safetensors"
        if not path.exists():
            capture_layer(model, name, text, path, device="cpu", dtype="float32")
        yield path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("shapes", nargs="*", metavar="OUTxIN", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the instance, or of the choice of sequences")
    parser.add_argument("--model", help="capture this model's layers: embedded, a folder or a Hub id")
    parser.add_argument("--data", default="embedded", help="calibration text, with --model")
    parser.add_argument("--eval-data", help="held-out text; by default a part of --data that does not calibrate")
    chosen = parser.parse_args(arguments)
    if chosen.model and chosen.shapes:
        parser.error("give either shapes or --model")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.model:
        paths = capture(chosen.out, chosen.model, chosen.data, chosen.eval_data, chosen.seed)
    else:
        paths = draw(chosen.out, chosen.shapes or list(SHAPES), chosen.seed)
    for path in paths:
        print(path, flush=True)


if __name__ == "__main__":
    main()
