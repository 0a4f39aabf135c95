"""How well a model predicts text, and how sparse it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Batch, Sequences
from admm_prune.models.structure import Block

_LOGITS = 2**27  # logits held at once: 512 MiB in float32


@dataclass(frozen=True)
class Evaluation:
    """perplexity = exp(cross-entropy per scored token); bits_per_char = total cross-entropy in bits / characters.

    Bits per character compares models of different tokenizers; perplexity does not. `protocol` says in one sentence
    what was scored and how.
    """

    perplexity: float
    bits_per_char: float
    tokens: int
    characters: int
    packing: str
    length: int
    truncated_tokens: int
    protocol: str


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Sequences) -> Evaluation:
    """Scores every token of `sequences` but those that are given, once each.

    Cross-entropies are computed from logits in float32 and added in float64. A model that overflows gets the
    perplexity it earned, inf or nan.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in sequences.batches:
        total += cross_entropy(model, batch)
    tokens, characters = sequences.scored_tokens, sequences.characters
    return Evaluation(
        perplexity=(total / tokens).exp().item(),
        bits_per_char=total.item() / math.log(2) / characters,
        tokens=tokens,
        characters=characters,
        packing=sequences.packing,
        length=sequences.length,
        truncated_tokens=sequences.truncated_tokens,
        protocol=_protocol(sequences),
    )


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of -log p over the scored tokens of a batch: a float64 scalar on the CPU."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    rows = _rows_at_once(model, batch)
    for ids, scored in zip(batch.input_ids.split(rows), batch.scored.split(rows), strict=True):
        ids, scored = ids.to(device), scored.to(device)[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][scored]
        losses = nn.functional.cross_entropy(logits.float(), ids[:, 1:][scored], reduction="none")
        total += losses.double().sum().cpu()
    return total


def _rows_at_once(model: nn.Module, batch: Batch) -> int:
    """As many rows as keep the logits of one call within bounds, at least one."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, _LOGITS // (batch.input_ids.shape[1] * vocabulary))


def _protocol(sequences: Sequences) -> str:
    begin = "no BOS, the first token is given" if sequences.bos is None else "BOS is given"
    if sequences.packing == "documents":
        form = f"one document a sequence, {begin}, cut at {sequences.length} tokens ({sequences.truncated_tokens} lost)"
    else:
        begin = "the last token before it is given" if sequences.bos is None else begin
        form = f"contiguous windows of {sequences.length} tokens, {begin}"
    return f"{form}; {sequences.scored_tokens} tokens of text scored once each; logits in float32, sum in float64."


def sparsity(blocks: Iterable[Block]) -> float:
    """The fraction of the prunable weights that are exactly zero."""
    weights = [view.parameter for block in blocks for view in block.weights]
    return 1.0 - sum(map(_nonzeros, weights)) / sum(weight.numel() for weight in weights)


def sparsity_by_weight(blocks: Iterable[Block]) -> dict[str, float]:
    """The fraction of exact zeros of every prunable matrix, by its name."""
    weights = {view.name: view.parameter for block in blocks for view in block.weights}
    return {name: 1.0 - _nonzeros(weight) / weight.numel() for name, weight in weights.items()}


def _nonzeros(weight: Tensor) -> int:
    return int(torch.count_nonzero(weight))
