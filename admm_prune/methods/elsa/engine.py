"""How forward and backward passes of training are computed: precision, micro-batches, recomputation, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from admm_prune.errors import UserError, check_at_least
from admm_prune.models.structure import decoder_blocks, replaced_forward
from admm_prune.ops.precision import autocast, function_modes

Precision = Literal["auto", "bf16", "float32"]
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16")  # features of processors that multiply in bfloat16


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Settings of training that change its result by rounding only.

    The trained weights, their gradients and Adam's moments are in float32, whatever the dtype of the model; the forward
    pass is computed in float32, or in bfloat16 by autocast.

    Attributes:
        precision: "bf16" (autocast), "float32", or "auto": bf16 on devices with bfloat16 matrix products.
        micro_batch: the number of sequences in one forward and backward pass; their gradients are accumulated over the
            batch. None for the whole batch.
        gradient_checkpointing: recompute the activations inside a block in the backward pass, which takes a third more
            operations and less memory.
        compile: compile the blocks by `torch.compile`.
    """

    precision: Precision = "auto"
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise UserError(f"precision must be {' or '.join(get_args(Precision))}, not '{self.precision}'")
        check_at_least(self, micro_batch=1)

    @classmethod
    def of(cls, settings: object) -> Self:
        """The engine from the settings of a run, which have fields of the same names."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(cls)})

    def changed(self) -> list[str]:
        """The names of the settings that differ from their defaults."""
        return [one.name for one in fields(self) if getattr(self, one.name) != one.default]

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products. On the meta device "auto" is float32; `plan` replaces it for the device of the
        run."""
        half = self.precision == "bf16" or (self.precision == "auto" and multiplies_in_bfloat16(device))
        return torch.bfloat16 if half else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        return autocast(device, self.dtype(device))

    def blocks(self, model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The blocks of a model, each with the function that replaces its forward."""
        replacements: list[tuple[nn.Module, Callable[..., Any]]] = []
        device = next(model.parameters()).device
        for block in decoder_blocks(model) if self.gradient_checkpointing or self.compile else ():
            forward = block.module.forward
            if self.compile and device.type != "meta":
                forward = torch.compile(forward)
            if self.gradient_checkpointing:
                how: dict[str, Any] = {"use_reentrant": False}
                if device.type == "meta":  # a plan runs in function modes, which the recomputation must enter too
                    how["context_fn"] = lambda: (nullcontext(), function_modes())
                # Not the checkpointing of transformers, which needs training mode: these models train without dropout.
                forward = partial(checkpoint, forward, **how)
            replacements.append((block.module, forward))
        return replacements


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 products."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    features: Mapping[str, object] = torch.cpu.get_capabilities()
    return any(features.get(name) is True for name in _NATIVE)


@contextmanager
def replaced_forwards(blocks: list[tuple[nn.Module, Callable[..., Any]]]) -> Generator[None]:
    """Context in which the blocks call the functions from `Engine.blocks`."""
    with ExitStack() as stack:
        for module, forward in blocks:
            stack.enter_context(replaced_forward(module, forward))
        yield


@contextmanager
def float32_weights(model: nn.Module) -> Generator[dict[str, torch.dtype]]:
    """Context in which weights and buffers narrower than float32 are converted to float32; rounds them to their dtypes
    afterwards. Zeros stay zeros. Only one tensor at a time exists in both dtypes.

    Yields:
        The original dtypes of the parameters, by name.
    """
    narrow = [(x, x.dtype) for x in _floats(model) if x.dtype.itemsize < 4]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        for x, _ in narrow:
            x.data = x.data.float()
        yield dtypes
    finally:
        for x, dtype in narrow:
            x.data = x.data.to(dtype)


def teacher_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model without gradients, with its floating-point weights in `dtype`. They are converted one at a
    time."""
    converted: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
        if parameter.is_floating_point()
    }
    return copy.deepcopy(model, converted).requires_grad_(False)


def _floats(model: nn.Module) -> Iterator[Tensor]:
    yield from (x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point())
