"""Tensors that a function must not modify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Compares the tensors after the block with copies taken before it."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for number, (one, other) in enumerate(zip(before, tensors, strict=True)):
        assert torch.equal(one, other), f"argument {number} was modified"
