"""SparseLLM: attention layer by layer, then the feed-forward network as one, towards the dense block's output.

With several processes, each has a part of the tokens, and all continue from the same point.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.methods.base import IN_PROCESS, Capabilities, LayerReport, Outcome, Runtime, Stages, Task
from admm_prune.methods.block_loop import BlockResult, for_each_block
from admm_prune.methods.layerwise import Layerwise, check_target, prune_all, untouched
from admm_prune.methods.local import LOCAL_METHODS, Method, with_parts
from admm_prune.methods.part_checks import Checked
from admm_prune.methods.parts import ProblemLike, SetLike
from admm_prune.methods.ridge import settle_ridge
from admm_prune.methods.struprune.sublayer import report_of
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.feed_forward import FeedForwardViews, feed_forward, feed_forwards
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.ops.activations import ACTIVATIONS
from admm_prune.point import Point
from admm_prune.problems.constraints import SparseSet
from admm_prune.problems.feed_forward import EVEN, FeedForward, GatedFeedForward, Network, Penalties
from admm_prune.problems.layer import AllReduce, Share
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.result import Result
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.base import Solver
from admm_prune.solvers.support_descent import SupportDescent
from admm_prune.statistics import GramAccumulator

Pairs = dict[str, tuple[Tensor, Tensor]]  # inputs and targets, by the part of the text


@dataclass(frozen=True)
class Agreed:
    """A solver that broadcasts the solution of the first process.

    All processes solve the same problem, with the statistics of all tokens; the broadcast removes differences in
    rounding, which could lead to different supports.
    """

    inner: Solver
    world: World

    def solve(self, problem: Any, *, start: Point | None = None) -> Result:
        result = self.inner.solve(problem, start=start)
        return replace(result, solution=result.solution.map(lambda x: self.world.broadcast(x.contiguous(), 0)))


@dataclass(frozen=True, kw_only=True)
class SparseLLM(Capabilities):
    """A method that prunes attention layer by layer and the feed-forward network of a block as one problem.

    For each block: prune attention; capture the network's inputs again, and as its target the output that restores
    the block's dense output, including the error of attention; then alternate: fit and prune the up projection (and
    gate), refit and prune the down projection on the hidden units of the pruned up projection, optimize all weights
    jointly on their supports, update the auxiliary variables of the split network, and repeat. The best
    round on validation tokens is kept.

    Args:
        method: prunes attention, and is the inner solver of every block of weights.
        rounds: the maximum number; 1 is "sequential + closing".
        closing: False is the objective as published: the down projection is fitted to the auxiliary activations, never
            to those that the pruned up projection gives.
        descent: steps with all weights together in every round; 0 for none.
        target: of the network: "block" compensates for attention too, "network" is its own dense output, "before" is
            that too, with inputs from before attention was pruned, as released.
        penalties: of the split network.
        first_half: prune only the first half of the blocks, as the published tables did.

    Sources: Bai et al., SparseLLM: Towards Global Pruning of Pre-trained Language Models, 2024, and its released code
    (`sparsellm-release`). Closing, descent and the target "block" are ours.
    """

    stages: ClassVar[Stages | None] = "networks"

    name: str
    summary: str
    method: Method
    rounds: int = 2
    closing: bool = True
    descent: int = 100
    target: Literal["block", "network", "before"] = "block"
    penalties: Penalties = Penalties(alpha=0.1, beta=10.0)
    first_half: bool = False
    samples: int = 128

    @property
    def budget(self) -> Literal["matrix", "model"]:
        return "model" if self.first_half else "matrix"

    def with_parts(self, solver: Method | None, problem: ProblemLike, constraint: SetLike) -> Self | None:
        if problem is not None:
            return None
        return replace(self, method=with_parts(solver or self.method, None, constraint))

    def check(self, model: nn.Module, target: Target) -> None:
        blocks = decoder_blocks(model)
        check_target(blocks, self.method, target)
        if not blocks[0].weights[0].parameter.is_meta:  # otherwise a block is read once its weights are loaded
            for views in feed_forwards(model, blocks):
                _targets(views, target)

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        self.check(model, task.target)
        if task.target.fraction == 0 and not task.target.layers:  # nothing to prune: bitwise equal
            return Layerwise(self.method).prune(model, task, runtime)
        count = len(decoder_blocks(model))
        chosen = (count + 1) // 2 if self.first_half else count

        def prune_block(stream: BlockStream, index: int, block: Block) -> BlockResult:
            if index >= chosen:
                return BlockResult(layers=[report_of(view, view.shape) for view in block.weights])
            return self._prune_block(stream, index, block, task, runtime.world)

        block_results = for_each_block(model, task, runtime, prune_block)
        runtime.report_progress(count, count)
        figures = [found.details for found in block_results[:chosen]]
        notes = []
        if self.target == "block" and not all(figure["repairs"] for figure in figures):
            notes.append(
                "the blocks do not add the networks' outputs to a residual: errors of attention are not compensated"
            )
        if chosen < count:
            notes.append(f"only the first {chosen} of {count} blocks were pruned")
        layers = [report for found in block_results for report in found.layers]
        return Outcome(
            layers=layers,
            notes=tuple(notes),
            details={"feed_forward": [figure for figure in figures if "rounds" in figure]},
        )

    def _prune_block(self, stream: BlockStream, index: int, block: Block, task: Task, world: World) -> BlockResult:
        began = time.perf_counter()
        views = feed_forward(block, lambda: stream.preview(index))
        activation = world.broadcast_from_rank0(lambda: views.activation.name)  # two may agree up to rounding
        views = replace(views, activation=ACTIVATIONS[activation])
        repairs = self.target == "block" and stream.adds(index, views.down)
        own = views.weights
        wanted: dict[str, Tensor] | None = {} if repairs else None
        pairs = stream.pairs(index, views.up, views.down) if self.target == "before" else None
        reports = []
        pruned = {view.name for view in block.weights if task.target.at(view.name) is not None}
        targets = _targets(views, task.target)
        attention = pruned - {view.name for view in own}
        reports += prune_all(stream.collect(index, attention, wanted), self.method, task, world)
        if not targets:  # the whole network is left unpruned
            return BlockResult(
                layers=reports + untouched(block, pruned), details={"block": block.name, "repairs": repairs}
            )
        if pairs is None:
            pairs = stream.pairs(index, views.up, views.down, wanted)
        del wanted
        constraints = {name: self.method.constraint(target) for name, target in targets.items()}
        try:
            network = network_of(views)
            damped = self.damped(network, pairs, task, constraints, world)
            places, count = stream.places("calibration")
            share = Share(count, places, world.all_reduce)
            result, error, validation_loss = self.solve(network, damped, pairs, constraints, share, world)
            for name, view in views.views.items():
                view.write(result.solution[name])
            bias = views.down.bias
            if bias is not None and "bias" in result.solution:
                bias.data.copy_(result.solution["bias"])
        except (ValueError, LinAlgError) as problem:
            raise UserError(f"{', '.join(view.name for view in own)}: {problem}") from problem
        seconds = time.perf_counter() - began - sum(report.seconds for report in reports)
        entries = sum(view.read().numel() for view in own)
        for view in own:
            written = Point(weight=view.read())
            reports.append(
                LayerReport(
                    name=view.name,
                    shape=view.shape,
                    sparsity=written.sparsity(),
                    status=result.status.name,
                    iterations=result.iterations,
                    seconds=seconds * view.read().numel() / entries,
                    tokens=count,
                    notes=result.notes,
                )
            )
        figure = {
            "block": block.name,
            "activation": views.activation.name,
            "repairs": repairs,
            "relative_error": error,
            "relative_error_validation": validation_loss,
            "damped": damped,
            "rounds": [progress.end_to_end for progress in result.history],
            "best_round": result.best_iteration,
        }
        return BlockResult(layers=reports + untouched(block, pruned), details=figure)

    def solve(
        self,
        network: Network,
        damped: dict[str, tuple[float, float]],
        pairs: Pairs,
        constraints: Mapping[str, SparseSet],
        share: Share | None = None,
        world: World = ALONE,
    ) -> tuple[Result, float, float]:
        """The solved network, and the relative errors of its output on calibration and on validation tokens.

        Args:
            share, world: of the calibration tokens, where every process has its own.
        """
        validation = pairs.get("validation", pairs["calibration"])
        whole = NetworkOutput(
            network,
            pairs["calibration"],
            constraints,
            validation=validation,
            penalties=self.penalties,
            damped=damped,
            share=share,
        )
        all_reduce = whole.share.all_reduce
        problem: NetworkOutput | FeedForward = whole
        if not self.closing:
            kind = GatedFeedForward if network.gated else FeedForward
            inputs, outputs, *others = (x.to(network.weights["up"]) for x in (*pairs["calibration"], *validation))
            problem = kind(
                network,
                inputs,
                outputs,
                constraints,
                validation=(others[0], others[1]),
                penalties=self.penalties,
                damped=damped,
                all_reduce=all_reduce,
            )
        solver = Alternating(
            inner=Agreed(Checked.of(self.method.make()), world),
            max_iterations=self.rounds,
            refit=Agreed(Alternating.refit, world),
            together=Agreed(SupportDescent.of(self.descent), world) if self.descent and self.closing else None,
        )
        result = solver.solve(problem)
        x = Point({name: result.solution.get(name, part) for name, part in whole.initial().items()})
        energy = float(all_reduce(pairs["calibration"][1].double().square().sum())) or 1.0
        return result, (result.objective if self.closing else whole.value(x)) / energy, whole.validation_loss(x)

    def damped(
        self, network: Network, pairs: Pairs, task: Task, constraints: Mapping[str, SparseSet], world: World = ALONE
    ) -> dict[str, tuple[float, float]]:
        """Ridge and damping for every weight; selected on validation tokens for "auto"."""
        damped = {}
        for name, weight in network.weights.items():
            gram, validation = torch.empty(0), None
            if task.ridge == "auto":
                grams = {part: _gram(network, name, inputs, world.all_reduce) for part, (inputs, _) in pairs.items()}
                validation = grams.get("validation")
                gram = torch.stack(list(grams.values())).sum(0)
            settle = partial(settle_ridge, task.ridge, self.method, weight, gram, validation, constraints[name])
            asked = world.broadcast_from_rank0(settle)
            damped[name] = (asked.ridge, asked.damping)
        return damped


def _targets(views: FeedForwardViews, target: Target) -> dict[str, Target]:
    """The target of every matrix of a network; empty if it is not pruned.

    Raises:
        UserError: only some of its matrices are selected for pruning.
    """
    own = {name: target.at(view.name) for name, view in views.views.items()}
    found = {name: one for name, one in own.items() if one is not None}
    if found and len(found) < len(own):
        left = next(views.views[name].name for name, one in own.items() if one is None)
        raise UserError(f"a feed-forward network is pruned as one: {left} cannot be left out")
    return found


def network_of(views: FeedForwardViews) -> Network:
    """The network's weights and biases as they are now, copied, in float32 at least."""
    weights = {name: _wide(view.read()) for name, view in views.views.items()}
    biases = {name: _wide(view.bias.detach()) for name, view in views.views.items() if view.bias is not None}
    return Network(views.activation, Point(weights), biases)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _gram(network: Network, name: str, inputs: Tensor, all_reduce: AllReduce) -> Tensor:
    """The Gram H of the inputs of a weight of the dense network."""
    gram = GramAccumulator(network.weights[name].shape[1], inputs.device)
    for chunk in inputs.split(1024):
        x = chunk.to(network.weights[name])
        gram.add(network.hidden(network.weights, x) if name == "down" else x)
    gram.join(all_reduce)
    return gram.gram.to(network.weights[name])


SPARSELLM = (
    SparseLLM(
        name="sparsellm",
        summary="each feed-forward network as a whole, by admm, compensating the error of attention",
        method=LOCAL_METHODS["admm"],
    ),
    SparseLLM(
        name="sequential",
        summary="ablation of sparsellm: up by admm, then down on the output of the pruned up (closing)",
        method=LOCAL_METHODS["admm"],
        rounds=1,
        descent=0,
    ),
    SparseLLM(
        name="sparsellm-release",
        summary="sparsellm with the layer solver, ratios, rounds and targets of its released code",
        method=LOCAL_METHODS["sparsegpt"],
        rounds=4,
        closing=False,
        target="before",
        penalties=EVEN,
    ),
)
