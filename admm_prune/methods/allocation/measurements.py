"""Measurements for allocation rules: outliers, spectra, errors and pruned matrices at several sparsities, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.sequences import Batch, Sequences
from admm_prune.errors import UserError
from admm_prune.methods.allocation.levels import NearbyLevels
from admm_prune.methods.base import Runtime, Task
from admm_prune.methods.block_loop import BlockResult, PassSettings, for_each_block
from admm_prune.methods.joint import Joint
from admm_prune.methods.layerwise import prune_all, uses_ridge
from admm_prune.methods.local import LOCAL_METHODS, Method
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.inputs import SharedInput
from admm_prune.models.losses import cross_entropy, next_token_loss
from admm_prune.models.structure import Block, WeightView, decoder_blocks
from admm_prune.ops.precision import at_least_float32
from admm_prune.problems.allocation_matrices import outlier_fraction, tail_exponent
from admm_prune.problems.constraints import StackedRows

SOLVER = LOCAL_METHODS["sparsegpt"]  # prunes to the levels: its errors rank matrices as those of slower solvers do
GRADIENT_SEQUENCES = 16  # calibration sequences for gradients


def outliers(model: nn.Module, task: Task, runtime: Runtime, names: frozenset[str]) -> list[float]:
    """The outlier fraction D of each block, see `owl_offsets`; 0 for a block without any of the named matrices."""

    def measure(stream: BlockStream, index: int, block: Block) -> BlockResult:
        chosen = {view.name for view in block.weights if view.name in names}
        scores = []
        for shared in stream.collect(index, chosen) if chosen else ():
            norms = shared.statistics.gram.diagonal().sqrt()
            scores += [view.read().abs().to(norms.dtype) * norms for view in shared.weights]
        stream.advance(index)
        return BlockResult(details={"outliers": outlier_fraction(scores) if scores else 0.0})

    results = _pass(model, task, runtime, measure, "outliers")
    return [result.details["outliers"] for result in results]


def exponents(model: nn.Module, runtime: Runtime, names: frozenset[str]) -> dict[str, float]:
    """The tail exponent alpha of each named matrix, see `alpha_rates`."""
    measured: dict[str, float] = {}
    for index, block in enumerate(decoder_blocks(model)):
        with runtime.offloading.block(index):
            for view in block.weights:
                if view.name in names:
                    measured[view.name] = tail_exponent(torch.linalg.svdvals(view.read().float()))
    return measured


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The errors of each matrix at the levels of its path, on the inputs of the dense model; by name.

    Attributes:
        rows: (levels + 1, out) float64: the squared output error of each row, summed over the tokens. The last entry is
            the error of removing the whole matrix.
        traces: tr(H), the squared norms of the inputs, summed over the tokens.
        weights: the pruned matrix at each level; empty unless they are kept.
        first_order: (levels + 1,): <g, dW>, the sum of gradient times change; empty without gradients.
        losses: for each block, the loss of the model with only this block pruned, to the reference level; empty unless
            they are measured.
    """

    rows: dict[str, Tensor]
    traces: dict[str, float]
    weights: dict[str, list[Tensor]]
    first_order: dict[str, Tensor]
    losses: list[float]


def levels(
    model: nn.Module,
    task: Task,
    runtime: Runtime,
    path: Mapping[str, Sequence[Target]],
    *,
    keep: bool = False,
    gradients: Mapping[str, Tensor] | None = None,
    loss: Callable[[], float] | None = None,
    reference: int = 0,
    part: str = "levels",
) -> Levels:
    """Prunes each matrix to all levels of its path by one solve, block after block, and measures the errors. The model
    is dense again afterwards, also after an error.

    Args:
        path: the targets of the levels, by the name of the matrix.
        keep: whether to keep the pruned matrices: one copy of the model's matrices per level.
        gradients: of the loss, by name.
        loss: computes the loss of the model; called for each block, with this block at its reference level and all
            others dense.
        reference: the index of the reference level.
        part: the name of this measurement in the journal.

    Raises:
        UserError: a matrix cannot be pruned; the message names it.
    """

    def measure(stream: BlockStream, index: int, block: Block) -> BlockResult:
        chosen = {view.name for view in block.weights if view.name in path}
        tensors: dict[str, Tensor] = {}
        measured = None
        with _restored(view for view in block.weights if loss is not None and view.name in chosen):
            for shared in stream.collect(index, chosen) if chosen else ():
                gram = shared.statistics.gram
                pruned = _pruned(shared, path)
                for view in shared.weights:
                    original = view.read()
                    every = (*pruned[view.name], torch.zeros_like(original))
                    changes = [w.to(gram) - original.to(gram) for w in every]
                    tensors[f"rows/{view.name}"] = torch.stack(
                        [((change @ gram) * change).sum(1).double().clamp_min(0.0) for change in changes]
                    ).cpu()
                    tensors[f"trace/{view.name}"] = gram.diagonal().double().sum().cpu()
                    if gradients is not None:
                        gradient = gradients[view.name].double()
                        tensors[f"first/{view.name}"] = torch.stack(
                            [(change * gradient).sum() for change in changes]
                        ).cpu()
                    if keep:
                        stored = (w.to(original.dtype).cpu() for w in pruned[view.name])
                        tensors |= {f"{k}/{view.name}": w for k, w in enumerate(stored)}
                    if loss is not None:
                        view.write(pruned[view.name][reference])
            if loss is not None and chosen:
                measured = loss()
        stream.advance(index)
        return BlockResult(details={"loss": measured}, tensors=tensors)

    results = _pass(model, task, runtime, measure, part)
    tensors = {name: tensor for result in results for name, tensor in result.tensors.items()}
    return Levels(
        rows={name: tensors[f"rows/{name}"] for name in path},
        traces={name: float(tensors[f"trace/{name}"]) for name in path},
        weights={name: [tensors[f"{k}/{name}"] for k in range(len(to))] for name, to in path.items()} if keep else {},
        first_order={} if gradients is None else {name: tensors[f"first/{name}"] for name in path},
        losses=[result.details["loss"] for result in results] if loss is not None else [],
    )


def pruned_nearby(
    model: nn.Module, task: Task, runtime: Runtime, nearby: Mapping[str, NearbyLevels], method: Method
) -> dict[str, list[Tensor]]:
    """Prunes each matrix by a layer method to the levels near an allocation, on the outputs of the blocks before it as
    this allocation prunes them. The model is dense again afterwards, also after an error.

    Args:
        nearby: by the name of the matrix.

    Returns:
        For each matrix, the pruned matrix at each of its levels.

    Raises:
        UserError: a matrix cannot be pruned; the message names it.
    """
    views = [[view for view in block.weights if view.name in nearby] for block in decoder_blocks(model)]
    task = replace(task, bounds=False, ridge=task.ridge if uses_ridge(method, Joint(), bounds=False) else None)
    levels = [
        {name: str(one.targets[k]) for name, one in nearby.items() if k < len(one.targets)}
        for k in range(max(len(one.targets) for one in nearby.values()))
    ]

    def prune(stream: BlockStream, index: int, block: Block) -> BlockResult:
        inputs = stream.collect(index, {view.name for view in views[index]}) if views[index] else []
        tensors: dict[str, Tensor] = {}
        for k, targets in enumerate(levels):
            level = replace(task, target=replace(task.target, layers=tuple(targets.items())))
            having = [
                replace(one, weights=tuple(view for view in one.weights if view.name in targets)) for one in inputs
            ]
            with _restored(views[index]):
                prune_all([one for one in having if one.weights], method, level)
                for view in (view for one in having for view in one.weights):
                    tensors[f"{k}/{view.name}"] = view.read().to("cpu", copy=True)
        return BlockResult(tensors=tensors)

    def at_start(index: int, result: BlockResult) -> AbstractContextManager[None]:
        return replaced((view, result.tensors[f"{nearby[view.name].start}/{view.name}"]) for view in views[index])

    settings = PassSettings(
        part="allocation-table",
        changes=False,
        note=", table",
        weighting=method.problem.weighting,
        advancing=at_start,
    )
    results = for_each_block(model, task, runtime, prune, settings)
    tensors = {name: tensor for result in results for name, tensor in result.tensors.items()}
    return {name: [tensors[f"{k}/{name}"] for k in range(len(one.targets))] for name, one in nearby.items()}


@contextmanager
def replaced(weights: Iterable[tuple[WeightView, Tensor]]) -> Iterator[None]:
    """Gives matrices other weights for a while."""
    weights = list(weights)
    with _restored(view for view, _ in weights):
        for view, weight in weights:
            view.write(weight)
        yield


@contextmanager
def _restored(views: Iterable[WeightView]) -> Iterator[None]:
    """Gives matrices their present weights again at the end."""
    before = [(view, view.read().clone()) for view in views]
    try:
        yield
    finally:
        for view, weight in before:
            view.write(weight)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients g of the loss, summed over the tokens of a sequence, at the weights of the dense model; by name.

    Attributes:
        squares: (out,) float64: sum_j g_ij^2, summed over the sequences.
        means: (out, in), in at least float32: the gradient of the mean loss per token; empty unless they are kept.
        tokens: the number of tokens in all sequences.
    """

    squares: dict[str, Tensor]
    means: dict[str, Tensor]
    tokens: int


def gradients(model: nn.Module, text: Sequences, names: frozenset[str], *, keep: bool = False) -> Gradients:
    """Gradients from one backward pass for each of up to 16 sequences. The model must be in memory.

    Raises:
        UserError: the gradients of a matrix, named in the message, are not finite.
    """
    views = [view for block in decoder_blocks(model) for view in block.weights if view.name in names]
    squares = {view.name: torch.zeros(view.shape[0], dtype=torch.float64) for view in views}
    means: dict[str, Tensor] = {}

    def reduce(view: WeightView, gradient: Tensor) -> None:
        squares[view.name] += gradient.double().square().sum(1).cpu()
        if keep:
            means[view.name] = means.get(view.name, torch.zeros_like(gradient)) + gradient

    rows = text.rows[:: -(-len(text.rows) // GRADIENT_SEQUENCES)]
    tokens = backward(model, [text.batch([row.ids]) for row in rows], views, reduce)
    for view in views:
        check_finite_gradients(view, squares[view.name])
    return Gradients(squares=squares, means={name: total.div_(tokens) for name, total in means.items()}, tokens=tokens)


def backward(
    model: nn.Module,
    batches: Iterable[Batch],
    views: Sequence[WeightView],
    reduce: Callable[[WeightView, Tensor], None],
) -> int:
    """One backward pass for each batch, of its loss summed over the tokens. The model must be in memory.

    The gradient of a parameter is reduced as soon as it is complete, so that only one is held at a time. The sum over
    the tokens is differentiated, not the mean, whose gradients underflow in float16.

    Args:
        views: the matrices whose gradients are needed.
        reduce: called for every batch and matrix with the gradient, in at least float32.

    Returns:
        The number of tokens.
    """
    by_parameter: dict[int, list[WeightView]] = {}
    for view in views:
        by_parameter.setdefault(id(view.parameter), []).append(view)

    def complete(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for view in by_parameter[id(parameter)]:
            reduce(view, at_least_float32(view.within(gradient)))

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles: list[Any] = []
    tokens = 0
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in by_parameter)  # nothing would reduce gradients of the others
            if id(parameter) in by_parameter:
                handles.append(parameter.register_post_accumulate_grad_hook(complete))
        with torch.enable_grad():
            for batch in batches:
                count = int(batch.scored.sum())
                tokens += count
                (next_token_loss(model, batch) * count).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
    return tokens


def check_finite_gradients(view: WeightView, values: Tensor) -> None:
    """Raises UserError if figures computed from the gradients of a matrix are not finite."""
    if not bool(values.isfinite().all()):
        kind = view.parameter.dtype
        wider = ": use --dtype float32" if kind.itemsize < 4 else ""
        raise UserError(f"{view.name}: the gradients of the loss are not finite in {kind}{wider}")


@torch.no_grad()
def mean_loss(model: nn.Module, text: Sequences) -> float:
    """The mean cross-entropy of a text, in nats per token; infinite if the model overflows. The model must be in
    memory."""
    loss = sum(float(cross_entropy(model, batch)) for batch in text.batches) / text.scored_tokens
    return loss if math.isfinite(loss) else math.inf


def _pass(
    model: nn.Module,
    task: Task,
    runtime: Runtime,
    measure: Callable[[BlockStream, int, Block], BlockResult],
    what: str,
) -> list[BlockResult]:
    """A pass over the dense blocks that does not change them."""
    settings = PassSettings(part=f"allocation-{what}", changes=False, note=f", {what}")
    return for_each_block(model, task, runtime, measure, settings)


def _pruned(shared: SharedInput, path: Mapping[str, Sequence[Target]]) -> dict[str, list[Tensor]]:
    """The matrices that read one input, each pruned to all levels of its path; by one factorization, unless a level is
    a pattern."""
    jobs = [(view, k, target) for view in shared.weights for k, target in enumerate(path[view.name])]
    together = [jobs] if all(target.pattern is None for _, _, target in jobs) else [[job] for job in jobs]
    solved: dict[str, list[Tensor]] = {view.name: [] for view in shared.weights}
    for some in together:
        stacked = torch.cat([view.read() for view, _, _ in some])
        parts = tuple((view.shape[0], SOLVER.constraint(target)) for view, _, target in some)
        try:
            problem = SOLVER.problem.posed(
                stacked, shared.statistics.gram, StackedRows(parts), ridge=SOLVER.ridge, damping=SOLVER.damping
            )
            solution = SOLVER.make().solve(problem).solution["weight"]
        except (ValueError, LinAlgError) as error:
            names = ", ".join(dict.fromkeys(view.name for view, _, _ in some))
            raise UserError(f"{names}: {error}") from error
        for (view, _, _), weight in zip(some, solution.split([rows for rows, _ in parts]), strict=True):
            solved[view.name].append(weight)
    return solved
