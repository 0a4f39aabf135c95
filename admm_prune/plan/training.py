"""The stages of methods that train: the training code itself, run for a few steps on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from admm_prune.methods.base import Task
from admm_prune.methods.elsa.engine import multiplies_in_bfloat16
from admm_prune.methods.elsa.session import Session
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.target import Target
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.blockwise import pruning_stages
from admm_prune.plan.counting import Counting, Stage, Work, counted, measured_cost
from admm_prune.plan.whole_model import WEIGHTS

_MOMENTS, _MASKS, _ANCHORS = "Adam's moments", "masks", "anchors"
_TEACHER, _BEST = "teacher", "best weights so far"
TRAINING, STEP = "training", "activations and logits of a step"
_STATE = (_MOMENTS, _MASKS, _ANCHORS, _TEACHER, _BEST)
KEPT_IN_CHECKPOINTS = (WEIGHTS, _MOMENTS, _MASKS, _ANCHORS, _BEST)
_STEPS = 3  # of the trial: the first one creates the optimizer's state, and one of the others may fix the support


def training_stages(anatomy: Anatomy, recipe: Trained, task: Task, device: str = "cpu") -> list[Stage]:
    """The training, and the projections between its steps.

    Args:
        device: on which the method is to run, in bfloat16 where that is the default there.
    """
    half = device == "cuda" or multiplies_in_bfloat16(torch.device(device))
    if recipe.engine.precision == "auto":
        recipe = replace(recipe, engine=replace(recipe.engine, precision="bf16" if half else "float32"))
    stages = [_training(anatomy, recipe, task)]
    projecting = recipe.projecting(task)
    state = {name: size for name, size in stages[0].parts.items() if name in _STATE}
    if projecting is not None:
        # They differ in sparsity, not in cost; where a target comes again, `elsa` fixes its support without one.
        count = len({str(target) for _, target in recipe.projections(task.target)})
        for stage in pruning_stages(anatomy, *projecting, stream=False):
            stages.append(replace(stage, name=f"projection: {stage.name}").beside(state).times(count))
    return stages


def _training(anatomy: Anatomy, recipe: Trained, task: Task) -> Stage:
    """Memory and work of a run without its projections, but with the evaluation after each of them.

    Updates of z and u, or of masks, are not counted where they are due only every few steps: they take no products, and
    of the memory traffic of `elsa` about a tenth.
    """
    model = anatomy.model
    rate_steps = recipe.steps - recipe.training_steps
    trial = replace(recipe, steps=rate_steps + _STEPS)
    with counted() as counting:
        counting.know(*model.parameters(), *model.buffers())
        observer = _Observer(counting)
        with register_optimizer_step_post_hook(observer.after_step), measured_cost(counting) as cost:
            session = trial.run(model, task, project=observer.project)
        teacher = getattr(session.trainer.objective, "teacher", None)
        for parameter in model.parameters():
            parameter.grad = None
    parts = observer.parts
    if teacher is not None:
        parts[_TEACHER] = sum(p.nbytes for p in teacher.parameters())
    steps = recipe.training_steps - _STEPS
    evaluations = _evaluations(recipe, task) - _evaluations(trial, task)
    work = cost.work + observer.step * steps + observer.evaluation * evaluations
    trained = sum(p.numel() * max(4, p.dtype.itemsize) for p in model.parameters())  # in float32, weights and gradients
    known = {WEIGHTS: trained, **parts, "gradients": trained}
    uncounted = sum(p.nbytes for p in model.parameters() if p.dtype.itemsize >= 4)  # there before
    rest = uncounted + cost.peak - sum(known.values())
    return Stage(name=TRAINING, parts={**known, STEP: max(0, rest)}, work=work)


class _Observer:
    """What the trial of a training does and holds, read after each step and each projection.

    Attributes:
        parts: bytes of the optimizer's state and of the best weights so far.
        evaluation: the work of the last evaluation after a projection; none where nothing was projected.
    """

    def __init__(self, counting: Counting) -> None:
        self.parts: dict[str, int] = {}
        self.evaluation = Work()
        self._steps: list[Work] = []
        self._counting = counting
        self._begun = Work()  # what had been done when the current step began

    @property
    def step(self) -> Work:
        """The work of a step after the first, without a change of masks."""
        return min(self._steps[1:], key=lambda work: work.counts["traffic"])

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps.append(self._since(self._begun))
        self._begun = self._counting.work
        self.parts.update(_state(optimizer))  # the anchors too, which are dropped at the end

    def project(self, session: Session, target: Target) -> None:
        before = self._counting.work
        _keep_all(session, target)
        self.evaluation = self._since(before)
        self._begun += self.evaluation  # not a part of the step that follows
        self.parts[_BEST] = sum(x.nbytes for x in (session.best or {}).values())  # without stages, held after the end

    def _since(self, before: Work) -> Work:
        return self._counting.work + before * -1.0


def _evaluations(recipe: Trained, task: Task) -> int:
    """Steps before which a run projects: of several projections before the same step it makes the last one."""
    last = recipe.training_steps - 1
    return len({min(round(at * recipe.training_steps), last) for at, _ in recipe.projections(task.target)})


def _state(optimizer: Optimizer) -> dict[str, int]:
    state: dict[str, int] = {}
    for entries in optimizer.state.values():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                of_adam = name == "step" or name.startswith("exp_avg")
                kind = _MASKS if name == "mask" else _MOMENTS if of_adam else _ANCHORS
                state[kind] = state.get(kind, 0) + value.nbytes
    return state


def _keep_all(session: Session, target: Target) -> None:
    """In place of a projection: keeps every weight. Where x and z are apart they stay so, with all of their state."""
    optimizer = session.trainer.optimizer
    masks = {name: torch.ones_like(mask) for name, mask in optimizer.masks().items()}
    if optimizer.frozen:
        optimizer.change_support(masks)
    else:
        optimizer.restart({view.parameter_name: view.parameter.detach() for view in session.views})
    session.offer()
