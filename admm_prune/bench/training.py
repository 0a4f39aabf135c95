"""SparseAdam's step compared with torch's fused Adam, bytes per weight, and ELSA-L at a 27 B shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.bench.baselines import Work, seconds_of, synchronize
from admm_prune.bench.rows import Case, Figures
from admm_prune.ops import backend
from admm_prune.solvers.sparse_adam import SparseAdam

SECTION = "training"
_SPARSITY = 0.9


@dataclass(frozen=True)
class ModelShape:
    """A Llama: hidden size, feed-forward size, query heads, key heads, their size, blocks, vocabulary."""

    name: str
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    blocks: int
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of the matrices of a block."""
        query, key = self.heads * self.head, self.key_heads * self.head
        attention = [(query, self.hidden), (key, self.hidden), (key, self.hidden), (self.hidden, query)]
        return [*attention, (self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner)]

    @property
    def block(self) -> int:
        return sum(rows * width for rows, width in self.matrices)

    @property
    def parameters(self) -> int:
        return self.blocks * self.block + 2 * self.vocabulary * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("1B", 2048, 8192, 32, 8, 64, 16, 32000),
        ModelShape("7B", 4096, 11008, 32, 32, 128, 32, 32000),
        ModelShape("13B", 5120, 13824, 40, 40, 128, 40, 32000),
        ModelShape("27B", 5376, 21504, 32, 16, 128, 62, 32000),
        ModelShape("70B", 8192, 28672, 64, 8, 128, 80, 32000),
        ModelShape("small", 64, 160, 4, 2, 16, 2, 256),
    )
}

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Configuration:
    """An optimizer, the dtype of the weights, and the bytes that a step moves and holds per weight.

    Attributes:
        moved: read and written by a step at the least: x, its gradient, m, v, the anchor.
        held: weights, gradients and state.
    """

    name: str
    make: Make
    dtype: torch.dtype
    moved: float
    held: float
    baseline: bool = False


class ClippedAdam(torch.optim.Adam):
    """`torch.optim.Adam` after `clip_grad_norm_`, which `SparseAdam` does in its own step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        return super().step(closure)


def _sparse(**how: Any) -> Make:
    return lambda parameters: SparseAdam(parameters, sparsity=_SPARSITY, lr=1e-4, interval=1 << 20, **how)


EIGHT_BIT = "8-bit moments"  # in the names of configurations with a target of their own
ADAM, CLIPPED = "torch.optim.Adam(fused=True), float32", "torch.optim.Adam(fused=True), clip_grad_norm_, float32"
CONFIGURATIONS = (
    Configuration(
        ADAM,
        lambda parameters: torch.optim.Adam(parameters, lr=1e-4, fused=True),
        torch.float32,
        28.0,
        16.0,
        baseline=True,
    ),
    Configuration(
        CLIPPED,
        lambda parameters: ClippedAdam(parameters, lr=1e-4, fused=True),
        torch.float32,
        40.0,
        16.0,
        baseline=True,
    ),
    Configuration("SparseAdam, float32, bfloat16 anchor", _sparse(), torch.float32, 34.0, 18.2),
    Configuration("SparseAdam, no clipping", _sparse(clip=None), torch.float32, 34.0, 18.2),
    Configuration("SparseAdam, int8 anchor", _sparse(anchor="int8"), torch.float32, 33.0, 17.2),
    Configuration(f"SparseAdam, {EIGHT_BIT}", _sparse(anchor="int8", moments="int8"), torch.float32, 21.0, 11.3),
    Configuration(
        f"SparseAdam, bfloat16 weights, {EIGHT_BIT}",
        _sparse(anchor="int8", moments="int8"),
        torch.bfloat16,
        13.0,
        7.3,
    ),
    Configuration(
        "ELSA-L (x = z), bfloat16 weights",
        _sparse(penalty=math.inf, total_steps=1 << 20, ramp=1.0, moments="int8"),
        torch.bfloat16,
        12.2,
        6.3,
    ),
)


def cases(shapes: list[tuple[ModelShape, int]], device: torch.device) -> Iterator[Case]:
    """A step on random gradients, for the matrices of some blocks of each shape, and the dual update.

    Peaks count weights, gradients, state and temporaries of a step, divided by the number of weights.
    """
    for shape, blocks in shapes:
        for how in CONFIGURATIONS:
            yield _step_case(shape, blocks, how, device)
        yield _training_case(shape, min(2, blocks), device, sparse=False)
        yield _training_case(shape, min(2, blocks), device, sparse=True)


def large_case(shape: ModelShape, blocks: int, device: torch.device) -> Case:
    """ELSA-L with all weights and state of `blocks` blocks held, gradients of one block at a time.

    A backward pass that steps as gradients come holds no more: with all gradients, 27 B weights take 6.2 bytes
    each, more than one card has.
    """
    entries = blocks * shape.block

    def run() -> Figures:
        before = _allocated(device)
        groups = [_parameters(shape, 1, device, torch.bfloat16) for _ in range(blocks)]
        optimizers = [CONFIGURATIONS[-1].make(group) for group in groups]
        g = torch.Generator(device).manual_seed(0)

        def step() -> None:
            for group, optimizer in zip(groups, optimizers, strict=True):
                for parameter in group:
                    parameter.grad = torch.empty_like(parameter).normal_(generator=g)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        step()
        seconds = seconds_of(step, device, repeats=2, warm_up=0)
        peak = _peak(device) - before
        whole = shape.blocks / blocks
        more: dict[str, Any] = {"blocks measured": blocks, "blocks of the shape": shape.blocks}
        if device.type == "cuda":
            a_weight = peak / entries
            more |= {"bytes per weight": a_weight, "GB for all blocks": a_weight * shape.blocks * shape.block / 1e9}
        more["seconds for all blocks"] = seconds * whole
        return Figures(
            seconds=seconds, work=Work({}, 14.2 * entries), more=more, note="drawing the gradients is in the time"
        )

    return Case(
        section=SECTION,
        name="ELSA-L, step while gradients come",
        case=f"{shape.name}, {blocks} of {shape.blocks} blocks",
        run=run,
        needs=4.4 * entries + 16.0 * shape.block,
        limit=60.0,
    )


def _step_case(shape: ModelShape, blocks: int, how: Configuration, device: torch.device) -> Case:
    entries = blocks * shape.block

    def run() -> Figures:
        before = _allocated(device)
        parameters = _parameters(shape, blocks, device, how.dtype)
        g = torch.Generator(device).manual_seed(1)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter).normal_(std=1e-3, generator=g)
        optimizer = how.make(parameters)
        optimizer.step()  # makes the state
        seconds = seconds_of(optimizer.step, device, repeats=5)
        more: dict[str, Any] = {
            "state bytes per weight": _state_bytes(optimizer) / entries,
            "kernels": backend.described(device),
        }
        if device.type == "cuda":
            more["peak bytes per weight"] = (_peak(device) - before) / entries
        return Figures(seconds=seconds, work=Work({}, how.moved * entries), more=more)

    return Case(
        section=SECTION,
        name=how.name,
        case=f"{shape.name}, {blocks} of {shape.blocks} blocks",
        run=run,
        needs=1.05 * how.held * entries + 16.0 * max(rows * width for rows, width in shape.matrices),
        limit=30.0,
        baseline=how.baseline,
    )


def _training_case(shape: ModelShape, blocks: int, device: torch.device, *, sparse: bool) -> Case:
    """A whole step of training: forward and backward on 2048 random tokens, and the optimizer's.

    Its floor: 6 operations per token for every weight except embeddings, in float32, without attention between tokens.
    """
    tokens = min(2048, 32 * shape.hidden)
    multiplied = blocks * shape.block + shape.vocabulary * shape.hidden
    parameters = multiplied + shape.vocabulary * shape.hidden
    optimizing = next(how for how in CONFIGURATIONS if how.baseline is not sparse)
    work = Work({"float32": 6.0 * tokens * multiplied}, optimizing.moved * parameters)

    def run() -> Figures:
        model = llama(shape, blocks, device, torch.float32).train()
        if sparse:
            optimizer: torch.optim.Optimizer = SparseAdam(model, sparsity=_SPARSITY, lr=1e-4, interval=1 << 20)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(shape.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Figures(seconds=seconds_of(step, device, repeats=3, warm_up=2), work=work, more={"tokens": tokens})

    return Case(
        section=SECTION,
        name="training step, SparseAdam" if sparse else "training step, torch.optim.Adam(fused=True)",
        case=f"{shape.name}, {blocks} of {shape.blocks} blocks",
        run=run,
        needs=19.0 * parameters + 4e3 * shape.vocabulary * 8,
        limit=30.0,
        baseline=not sparse,
    )


def llama(shape: ModelShape, blocks: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights with `blocks` blocks, created on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


def _parameters(shape: ModelShape, blocks: int, device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    g = torch.Generator(device).manual_seed(0)
    return [
        nn.Parameter(torch.empty(size, device=device, dtype=dtype).normal_(std=0.02, generator=g))
        for _ in range(blocks)
        for size in shape.matrices
    ]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    held = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in held)


def _allocated(device: torch.device) -> int:
    synchronize(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
