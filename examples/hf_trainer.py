"""Prune while training with the Hugging Face Trainer: hand it `SparseAdam` as its optimizer.

    python examples/hf_trainer.py [--model embedded] [--data embedded] [--steps 100] [--sparsity 0.8] [--out pruned]

Needs accelerate (`pip install admm-prune[trainer]`).
"""

from __future__ import annotations

import argparse
import math
import tempfile

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from admm_prune import SparseAdam
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
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
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    model = loaded.model.requires_grad_(True)
    texts = Texts(
        TextSettings(data=arguments.data, length=arguments.length, eval_samples=64, packing="windows"), loaded
    )
    rows = [{"input_ids": row.ids, "labels": row.ids} for row in texts.calibration(arguments.steps * 4).rows]

    optimizer = SparseAdam(
        model, sparsity=arguments.sparsity, lr=arguments.lr, total_steps=arguments.steps,
        penalty=math.inf, interval=8, ramp=1.0, freeze=0.25,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch, max_steps=arguments.steps, per_device_train_batch_size=4, save_strategy="no",
                report_to=[], max_grad_norm=0.0, use_cpu=not torch.cuda.is_available(), logging_steps=20, seed=0,
            ),  # SparseAdam clips by itself, before the penalty: hence max_grad_norm=0
            train_dataset=rows,
            optimizers=(optimizer, LambdaLR(optimizer, warm_up_then_linear(arguments.steps))),
        )  # fmt: skip
        trainer.train()
    masks = optimizer.finalize()

    density = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    print(f"{1 - density:.1%} pruned: perplexity {evaluate(model.eval(), texts.evaluation).perplexity:.2f}")
    if arguments.out:
        model.save_pretrained(arguments.out)
        loaded.tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
