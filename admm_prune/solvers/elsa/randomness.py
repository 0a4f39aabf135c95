"""Random numbers that a continued run draws as the uninterrupted one would have."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from admm_prune.kernels.quantization import generator_on
from admm_prune.solvers.elsa.sharding import processes_of


def generator(parameter: Tensor, *numbers: int) -> torch.Generator:
    """A generator on the parameter's device, with `seed` of the same."""
    return generator_on(parameter.device).manual_seed(seed(parameter, *numbers))


def seed(parameter: Tensor, *numbers: int) -> int:
    """56 bits, by `numbers` and by which of the parameter's rows lie in this process."""
    processes = processes_of(parameter)
    said = repr((*numbers, 0 if processes is None else processes.rank))
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest())
