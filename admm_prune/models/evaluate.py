"""Perplexity and sparsity of a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Batch, Sequences
from admm_prune.errors import UserError
from admm_prune.models.activation_store import ActivationStore, passed_by, record, returned_form
from admm_prune.models.losses import cross_entropy, split_rows
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.streaming import IN_MEMORY, Offloading
from admm_prune.models.structure import Block, decoder_blocks

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a figure of quality is computed and shown.

    Attributes:
        name: in full, with its unit.
        heading: of a column of its values.
        format: of a value, for the operator %.
        compute: from the cross-entropy of all scored tokens together, a float64 scalar in nats, and the text.
        primary: also divided by that of the dense model, and plotted over the targets. The first one ranks methods.
    """

    name: str
    heading: str
    format: str
    compute: Callable[[Tensor, Sequences], float]
    primary: bool = False
    lower_is_better: bool = True


def _metric(name: str, format: str, compute: Callable[[Tensor, Sequences], float], **how: Any) -> Any:
    options: dict[str, Any] = {"heading": name} | how
    return field(metadata={"metric": Metric(name=name, format=format, compute=compute, **options)})


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """perplexity = exp(cross-entropy per scored token); bits_per_char = total cross-entropy in bits / characters.

    Bits per character is comparable between models with different tokenizers; perplexity is not.

    A metric is declared here alone: the command line, reports, comparisons, trackers and `verify` iterate over METRICS.
    """

    perplexity: float = _metric(
        "perplexity", "%.3f", lambda loss, text: (loss / text.scored_tokens).exp().item(), primary=True
    )
    bits_per_char: float = _metric(
        "bits per character",
        "%.4f",
        lambda loss, text: loss.item() / math.log(2) / (text.characters or math.nan),
        heading="bits/char",
    )

    def formatted(self, dense: Metrics | None = None) -> list[str]:
        """The values as text, in the order of METRICS; after a primary one its ratio to that of the dense model."""
        cells: list[str] = []
        for name, metric in METRICS.items():
            value = getattr(self, name)
            cells.append(metric.format % value)
            if metric.primary and dense is not None:
                cells.append(f"{value / getattr(dense, name):.2f}")
        return cells


METRICS: dict[str, Metric] = {one.name: one.metadata["metric"] for one in fields(Metrics)}
RANKING = next(name for name, metric in METRICS.items() if metric.primary)


def headings(*, ratios: bool = False) -> list[str]:
    """Of the columns of `Metrics.formatted`, with or without ratios."""
    columns: list[str] = []
    for metric in METRICS.values():
        columns += [metric.heading, "/ dense"] if ratios and metric.primary else [metric.heading]
    return columns


@dataclass(frozen=True, kw_only=True)
class Evaluation(Metrics):
    """The metrics of a model on a text.

    Attributes:
        protocol: what was scored and how, in one sentence.
        perplexity_error: standard error of the perplexity, from the variation between the sequences, as if they were
            independent; None of a single sequence, or where the perplexity is not finite.
    """

    tokens: int
    characters: int
    packing: str
    length: int
    truncated_tokens: int
    protocol: str
    perplexity_error: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sequences: Sequences,
    offloading: Offloading = IN_MEMORY,
    activation_store: ActivationStore | None = None,
    world: World = ALONE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores every token of `sequences` but those that are given, once each.

    Cross-entropies are computed from logits in float32 and added in float64. If a model overflows,
    its perplexity is inf or nan.

    Args:
        offloading: of the weights. If they are not in memory, the whole text is passed through one block after the
            other, with the same calls on the same batches, so that the figures are the same.
        activation_store: keeps the hidden states meanwhile.
        world: processes that share the text; all of them get the figures.
        on_progress: called with (steps done, steps): one for a batch, and for a block if the weights are not in
            memory.

    Raises:
        UserError: the text has no token to score.
    """
    if not sequences.scored_tokens:
        raise UserError("the text to evaluate has no token to score: sequences start with a token that is given")
    pieces = world.partition([piece for batch in sequences.batches for piece in split_rows(model, batch)])
    passes = len(decoder_blocks(model)) if offloading.is_offloaded else 0

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, passes + len(pieces))

    report(0)
    sequence_losses: list[Tensor] = []
    if offloading.is_offloaded:
        device = offloading.device(model)
        losses = streamed(
            model,
            pieces,
            offloading,
            lambda piece: cross_entropy(model, piece, device, sequence_losses=sequence_losses),
            activation_store,
            report,
        )
    else:
        losses = (cross_entropy(model, piece, sequence_losses=sequence_losses) for piece in pieces)
    total = torch.zeros((), dtype=torch.float64)
    for done, loss in enumerate(losses, passes + 1):
        total += loss
        report(done)
    total = world.all_reduce(total)
    metrics: dict[str, Any] = {name: metric.compute(total, sequences) for name, metric in METRICS.items()}
    return Evaluation(
        **metrics,
        tokens=sequences.scored_tokens,
        characters=sequences.characters,
        packing=sequences.packing,
        length=sequences.length,
        truncated_tokens=sequences.truncated_tokens,
        protocol=_protocol(sequences),
        perplexity_error=_perplexity_error(pieces, sequence_losses, world, total, sequences.scored_tokens),
    )


def _perplexity_error(
    pieces: list[Batch], losses: list[Tensor], world: World, total: Tensor, tokens: int
) -> float | None:
    """Standard error of exp(mu), mu = sum l_i / sum n_i over sequences i, by the delta method:
    exp(mu) sqrt(m / (m - 1) sum (l_i - mu n_i)^2) / sum n_i for m sequences.

    Source: Cochran, Sampling Techniques, 1977, section 6.4 (the ratio estimator).
    """
    moments = torch.zeros(4, dtype=torch.float64)
    for piece, loss in zip(pieces, losses, strict=True):
        counts = piece.scored.sum(1).double()
        moments += torch.stack([(counts > 0).sum(), loss @ loss, loss @ counts, counts @ counts])
    count, squares, products, sizes = world.all_reduce(moments).tolist()
    mean = float(total) / tokens
    if count < 2 or not math.isfinite(squares) or mean > math.log(sys.float_info.max):
        return None
    residual = max(0.0, squares - 2 * mean * products + mean**2 * sizes)
    return math.exp(mean) * math.sqrt(count / (count - 1) * residual) / tokens


def streamed(
    model: nn.Module,
    pieces: list[Batch],
    offloading: Offloading,
    call: Callable[[Batch], T],
    activation_store: ActivationStore | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Iterator[T]:
    """The result of `call` on every piece, with one block in memory at a time, then the modules outside the blocks.

    Args:
        call: calls the model on a piece; its blocks then return their saved outputs.
        activation_store: keeps the hidden states meanwhile.
        on_block: called with the number of blocks that the pieces have passed.
    """
    blocks, device = decoder_blocks(model), offloading.device(model)
    named = ((f"evaluation/{i}", piece) for i, piece in enumerate(pieces))
    wrap = returned_form(model, blocks, device, offloading)
    states = record(
        model,
        blocks,
        named,
        device,
        offloading=offloading,
        wrap=wrap,
        activation_store=activation_store or ActivationStore(),
        finite=False,
    )
    for index, block in enumerate(blocks):
        with offloading.block(index):
            for state in states:
                state.hidden = state.replay(block, index, finite=False)
        if on_block is not None:
            on_block(index + 1)
    with offloading.outside():
        for piece, state in zip(pieces, states, strict=True):
            with passed_by(blocks, wrap, state.hidden):
                yield call(piece)


@torch.no_grad()
def continued(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """The most probable tokens (count,) after a prompt (n,), generated one by one; independent of the model's
    generation settings."""
    ids = prompt.to(next(model.parameters()).device)[None]
    for _ in range(count):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].cpu()


def _protocol(sequences: Sequences) -> str:
    begin = "no BOS, the first token is given" if sequences.bos is None else "BOS is given"
    if sequences.packing == "segments":
        form = (
            f"joined documents in segments of {sequences.length} tokens, as the code of GPTQ, SparseGPT and Wanda, the "
            f"first token of each is given, {sequences.dropped_sequences} shorter at the end dropped"
        )
    elif sequences.packing == "documents":
        form = f"one document a sequence, {begin}, cut at {sequences.length} tokens ({sequences.truncated_tokens} lost)"
    else:
        begin = "the last token before it is given" if sequences.bos is None else begin
        form = f"contiguous windows of {sequences.length} tokens, {begin}"
    return f"{form}; {sequences.scored_tokens} tokens of text scored once each; logits in float32, sum in float64."


def sparsity(blocks: Iterable[Block]) -> float:
    """The fraction of the prunable weights that are exactly zero."""
    weights = (view.read() for block in blocks for view in block.weights)  # one at a time: they may be on disk
    nonzeros, total = map(sum, zip(*((int(weight.count_nonzero()), weight.numel()) for weight in weights), strict=True))
    return 1.0 - nonzeros / total
