"""Losses of a language model on a batch, to be differentiated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Batch


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of -log p over the scored tokens of a batch, from logits in float32."""
    logits, targets = _scored_logits(model, batch)
    return nn.functional.cross_entropy(logits, targets)


@dataclass(frozen=True, eq=False)
class Distillation:
    """(1 - weight) cross-entropy + weight T^2 KL(p_teacher || p), means over the scored tokens, at temperature T.

    The teacher is the dense model: its whole distribution says more of each token than the token does. It runs without
    gradients, which costs about a third of a training step.

    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = _scored_logits(model, batch)
        with torch.no_grad():
            wanted, _ = _scored_logits(self.teacher, batch)
        divergence = nn.functional.kl_div(
            (logits / self.temperature).log_softmax(-1),
            (wanted / self.temperature).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        loss = self.weight * self.temperature**2 * divergence
        return loss if self.weight == 1.0 else loss + (1 - self.weight) * nn.functional.cross_entropy(logits, targets)


def _scored_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(n, vocabulary) in float32, and the n tokens they are to predict."""
    device = next(model.parameters()).device
    ids, scored = batch.input_ids.to(device), batch.scored.to(device)[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][scored]
    return logits.float(), ids[:, 1:][scored]
