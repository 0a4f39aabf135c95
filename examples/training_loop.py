"""Prune while training, in a loop of your own: `SparseAdam` in place of Adam.

    python examples/training_loop.py [--model embedded] [--data embedded] [--steps 100] [--sparsity 0.8]

The sparsity is raised gradually; leave out `penalty`, `ramp` and `freeze` for ELSA's ADMM.
"""

from __future__ import annotations

import argparse
import math

from torch.optim.lr_scheduler import LambdaLR

from admm_prune import SparseAdam
from admm_prune.methods.elsa.trainer import endless_batches
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
from admm_prune.models.losses import next_token_loss
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.solvers.schedules import warm_up_then_linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    model = loaded.model.requires_grad_(True)
    texts = Texts(TextSettings(data=arguments.data, length=arguments.length, eval_samples=64), loaded)
    print(f"dense: perplexity {evaluate(model, texts.evaluation).perplexity:.2f}")

    optimizer = SparseAdam(
        model, sparsity=arguments.sparsity, lr=arguments.lr, total_steps=arguments.steps,
        penalty=math.inf, interval=8, ramp=1.0, freeze=0.25,
    )  # fmt: skip
    rates = LambdaLR(optimizer, warm_up_then_linear(arguments.steps))
    batches = endless_batches(texts.calibration(arguments.steps * 4), batch_size=4, seed=0)
    for _ in range(arguments.steps):
        next_token_loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    masks = optimizer.finalize()

    density = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    print(f"{1 - density:.1%} pruned: perplexity {evaluate(model, texts.evaluation).perplexity:.2f}")


if __name__ == "__main__":
    main()
