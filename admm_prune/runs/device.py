"""Where a run computes, and in which numbers."""

from __future__ import annotations

import torch

from admm_prune.errors import UserError

_DEVICES = ("auto", "cpu", "cuda")
_DTYPES = ("float32", "bfloat16", "float16")


def pick_device(name: str) -> str:
    """Resolves "auto".

    Raises:
        UserError: no such device here.
    """
    if name not in _DEVICES:
        raise UserError(f"device must be auto, cpu or cuda, not '{name}'")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu")
    return name


def check_dtype(name: str | None) -> None:
    """Raises UserError unless `name` is a dtype that models are stored in, or None."""
    if name is not None and name not in _DTYPES:
        raise UserError(f"dtype must be float32, bfloat16 or float16, not '{name}'")
