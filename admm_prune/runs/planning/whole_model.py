"""The stages in which the whole model runs: loading, evaluation, training. The code itself is run on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from admm_prune.data.sequences import Sequences
from admm_prune.models import evaluate as evaluation
from admm_prune.recipes.elsa import CALIBRATION, Elsa
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.recipe import Request
from admm_prune.recipes.targets import Target
from admm_prune.recipes.session import Session
from admm_prune.recipes.trained import Trained
from admm_prune.runs.planning.anatomy import Anatomy
from admm_prune.runs.planning.blockwise import ACTIVATIONS_PART, FORWARD, blockwise_stages
from admm_prune.runs.planning.counting import counted
from admm_prune.runs.planning.stages import Stage, stretch
from admm_prune.runs.planning.work import Work

WEIGHTS, CHECKED = "weights", "check of the largest weight"
_MOMENTS, _MASKS, _ANCHORS = "Adam's moments", "masks", "anchors"
_STEPS = (1, 2)  # on which the work of a step is counted


def loading(anatomy: Anatomy, *, stream: bool) -> Stage:
    """Reading the weights, and looking for damage in each: |x| and two masks of the largest beside all of them."""
    with counted() as counting:
        weight = torch.empty_like(anatomy.largest)
        with stretch(counting) as check:
            bool(torch.isfinite(weight).all())
    held = {"largest weight": weight.nbytes} if stream else {WEIGHTS: anatomy.weight_bytes}
    work = Work.of(
        disk_read=anatomy.weight_bytes, traffic=check.work.counts["traffic"] * anatomy.parameters / weight.numel()
    )
    return Stage(name="loading", parts={**held, CHECKED: check.peak}, work=work)


def evaluating(anatomy: Anatomy, judging: Sequences, *, stream: bool) -> Iterator[Stage]:
    """One evaluation.

    Args:
        judging: its text, as whole sequences.
        stream: block by block, with the hidden states of all of the text between them.
    """
    batch = judging.batches[0]
    tokens = sum(len(row.ids) for row in judging.rows)
    share = tokens / batch.input_ids.numel()
    with counted() as counting, torch.no_grad():
        counting.know(*anatomy.model.parameters(), *anatomy.model.buffers())
        with stretch(counting) as found:
            evaluation.cross_entropy(anatomy.model, batch)
    weights = {WEIGHTS: anatomy.weight_bytes}
    if stream:
        width = anatomy.model.get_input_embeddings().weight.shape[-1]
        element = anatomy.model.get_input_embeddings().weight.element_size()
        weights = {"weights outside of the blocks": anatomy.outside_bytes, ACTIVATIONS_PART: tokens * width * element}
    yield Stage(name="evaluation", parts={**weights, "logits": found.peak}, work=found.work * share)


def saving(anatomy: Anatomy, *, stream: bool, factor: float = 1.0) -> Stage:
    """Writing the model and reading its files again for their fingerprints: no second copy is made of any of it."""
    size = round(anatomy.weight_bytes * factor)
    held = {"largest weight": anatomy.largest.nbytes} if stream else {WEIGHTS: size}
    return Stage(name="saving", parts=held, work=Work.of(disk_write=size, disk_read=size))


def training(anatomy: Anatomy, recipe: Trained, request: Request) -> list[Stage]:
    """All of a recipe that trains: the recipe itself, run on the meta device for a few steps, without its projections.

    A step takes the same bytes and operations at all times, so that the work of all is that of the first and as many of
    the second's as there are more.
    """
    stages = [_trained(anatomy, recipe, request)]
    projections = recipe.projections(request.target) if isinstance(recipe, Elsa) else []
    state = {name: size for name, size in stages[0].parts.items() if name in _STATE}
    if isinstance(recipe, Elsa) and projections:  # they differ in how much goes, not in what they take
        calibration = replace(request.calibration, rows=request.calibration.rows[:CALIBRATION])
        own = replace(request, calibration=calibration)
        for stage in blockwise_stages(anatomy, Layerwise(recipe.projection), own, stream=False):
            stages.append(replace(stage, name=f"projection: {stage.name}").beside(state).times(len(projections)))
    return stages


_TEACHER, _BEST = "teacher", "best weights so far"
_STATE = (_MOMENTS, _MASKS, _ANCHORS, _TEACHER, _BEST)


def _trained(anatomy: Anatomy, recipe: Trained, request: Request) -> Stage:
    model = anatomy.model
    least = recipe.steps - replace(recipe, steps=recipe.steps).training_steps
    works, peak, parts = [], 0, {}
    for steps in _STEPS:
        short = _unprojected(replace(recipe, steps=least + steps))
        with counted() as counting:
            counting.know(*model.parameters(), *model.buffers())
            with stretch(counting) as found:
                session = short.run(model, replace(request, on_progress=None))
            works.append(found.work)
            peak = max(peak, found.peak)
            parts = _parts(session)
            for parameter in model.parameters():
                parameter.grad = None
            del session
    step = works[1] + works[0] * -1.0
    work = works[0] + step * (recipe.steps - least - _STEPS[0])
    known = {WEIGHTS: anatomy.weight_bytes, **parts, "gradients": anatomy.weight_bytes}
    rest = peak - sum(size for name, size in known.items() if name != WEIGHTS)
    return Stage(name="training", parts={**known, "activations and logits of a step": max(0, rest)}, work=work)


def _parts(session: Session) -> dict[str, int]:
    state: dict[str, int] = {_MOMENTS: 0, _MASKS: 0, _ANCHORS: 0}
    for entries in session.trainer.optimizer.state.values():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                kind = _MASKS if name == "mask" else _MOMENTS if name.startswith("exp_avg") else _ANCHORS
                state[kind] += value.nbytes
    teacher = getattr(session.trainer.objective, "teacher", None)
    if teacher is not None:
        state[_TEACHER] = sum(p.nbytes for p in teacher.parameters())
    state[_BEST] = sum(x.nbytes for x in (session.best or {}).values())
    return {name: size for name, size in state.items() if size}


def _unprojected(recipe: Trained) -> Trained:
    """The recipe, with every weight kept where it would project."""
    kind = type(recipe)
    values: dict[str, Any] = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    unprojected: Trained = type(kind.__name__, (kind,), {"project": _keep_all})(**values)
    return unprojected


def _keep_all(_: Trained, session: Session, target: Target) -> None:
    masks = {view.name: torch.ones_like(view.parameter, dtype=torch.bool) for view in session.views}
    session.trainer.optimizer.change_support(masks)
    session.offer()
