"""The layers of a model as matrices: W and H = X^T X + 0.01 mean(diag X^T X) I, on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.models.capture import BlockStream
from admm_prune.models.families import sequence_length
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import decoder_blocks
from admm_prune.problems.constraints import RowWise
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.solvers.one_shot import Wanda

DAMPING = 0.01  # of the mean diagonal, as published for SparseGPT and ALPS: the ridge of every problem
PREFIX_SPARSITY = 0.5  # of the blocks before a re-targeted layer, by Wanda, row by row


@dataclass(frozen=True, eq=False)
class Layer:
    """W (out, in) and H (in, in), float32, of the matrix `module` in block `block`; of how many tokens."""

    block: int
    module: str
    weight: NDArray[np.float32]
    hessian: NDArray[np.float32]
    tokens: int


def opened(model: str, text: str, tokens: int) -> tuple[LoadedModel, Sequences]:
    """The model in float32, and windows of at most 1024 tokens of the text, the same for every call."""
    loaded = load(model, device=torch.device("cpu"), dtype="float32")
    length = min(1024, sequence_length(loaded.model.config))
    settings = TextSettings(data=text, samples=tokens // length, eval_samples=1, length=length, packing="windows")
    return loaded, Texts(settings, loaded).calibration()


def dense(model: str, text: str, tokens: int, blocks: Sequence[int]) -> Iterator[Layer]:
    """Every matrix of some blocks, on the inputs that it has in the dense model."""
    loaded, sequences = opened(model, text, tokens)
    every = decoder_blocks(loaded.model)
    stream = BlockStream(loaded.model, every, sequences, "cpu", validation_fraction=0.0)
    for index in range(max(blocks) + 1):
        if index in blocks:
            for shared in stream.collect(index):
                hessian = damped(shared.statistics.gram.double())
                for view in shared.weights:
                    module = view.module_name.rpartition(".")[2]
                    yield Layer(index, module, _numpy(view.read()), _numpy(hessian), shared.statistics.tokens)
        if index < max(blocks):
            stream.advance(index)


def retargeted(model: str, text: str, tokens: int, block: int, modules: Sequence[str]) -> Iterator[Layer]:
    """Matrices of a block whose preceding blocks are pruned: H of the pruned model's inputs X, and as W the target

    (W X0^T X + 0.01 m W) (X^T X + 0.01 m I)^-1,  m = mean(diag X^T X), that reproduces the outputs of the dense
    model's inputs X0 best.
    """
    loaded, sequences = opened(model, text, tokens)
    every = decoder_blocks(loaded.model)
    named = {view.module_name.rpartition(".")[2]: view for view in every[block].weights}
    observed = {name: named[name].module for name in modules}
    end = every[block + 1].module if block + 1 < len(every) else None
    dense_inputs = _inputs(loaded.model, observed, end, sequences)
    stream = BlockStream(loaded.model, every, sequences, "cpu", validation_fraction=0.0)
    for index in range(block):
        for shared in stream.collect(index):
            for view in shared.weights:
                problem = LayerReconstruction(view.read(), shared.statistics.gram, RowWise(PREFIX_SPARSITY))
                view.write(Wanda().solve(problem).solution["weight"])
        stream.advance(index)
    for name, x in _inputs(loaded.model, observed, end, sequences).items():
        x0 = dense_inputs[name]
        hessian = damped(x.T @ x)
        weight = named[name].read().double()
        ridge = hessian.diagonal().mean() * DAMPING / (1 + DAMPING)
        target = torch.linalg.solve(hessian, (weight @ (x0.T @ x) + ridge * weight).T).T
        yield Layer(block, name, _numpy(target), _numpy(hessian), len(x))


def damped(gram: Tensor) -> Tensor:
    """H + 0.01 mean(diag H) I."""
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def row_problems(
    layers: Sequence[Layer], width: int, count: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """W (count, width) and H (count, width, width): rows of random layers, restricted to random inputs.

    All other weights of the row stay dense. Each H is divided by w H w^T, so that pruning all costs 1.
    """
    draw = np.random.default_rng(seed)
    weights, hessians = [], []
    for _ in range(count):
        layer = layers[int(draw.integers(len(layers)))]
        row, inputs = int(draw.integers(len(layer.weight))), draw.permutation(layer.weight.shape[1])[:width]
        w, h = layer.weight[row, inputs].astype(np.float64), layer.hessian[np.ix_(inputs, inputs)].astype(np.float64)
        weights.append(w)
        hessians.append(h / (w @ h @ w))
    return np.stack(weights).astype(np.float32), np.stack(hessians).astype(np.float32)


@torch.no_grad()
def _inputs(
    model: Any, observed: Mapping[str, nn.Module], end: nn.Module | None, sequences: Sequences
) -> dict[str, Tensor]:
    """X (tokens, in), float64, of some matrices; the model is run up to the module `end`."""
    seen: dict[str, list[Tensor]] = {name: [] for name in observed}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, arguments: seen[name].append(arguments[0].flatten(0, 1).double())

    def stop(*_: object) -> None:
        raise _StopError

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in observed.items()]
    hooks += [] if end is None else [end.register_forward_pre_hook(stop)]
    try:
        for batch in sequences.batches:
            with suppress(_StopError):
                model(batch.input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


class _StopError(Exception):
    """The forward pass has gone as far as is needed."""


def _numpy(matrix: Tensor) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = matrix.detach().float().contiguous().numpy().copy()
    return numbers
