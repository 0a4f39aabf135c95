"""The stages of blockwise methods.

The code that captures statistics runs on the meta device, where bytes and operations are counted
and nothing is computed; solvers are measured on small instances (`trials`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.methods.allocation.budget import LOSS_TOKENS, held_out
from admm_prune.methods.allocation.measurements import GRADIENT_SEQUENCES, backward
from admm_prune.methods.allocation.measurements import SOLVER as PATH_SOLVER
from admm_prune.methods.allocation.rules import RULES, SEARCHES, AllocationRule, layer_method
from admm_prune.methods.base import IN_PROCESS, Recipe, Task
from admm_prune.methods.joint import in_stages
from admm_prune.methods.layerwise import Layerwise
from admm_prune.methods.local import Method
from admm_prune.methods.sparsellm import SparseLLM
from admm_prune.methods.struprune.struprune import StruPrune
from admm_prune.methods.target import Target
from admm_prune.models import families
from admm_prune.models.activation_store import ActivationStore
from admm_prune.models.capture import BlockStream
from admm_prune.models.feed_forward import check_no_mixture
from admm_prune.models.losses import cross_entropy
from admm_prune.models.structure import Block, WeightView
from admm_prune.models.sublayers import Sublayer, feed_forward_part, sublayers
from admm_prune.ops.activations import ACTIVATIONS, Activation
from admm_prune.plan.anatomy import Anatomy, block_bytes
from admm_prune.plan.counting import Cost, Counting, Stage, counted, measured_cost
from admm_prune.plan.joint import coordinated, joint_stages
from admm_prune.plan.trials import GroupTrial, LayerTrial, NetworkTrial, estimated
from admm_prune.plan.whole_model import ACTIVATIONS_PART, WEIGHTS, evaluating
from admm_prune.solvers.together import Shape, batches
from admm_prune.statistics import SUM_BYTES, UNWEIGHTED, TokenWeighting

TABLE = "table of pruned matrices"  # of a search
ERRORS = "errors at all levels"  # of the rows of every matrix, in float64
GRAMS, SOLVER, FORWARD = "Grams", "solver", "forward pass of a batch"
SCORES, _SCORE_BYTES = "token scores", 4  # of a token, in float32


@dataclass(frozen=True)
class Collected:
    """The statistics of a block, and the cost of collecting them.

    Attributes:
        shared: for each input, the weights that read it and its width.
        sums: bytes of the sums of all Gram matrices, which exist at the same time unless memory is spared.
    """

    shared: list[tuple[tuple[WeightView, ...], int]]
    cost: Cost
    sums: int

    def stage(self, name: str) -> Stage:
        forward = max(0, self.cost.peak - self.sums)
        return Stage(name=name, parts={GRAMS: self.sums, FORWARD: forward}, work=self.cost.work)


class _ActivationStore(ActivationStore):
    """Leaves activations on the meta device, where there is no host copy."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor.detach()

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class BlockPass:
    """A `BlockStream` on the meta device, whose operations are counted."""

    def __init__(
        self,
        anatomy: Anatomy,
        counting: Counting,
        task: Task,
        device: str,
        *,
        stream: bool,
        weighting: TokenWeighting = UNWEIGHTED,
    ) -> None:
        self.anatomy, self.counting, self.device = anatomy, counting, torch.device(device)
        counting.know(*anatomy.model.parameters(), *anatomy.model.buffers())
        with measured_cost(counting) as self.recording:
            self.stream = BlockStream(
                anatomy.model,
                anatomy.blocks,
                task.calibration,
                "meta",
                activation_store=_ActivationStore(),
                sparing=stream,
                weighting=TokenWeighting(needs_outputs=weighting.needs_outputs),
            )
        self.target = task.target
        self.parts = 2 if len(task.calibration.rows) > 1 else 1  # calibration and validation
        self.position = 0

    @property
    def held(self) -> dict[str, int]:
        return {ACTIVATIONS_PART: self.recording.left}

    def kinds(self) -> Iterator[tuple[int, Block, int]]:
        """(index, block, count) of each kind of block, with the stream at that block."""
        for index, count in self.anatomy.kinds(self.target):
            while self.position < index:
                self.advance()
            yield index, self.anatomy.blocks[index], count

    def pruned(self, weights: Iterable[WeightView]) -> set[str]:
        """The names of those of the given weights that are pruned."""
        return {view.name for view in weights if self.target.at(view.name) is not None}

    def advance(self) -> Cost:
        with measured_cost(self.counting) as cost:
            if self.stream.position == self.position:  # else it advanced while it collected
                self.stream.advance(self.position)
        self.position += 1
        return cost

    def collect(
        self, only: Collection[str] | None = None, outputs: dict[str, Tensor] | None = None, *, centre: bool = False
    ) -> Collected:
        with measured_cost(self.counting) as cost:
            shared = self.stream.collect(self.position, only, outputs, centre=centre)
        cost.left -= sum(x.nbytes for x in (outputs or {}).values())
        layers = [(one.weights, one.statistics.gram.shape[0]) for one in shared]
        sums = self.parts * sum(SUM_BYTES * width * width for _, width in layers)
        return Collected(layers, cost, min(sums, cost.peak))


def pruning_stages(anatomy: Anatomy, recipe: Recipe, task: Task, *, stream: bool, device: str = "cpu") -> list[Stage]:
    """The stages of a blockwise method, without those that all methods have in common.

    Args:
        stream: whether one block at a time is in memory.
        device: the device of the run.

    Raises:
        UserError: the cost of the method cannot be estimated.
    """
    plans: dict[str | None, Callable[[BlockPass, Any, Task], Iterator[Stage]]] = {
        "layers": _layerwise,
        "networks": _sparsellm,
        "groups": _struprune,
    }
    plan = plans.get(recipe.stages)
    if plan is None:
        raise UserError(f"{recipe.name}: its cost cannot be estimated")
    if recipe.stages in ("layers", "networks"):
        task = cast("Layerwise", recipe).joint.task(task, IN_PROCESS)
    weights = _held_weights(anatomy, stream=stream)
    weighting = cast("Layerwise", recipe).method.problem.weighting if recipe.stages == "layers" else UNWEIGHTED
    scores, scoring = {}, list[Stage]()
    if weighting.score is not None:
        scores = {SCORES: _SCORE_BYTES * task.calibration.tokens}
        scoring = [
            replace(stage, name=SCORES).beside(scores) for stage in evaluating(anatomy, task.calibration, stream=stream)
        ]
    with counted() as counting:
        block_pass = BlockPass(anatomy, counting, task, device, stream=stream, weighting=weighting)
        recording = Stage(
            name="embeddings",
            parts={FORWARD: block_pass.recording.peak - block_pass.recording.left},
            work=block_pass.recording.work,
        )
        outside = {"weights outside of the blocks": anatomy.outside_bytes} if stream else weights
        held = {**block_pass.held, **scores}
        stages = [*scoring, recording.beside({**outside, **held})]
        stages += [stage.beside({**weights, **held}) for stage in plan(block_pass, recipe, task)]
    return stages


def allocating(
    anatomy: Anatomy,
    rule: AllocationRule,
    task: Task,
    *,
    stream: bool,
    device: str = "cpu",
    recipe: Recipe | None = None,
) -> list[Stage]:
    """The stages of an allocation rule: a pass over the blocks on dense inputs with solves at all levels, one that
    prunes to the levels of a search, gradients, and losses on the held-out text of a search.

    Args:
        stream, device: as for `pruning_stages`.
        recipe: the method of the run, as for `AllocationRule.applied`.
    """
    measured, text = RULES[rule.name], task.calibration
    levels = rule.levels(task.target)
    stages: list[Stage] = []
    weights = _held_weights(anatomy, stream=stream)
    views = [view for one in anatomy.blocks for view in one.weights]
    pruned = sum(view.read().nbytes for view in views)
    table = {TABLE: (measured.nearby or levels) * pruned} if rule.name in SEARCHES else {}
    errors = {ERRORS: sum(8 * (levels + 1) * view.shape[0] for view in views) if levels else 0}
    with counted() as counting:
        if measured.collects:
            block_pass = BlockPass(anatomy, counting, task, device, stream=stream)
            for _, block, count in block_pass.kinds():
                collected = block_pass.collect(block_pass.pruned(block.weights))
                # The levels of fractions are rows of one problem, those of patterns problems of their own.
                stacked = levels if task.target.pattern is None else 1
                path = replace(collected, shared=[(views * stacked, width) for views, width in collected.shared])
                several = [collected.stage("statistics").times(count)]
                if levels:
                    _, *solves = _local(path, PATH_SOLVER, task, count, block_pass)
                    several += [stage.times(levels // stacked) for stage in solves]
                several.append(_forward("next inputs", block_pass.advance(), count))
                stages += [stage.beside({**weights, **errors, **block_pass.held}) for stage in several]
            if measured.nearby:
                method = layer_method(recipe)
                weighting = method.problem.weighting
                block_pass = BlockPass(anatomy, counting, task, device, stream=stream, weighting=weighting)
                for _, block, count in block_pass.kinds():
                    collected = block_pass.collect(block_pass.pruned(block.weights))
                    statistics, *solves = _local(collected, method, task, count, block_pass)
                    several = [statistics, *(stage.times(measured.nearby) for stage in solves)]
                    several.append(_forward("next inputs", block_pass.advance(), count))
                    stages += [stage.beside({**weights, **table, **block_pass.held}) for stage in several]
        if measured.gradients or measured.losses:
            searched = len(held_out(text)[1].rows) if rule.name in SEARCHES else 0  # sequences of a forward pass
            batch = replace(text, rows=text.rows[: searched or 1]).batches[0]
            share = 1 / len(batch.input_ids)
            with torch.no_grad(), measured_cost(counting) as loss:
                cross_entropy(anatomy.model, batch)
            sequences = rule.passes * searched
            if measured.losses and not searched:
                sequences = len(anatomy.blocks) * -(-LOSS_TOKENS // text.length)
            work, peak = loss.work * (share * sequences), loss.peak
            if measured.gradients:
                with measured_cost(counting) as gradient:
                    backward(anatomy.model, [batch], views, lambda view, value: None)
                work += gradient.work * (share * min(GRADIENT_SEQUENCES, len(text.rows)))
                peak = max(peak, gradient.peak)
            parts = {**weights, **errors, **table, "activations": peak}
            if table:
                parts["dense matrices"] = pruned
            if rule.name == "taylor":  # keeps the gradients, in float32
                parts["gradients"] = sum(4 * view.read().numel() for view in views)
            stages.append(Stage(name="losses and gradients", parts=parts, work=work))
    return [replace(stage, name=f"allocation: {stage.name}") for stage in stages]


def _held_weights(anatomy: Anatomy, *, stream: bool) -> dict[str, int]:
    """The weights in memory: those of the model, or of its largest block if the model stays on disk."""
    if stream:
        return {"weights of a block": max(map(block_bytes, anatomy.blocks))}
    return {WEIGHTS: anatomy.weight_bytes}


def _layerwise(block_pass: BlockPass, recipe: Layerwise, task: Task) -> Iterator[Stage]:
    for index, block, count in block_pass.kinds():
        layers = block_pass.pruned(block.weights)
        for names in in_stages(coordinated(recipe.joint, block, layers), layers):
            yield from _local(block_pass.collect(names), recipe.method, task, count, block_pass)
        yield from _joint(block_pass, recipe, index, block, count, task, layers)
        yield _forward("next inputs", block_pass.advance(), count)


def _local(collected: Collected, method: Method, task: Task, count: int, block_pass: BlockPass) -> Iterator[Stage]:
    """The statistics of a block, and the solves of a layer method."""
    yield collected.stage("statistics").times(count)
    jobs: list[_Job] = []
    for views, width in collected.shared:
        stacks: dict[Target | str, list[WeightView]] = {}
        for view in views:
            target = None if method.stacks_targets else task.target.at(view.name)
            stacks.setdefault((target or task.target) if method.stacks else view.name, []).append(view)
        for stacked in stacks.values():
            target = task.target.at(stacked[0].name) or task.target
            rows = tuple(view.shape[0] for view in stacked)
            jobs.append(_Job(target, rows, width, stacked[0].parameter.dtype))
    solver, several = method.make(), Counter(jobs)
    for job in jobs:
        target, rows, width = job.target, job.rows, job.width
        trial = estimated(LayerTrial(method, target, task.ridge, rows, width, job.dtype, block_pass.parts > 1))
        shape = Shape(sum(rows), width, torch.float32, block_pass.device, method.constraint(target))
        batch = len(batches(solver, [shape] * several[job])[0])
        posed = 2 * shape.rows * width * shape.dtype.itemsize  # the weights as they were, stacked and in float32
        peak = trial.peak if batch == 1 else max(trial.peak, batch * (posed + shape.bytes))
        parts = {GRAMS: collected.cost.left, SOLVER: peak}
        yield Stage(name="solver", parts=parts, work=trial.work * count)


@dataclass(frozen=True)
class _Job:
    """One solve, of stacked matrices that share their inputs.

    Attributes:
        rows: the number of rows of each matrix.
    """

    target: Target
    rows: tuple[int, ...]
    width: int
    dtype: torch.dtype


def _struprune(block_pass: BlockPass, recipe: StruPrune, task: Task) -> Iterator[Stage]:
    for _, block, count in block_pass.kinds():
        parts = sublayers(block)
        outputs = [sublayer.output.name for sublayer in parts]
        both = block_pass.collect(
            outputs, centre=recipe.fold_bias and any(part.output.bias is not None for part in parts)
        )
        yield both.stage("statistics").times(count)
        for sublayer in parts:
            curve = estimated(_group_trial(recipe, sublayer, None))
            yield Stage(name="curves", parts={GRAMS: both.cost.left, SOLVER: curve.peak}, work=curve.work * count)
        for sublayer in parts:
            centre = recipe.fold_bias and sublayer.output.bias is not None
            collected = block_pass.collect([sublayer.output.name], centre=centre)
            yield collected.stage("statistics").times(count)
            solved = estimated(_group_trial(recipe, sublayer, task.target.fraction))
            left = {GRAMS: collected.cost.left, SOLVER: solved.peak}
            yield Stage(name="solver", parts=left, work=solved.work * count)
            with measured_cost(block_pass.counting) as preview:
                for _ in range(2):
                    block_pass.stream.preview(block_pass.position)
            yield _forward("check of the slices", preview, count)
        yield _forward("next inputs", block_pass.advance(), 2 * count)


def _sparsellm(block_pass: BlockPass, recipe: SparseLLM, task: Task) -> Iterator[Stage]:
    for index, block, count in block_pass.kinds():
        network = _network(block)
        with measured_cost(block_pass.counting) as looking:
            for _ in range(3):  # for the network, and whether the block adds its output to a residual
                block_pass.stream.preview(index)
        yield _forward("form of the network", looking, count)
        network_names = {view.name for view in network}
        targets: dict[str, Tensor] = {}
        layers = block_pass.pruned(view for view in block.weights if view.name not in network_names)
        attention = block_pass.collect(layers, targets)
        target = {"targets": sum(x.nbytes for x in targets.values())}
        for stage in _local(attention, recipe.method, recipe.attention_task(task), count, block_pass):
            yield stage.beside(target)
        network_target = task.target.at(network[-1].name)
        if network_target is not None:
            yield from _network_stages(block_pass, recipe, network, network_target, targets, count, task)
        targets.clear()
        yield from _joint(block_pass, recipe, index, block, count, task, layers)
        yield _forward("next inputs", block_pass.advance(), count)


def _network_stages(
    block_pass: BlockPass,
    recipe: SparseLLM,
    network: Sequence[WeightView],
    target: Target,
    targets: dict[str, Tensor],
    count: int,
    task: Task,
) -> Iterator[Stage]:
    """The stages that collect the tokens of a feed-forward network and solve its problem.

    Args:
        target: the pruning target of its last weight.
        targets: the outputs of the dense block.
    """
    up, down = network[0], network[-1]
    with measured_cost(block_pass.counting) as pairing:
        pairs = block_pass.stream.pairs(block_pass.position, network, targets)
    tokens = [len(pairs[part][0]) if part in pairs else 0 for part in ("calibration", "validation")]
    del pairs
    held = {"targets": sum(x.nbytes for x in targets.values())}
    yield _forward("tokens of the network", pairing, count).beside(held)
    trial = estimated(
        NetworkTrial(
            recipe,
            target,
            task.ridge,
            _activation(block_pass.anatomy),
            len(network) == 3,
            up.shape[1],
            up.shape[0],
            down.shape[0],
            (tokens[0], tokens[1]),
            up.parameter.dtype,
        )
    )
    held = {"tokens of the network": pairing.left}
    yield Stage(name="solver of the network", parts={**held, SOLVER: trial.peak}, work=trial.work * count)


def _joint(
    block_pass: BlockPass,
    recipe: Layerwise | SparseLLM,
    index: int,
    block: Block,
    count: int,
    task: Task,
    layers: Collection[str],
) -> Iterator[Stage]:
    if not block_pass.pruned(block.weights):
        return
    stream, counting = block_pass.stream, block_pass.counting
    stages = joint_stages(recipe.joint, stream, counting, index, block, recipe.method, task, layers)
    yield from (stage.times(count) for stage in stages)


def _forward(name: str, cost: Cost, count: float) -> Stage:
    return Stage(name=name, parts={FORWARD: cost.peak}, work=cost.work * count)


def _group_trial(recipe: StruPrune, sublayer: Sublayer, removed: float | None) -> GroupTrial:
    output = sublayer.output
    centred = recipe.fold_bias and output.bias is not None
    return GroupTrial(recipe, *output.shape, sublayer.width, removed, output.parameter.dtype, centred)


def _network(block: Block) -> tuple[WeightView, ...]:
    """The weights of the feed-forward network: up, the gate if there is one, and down."""
    check_no_mixture(block)
    network = feed_forward_part(block)
    if network is None:
        raise UserError(f"cannot read the feed-forward network of {block.name}: use a layer-wise method")
    return (*reversed(network.inner), network.output)


def _activation(anatomy: Anatomy) -> Activation:
    config = anatomy.model.config
    name = next((name for key in families.ACTIVATION if (name := getattr(config, key, None))), "silu")
    return ACTIVATIONS[families.ACTIVATION_NAMES.get(str(name), "gelu-tanh")]
