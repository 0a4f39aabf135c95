"""The stages in which the whole model is read, evaluated and saved: their code, run on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from admm_prune.data.sequences import Sequences
from admm_prune.models.losses import cross_entropy
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.counting import Stage, Work, counted, measured_cost

ACTIVATIONS_PART = "activations between blocks"
WEIGHTS, CHECKED = "weights", "check of the largest weight"


def loading(anatomy: Anatomy, *, stream: bool) -> Stage:
    """Reading the weights, checking that each is finite (which makes |x| and two masks), and hashing them."""
    with counted() as counting:
        weight = torch.empty_like(anatomy.largest)
        with measured_cost(counting) as check:
            bool(torch.isfinite(weight).all())
    held = {"largest weight": weight.nbytes} if stream else {WEIGHTS: anatomy.weight_bytes}
    size = anatomy.weight_bytes
    checks = check.work.counts["traffic"] * anatomy.parameters / weight.numel()
    work = Work.of(disk_read=2 * size if stream else size, traffic=checks, hash=size)
    return Stage(name="loading", parts={**held, CHECKED: check.peak}, work=work)


def evaluating(anatomy: Anatomy, validation: Sequences, *, stream: bool) -> Iterator[Stage]:
    """One evaluation.

    Args:
        validation: the text, in full sequences.
        stream: whether it runs block by block, with the hidden states of the whole text between blocks.
    """
    batch = validation.batches[0]
    tokens = sum(len(row.ids) for row in validation.rows)
    share = tokens / batch.input_ids.numel()
    with counted() as counting, torch.no_grad():
        counting.know(*anatomy.model.parameters(), *anatomy.model.buffers())
        with measured_cost(counting) as cost:
            cross_entropy(anatomy.model, batch)
    weights, work = {WEIGHTS: anatomy.weight_bytes}, cost.work * share
    if stream:
        work += Work.of(disk_read=anatomy.weight_bytes)
        width = anatomy.model.get_input_embeddings().weight.shape[-1]
        element = anatomy.model.get_input_embeddings().weight.element_size()
        weights = {"weights outside of the blocks": anatomy.outside_bytes, ACTIVATIONS_PART: tokens * width * element}
    yield Stage(name="evaluation", parts={**weights, "logits": cost.peak}, work=work)


def saving(anatomy: Anatomy, *, stream: bool, factor: float = 1.0) -> Stage:
    """Writing the model, and reading its files to hash them; no weight is copied in memory."""
    size = round(anatomy.weight_bytes * factor)
    held = {"largest weight": anatomy.largest.nbytes} if stream else {WEIGHTS: size}
    return Stage(name="saving", parts=held, work=Work.of(disk_write=size, disk_read=size, hash=size))
