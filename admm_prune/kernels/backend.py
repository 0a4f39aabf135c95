"""Which implementation of a kernel runs: Triton's on CUDA tensors, its plain-torch twin everywhere else.

The environment variable ADMM_PRUNE_KERNELS, or `forced`, decides otherwise: "torch" takes the twins on every device;
"triton" takes Triton's kernels or fails, on the CPU too, which needs Triton's interpreter (TRITON_INTERPRET=1, set
before the first use). A twin runs on the device of its arguments: nothing ever moves to the host unasked.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

CHOICES = ("auto", "torch", "triton")

_choice = [os.environ.get("ADMM_PRUNE_KERNELS", "auto")]  # the last one counts


@contextmanager
def forced(choice: str) -> Generator[None]:
    """Within it "auto", "torch" or "triton" decides, whatever the environment says."""
    _choice.append(_checked(choice))
    try:
        yield
    finally:
        _choice.pop()


def choice() -> str:
    """auto, torch or triton, as it is in force."""
    return _checked(_choice[-1])


def uses_triton(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether Triton's kernels serve x.

    Args:
        dtypes: those that the kernel at hand takes; any where none is given. Others go to the twin.

    Raises:
        RuntimeError: Triton is asked for where it cannot run.
    """
    if not x.is_cuda and _choice[-1] == "auto":
        return False
    if dtypes and x.dtype not in dtypes:
        return False
    wanted = choice()
    if wanted == "torch":
        return False
    if wanted == "triton":
        _require(x)
        return True
    return x.is_cuda and installed()


def on_device(x: Tensor | torch.device) -> bool:
    """Whether the host should leave x's device alone: to read a number is to wait. Where Triton is forced on the CPU,
    it is treated as such a device, so that what runs on a GPU can be tested without one."""
    return (x.type == "cuda" if isinstance(x, torch.device) else x.is_cuda) or _choice[-1] == "triton"


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def note(device: torch.device) -> tuple[str, ...]:
    """A note for results where a CUDA device had to do without Triton's kernels."""
    if device.type != "cuda" or choice() == "torch" or installed():
        return ()
    return ("triton is not installed: plain torch on the GPU in place of fused kernels",)


def described(device: torch.device | str) -> str:
    """What runs on a device: for the records of a benchmark."""
    wanted = choice()
    on_triton = wanted == "triton" or (wanted == "auto" and torch.device(device).type == "cuda" and installed())
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
    if not x.is_cuda and not interpreted():
        raise RuntimeError(
            f"ADMM_PRUNE_KERNELS=triton, but a tensor lies on the {x.device.type}: Triton needs CUDA, or its "
            "interpreter (TRITON_INTERPRET=1)"
        )


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise RuntimeError(f"ADMM_PRUNE_KERNELS must be one of {', '.join(CHOICES)}, not '{name}'")
    return name
