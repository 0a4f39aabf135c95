"""Selects the implementation of a kernel: Triton's on the current CUDA device, the reference in plain torch otherwise.

The environment variable ADMM_PRUNE_KERNELS, or `forced`, overrides this: "torch" selects the references on every
device; "triton" takes Triton's kernels or fails, on the CPU too, which needs Triton's interpreter (TRITON_INTERPRET=1,
set before the first use). A reference runs on the device of its arguments: nothing is moved to the host.

CUDA graphs (`Replayed`) record work that is the same every time, and replay it without the host.

A graph records kernels and the addresses they read and write. A function can be replayed if everything that changes
between two calls is in tensors with fixed addresses, and if it does not synchronize with the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

CHOICES = ("auto", "torch", "triton")

_FAST_IN_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities: half the rate of float32

_choice = [os.environ.get("ADMM_PRUNE_KERNELS", "auto")]  # a stack: the last entry is in force
Returned = TypeVar("Returned")


@contextmanager
def forced(choice: str) -> Generator[None]:
    """Within it "auto", "torch" or "triton" overrides the environment variable."""
    _choice.append(_checked(choice))
    try:
        yield
    finally:
        _choice.pop()


def choice() -> str:
    """The current setting: auto, torch or triton."""
    return _checked(_choice[-1])


def uses_triton(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether Triton's kernels are used for x.

    Args:
        dtypes: those that the kernel supports; any if none is given. Others use the reference.

    Raises:
        RuntimeError: Triton is forced where it cannot run.
    """
    if not x.is_cuda and _choice[-1] == "auto":
        return False
    if dtypes and x.dtype not in dtypes:
        return False
    selected = choice()
    if selected == "torch":
        return False
    if selected == "triton":
        _require(x)
        return True
    return x.is_cuda and installed() and _is_current(x.device)


def on_device(x: Tensor | torch.device) -> bool:
    """Whether the host should avoid synchronizing with x's device. Where Triton is forced on the CPU,
    it is treated as such a device, so that what runs on a GPU can be tested without one."""
    return (x.type == "cuda" if isinstance(x, torch.device) else x.is_cuda) or _choice[-1] == "triton"


def slow_in_float64(x: Tensor) -> bool:
    """Whether x is on a device with far fewer operations a second in float64 than in float32, as most GPUs have: a 32nd
    or a 64th. Where Triton is forced on the CPU, it is treated as such a device.

    Source: CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions.
    """
    if not x.is_cuda:
        return on_device(x)
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) not in _FAST_IN_FLOAT64


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def note(device: torch.device) -> tuple[str, ...]:
    """A note for results on a CUDA device without Triton's kernels."""
    if device.type != "cuda" or choice() == "torch":
        return ()
    if not installed():
        return ("triton is not installed: plain torch on the GPU in place of fused kernels",)
    if not _is_current(device):
        return (f"plain torch in place of fused kernels: {device} is not the current device (torch.cuda.set_device)",)
    return ()


def described(device: torch.device | str) -> str:
    """The implementation in use on a device, for the records of a benchmark."""
    selected = choice()
    on_triton = selected == "triton" or (selected == "auto" and torch.device(device).type == "cuda" and installed())
    if not on_triton:
        return f"torch {torch.__version__}"
    try:
        return f"triton {version('triton')}" + (", interpreted" if interpreted() else "")
    except PackageNotFoundError:
        return "triton, not installed"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _require(x: Tensor) -> None:
    if not installed():
        raise RuntimeError("ADMM_PRUNE_KERNELS=triton, but triton is not installed: pip install triton, or use 'torch'")
    if x.is_cuda and not _is_current(x.device):
        raise RuntimeError(
            f"ADMM_PRUNE_KERNELS=triton, but a tensor lies on {x.device}, which is not the current device: call "
            "torch.cuda.set_device"
        )
    if not x.is_cuda and not interpreted():
        raise RuntimeError(
            f"ADMM_PRUNE_KERNELS=triton, but a tensor lies on the {x.device.type}: Triton needs CUDA, or its "
            "interpreter (TRITON_INTERPRET=1)"
        )


def _is_current(device: torch.device) -> bool:
    """Whether it is the CUDA device that Triton launches on and that graphs record, wherever the tensors are."""
    return device == torch.device("cuda") or device.index == torch.cuda.current_device()  # the current one by default


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise RuntimeError(f"ADMM_PRUNE_KERNELS must be one of {', '.join(CHOICES)}, not '{name}'")
    return name


class Recorder(Protocol):
    """Records the work of a device."""

    def record(self, function: Callable[[], Returned]) -> tuple[Callable[[], Any], Returned]:
        """Records the function's work without executing it.

        Returns:
            A function that replays the work, and the function's return value: tensors that each replay overwrites.

        Raises:
            RuntimeError: the function cannot be recorded.
        """
        ...


class CudaGraphs:
    """`torch.cuda.graph`, with memory owned by the graph."""

    def record(self, function: Callable[[], Returned]) -> tuple[Callable[[], Any], Returned]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which may read weights meanwhile, are not recorded.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            returned = function()
        return graph.replay, returned


RECORDERS: dict[str, Recorder] = {"cuda": CudaGraphs()}  # by the type of the device


def records(device: torch.device) -> bool:
    """Whether work on a device can be recorded."""
    return device.type in RECORDERS and (device.type != "cuda" or _is_current(device))


class Replayed(Generic[Returned]):
    """A function that is called the first time, recorded the second time, and replayed from then on.

    The first call loads kernels and libraries before the recording. If nothing can be recorded,
    the function is called every time, and `note` says why.

    Args:
        function: works on tensors with fixed addresses, and may be called any number of times.
        device: of the tensors.
    """

    def __init__(self, function: Callable[[], Returned], device: torch.device) -> None:
        self._function = function
        self._recorder = RECORDERS[device.type] if records(device) else None
        self._play: Callable[[], Any] | None = None
        self._returned: Returned | None = None
        self._called = False
        self.note = "" if self._recorder else f"steps were not replayed: there are no graphs on the {device}"

    def __call__(self) -> Returned:
        """The function's return value; once replayed, tensors that the next call overwrites."""
        if self._play is None and self._called and self._recorder is not None:
            try:
                self._play, self._returned = self._recorder.record(self._function)
            except RuntimeError as error:  # nothing was done: recorded work is not executed
                self._recorder = None
                self.note = f"steps were not replayed: {str(error).strip().splitlines()[0]}"
        self._called = True
        if self._play is None or self._returned is None:
            return self._function()
        self._play()
        return self._returned
