"""SparseLLM: prunes attention layer by layer, then the feed-forward network of each block as one problem.

Several processes each have a part of the tokens, and continue from the same point after every solve.
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

from admm_prune.errors import UserError, check_at_least
from admm_prune.methods.base import (
    IN_PROCESS,
    Capabilities,
    LayerReport,
    Outcome,
    Runtime,
    Stages,
    Task,
    report_of,
    untouched,
)
from admm_prune.methods.block_loop import BlockResult, for_each_block
from admm_prune.methods.joint import STEPS, Joint
from admm_prune.methods.layerwise import Layerwise, check_target, prune_all, uses_ridge
from admm_prune.methods.local import LOCAL_METHODS, Method, with_parts
from admm_prune.methods.part_checks import Checked
from admm_prune.methods.parts import ProblemLike, SetLike
from admm_prune.methods.ridge import settle_ridge
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.feed_forward import FeedForwardViews, feed_forward, feed_forwards
from admm_prune.models.parallel import ALONE, World
from admm_prune.models.structure import Block, decoder_blocks
from admm_prune.ops.activations import ACTIVATIONS
from admm_prune.ops.precision import at_least_float32
from admm_prune.point import Point
from admm_prune.problems.constraints import SparseSet
from admm_prune.problems.feed_forward import EVEN, FeedForward, GatedFeedForward, Network, Penalties
from admm_prune.problems.layer import DEFAULT_DAMPING, DEFAULT_RIDGE, AllReduce, Share
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.result import Result
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.base import Solver
from admm_prune.solvers.support_descent import SupportDescent
from admm_prune.statistics import GramAccumulator

Pairs = dict[str, tuple[Tensor, Tensor]]  # inputs X and targets Y for each part of the text


@dataclass(frozen=True)
class Agreed:
    """A solver that broadcasts the solution of the first process to all others.

    All processes solve the same problem, from the statistics of all tokens. The broadcast removes differences by
    rounding, which could otherwise lead to different supports.
    """

    inner: Solver
    world: World

    def solve(self, problem: Any, *, start: Point | None = None) -> Result:
        result = self.inner.solve(problem, start=start)
        return replace(result, solution=result.solution.map(lambda x: self.world.broadcast(x.contiguous(), 0)))


@dataclass(frozen=True, kw_only=True)
class SparseLLM(Capabilities):
    """Prunes attention layer by layer, and the feed-forward network of a block as one problem:

        min alpha |X W1^T + b1 - Z|^2 + gamma |P - act(Z)|^2 + beta |P W2^T + b2 - Y|^2   over sparse W1, W2 and Z, P,

    by alternating minimization. A gate Wg has a pre-activation S of its own, and act(Z) then stands for act(S) * Z:

        W1 <- prune(argmin |X W1^T + b1 - Z|^2),    Wg likewise on S,
        W2 <- prune(argmin |P W2^T + b2 - Y|^2),    with closing on P = act(X W1^T + b1) of the pruned W1,
        P  <- argmin gamma |P - act(Z)|^2 + beta |P W2^T + b2 - Y|^2,
        Z  <- argmin alpha |X W1^T + b1 - Z|^2 + gamma |P - act(Z)|^2,    then S.

    With closing, every round ends with gradient steps on all weights jointly, on their supports. The result is the best
    round on validation tokens.

    Args:
        method: prunes attention, and is the inner solver for each matrix of the network.
        rounds: the maximum number of rounds; one round is the method "sequential".
        closing: fit W2 to the outputs of the pruned W1. False is the published objective, which fits it to the
            auxiliary variable P.
        descent: gradient steps on all weights jointly in every round; 0 for none.
        target: the target Y: "block" is what restores the dense output of the block, which also compensates for the
            pruned attention; "network" is the dense output of the network; "before" is the same with X from before
            attention was pruned, as in the released code.
        penalties: alpha, beta and gamma.
        first_half: prune only the first half of the blocks, as in the published tables.
        samples: the default number of calibration sequences.
        joint: joint steps on several matrices of a block.

    Reference implementation: `textbook.sparsellm`.

    Sources: Bai et al., SparseLLM, 2024, section 3.2, eq. 5 to 9, and its released code (`sparsellm-release`). Closing,
    descent and the target "block" are ours.
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
    joint: Joint = Joint()

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, descent=0, samples=1)

    @property
    def budget(self) -> Literal["matrix", "model"]:
        return "model" if self.first_half else "matrix"

    def with_parts(self, solver: Method | None, problem: ProblemLike, constraint: SetLike) -> Self | None:
        if problem is not None:
            return None
        return replace(self, method=with_parts(solver or self.method, None, constraint))

    def with_joint(self, joint: Joint) -> Self:
        return replace(self, joint=joint)

    def check(self, model: nn.Module, target: Target) -> None:
        blocks = decoder_blocks(model)
        self.joint.check(model, self.method)
        if self.method.problem.weighting.weigh is not None:
            raise UserError(f"{self.name} weights all tokens alike: it takes no {self.method.problem.name}")
        check_target(blocks, self.method, target)
        if not blocks[0].weights[0].parameter.is_meta:  # the networks of a streamed model are checked block by block
            for views in feed_forwards(model, blocks):
                _targets(views, target)

    def prune(self, model: nn.Module, task: Task, runtime: Runtime = IN_PROCESS) -> Outcome:
        self.check(model, task.target)
        if task.target.fraction == 0 and not task.target.layers:  # nothing to prune: the weights stay bitwise equal
            return Layerwise(self.method).prune(model, self.attention_task(task), runtime)
        task = self.joint.task(task, runtime)
        count = len(decoder_blocks(model))
        chosen = (count + 1) // 2 if self.first_half else count

        def prune_block(stream: BlockStream, index: int, block: Block) -> BlockResult:
            if index >= chosen:
                return BlockResult(layers=[report_of(view, view.shape) for view in block.weights])
            return self._prune_block(stream, index, block, task, runtime.world)

        results = for_each_block(model, task, runtime, prune_block)
        runtime.report_progress(count, count)
        figures = [result.details for result in results[:chosen]]
        notes = []
        if self.target == "block" and not all(figure["repairs"] for figure in figures):
            notes.append(
                "the blocks do not add the networks' outputs to a residual: errors of attention are not compensated"
            )
        held_out = [figure.get("relative_error_validation") for figure in figures]
        if failed := sum(error is not None and not error < 1 for error in held_out):
            notes.append(
                f"the relative error of {failed} of {chosen} feed-forward networks is 1 or more on held-out tokens, as "
                "large as without their outputs: give more calibration text or a larger --ridge"
            )
        if chosen < count:
            notes.append(f"only the first {chosen} of {count} blocks were pruned")
        joint = [{step: figure[step] for step in STEPS if step in figure} for figure in figures]
        if not self.joint and len(task.calibration.rows) == 1:
            notes.append("there is one calibration sequence: the round is chosen on the tokens that it was fitted to")
        return Outcome(
            layers=[report for result in results for report in result.layers],
            notes=(*notes, *self.joint.notes(joint, task)),
            details={"feed_forward": [figure for figure in figures if "rounds" in figure]}
            | ({"joint": joint} if self.joint else {}),
        )

    def attention_task(self, task: Task) -> Task:
        """The task for the matrices outside the networks, without a ridge if nothing depends on it."""
        return task if uses_ridge(self.method, self.joint, bounds=task.bounds) else replace(task, ridge=None)

    def _prune_block(self, stream: BlockStream, index: int, block: Block, task: Task, world: World) -> BlockResult:
        began = time.perf_counter()
        views = feed_forward(block, lambda: stream.preview(index))
        # The activation is identified from outputs, and two may agree up to rounding: all processes use the same one.
        activation = world.broadcast_from_rank0(lambda: views.activation.name)
        views = replace(views, activation=ACTIVATIONS[activation])
        targets = _targets(views, task.target)
        pruned = {view.name for view in block.weights if task.target.at(view.name) is not None}
        repairs = self.target == "block" and stream.adds(index, views.down)
        details: dict[str, Any] = {"block": block.name, "activation": activation, "repairs": repairs}

        # 1. X and Y as released: before attention is pruned.
        pairs = stream.pairs(index, views.weights) if self.target == "before" else None
        # 2. Attention, each W <- prune(W) by the layer solver; V and O then together, if coordinated.
        joint = self.joint.begin(stream, index, block, pruned)
        block_outputs = joint.outputs if repairs or self.joint.refit else None  # of the dense block
        attention = pruned - {view.name for view in views.weights}
        inputs = stream.collect(index, attention, block_outputs)
        reports = prune_all(inputs, self.method, self.attention_task(task), world)
        reports = joint.coordinated(reports, self.method, task)
        if not targets:  # the network is left unpruned
            reports = joint.finished(reports, self.method, task)
            return BlockResult(layers=reports + untouched(block, pruned), details=details | joint.figures)
        # 3. X <- the network's inputs behind the pruned attention;  Y <- block_outputs - residual, or act(X W1^T) W2^T.
        if pairs is None:
            pairs = stream.pairs(index, views.weights, block_outputs if repairs else None)
        del block_outputs
        if not self.joint.refit:
            joint.outputs.clear()
        # 4. W1, W2 <- argmin of the split network.
        try:
            result, figures = self._prune_network(views, targets, pairs, task, stream, world)
        except (ValueError, LinAlgError) as error:
            raise UserError(f"{', '.join(view.name for view in views.weights)}: {error}") from error
        seconds = time.perf_counter() - began - sum(report.seconds for report in reports)
        reports += _reports(views, result, seconds, stream.places("calibration")[0])
        # 5. All pruned matrices of the block, if they are refitted.
        del pairs
        reports = joint.finished(reports, self.method, task)
        return BlockResult(layers=reports + untouched(block, pruned), details=details | figures | joint.figures)

    def _prune_network(
        self,
        views: FeedForwardViews,
        targets: Mapping[str, Target],
        pairs: Pairs,
        task: Task,
        stream: BlockStream,
        world: World,
    ) -> tuple[Result, dict[str, Any]]:
        """Prunes a network in place.

        Returns:
            The result of the solver, and the figures of the network as JSON values.
        """
        network = network_of(views)
        constraints = {name: self.method.constraint(target) for name, target in targets.items()}
        damped = self.damped(network, pairs, task, constraints, world)
        count, places, lengths = stream.places("calibration")
        share = Share(count, places, world.all_reduce, lengths)
        result, error, validation_loss = self.solve(network, damped, pairs, constraints, share, world)
        for name, view in views.views.items():
            view.write(result.solution[name])
        if views.down.bias is not None and "bias" in result.solution:
            views.down.write_bias(result.solution["bias"])
        return result, {
            "relative_error": error,
            "relative_error_validation": validation_loss if "validation" in pairs else None,
            "damped": damped,
            "rounds": [progress.end_to_end for progress in result.history],
            "best_round": result.best_iteration,
        }

    def solve(
        self,
        network: Network,
        damped: dict[str, tuple[float, float]],
        pairs: Pairs,
        constraints: Mapping[str, SparseSet],
        share: Share | None = None,
        world: World = ALONE,
        sample: int | None = None,
    ) -> tuple[Result, float, float]:
        """Solves the problem of one network.

        Args:
            damped: ridge and damping for each weight, see `damped`.
            pairs: inputs X and targets Y for each part of the text.
            constraints: the sparse set of each weight.
            share, world: the share of the calibration tokens that this process has, and all processes.
            sample: the number of tokens in a step of the descent; by default that of `NetworkOutput`.

        Returns:
            The result, and the relative errors of the network's output on calibration and on validation tokens.
        """
        calibration, validation = pairs["calibration"], pairs.get("validation", pairs["calibration"])
        settings: dict[str, Any] = {"penalties": self.penalties, "damped": damped}
        # 1. The problem |net(X; W1, W2) - Y|^2, where W2 is fitted to the P of the pruned W1 (closing).
        whole = NetworkOutput(
            network, calibration, constraints, validation=validation, share=share, sample=sample, **settings
        )
        all_reduce = whole.share.all_reduce
        problem: NetworkOutput | FeedForward = whole
        # 2. As published: with the penalties of Z and P, which are variables.
        if not self.closing:
            split = GatedFeedForward if network.gated else FeedForward
            X, Y, *held_out = (x.to(network.weights["up"]) for x in (*calibration, *validation))
            problem = split(
                network, X, Y, constraints, validation=(held_out[0], held_out[1]), all_reduce=all_reduce, **settings
            )
        # 3. W1, W2 (and P, Z), each with the others fixed, in `problem.order`, round after round.
        result = Alternating(
            inner=Agreed(Checked.of(self.method.make()), world),
            max_iterations=self.rounds,
            refit=Agreed(Alternating.refit, world),
            together=Agreed(SupportDescent.of(self.descent), world) if self.descent and self.closing else None,
        ).solve(problem)
        # 4. |net(X; W1, W2) - Y|^2 / |Y|^2
        x = Point({name: result.solution.get(name, part) for name, part in whole.initial().items()})
        energy = float(all_reduce(calibration[1].double().square().sum())) or 1.0
        return result, (result.objective if self.closing else whole.value(x)) / energy, whole.validation_loss(x)

    def damped(
        self, network: Network, pairs: Pairs, task: Task, constraints: Mapping[str, SparseSet], world: World = ALONE
    ) -> dict[str, tuple[float, float]]:
        """Ridge and damping for each weight of a network; for the ridge "auto" selected on validation tokens.

        A method that only scores weights has no ridge. The defaults apply then, because the weights are fitted to Z and
        P before they are pruned.
        """
        if task.ridge is None and not self.method.damped:
            return dict.fromkeys(network.weights, (DEFAULT_RIDGE, DEFAULT_DAMPING))
        damped = {}
        for name, weight in network.weights.items():
            gram, validation = torch.empty(0), None
            if task.ridge == "auto":
                grams = {part: _gram(network, name, inputs, world.all_reduce) for part, (inputs, _) in pairs.items()}
                validation = grams.get("validation")
                gram = torch.stack(list(grams.values())).sum(0)
            settle = partial(settle_ridge, task.ridge, self.method, weight, gram, validation, constraints[name])
            damping = world.broadcast_from_rank0(settle)
            damped[name] = (damping.ridge, damping.damping)
        return damped


def _targets(views: FeedForwardViews, target: Target) -> dict[str, Target]:
    """The target of every matrix of a network; empty if the network is not pruned.

    Raises:
        UserError: only some of its matrices are selected for pruning.
    """
    every = {name: target.at(view.name) for name, view in views.views.items()}
    targets = {name: one for name, one in every.items() if one is not None}
    if targets and len(targets) < len(every):
        left = next(views.views[name].name for name in every if name not in targets)
        raise UserError(f"a feed-forward network is pruned as one: {left} cannot be left out alone")
    return targets


def _reports(views: FeedForwardViews, result: Result, seconds: float, tokens: int) -> list[LayerReport]:
    """A report for each matrix of a solved network, with seconds in proportion to its size."""
    entries = sum(view.read().numel() for view in views.weights)
    return [
        LayerReport(
            name=view.name,
            shape=view.shape,
            sparsity=Point(weight=view.read()).sparsity(),
            status=result.status.name,
            iterations=result.iterations,
            seconds=seconds * view.read().numel() / entries,
            tokens=tokens,
            notes=result.notes,
        )
        for view in views.weights
    ]


def network_of(views: FeedForwardViews) -> Network:
    """A copy of the current weights and biases of the network, in at least float32."""
    weights = {name: at_least_float32(view.read()) for name, view in views.views.items()}
    biases = {name: at_least_float32(view.bias.detach()) for name, view in views.views.items() if view.bias is not None}
    return Network(views.activation, Point(weights), biases)


def _gram(network: Network, name: str, inputs: Tensor, all_reduce: AllReduce) -> Tensor:
    """The Gram matrix H of the inputs of one weight in the dense network."""
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
