"""Prune while training with the Hugging Face Trainer: `SparseAdam` is its optimizer.

    python examples/hf_trainer.py --out pruned [--model embedded] [--data embedded] [--steps 100] [--sparsity 0.8]
    python examples/hf_trainer.py --out pruned --bf16 --accumulation 4 --gradient-checkpointing --save-steps 50
    torchrun --nproc-per-node 2 examples/hf_trainer.py --out pruned --fsdp

With --save-steps, the same command with --resume continues after an interruption. Needs accelerate
(`pip install 'admm-prune[trainer]'`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from admm_prune import SparseAdam
from admm_prune.models.evaluate import evaluate
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings


class PruningTrainer(Trainer):
    """A Trainer whose optimizer prunes. FSDP takes no optimizer from outside: it shards the parameters of this one."""

    sparsity: float

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        self.pruning = SparseAdam(
            model or self.model, sparsity=self.sparsity, lr=self.args.learning_rate, total_steps=self.args.max_steps,
            penalty=math.inf, interval=8, ramp=1.0, freeze=0.25,
        )  # fmt: skip
        self.optimizer = self.pruning
        return self.optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences per forward pass and process")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes per step")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, weights in float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="shard the model over the processes of torchrun")
    parser.add_argument("--save-steps", type=int, default=0, help="checkpoint every so many steps")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    arguments = parser.parse_args()
    settings = TrainingArguments(
        output_dir=str(arguments.out), max_steps=arguments.steps, per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation, learning_rate=arguments.lr, lr_scheduler_type="linear",
        warmup_steps=arguments.steps // 10, bf16=arguments.bf16, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=arguments.gradient_checkpointing, fsdp=arguments.fsdp,
        save_strategy="steps" if arguments.save_steps else "no", save_steps=arguments.save_steps or 500,
        max_grad_norm=0.0,  # SparseAdam clips by itself, before the penalty
        report_to=[], logging_steps=20, seed=0,
    )  # fmt: skip
    loaded = load(arguments.model)
    model = loaded.model.float().requires_grad_(True)
    model.config.use_cache = False
    if arguments.fsdp:  # each block is gathered on its own
        settings.fsdp_plugin_args["transformer_cls_names_to_wrap"] = type(decoder_blocks(model)[0].module).__name__
    text = TextSettings(data=arguments.data, length=arguments.length, eval_samples=64, packing="windows")
    sequences = Texts(text, loaded).calibration(
        arguments.steps * arguments.batch * arguments.accumulation * settings.world_size
    )
    rows = [{"input_ids": row.ids, "labels": row.ids} for row in sequences.rows]

    trainer = PruningTrainer(model=model, args=settings, train_dataset=rows)
    trainer.sparsity = arguments.sparsity
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.pruning.finalize()
    trainer.save_model()
    if trainer.is_world_process_zero():
        loaded.tokenizer.save_pretrained(arguments.out)
        pruned = load(str(arguments.out))
        weights = [view.read() for block in decoder_blocks(pruned.model) for view in block.weights]
        density = sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
        perplexity = evaluate(pruned.model, Texts(text, pruned).evaluation).perplexity
        print(f"{1 - density:.1%} pruned: perplexity {perplexity:.2f}")


if __name__ == "__main__":
    main()
