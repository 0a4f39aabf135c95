"""The stages of methods that go block by block.

The calibration text goes through the very code that captures statistics, on the meta device, where bytes and operations
are counted and nothing is computed; solvers are counted on small instances (`trials`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.kernels.activations import ACTIVATIONS, Activation
from admm_prune.models.branches import Branch, branches
from admm_prune.models.capture import BlockStream
from admm_prune.models.shelf import Shelf
from admm_prune.models.structure import Block, WeightView
from admm_prune.problems.gram import SUM_BYTES
from admm_prune.recipes.layerwise import Layerwise
from admm_prune.recipes.local_methods import Method
from admm_prune.recipes.recipe import Recipe, Request
from admm_prune.recipes.sparsellm import SparseLLM
from admm_prune.recipes.struprune import StruPrune
from admm_prune.runs.planning.anatomy import Anatomy, block_bytes
from admm_prune.runs.planning.counting import Counting, counted
from admm_prune.runs.planning.stages import Stage, Stretch, stretch
from admm_prune.runs.planning.trials import GroupTrial, LayerTrial, NetworkTrial
from admm_prune.solvers.together import Shape, batches

ACTIVATIONS_PART = "activations between blocks"
GRAMS, SOLVER, FORWARD = "Grams", "solver", "forward pass of a batch"
_NAMES = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}


@dataclass(frozen=True)
class Collected:
    """Statistics of a block: who shares inputs, what collecting them took, what they are.

    Attributes:
        shared: the weights that read one input, and their width.
        sums: bytes of the sums of Grams, all there when the last token was seen, unless memory is spared.
    """

    shared: list[tuple[tuple[WeightView, ...], int]]
    stretch: Stretch
    sums: int

    def stage(self, name: str) -> Stage:
        forward = max(0, self.stretch.peak - self.sums)
        return Stage(name=name, parts={GRAMS: self.sums, FORWARD: forward}, work=self.stretch.work)


class _Shelf(Shelf):
    """Keeps activations where they are: on the meta device there is no host to bring them to."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._kept[name] = tensor.detach()

    def get(self, name: str) -> Tensor:
        return self._kept[name]


class Walk:
    """A text on its way through a model on the meta device, as `BlockStream` takes it."""

    def __init__(self, anatomy: Anatomy, counting: Counting, request: Request, device: str, *, stream: bool) -> None:
        self.anatomy, self.counting, self.device = anatomy, counting, torch.device(device)
        counting.know(*anatomy.model.parameters(), *anatomy.model.buffers())
        with stretch(counting) as self.recording:
            self.stream = BlockStream(
                anatomy.model, anatomy.blocks, request.calibration, "meta", shelf=_Shelf(), sparing=stream
            )
        self.parts = 2 if len(request.calibration.rows) > 1 else 1  # calibration and validation
        self.position = 0

    @property
    def held(self) -> dict[str, int]:
        return {ACTIVATIONS_PART: self.recording.left}

    def kinds(self) -> Iterator[tuple[int, Block, int]]:
        """(index, block, how many) of each kind of block, the stream at that block."""
        for index, count in self.anatomy.kinds():
            while self.position < index:
                self.advance()
            yield index, self.anatomy.blocks[index], count

    def advance(self) -> Stretch:
        with stretch(self.counting) as found:
            self.stream.advance(self.position)
        self.position += 1
        return found

    def collect(
        self,
        only: Collection[str] | None = None,
        outputs: dict[str, Tensor] | None = None,
        *,
        centre: bool = False,
    ) -> Collected:
        with stretch(self.counting) as found:
            shared = self.stream.collect(self.position, only, outputs, centre=centre)
        found.left -= sum(x.nbytes for x in (outputs or {}).values())
        told = [(one.weights, one.statistics.gram.shape[0]) for one in shared]
        sums = self.parts * sum(SUM_BYTES * width * width for _, width in told)
        return Collected(told, found, min(sums, found.peak))


def blockwise_stages(
    anatomy: Anatomy, recipe: Recipe, request: Request, *, stream: bool, device: str = "cpu"
) -> list[Stage]:
    """Every stage of a method, but for what it has in common with all others, from the text to the last block.

    Args:
        stream: one block in memory at a time.
        device: on which it is to run.

    Raises:
        UserError: the recipe is of no kind that goes block by block.
    """
    plans: dict[type, Callable[[Walk, Any, Request], Iterator[Stage]]] = {
        Layerwise: _layerwise,
        SparseLLM: _sparsellm,
        StruPrune: _struprune,
    }
    plan = plans.get(type(recipe))
    if plan is None:
        raise UserError(f"{recipe.name}: what it takes cannot be told beforehand")
    block = {"weights of a block": max(map(block_bytes, anatomy.blocks))}
    weights = block if stream else {"weights": anatomy.weight_bytes}
    with counted() as counting:
        walk = Walk(anatomy, counting, request, device, stream=stream)
        recording = Stage(
            name="embeddings", parts={FORWARD: walk.recording.peak - walk.recording.left}, work=walk.recording.work
        )
        outside = {"weights outside of the blocks": anatomy.outside_bytes} if stream else weights
        stages = [recording.beside({**outside, **walk.held})]
        stages += [stage.beside({**weights, **walk.held}) for stage in plan(walk, recipe, request)]
    return stages


def _layerwise(walk: Walk, recipe: Layerwise, request: Request) -> Iterator[Stage]:
    for _, _, count in walk.kinds():
        yield from _local(walk.collect(), recipe.method, request, count, walk)
        yield _forward("next inputs", walk.advance(), count)


def _local(collected: Collected, method: Method, request: Request, count: int, walk: Walk) -> Iterator[Stage]:
    """Statistics of a block, and a local method on them."""
    yield collected.stage("statistics").times(count)
    jobs: list[tuple[tuple[int, ...], int, torch.dtype]] = []
    for views, width in collected.shared:
        rows = tuple(view.shape[0] for view in views)
        groups = [rows] if method.stacks else [(row,) for row in rows]
        jobs += [(group, width, views[0].parameter.dtype) for group in groups]
    solver, several = method.make(), Counter(jobs)
    for group, width, dtype in jobs:
        trial = _cached(LayerTrial(method, request.target, request.ridge, group, width, dtype, walk.parts > 1))
        shape = Shape(sum(group), width, torch.float32, walk.device, method.constraint(request.target))
        batch = len(batches(solver, [shape] * several[group, width, dtype])[0])
        posed = 2 * shape.rows * width * shape.dtype.itemsize  # the weights as they were, stacked and in float32
        peak = trial.peak if batch == 1 else max(trial.peak, batch * (posed + shape.bytes))
        parts = {GRAMS: collected.stretch.left, SOLVER: peak}
        yield Stage(name="solver", parts=parts, work=trial.work * count)


def _struprune(walk: Walk, recipe: StruPrune, request: Request) -> Iterator[Stage]:
    for _, block, count in walk.kinds():
        parts = branches(block)
        outputs = [branch.output.name for branch in parts]
        both = walk.collect(outputs, centre=recipe.fold_bias and any(part.output.bias is not None for part in parts))
        yield both.stage("statistics").times(count)
        for branch in parts:
            curve = _cached(_group_trial(recipe, branch, None))
            yield Stage(name="curves", parts={GRAMS: both.stretch.left, SOLVER: curve.peak}, work=curve.work * count)
        for branch in parts:
            centre = recipe.fold_bias and branch.output.bias is not None
            own = walk.collect([branch.output.name], centre=centre)
            yield own.stage("statistics").times(count)
            solved = _cached(_group_trial(recipe, branch, request.target.fraction))
            left = {GRAMS: own.stretch.left, SOLVER: solved.peak}
            yield Stage(name="solver", parts=left, work=solved.work * count)
            with stretch(walk.counting) as preview:
                for _ in range(2):
                    walk.stream.preview(walk.position)
            yield _forward("check of the slices", preview, count)
        yield _forward("next inputs", walk.advance(), 2 * count)


def _sparsellm(walk: Walk, recipe: SparseLLM, request: Request) -> Iterator[Stage]:
    for index, block, count in walk.kinds():
        network = _network(block)
        with stretch(walk.counting) as looking:  # for the network, and whether its block adds what it puts out
            for _ in range(3):
                walk.stream.preview(index)
        yield _forward("form of the network", looking, count)
        own = {view.name for view in network}
        wanted: dict[str, Tensor] = {}
        attention = walk.collect([view.name for view in block.weights if view.name not in own], wanted)
        target = {"targets": sum(x.nbytes for x in wanted.values())}
        for stage in _local(attention, recipe.method, request, count, walk):
            yield stage.beside(target)
        up, down = network[0], network[-1]
        with stretch(walk.counting) as pairing:
            pairs = walk.stream.pairs(index, up, down, wanted)
        tokens = [len(pairs[part][0]) if part in pairs else 0 for part in ("calibration", "validation")]
        held = {"tokens of the network": pairing.left}
        yield _forward("tokens of the network", pairing, count).beside(target)
        del pairs
        wanted.clear()
        trial = _cached(
            NetworkTrial(
                recipe,
                request.target,
                request.ridge,
                _activation(walk.anatomy),
                len(network) == 3,
                up.shape[1],
                up.shape[0],
                down.shape[0],
                (tokens[0], tokens[1]),
                up.parameter.dtype,
            )
        )
        yield Stage(name="solver of the network", parts={**held, SOLVER: trial.peak}, work=trial.work * count)
        yield _forward("next inputs", walk.advance(), count)


@lru_cache(maxsize=256)  # blocks are alike
def _cached(trial: LayerTrial | NetworkTrial | GroupTrial) -> Stretch:
    return trial.estimated()


def _forward(name: str, found: Stretch, count: float) -> Stage:
    return Stage(name=name, parts={FORWARD: found.peak}, work=found.work * count)


def _group_trial(recipe: StruPrune, branch: Branch, removed: float | None) -> GroupTrial:
    output = branch.output
    centred = recipe.fold_bias and output.bias is not None
    return GroupTrial(recipe, *output.shape, branch.width, removed, output.parameter.dtype, centred)


def _network(block: Block) -> tuple[WeightView, ...]:
    """The weights of the feed-forward network: those into it, up first, and the one out of it."""
    for branch in branches(block):
        if branch.kind == "neurons":
            return (*reversed(branch.inner), branch.output)
    raise UserError(f"cannot read the feed-forward network of {block.name}: use a method that goes layer by layer")


def _activation(anatomy: Anatomy) -> Activation:
    config = anatomy.model.config
    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "silu")
    return ACTIVATIONS[_NAMES.get(str(name), "gelu-tanh")]
